"""Integer codes in 32-bit words, as compressed-tensors' pack-quantized layout has them.

A code q in [-2^(bits-1), 2^(bits-1)) is stored as q + 2^(bits-1); the lowest column of a word is in
its lowest bits. Only 4 and 8 bits, whose codes never cross a word.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

BITS = (4, 8)


def words_per_row(columns: int, bits: int) -> int:
    return -(-columns * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """int8 codes [rows, columns] to int32 words [rows, ceil(columns * bits / 32)]."""
    per_word = 32 // bits
    columns = codes.shape[1]
    stored = (codes + (1 << (bits - 1))).view(torch.uint8)  # int8 wraps to the same byte
    stored = F.pad(stored, (0, -columns % per_word))
    if bits == 4:
        stored = stored[:, 0::2] | (stored[:, 1::2] << 4)
    # Flat first: the one row of a matrix counts as contiguous whatever its strides.
    return stored.flatten().view(torch.int32).view(len(codes), words_per_row(columns, bits))


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """int32 words [rows, words] to int8 codes [rows, columns]."""
    stored = words.contiguous().view(torch.uint8)
    if bits == 4:
        stored = torch.stack((stored & 15, stored >> 4), dim=-1).flatten(1)
    return (stored[:, :columns] - (1 << (bits - 1))).view(torch.int8)  # uint8 wraps to the same byte


def dequantize(words: Tensor, scales: Tensor, bits: int, columns: int) -> Tensor:
    """fp32 [rows, columns] = code * scale, `columns / scales.shape[1]` columns to a scale."""
    codes = unpack(words, bits, columns).float()
    group = -(-columns // scales.shape[1])
    return codes * scales.float().repeat_interleave(group, dim=1)[:, :columns]
