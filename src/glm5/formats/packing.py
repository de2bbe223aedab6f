"""Signed integer codes in compressed-tensors' pack-quantized layout.

A code q in [-2^(bits-1), 2^(bits-1)) is stored as q + 2^(bits-1); the lowest column of a word is in
its lowest bits. Only 4 and 8 bits, whose codes never cross a word.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm5.formats import bits as stored

BITS = (4, 8)
words_per_row = stored.words


def pack(codes: Tensor, bits: int) -> Tensor:
    """int8 codes [rows, columns] to int32 words [rows, ceil(columns * bits / 32)]."""
    return stored.pack((codes + (1 << (bits - 1))).view(torch.uint8), bits)  # int8 wraps to the same byte


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """int32 words [rows, words] to int8 codes [rows, columns]."""
    return (stored.unpack(words, bits, columns) - (1 << (bits - 1))).view(torch.int8)  # uint8 wraps too


def dequantize(words: Tensor, scales: Tensor, bits: int, columns: int) -> Tensor:
    """fp32 [rows, columns] = code * scale, `columns / scales.shape[1]` columns to a scale."""
    codes = unpack(words, bits, columns).float()
    group = -(-columns // scales.shape[1])
    return codes * scales.float().repeat_interleave(group, dim=1)[:, :columns]
