"""A linear layer that takes the fastest of PyTorch's own fp32 products on a CPU.

`nn.Linear` in everything but speed, and only without gradients: MKL does not use AVX-512 on CPUs of
other makers, oneDNN does (512 x 256 x 256, two Zen 5 cores: 442 GFLOP/s instead of 219); and MKL
reads a matrix for a single row on one thread.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Fewer rows are bound by reading the weights, where MKL has the smaller start-up cost.
_MIN_ROWS = 16
# Smaller matrices are read before a second thread has woken up.
_MIN_SPLIT_WEIGHTS = 1 << 20


class Linear(nn.Linear):
    """y = x W^T + b; weight [out, in] as on disk."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self._is_large = in_features * out_features >= _MIN_SPLIT_WEIGHTS

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        if input.numel() < _MIN_ROWS * self.in_features and not self._is_large:
            return F.linear(input, weight, self.bias)  # first, since decoding is all calls
        plain = torch.is_grad_enabled() or weight.dtype != torch.float32 or weight.device.type != "cpu"
        if plain or torch.is_autocast_enabled("cpu"):
            return F.linear(input, weight, self.bias)
        rows = input.numel() // self.in_features
        product = _onednn_linear()
        if rows >= _MIN_ROWS and product is not None:
            out: Tensor = product(input, weight, self.bias, "none", [], "")
            return out
        threads = torch.get_num_threads()
        if rows == 1 and self._is_split(threads):
            # A batch of parts of the matrix is read by all threads (6400 x 256 from memory, two
            # threads: 260 us instead of 510).
            parts = weight.view(threads, -1, self.in_features).transpose(1, 2)
            split = torch.bmm(input.reshape(1, 1, -1).expand(threads, 1, -1), parts)
            return split.view(*input.shape[:-1], self.out_features)
        return F.linear(input, weight, self.bias)

    def _is_split(self, threads: int) -> bool:
        return threads > 1 and self._is_large and self.bias is None and self.out_features % threads == 0


@cache
def _onednn_linear() -> Any | None:
    """oneDNN's linear where it beats MKL: an AVX-512 CPU that is not Intel's."""
    try:
        intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None  # not Linux: nothing was measured there
    if intel or "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return None
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)
