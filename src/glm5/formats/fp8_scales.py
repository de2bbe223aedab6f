"""e4m3 weights with `weight_scale`: a scale a matrix, a row, a group or a block of it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from glm5.formats.decoding import Grid, decode, grid_shape
from glm5.formats.format import Weight
from glm5.formats.fp4 import EXPONENTS, MX_GROUP, e8m0
from glm5.formats.fp8 import FP8_MAX
from glm5.formats.stored import FLOATS, Stored

SCALE = "weight_scale"


def scaled_fp8(
    stored: Stored, block: tuple[int, int], grid: tuple[int, int], *scale_shapes: tuple[int, ...]
) -> Weight:
    """Float scales: `grid` of them, each for `block` weights, stored in one of `scale_shapes`."""
    shape = stored.matrix("weight", "F8_E4M3")
    stored.check(SCALE, FLOATS, *scale_shapes)
    return _weight(stored, shape, block, lambda: stored.scale(SCALE).reshape(grid))


def mxfp8(stored: Stored) -> Weight:
    """Groups of 32 with e8m0 scales."""
    shape = stored.matrix("weight", "F8_E4M3")
    stored.check(SCALE, EXPONENTS, grid_shape(shape, (1, MX_GROUP)))
    return _weight(stored, shape, (1, MX_GROUP), lambda: e8m0(stored.read(SCALE)))


def _weight(
    stored: Stored, shape: tuple[int, int], block: tuple[int, int], scale: Callable[[], Tensor]
) -> Weight:
    def read(first: int, last: int) -> Tensor:
        grid = Grid(stored.finite(SCALE, scale(), FP8_MAX), block)
        codes = stored.numbers("weight")
        return decode(shape[1], first, last, lambda a, b: codes[a:b], grid)

    return Weight(shape, read)
