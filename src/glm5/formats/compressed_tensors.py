"""`quant_method: compressed-tensors`, as llm-compressor and many others write it.

Integers packed or as int8, FP8, NVFP4 and MX formats, one group of modules each its own way
(`groups.py`). Tensors: compressed-tensors 0.20, `compressors/*/base.py`.
"""

from __future__ import annotations

from torch import Tensor

from glm5.formats.bits import unpack, words
from glm5.formats.decoding import Grid, decode, grid_shape
from glm5.formats.format import CodedFormat, Weight
from glm5.formats.fp4 import mxfp4, nvfp4
from glm5.formats.fp8_scales import mxfp8, scaled_fp8
from glm5.formats.groups import Group, Groups
from glm5.formats.parts import FLOATS, SCALAR, Parts
from glm5.formats.settings import Settings

PACKED, PLAIN = "weight_packed", "weight"
SCALE, ZERO, SHAPE, G_IDX = "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"
GLOBAL = "weight_global_scale"
_ACTIVATIONS = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point")
_PARTS = (SCALE, ZERO, SHAPE, G_IDX, GLOBAL, *_ACTIVATIONS)
_CODES = ("F8_E4M3", "I8")


class CompressedTensors(CodedFormat):
    """Which tensors are there decides whether a weight is quantized; its group says how."""

    def __init__(self, settings: Settings) -> None:
        for key, what in (
            ("sparsity_config", "dense weights"),
            ("transform_config", "untransformed weights"),
        ):
            section = settings.section(key)
            if any(section.values.values()) and section.values.get("format") != "dense":
                raise settings.refuse(key, what)
        self._where = settings.where
        self._groups = Groups(settings)

    def group_of(self, module: str) -> Group | None:
        """How the weight of `model.layers.0.mlp.up_proj` is stored; None: as it is.

        This is what the config says; the tensors (`stored_names`) have the last word.
        """
        return self._groups.of(module)

    def suffixes(self, parts: Parts) -> tuple[str, ...] | None:
        if parts.has(PACKED):
            return (PACKED, PLAIN, *_PARTS)
        return (PLAIN, *_PARTS) if parts.dtype(PLAIN) in _CODES else None

    def checked(self, parts: Parts) -> Weight:
        if parts.has(PACKED) and parts.has(PLAIN):
            raise parts.refuse(PLAIN, f"is stored a second time as {PACKED}")
        group = self.group_of(parts.module)
        if group is None:
            found = PACKED if parts.has(PACKED) else PLAIN
            raise parts.refuse(
                found,
                f"is quantized, but {self._where} has no group for its module",
                "get weights and config.json from one place",
            )
        if group.type == "int":
            return _integers(parts, group, packed=parts.has(PACKED))
        if group.format == "nvfp4-pack-quantized":
            return nvfp4(parts, PACKED, GLOBAL, reciprocal=True)
        if group.format == "mxfp4-pack-quantized":
            return mxfp4(parts, PACKED, SCALE)
        if group.format == "mxfp8-quantized":
            return mxfp8(parts)
        block, (down, across) = _grid(group, parts.matrix(PLAIN, "F8_E4M3"))
        return scaled_fp8(parts, block, (down, across), *_scale_shapes(group, down, across))


