"""FP4: what NVFP4 and MXFP4 share, the codes, and the scales that MX formats store as exponents.

e2m1 is 1 sign, 2 exponent bits of bias 1 and 1 mantissa bit; two codes a byte, the even column in
the low half. e8m0 is 2 ** (byte - 127); 255 is NaN (OCP Microscaling Formats 1.0, section 5).
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm5.formats.decoding import Grid, decode, grid_shape
from glm5.formats.format import Weight
from glm5.formats.parts import SCALAR, Parts

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E2M1_MAX = 6.0
NVFP4_GROUP = 16
MX_GROUP = 32
EXPONENTS = ("U8", "F8_E8M0")  # the dtypes that scales of powers of two are stored in
# The two values of each byte, fp32 [256, 2].
_PAIRS = torch.tensor([[E2M1[byte & 15], E2M1[byte >> 4]] for byte in range(256)])


def e2m1(packed: Tensor) -> Tensor:
    """uint8 [rows, n] to fp32 [rows, 2 * n]."""
    return _PAIRS[packed.int()].flatten(1)


def e8m0(exponents: Tensor) -> Tensor:
    """uint8 (or torch's own type for these) to fp32 powers of two; 255 becomes infinite."""
    exponents = exponents.view(torch.uint8)
    # As the bits of an fp32: the byte is its exponent, but for 0, which is the subnormal 2^-127.
    bits = torch.where(exponents == 0, 1 << 22, exponents.int() << 23)
    return bits.to(torch.int32).view(torch.float32)


def nvfp4(parts: Parts, packed: str, whole: str, reciprocal: bool) -> Weight:
    """e2m1 in groups of 16 with `weight_scale` in e4m3 and a scale of the whole matrix in fp32.

    packed, whole: suffixes of the codes and of the scale of the whole.
    reciprocal: whether that one divides (compressed-tensors) or multiplies (ModelOpt).
    """
    rows, pairs = parts.matrix(packed, "U8")
    shape = (rows, 2 * pairs)
    parts.check("weight_scale", ("F8_E4M3",), grid_shape(shape, (1, NVFP4_GROUP)))
    parts.check(whole, ("F32",), *SCALAR)

    def read(first: int, last: int) -> Tensor:
        of_groups, of_whole = parts.scale("weight_scale"), parts.scale(whole).reshape(1, 1)
        scale = of_groups / of_whole if reciprocal else of_groups * of_whole
        grid = Grid(parts.finite(whole, scale, E2M1_MAX), (1, NVFP4_GROUP))
        codes = parts.read(packed)
        return decode(shape[1], first, last, lambda a, b: e2m1(codes[a:b]), grid)

    return Weight(shape, read)


def mxfp4(parts: Parts, packed: str, scales: str) -> Weight:
    """e2m1 in groups of 32 with e8m0 scales; the codes are [out, in / 2] or [out, in / 32, 16]."""
    info = parts.info(packed)
    if len(info.shape) == 3:
        rows, groups = info.shape[:2]
        parts.check(packed, ("U8",), (rows, groups, MX_GROUP // 2))
        shape = (rows, groups * MX_GROUP)
    else:
        rows, pairs = parts.matrix(packed, "U8")
        shape = (rows, 2 * pairs)
    parts.check(scales, EXPONENTS, grid_shape(shape, (1, MX_GROUP)))

    def read(first: int, last: int) -> Tensor:
        grid = Grid(parts.finite(scales, e8m0(parts.read(scales)), E2M1_MAX), (1, MX_GROUP))
        codes = parts.read(packed).flatten(1)
        return decode(shape[1], first, last, lambda a, b: e2m1(codes[a:b]), grid)

    return Weight(shape, read)
