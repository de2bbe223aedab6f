"""Codes of 1 to 8 bits in 32-bit words: the one place where bits are packed and unpacked."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def words(count: int, bits: int) -> int:
    """int32 words that `count` codes of `bits` bits fill."""
    return -(-count * bits // 32)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """int32 [n, words(count, bits)] to unsigned codes [n, count], uint8.

    A row is one string of bits, lowest first: code i is bits i * bits .. (i + 1) * bits - 1, across
    the borders of words where it must be.
    """
    # A copy, since `contiguous` keeps odd strides of extents of 1, which `view` refuses.
    octets = packed.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        codes = (octets.unsqueeze(2) >> shifts) & (2**bits - 1)
        return codes.flatten(1)[:, :count]
    starts = torch.arange(count, device=packed.device) * bits
    low, high = starts // 8, ((starts + bits - 1) // 8)
    # A code of at most 8 bits lies in one byte or two.
    pairs = octets[:, low].int() | octets[:, high].int() << 8
    return ((pairs >> (starts % 8).int()) & (2**bits - 1)).to(torch.uint8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes uint8 [n, count] to int32 [n, words(count, bits)]; 4 and 8 bits, which cross no word."""
    codes = F.pad(codes, (0, -codes.shape[1] % (32 // bits)))
    if bits == 4:
        codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
    # Flat first: the one row of a matrix counts as contiguous whatever its strides.
    return codes.flatten().view(torch.int32).view(len(codes), -1)
