"""A model without a network that reads what it needs from the cache, as a real one does.

It writes its token ids into the pages and says next what depends on every token before, as the pages hold
them: a lost, shared or overwritten page changes what it says. The MTP layer's place is empty.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.model_fixture import tiny_config

VOCAB = 50


def following(tokens: list[int]) -> int:
    """What the model says after these tokens."""
    value = len(tokens)
    for token in tokens:
        value = (value * 1_000_003 + token + 7) % 2_147_483_647
    return value % VOCAB


class FakeModel:
    """As much of `GlmForCausalLM` as the engine asks for."""

    def __init__(self, **changes: Any) -> None:
        sizes = {"vocab_size": VOCAB, "eos_token_id": [], "num_nextn_predict_layers": 0}
        self.config = tiny_config(**{"num_hidden_layers": 1, **sizes, **changes})
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.mtp: list[nn.Module] = []
        self.model = SimpleNamespace(layers=[nn.Identity()])
        self.fails_at: set[int] = set()  # steps that raise
        self.steps = self.tokens = 0

    def mtp_layers(self) -> list[nn.Module]:
        return self.mtp

    def parameters(self) -> list[nn.Parameter]:
        return []

    def buffers(self) -> list[Tensor]:
        return []

    def extend(self, ids_N: Tensor, coming: Any) -> Tensor:
        self.steps += 1
        if self.steps in self.fails_at:
            raise RuntimeError("the machine is on fire")
        self.tokens += len(ids_N)
        width = self.config.kv_lora_rank + self.config.qk_rope_head_dim
        rows = ids_N.float().view(1, -1, 1).expand(1, -1, width)
        held = coming.layer(0).append_latents(rows)
        said = []
        for part, rows in zip(coming.parts, held, strict=True):
            own = rows[0, :, 0].long().tolist()
            count = part.tokens.stop - part.tokens.start
            said += [following(own[: len(own) - back]) for back in range(count - 1, -1, -1)]
        coming.advance()
        return torch.tensor(said).unsqueeze(1).float()

    def lm_head(self, hidden: Tensor) -> Tensor:
        return 9 * torch.nn.functional.one_hot(hidden[..., 0].long(), VOCAB).float()
