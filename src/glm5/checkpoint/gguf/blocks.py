"""The block types of ggml: how the bytes of a quantized tensor become fp32 values.

A row is cut into blocks of 32 or 256 weights that share scales. Each decoder takes whole blocks,
uint8 [N, bytes], and gives fp32 [N, elements], multiplying in the order of ggml-quants.c so that
the result is the same to the bit. Files and tensors are left to `file`.
Letters: N blocks, B bytes, E elements, G groups that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockType:
    """One storage type. `decode` is None where only its size is known here."""

    name: str
    elements: int
    bytes: int
    decode: Callable[[Tensor], Tensor] | None = None

    @property
    def has_scales(self) -> bool:
        return self.elements > 1


def _fields(packed_NB: Tensor, bits: int, run: int) -> Tensor:
    """Every `bits`-wide field of the bytes, uint8 [N, B * 8 / bits].

    Fields lie in planes: of each `run` bytes come the lowest bits first, then the next ones. That
    is the one pattern all types share; they differ in the length of the run.
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8).view(-1, 1)
    spread = packed_NB.reshape(packed_NB.shape[0], -1, 1, run) >> shifts
    return spread.bitwise_and_((1 << bits) - 1).view(packed_NB.shape[0], -1)


def _half(block_NB: Tensor, at: int) -> Tensor:
    """The fp16 value at byte `at` of each block, fp32 [N, 1]."""
    return block_NB[:, at : at + 2].contiguous().view(torch.float16).float()


def _scaled(codes_NE: Tensor, scale_NG: Tensor, minimum_NG: Tensor | None = None) -> Tensor:
    """code * scale - minimum, where each group of codes has its own."""
    values = codes_NE.view(*scale_NG.shape, -1).float()
    values.mul_(scale_NG.unsqueeze(-1))
    if minimum_NG is not None:
        values.sub_(minimum_NG.unsqueeze(-1))
    return values.view(codes_NE.shape)


# --- plain values ---------------------------------------------------------------------------------


def _f32(block_NB: Tensor) -> Tensor:
    return block_NB.view(torch.float32)


def _f16(block_NB: Tensor) -> Tensor:
    return block_NB.view(torch.float16).float()


def _bf16(block_NB: Tensor) -> Tensor:
    return block_NB.view(torch.bfloat16).float()


# --- 32 weights a block ---------------------------------------------------------------------------
# Of 16 bytes of nibbles the low halves are weights 0..15, the high halves weights 16..31.


def _q4_0(block_NB: Tensor) -> Tensor:
    """[ d f16 | 16 B nibbles ]   w = d (q - 8)"""
    return _fields(block_NB[:, 2:], 4, 16).float().sub_(8).mul_(_half(block_NB, 0))


def _q4_1(block_NB: Tensor) -> Tensor:
    """[ d f16 | m f16 | 16 B nibbles ]   w = d q + m"""
    values = _fields(block_NB[:, 4:], 4, 16).float().mul_(_half(block_NB, 0))
    return values.add_(_half(block_NB, 2))


def _five_bits(high_N4: Tensor, low_N16: Tensor) -> Tensor:
    """A fifth bit for each nibble: bit i of the little-endian u32 belongs to weight i."""
    return _fields(high_N4, 1, 1).bitwise_left_shift_(4).bitwise_or_(_fields(low_N16, 4, 16))


def _q5_0(block_NB: Tensor) -> Tensor:
    """[ d f16 | 4 B fifth bits | 16 B nibbles ]   w = d (q - 16)"""
    codes = _five_bits(block_NB[:, 2:6], block_NB[:, 6:])
    return codes.float().sub_(16).mul_(_half(block_NB, 0))


def _q5_1(block_NB: Tensor) -> Tensor:
    """[ d f16 | m f16 | 4 B fifth bits | 16 B nibbles ]   w = d q + m"""
    codes = _five_bits(block_NB[:, 4:8], block_NB[:, 8:])
    return codes.float().mul_(_half(block_NB, 0)).add_(_half(block_NB, 2))


