"""The vendor's own FP8 (`quant_method: fp8`): e4m3 weights with one fp32 scale a block.

W = fp8 * scale, although the scale is called `weight_scale_inv` (SPEC 6.1). A matrix counts as
quantized when it is stored in FP8; the published lists of modules name some that do not exist.
"""

from __future__ import annotations

from torch import Tensor

from glm5.formats.decoding import grid_shape
from glm5.formats.format import Format, Weight
from glm5.formats.fp8 import BLOCK, FP8_MAX, block_dequantize
from glm5.formats.settings import LARGEST_GROUP, Settings
from glm5.formats.stored import FLOATS, Stored

SCALE = "weight_scale_inv"


class BlockFp8(Format):
    """`block`: rows and columns that share a scale."""

    def __init__(self, settings: Settings) -> None:
        settings.choice("fmt", ("e4m3",), "e4m3")
        self.block = (BLOCK, BLOCK)
        if "weight_block_size" in settings:
            sizes = settings.values["weight_block_size"]
            whole = isinstance(sizes, list) and all(type(s) is int and 0 < s <= LARGEST_GROUP for s in sizes)
            if not whole or len(sizes) != 2:
                raise settings.refuse("weight_block_size", "two sizes")
            self.block = (sizes[0], sizes[1])

    def suffixes(self, stored: Stored) -> tuple[str, ...] | None:
        return ("weight", SCALE, "input_scale") if stored.dtype("weight") == "F8_E4M3" else None

    def checked(self, stored: Stored) -> Weight:
        return block_fp8(stored, self.block)


def block_fp8(stored: Stored, block: tuple[int, int]) -> Weight:
    """`weight` in e4m3 with `weight_scale_inv`."""
    shape = stored.matrix("weight", "F8_E4M3")
    stored.check(SCALE, FLOATS, grid_shape(shape, block))

    def read(first: int, last: int) -> Tensor:
        scale = stored.finite(SCALE, stored.scale(SCALE), FP8_MAX)
        codes = stored.numbers("weight")
        top = first // block[0]  # the scales of the block that row `first` lies in
        start = top * block[0]
        return block_dequantize(codes[start:last], scale[top:], block)[first - start :]

    return Weight(shape, read)
