"""The multi-token-prediction layer: drafts the token after the next one (DeepSeek-V3, section 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glm5.config import ModelConfig
from glm5.model.layer import DecoderLayer
from glm5.model.linear import Linear
from glm5.model.norms import RMSNorm
from glm5.model.step import Step


class SharedHead(nn.Module):
    """The norm before the borrowed output head (`shared_head.norm` in the files)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class MTPLayer(nn.Module):
    """A decoder layer behind a projection of [norm(embedding), norm(hidden)] (DeepSeek-V3 report, 2.2).

    It borrows the model's embedding and output head.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.layer = DecoderLayer.of(config, index)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = SharedHead(config)

    def forward(self, hidden_BTD: Tensor, next_embedding_BTD: Tensor, step: Step) -> Tensor:
        """Hidden states [B, T, D] for the output head, already through `shared_head.norm`.

        `hidden` is the model's output after its final norm or, when drafting further, this
        function's own previous result.
        """
        joined = torch.cat((self.enorm(next_embedding_BTD), self.hnorm(hidden_BTD)), dim=-1)
        out, _ = self.layer(self.eh_proj(joined), step, None)
        return self.shared_head(out)