def _q8_0(block_NB: Tensor) -> Tensor:
    """[ d f16 | 32 B int8 ]   w = d q"""
    return block_NB[:, 2:].view(torch.int8).float().mul_(_half(block_NB, 0))


# --- 256 weights a block, groups of 16 or 32 with scales of their own ------------------------------


def _q2_k(block_NB: Tensor) -> Tensor:
    """[ 16 B scale 4 bit, min 4 bit | 64 B 2-bit codes | d f16 | dmin f16 ]   groups of 16

    w = (d scale) q - (dmin min)
    """
    scales = (block_NB[:, :16] & 15).float().mul_(_half(block_NB, 80))
    minima = (block_NB[:, :16] >> 4).float().mul_(_half(block_NB, 82))
    return _scaled(_fields(block_NB[:, 16:80], 2, 32), scales, minima)


def _q3_k(block_NB: Tensor) -> Tensor:
    """[ 32 B third bits | 64 B 2-bit codes | 12 B scales | d f16 ]   groups of 16

    scales: 8 B with the low nibbles of 0..7 and, above them, of 8..15; then 4 B of their top bits.
    w = d (scale - 32) (q - 4), the third bit being the 4 of q
    """
    low, high = _fields(block_NB[:, 96:104], 4, 8), _fields(block_NB[:, 104:108], 2, 4)
    scales = (low | (high << 4)).float().sub_(32).mul_(_half(block_NB, 108))
    codes = _fields(block_NB[:, 32:96], 2, 32) | (_fields(block_NB[:, :32], 1, 32) << 2)
    return _scaled(codes.view(torch.int8) - 4, scales)


def _six_bit_pairs(packed_N12: Tensor) -> tuple[Tensor, Tensor]:
    """Eight 6-bit scales and eight 6-bit minima of Q4_K and Q5_K, uint8 [N, 8] each.

    bytes 0..3   [ top 2 bits of scale 4..7 | scale 0..3 ]
    bytes 4..7   [ top 2 bits of min 4..7   | min 0..3 ]
    bytes 8..11  [ low nibble of min 4..7   | low nibble of scale 4..7 ]
    """
    first, second, third = packed_N12.split(4, dim=1)
    scales = torch.cat((first & 63, (third & 15) | (first >> 6 << 4)), dim=1)
    minima = torch.cat((second & 63, (third >> 4) | (second >> 6 << 4)), dim=1)
    return scales, minima


def _q4_k(block_NB: Tensor) -> Tensor:
    """[ d f16 | dmin f16 | 12 B scales and minima | 128 B nibbles ]   groups of 32

    w = (d scale) q - (dmin min)
    """
    scales, minima = _six_bit_pairs(block_NB[:, 4:16])
    return _scaled(
        _fields(block_NB[:, 16:], 4, 32),
        scales.float().mul_(_half(block_NB, 0)),
        minima.float().mul_(_half(block_NB, 2)),
    )


def _q5_k(block_NB: Tensor) -> Tensor:
    """[ d f16 | dmin f16 | 12 B scales and minima | 32 B fifth bits | 128 B nibbles ]   groups of 32

    w = (d scale) q - (dmin min)
    """
    scales, minima = _six_bit_pairs(block_NB[:, 4:16])
    codes = _fields(block_NB[:, 48:], 4, 32) | (_fields(block_NB[:, 16:48], 1, 32) << 4)
    return _scaled(
        codes,
        scales.float().mul_(_half(block_NB, 0)),
        minima.float().mul_(_half(block_NB, 2)),
    )


def _q6_k(block_NB: Tensor) -> Tensor:
    """[ 128 B low nibbles | 64 B top 2 bits | 16 B int8 scales | d f16 ]   groups of 16

    w = (d scale) (q - 32)
    """
    codes = _fields(block_NB[:, :128], 4, 64) | (_fields(block_NB[:, 128:192], 2, 32) << 4)
    scales = block_NB[:, 192:208].view(torch.int8).float().mul_(_half(block_NB, 208))
    return _scaled(codes.view(torch.int8) - 32, scales)


# --- 4-bit codes that stand for the entries of a table ---------------------------------------------

