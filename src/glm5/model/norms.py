"""RMSNorm as GLM uses it: mean of squares in fp32, cast back, then the weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    The normalized value is cast to the input's dtype before the weight is applied, which is where
    bf16 checkpoints were trained to round.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def initialize(self, std: float, generator: torch.Generator | None) -> None:
        self.weight.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return F.rms_norm(x, (x.shape[-1],), self.weight.float(), self.eps)
        normalized = F.rms_norm(x.float(), (x.shape[-1],), None, self.eps)
        return normalized.to(x.dtype) * self.weight

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
