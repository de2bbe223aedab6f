"""How a bank of packed experts lies in memory; light, so that it is known without Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Bank(NamedTuple):
    """Packed experts, one run of bytes each.

    run: uint8 [E, stride], stride a multiple of 16. starts: byte of the first code and the first scale
    within a run, of gate, up and down.
    """

    run: Tensor
    starts: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    hidden: int
    width: int
    bits: int
    group: int
    scale_dtype: torch.dtype

    @property
    def words(self) -> Tensor:
        return self.run.view(torch.int32)

    @property
    def scales(self) -> Tensor:
        return self.run.view(self.scale_dtype)

    @property
    def strides(self) -> tuple[int, int]:
        """From one expert to the next, in words and in scales."""
        return self.run.shape[1] // 4, self.run.shape[1] // self.scale_dtype.itemsize

    def at(self, projection: int) -> tuple[int, int]:
        """Where a projection begins: its codes in words, its scales in scales."""
        codes, scales = self.starts[projection]
        return codes // 4, scales // self.scale_dtype.itemsize