# A non-linear grid, denser around zero where weights are (ggml-common.h, kvalues_iq4nl).
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# Twice the values of FP4 E2M1 (OCP Microscaling Formats 1.0, section 5.3.3).
_E2M1_TWICE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def _looked_up(codes_NE: Tensor, table: tuple[int, ...]) -> Tensor:
    values = torch.tensor(table, dtype=torch.float32)
    return values.index_select(0, codes_NE.reshape(-1).int()).view(codes_NE.shape)


def _iq4_nl(block_NB: Tensor) -> Tensor:
    """[ d f16 | 16 B nibbles ]   w = d table[q]"""
    return _looked_up(_fields(block_NB[:, 2:], 4, 16), _IQ4).mul_(_half(block_NB, 0))


def _iq4_xs(block_NB: Tensor) -> Tensor:
    """[ d f16 | 2 B top 2 bits of scales | 4 B low nibbles of scales | 128 B nibbles ]   groups of 32

    w = d (scale - 32) table[q]
    """
    scales = _fields(block_NB[:, 4:8], 4, 1) | (_fields(block_NB[:, 2:4], 2, 1) << 4)
    values = _looked_up(_fields(block_NB[:, 8:], 4, 16), _IQ4)
    return _scaled(values, scales.float().sub_(32).mul_(_half(block_NB, 0)))


def _mxfp4(block_NB: Tensor) -> Tensor:
    """[ e u8 | 16 B nibbles ]   w = 2^(e - 127) E2M1[q], kept as half of that times twice the value"""
    exponent = block_NB[:, :1].int()
    # Half of the scale as fp32 bits; the two smallest exponents give subnormal numbers.
    bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    return _looked_up(_fields(block_NB[:, 1:], 4, 16), _E2M1_TWICE).mul_(bits.view(torch.float32))


# --- by number in the file (enum ggml_type) ---------------------------------------------------------

TYPES: dict[int, BlockType] = {
    0: BlockType("F32", 1, 4, _f32),
    1: BlockType("F16", 1, 2, _f16),
    2: BlockType("Q4_0", 32, 18, _q4_0),
    3: BlockType("Q4_1", 32, 20, _q4_1),
    6: BlockType("Q5_0", 32, 22, _q5_0),
    7: BlockType("Q5_1", 32, 24, _q5_1),
    8: BlockType("Q8_0", 32, 34, _q8_0),
    9: BlockType("Q8_1", 32, 36),
    10: BlockType("Q2_K", 256, 84, _q2_k),
    11: BlockType("Q3_K", 256, 110, _q3_k),
    12: BlockType("Q4_K", 256, 144, _q4_k),
    13: BlockType("Q5_K", 256, 176, _q5_k),
    14: BlockType("Q6_K", 256, 210, _q6_k),
    15: BlockType("Q8_K", 256, 292),
    16: BlockType("IQ2_XXS", 256, 66),
    17: BlockType("IQ2_XS", 256, 74),
    18: BlockType("IQ3_XXS", 256, 98),
    19: BlockType("IQ1_S", 256, 50),
    20: BlockType("IQ4_NL", 32, 18, _iq4_nl),
    21: BlockType("IQ3_S", 256, 110),
    22: BlockType("IQ2_S", 256, 82),
    23: BlockType("IQ4_XS", 256, 136, _iq4_xs),
    24: BlockType("I8", 1, 1),
    25: BlockType("I16", 1, 2),
    26: BlockType("I32", 1, 4),
    27: BlockType("I64", 1, 8),
    28: BlockType("F64", 1, 8),
    29: BlockType("IQ1_M", 256, 56),
    30: BlockType("BF16", 1, 2, _bf16),
    34: BlockType("TQ1_0", 256, 54),
    35: BlockType("TQ2_0", 256, 66),
    39: BlockType("MXFP4", 32, 17, _mxfp4),
    40: BlockType("NVFP4", 64, 36),
    41: BlockType("Q1_0", 128, 18),
    42: BlockType("Q2_0", 64, 18),
}
DECODED = tuple(kind.name for kind in TYPES.values() if kind.decode is not None)