def _integers(parts: Parts, group: Group, packed: bool) -> Weight:
    """Signed codes. Packed, they and their zero points are stored with 2 ** (bits - 1) added."""
    shape = _packed_shape(parts, group) if packed else parts.matrix(PLAIN, "I8")
    block, (down, across) = _grid(group, shape)
    parts.check(SCALE, FLOATS, *_scale_shapes(group, down, across))
    # Only these two strategies have their zero points packed, and down the rows at that.
    packed_zero = packed and group.strategy in ("group", "channel")
    if not group.symmetric and packed_zero:
        parts.check(ZERO, ("I32",), (words(down, group.bits), across))
    elif not group.symmetric:
        parts.check(ZERO, ("I8",), *_scale_shapes(group, down, across))
    if parts.has(G_IDX):
        parts.check(G_IDX, ("I32", "I64"), (shape[1],))
    half = 1 << group.bits - 1
    offset = half if packed else 0

    def read(first: int, last: int) -> Tensor:
        if packed and parts.has(SHAPE):
            _check_shape(parts, shape)
        scale = parts.finite(SCALE, parts.scale(SCALE), 2.0 * half).reshape(down, across)
        zero: Tensor | float
        if group.symmetric:
            _check_no_zero_points(parts)
            zero = float(offset)
        elif packed_zero:
            zero = unpack(parts.read(ZERO).t(), group.bits, down).t().float()
        else:
            zero = _in_range(parts, ZERO, half).float().reshape(down, across) + offset
        grid = Grid(scale, block, zero, _columns(parts, shape[1], across))
        codes = parts.read(PACKED) if packed else _in_range(parts, PLAIN, half)

        def of_rows(start: int, stop: int) -> Tensor:
            return unpack(codes[start:stop], group.bits, shape[1]) if packed else codes[start:stop]

        return decode(shape[1], first, last, of_rows, grid)

    return Weight(shape, read)


def _packed_shape(parts: Parts, group: Group) -> tuple[int, int]:
    """From the headers where whole groups fill the words, as the library asks, else `weight_shape`.

    Reading that for every expert of GLM-5 would be 57,600 reads of 16 bytes before the first weight.
    """
    out, across = parts.matrix(PACKED, "I32")
    if group.strategy == "group" and group.group_size:
        columns = parts.matrix(SCALE, *FLOATS)[1] * group.group_size
        if words(columns, group.bits) == across:
            return out, columns
    parts.check(SHAPE, ("I64", "I32"), (2,))
    rows, columns = parts.read(SHAPE).tolist()
    if rows != out or columns < 0 or words(columns, group.bits) != across:
        raise parts.refuse(SHAPE, f"says {[rows, columns]}, but {PACKED} is {[out, across]}")
    return out, columns


def _check_shape(parts: Parts, shape: tuple[int, int]) -> None:
    parts.check(SHAPE, ("I64", "I32"), (2,))
    found = parts.read(SHAPE).tolist()
    if found != list(shape):
        raise parts.refuse(SHAPE, f"says {found}, but the other tensors make {list(shape)}")


def _grid(group: Group, shape: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns that share a scale, and the shape of the scales."""
    row = max(shape[1], 1)
    if group.strategy == "tensor":
        return (max(shape[0], 1), row), (1, 1)
    if group.strategy == "channel":
        return (1, row), (shape[0], 1)
    block = group.block or (1, group.group_size or row)
    return block, grid_shape(shape, block)


def _scale_shapes(group: Group, down: int, across: int) -> tuple[tuple[int, ...], ...]:
    if group.strategy == "tensor":
        return SCALAR
    return ((down, 1), (down,)) if group.strategy == "channel" else ((down, across),)


def _check_no_zero_points(parts: Parts) -> None:
    """Some writers store zero points of symmetric weights too, all of them nought."""
    if parts.has(ZERO) and bool(parts.read(ZERO).float().any()):
        raise parts.refuse(ZERO, "holds zero points, but config.json calls these weights symmetric")


def _columns(parts: Parts, columns: int, groups: int) -> Tensor | None:
    """The group of each column, where the columns were put in another order (`actorder`)."""
    if not parts.has(G_IDX) or bool((parts.read(G_IDX) == -1).all()):
        return None  # -1 throughout: set up and never used
    return parts.column_groups(G_IDX, columns, groups)


def _in_range(parts: Parts, suffix: str, half: int) -> Tensor:
    codes = parts.read(suffix)
    if codes.numel() and not -half <= int(codes.min()) <= int(codes.max()) < half:
        raise parts.refuse(suffix, f"holds a value that is not in {-half}..{half - 1}")
    return codes
