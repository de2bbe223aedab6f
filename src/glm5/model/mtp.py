"""The multi-token-prediction layer: from the hidden state of token t and the embedding of token
t+1 it predicts token t+2. Trained beside the model, used as its own draft model when decoding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glm5.config import ModelConfig
from glm5.layers.torch_cpu import Linear
from glm5.model.masks import Visibility
from glm5.model.norms import RMSNorm
from glm5.model.rotary import Rotation
from glm5.model.transformer import DecoderLayer


class SharedHead(nn.Module):
    """The norm before the borrowed output head (`shared_head.norm` in the files)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class MTPLayer(DecoderLayer):
    """A full decoder layer behind a projection of [norm(embedding), norm(hidden)] (SPEC 5.3).

    It borrows the model's embedding and output head.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = SharedHead(config)

    def draft(
        self,
        hidden_BTD: Tensor,
        next_embedding_BTD: Tensor,
        angles: Rotation,
        visible: Visibility,
        cache: Any | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D] for the output head, already through `shared_head.norm`.

        `hidden` is the model's output after its final norm or, when drafting further, this
        function's own previous result.
        """
        joined = torch.cat((self.enorm(next_embedding_BTD), self.hnorm(hidden_BTD)), dim=-1)
        out, _ = self(self.eh_proj(joined), angles, visible, cache, None)
        return self.shared_head(out)
