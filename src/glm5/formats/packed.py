"""Symmetric integers in compressed-tensors' pack-quantized layout: the scheme, and where a matrix lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scheme:
    """Symmetric integers of `bits` with one scale a row and `group` columns."""

    bits: int = 4
    group: int = 64
    scale_dtype: torch.dtype = torch.bfloat16

    def num_bytes(self, rows: int, columns: int) -> int:
        """Memory of a matrix: its words and its scales."""
        words = -(-columns * self.bits // 32)
        return rows * (words * 4 + -(-columns // self.group) * self.scale_dtype.itemsize)

    def fits(self, columns: int) -> bool:
        """Do whole groups of this size fill a row, as the kernels want them?"""
        return self.group % 32 == 0 and columns % self.group == 0


class Packed(NamedTuple):
    """Where a packed matrix lies: words int32 [out, words], scales [out, groups]."""

    words: Tensor
    scales: Tensor


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")  # of an expert, in the order of its bytes
