"""`quant_method: awq`, layout `gemm`: 4-bit codes packed along the outputs in an order of its own.

qweight int32 [in, out / 8], qzeros int32 [in / group, out / 8], scales [in / group, out]. A word
holds the outputs 0, 2, 4, 6, 1, 3, 5, 7 from its lowest nibble up. W[o, i] = (q - z) * scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm5.formats.bits import unpack
from glm5.formats.decoding import Grid, decode, grid_shape
from glm5.formats.format import CodedFormat, Weight
from glm5.formats.parts import FLOATS, Parts
from glm5.formats.settings import Settings

_BITS = 4
_CODES = 8  # in a word
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# Where output i of a word lies.
_PLACES = torch.tensor([_ORDER.index(i) for i in range(_CODES)])


class Awq(CodedFormat):
    """A weight with a `qweight` is quantized, whatever `modules_to_not_convert` says."""

    def __init__(self, settings: Settings) -> None:
        settings.whole("bits", _BITS, _BITS, _BITS)
        for key in ("version", "format", "checkpoint_format"):
            settings.choice(key, ("gemm",), "gemm")
        settings.texts("modules_to_not_convert")
        self._group_size = settings.group_size(128)
        self._has_zero_points = settings.flag("zero_point", True)

    def suffixes(self, parts: Parts) -> tuple[str, ...] | None:
        return ("qweight", "qzeros", "scales", "weight") if parts.has("qweight") else None

    def checked(self, parts: Parts) -> Weight:
        if parts.has("weight"):
            raise parts.refuse("weight", "is stored a second time as qweight")
        columns, wide = parts.matrix("qweight", "I32")
        out, size = wide * _CODES, self._group_size or max(columns, 1)
        groups = grid_shape((out, columns), (1, size))[1]
        parts.check("scales", FLOATS, (groups, out))
        if self._has_zero_points or parts.has("qzeros"):
            parts.check("qzeros", ("I32",), (groups, wide))

        def read(first: int, last: int) -> Tensor:
            scale = parts.finite("scales", parts.scale("scales"), 2.0**_BITS).t()
            grid = Grid(scale, (1, size), self._zero_points(parts))
            codes = parts.read("qweight")

            def of_rows(start: int, stop: int) -> Tensor:
                top = start // _CODES
                return _unpacked(codes[:, top : -(-stop // _CODES)])[
                    start - top * _CODES : stop - top * _CODES
                ]

            return decode(columns, first, last, of_rows, grid)

        return Weight((out, columns), read)

    def _zero_points(self, parts: Parts) -> Tensor | float:
        middle = 2.0 ** (_BITS - 1)
        if not parts.has("qzeros"):
            return middle
        zero = _unpacked(parts.read("qzeros")).float()
        if not self._has_zero_points and bool((zero != middle).any()):
            raise parts.refuse("qzeros", "holds zero points, but config.json says zero_point false")
        return zero


def _unpacked(packed: Tensor) -> Tensor:
    """int32 [n, words] to codes [words * 8, n]."""
    codes = unpack(packed, _BITS, packed.shape[1] * _CODES)
    return codes.unflatten(1, (-1, _CODES))[:, :, _PLACES].flatten(1).t()
