"""The vendor's own FP8 (`quant_method: fp8`): e4m3 weights with one fp32 scale a block.

W = fp8 * scale, although the scale is called `weight_scale_inv`. A matrix counts as
quantized when it is stored in FP8; the published lists of modules name some that do not exist.
"""

from __future__ import annotations

from torch import Tensor

from glm5.disk.shards import ShardIndex
from glm5.formats.decoding import grid_shape
from glm5.formats.format import CodedFormat, Weight
from glm5.formats.fp8 import BLOCK, FP8_MAX, block_dequantize
from glm5.formats.parts import FLOATS, Parts
from glm5.formats.settings import LARGEST_GROUP, Settings

SCALE = "weight_scale_inv"


class BlockFp8(CodedFormat):
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

    def suffixes(self, parts: Parts) -> tuple[str, ...] | None:
        return ("weight", SCALE, "input_scale") if parts.dtype("weight") == "F8_E4M3" else None

    def checked(self, parts: Parts) -> Weight:
        return block_fp8(parts, self.block)

    def fill(self, name: str, index: ShardIndex, target: Tensor) -> None:
        """A row of blocks at a time, on the target's device: the matrix never exists in fp32 beside it."""
        parts = Parts(index, name.removesuffix(".weight"))
        block_fp8(parts, self.block)
        scale = parts.finite(SCALE, parts.read(SCALE).float(), FP8_MAX).to(target.device)
        block_dequantize(parts.numbers("weight").to(target.device), scale, self.block, out=target)


def block_fp8(parts: Parts, block: tuple[int, int]) -> Weight:
    """`weight` in e4m3 with `weight_scale_inv`."""
    found = parts.info("weight").shape
    if len(found) != 2:
        raise parts.refuse("weight", f"is FP8 {list(found)}; only matrices have block scales")
    if not parts.has(SCALE):
        raise parts.refuse("weight", f"is FP8 but {parts.module}.{SCALE} is missing")
    shape = parts.matrix("weight", "F8_E4M3")
    parts.check(SCALE, FLOATS, grid_shape(shape, block))

    def read(first: int, last: int) -> Tensor:
        scale = parts.finite(SCALE, parts.read(SCALE).float(), FP8_MAX)
        codes = parts.numbers("weight")
        top = first // block[0]  # the scales of the block that row `first` lies in
        start = top * block[0]
        return block_dequantize(codes[start:last], scale[top:], block)[first - start :]

    return Weight(shape, read)
