"""Rounding of float weights to packed codes with searched scales."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from glm5.formats.packing import words_per_row
from glm5.kernels.cpu.native import FLOAT_CODES, fill, floats, library, need


class Rounded(NamedTuple):
    """Packed codes int32 [rows, words], scales bf16 [rows, groups], and what rounding lost."""

    words: Tensor
    scales: Tensor
    error: float  # sum of squared differences
    energy: float  # sum of squares of the weights


def round_weights(
    weight: Tensor, *, bits: int, group: int, importance: Tensor | None = None, search: bool = True
) -> Rounded:
    """Finite float weights [rows, columns] to symmetric codes with a searched scale a group.

    importance: fp32 [columns], how much an error in a column counts. A scale may be negative.
    Raises ValueError when the group is no multiple of 32 or does not divide the width.
    """
    need(weight.dim() == 2, f"weights have {weight.dim()} dimensions, not 2")
    rows, columns = weight.shape
    fits = weight.dtype in FLOAT_CODES and weight.is_contiguous() and weight.device.type == "cpu"
    need(fits, f"weights are {weight.dtype} on {weight.device}; they must be contiguous floats on the CPU")
    need(bits in (4, 8), f"codes have {bits} bits, not 4 or 8")
    need(
        group > 0 and group % 32 == 0 and columns % group == 0 and columns > 0,
        f"{columns} columns are no whole groups of {group}",
    )
    words = torch.empty(rows, words_per_row(columns, bits), dtype=torch.int32)
    scales = torch.empty(rows, columns // group, dtype=torch.bfloat16)
    call = fill(
        library.RoundCall(), weights=weight, rows=rows, cols=columns, group=group, bits=bits,
        importance=floats(importance, columns, "importance"), search=search and bits == 4,
        codes=words, scales=scales,
    )  # fmt: skip
    error, energy = library.round_weights(call, FLOAT_CODES[weight.dtype])
    return Rounded(words, scales, error, energy)
