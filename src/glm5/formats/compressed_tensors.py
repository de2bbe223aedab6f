"""`quant_method: compressed-tensors`, as llm-compressor and many others write it.

Integers packed or as int8, FP8, NVFP4 and MX formats, one group of modules each its own way
(`groups.py`). Tensors: compressed-tensors 0.20, `compressors/*/base.py`.
"""

from __future__ import annotations

from torch import Tensor

from glm5.formats.decoding import Grid, decode, grid_shape, unpack, words
from glm5.formats.format import Format, Weight
from glm5.formats.fp4 import mxfp4, nvfp4
from glm5.formats.fp8_scales import mxfp8, scaled_fp8
from glm5.formats.groups import Group, Groups
from glm5.formats.settings import Settings
from glm5.formats.stored import FLOATS, SCALAR, Stored

PACKED, PLAIN = "weight_packed", "weight"
SCALE, ZERO, SHAPE, G_IDX = "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"
GLOBAL = "weight_global_scale"
_ACTIVATIONS = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point")
_PARTS = (SCALE, ZERO, SHAPE, G_IDX, GLOBAL, *_ACTIVATIONS)
_CODES = ("F8_E4M3", "I8")


class CompressedTensors(Format):
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

    def suffixes(self, stored: Stored) -> tuple[str, ...] | None:
        if stored.has(PACKED):
            return (PACKED, PLAIN, *_PARTS)
        return (PLAIN, *_PARTS) if stored.dtype(PLAIN) in _CODES else None

    def checked(self, stored: Stored) -> Weight:
        if stored.has(PACKED) and stored.has(PLAIN):
            raise stored.refuse(PLAIN, f"is stored a second time as {PACKED}")
        group = self.group_of(stored.module)
        if group is None:
            found = PACKED if stored.has(PACKED) else PLAIN
            raise stored.refuse(
                found,
                f"is quantized, but {self._where} has no group for its module",
                "get weights and config.json from one place",
            )
        if group.type == "int":
            return _integers(stored, group, packed=stored.has(PACKED))
        if group.format == "nvfp4-pack-quantized":
            return nvfp4(stored, PACKED, GLOBAL, reciprocal=True)
        if group.format == "mxfp4-pack-quantized":
            return mxfp4(stored, PACKED, SCALE)
        if group.format == "mxfp8-quantized":
            return mxfp8(stored)
        block, (down, across) = _grid(group, stored.matrix(PLAIN, "F8_E4M3"))
        return scaled_fp8(stored, block, (down, across), *_scale_shapes(group, down, across))


def _integers(stored: Stored, group: Group, packed: bool) -> Weight:
    """Signed codes. Packed, they and their zero points are stored with 2 ** (bits - 1) added."""
    shape = _packed_shape(stored, group) if packed else stored.matrix(PLAIN, "I8")
    block, (down, across) = _grid(group, shape)
    stored.check(SCALE, FLOATS, *_scale_shapes(group, down, across))
    # Only these two strategies have their zero points packed, and down the rows at that.
    packed_zero = packed and group.strategy in ("group", "channel")
    if not group.symmetric and packed_zero:
        stored.check(ZERO, ("I32",), (words(down, group.bits), across))
    elif not group.symmetric:
        stored.check(ZERO, ("I8",), *_scale_shapes(group, down, across))
    if stored.has(G_IDX):
        stored.check(G_IDX, ("I32", "I64"), (shape[1],))
    half = 1 << group.bits - 1
    offset = half if packed else 0

    def read(first: int, last: int) -> Tensor:
        if packed and stored.has(SHAPE):
            _check_shape(stored, shape)
        scale = stored.finite(SCALE, stored.scale(SCALE), 2.0 * half).reshape(down, across)
        zero: Tensor | float
        if group.symmetric:
            _check_no_zero_points(stored)
            zero = float(offset)
        elif packed_zero:
            zero = unpack(stored.read(ZERO).t(), group.bits, down).t().float()
        else:
            zero = _in_range(stored, ZERO, half).float().reshape(down, across) + offset
        grid = Grid(scale, block, zero, _columns(stored, shape[1], across))
        codes = stored.read(PACKED) if packed else _in_range(stored, PLAIN, half)

        def of_rows(start: int, stop: int) -> Tensor:
            return unpack(codes[start:stop], group.bits, shape[1]) if packed else codes[start:stop]

        return decode(shape[1], first, last, of_rows, grid)

    return Weight(shape, read)


def _packed_shape(stored: Stored, group: Group) -> tuple[int, int]:
    """From the headers where whole groups fill the words, as the library asks, else `weight_shape`.

    Reading that for every expert of GLM-5 would be 57,600 reads of 16 bytes before the first weight.
    """
    out, across = stored.matrix(PACKED, "I32")
    if group.strategy == "group" and group.group_size:
        columns = stored.matrix(SCALE, *FLOATS)[1] * group.group_size
        if words(columns, group.bits) == across:
            return out, columns
    stored.check(SHAPE, ("I64", "I32"), (2,))
    rows, columns = stored.read(SHAPE).tolist()
    if rows != out or columns < 0 or words(columns, group.bits) != across:
        raise stored.refuse(SHAPE, f"says {[rows, columns]}, but {PACKED} is {[out, across]}")
    return out, columns


def _check_shape(stored: Stored, shape: tuple[int, int]) -> None:
    stored.check(SHAPE, ("I64", "I32"), (2,))
    found = stored.read(SHAPE).tolist()
    if found != list(shape):
        raise stored.refuse(SHAPE, f"says {found}, but the other tensors make {list(shape)}")


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


def _check_no_zero_points(stored: Stored) -> None:
    """Some writers store zero points of symmetric weights too, all of them nought."""
    if stored.has(ZERO) and bool(stored.read(ZERO).float().any()):
        raise stored.refuse(ZERO, "holds zero points, but config.json calls these weights symmetric")


def _columns(stored: Stored, columns: int, groups: int) -> Tensor | None:
    """The group of each column, where the columns were put in another order (`actorder`)."""
    if not stored.has(G_IDX) or bool((stored.read(G_IDX) == -1).all()):
        return None  # -1 throughout: set up and never used
    return stored.column_groups(G_IDX, columns, groups)


def _in_range(stored: Stored, suffix: str, half: int) -> Tensor:
    codes = stored.read(suffix)
    if codes.numel() and not -half <= int(codes.min()) <= int(codes.max()) < half:
        raise stored.refuse(suffix, f"holds a value that is not in {-half}..{half - 1}")
    return codes
