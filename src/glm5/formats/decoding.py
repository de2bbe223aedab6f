"""From stored codes to fp32 weights: W = (code - zero) * scale on a grid.

Every format here is a way of storing codes plus a grid of scales; this file knows neither names
nor files. Shape suffixes: O rows (out), I columns (in), R and C rows and columns of the grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Weights decoded at a time: bounds the temporaries to some 100 MB beside the result.
BAND = 1 << 22
Codes = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Grid:
    """Scales and zero points; one of each for every block of `block` rows and columns."""

    scale_RC: Tensor  # fp32
    block: tuple[int, int]
    zero: Tensor | float = 0.0  # in codes; a tensor is fp32 [R, C]
    columns_I: Tensor | None = None  # the grid's column of each weight's column; None = column // block

    def apply_(self, codes_OI: Tensor, first: int) -> None:
        """Turn fp32 codes, of which the first row is row `first` of the matrix, into weights."""
        rows = torch.arange(first, first + codes_OI.shape[0]) // self.block[0]
        scale = self.scale_RC[rows]
        zero = self.zero[rows] if isinstance(self.zero, Tensor) else self.zero
        columns, groups = codes_OI.shape[1], scale.shape[1]
        if groups == 1:
            codes_OI.sub_(zero).mul_(scale)
        elif columns == groups * self.block[1] and self.columns_I is None:
            grouped = codes_OI.unflatten(1, (groups, self.block[1]))
            grouped.sub_(zero.unsqueeze(2) if isinstance(zero, Tensor) else zero).mul_(scale.unsqueeze(2))
        else:
            where = torch.arange(columns) // self.block[1] if self.columns_I is None else self.columns_I
            codes_OI.sub_(zero[:, where] if isinstance(zero, Tensor) else zero).mul_(scale[:, where])


def grid_shape(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Blocks down and across; those at the border may be part full."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def decode(columns: int, first: int, last: int, codes: Codes, grid: Grid) -> Tensor:
    """Rows first..last as fp32 [last - first, columns]; `codes(a, b)` gives those of rows a..b."""
    weight = torch.empty(last - first, columns)
    if not weight.numel():
        return weight
    step = max(1, BAND // columns)
    for start in range(first, last, step):
        band = weight[start - first : start - first + step]
        band.copy_(codes(start, min(start + step, last)))
        grid.apply_(band, start)
    return weight
