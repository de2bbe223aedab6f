"""Linear layers and embeddings without torch's own initialization, which nobody here wants."""

from __future__ import annotations

import torch
from torch import nn


class Linear(nn.Linear):
    """y = x W^T + b; weight [out, in] as on disk. Uninitialized until `initialize`."""

    def reset_parameters(self) -> None:
        pass

    def initialize(self, std: float, generator: torch.Generator | None) -> None:
        self.weight.normal_(0.0, std, generator=generator)
        if self.bias is not None:
            self.bias.zero_()


class Embedding(nn.Embedding):
    """Rows [V, D]. torch's initialization would import its compiler on the meta device (1 s)."""

    def reset_parameters(self) -> None:
        pass

    def initialize(self, std: float, generator: torch.Generator | None) -> None:
        self.weight.normal_(0.0, std, generator=generator)
