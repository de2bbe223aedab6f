"""e4m3 weights with `weight_scale`: a scale a matrix, a row, a group or a block of it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from glm5.formats.decoding import Grid, decode, grid_shape
from glm5.formats.format import Weight
from glm5.formats.fp4 import EXPONENTS, MX_GROUP, e8m0
from glm5.formats.fp8 import FP8_MAX
from glm5.formats.parts import FLOATS, Parts

SCALE = "weight_scale"


def scaled_fp8(
    parts: Parts, block: tuple[int, int], grid: tuple[int, int], *scale_shapes: tuple[int, ...]
) -> Weight:
    """Float scales: `grid` of them, each for `block` weights, stored in one of `scale_shapes`."""
    shape = parts.matrix("weight", "F8_E4M3")
    parts.check(SCALE, FLOATS, *scale_shapes)
    return _weight(parts, shape, block, lambda: parts.scale(SCALE).reshape(grid))


def mxfp8(parts: Parts) -> Weight:
    """Groups of 32 with e8m0 scales."""
    shape = parts.matrix("weight", "F8_E4M3")
    parts.check(SCALE, EXPONENTS, grid_shape(shape, (1, MX_GROUP)))
    return _weight(parts, shape, (1, MX_GROUP), lambda: e8m0(parts.read(SCALE)))


def _weight(
    parts: Parts, shape: tuple[int, int], block: tuple[int, int], scale: Callable[[], Tensor]
) -> Weight:
    def read(first: int, last: int) -> Tensor:
        grid = Grid(parts.finite(SCALE, scale(), FP8_MAX), block)
        codes = parts.numbers("weight")
        return decode(shape[1], first, last, lambda a, b: codes[a:b], grid)

    return Weight(shape, read)
