"""`quant_method: gptq`: codes packed along the inputs, groups of inputs in any order (`g_idx`).

qweight int32 [in * bits / 32, out], qzeros int32 [groups, out * bits / 32], scales [groups, out],
g_idx int32 [in]. W[o, i] = (q - z) * scale. The older layout (`checkpoint_format: gptq`) stores
z - 1, GPTQModel's `gptq_v2` z itself.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from glm5.errors import CheckpointError
from glm5.formats.bits import unpack, words
from glm5.formats.decoding import Grid, decode
from glm5.formats.format import CodedFormat, Weight
from glm5.formats.parts import FLOATS, Parts
from glm5.formats.patterns import MAX_PATTERNS, NamePattern
from glm5.formats.settings import Settings, quoted

_WIDTHS = (2, 3, 4, 8)
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


class _Rule(NamedTuple):
    bits: int
    group_size: int | None  # None: one group
    symmetric: bool


class Gptq(CodedFormat):
    """A weight with a `qweight` is quantized; `dynamic` may give its module other bits or groups."""

    def __init__(self, settings: Settings) -> None:
        key = "checkpoint_format" if "checkpoint_format" in settings else "format"
        self._second_layout = settings.choice(key, ("gptq", "gptq_v2"), "gptq") == "gptq_v2"
        self._rule = _rule(settings, None)
        self._special: list[tuple[NamePattern, _Rule]] = []
        dynamic = settings.section("dynamic")
        if len(dynamic.values) > MAX_PATTERNS:
            raise settings.refuse("dynamic", f"at most {MAX_PATTERNS} patterns")
        for text, override in dynamic.sections():
            if text.startswith("-:"):
                continue  # these modules are not quantized, which their tensors say too
            try:
                pattern = NamePattern(text.removeprefix("+:"))
            except ValueError as error:
                raise CheckpointError(
                    f"{dynamic.where}: {quoted(text)} {error}; get another copy of this model"
                ) from None
            self._special.append((pattern, _rule(override, self._rule)))

    def suffixes(self, parts: Parts) -> tuple[str, ...] | None:
        return ("qweight", "qzeros", "scales", "g_idx", "weight") if parts.has("qweight") else None

    def checked(self, parts: Parts) -> Weight:
        if parts.has("weight"):
            raise parts.refuse("weight", "is stored a second time as qweight")
        rule = next((r for pattern, r in self._special if pattern.matches(parts.module)), self._rule)
        high, out = parts.matrix("qweight", "I32")
        columns = _columns(parts, rule, high)
        size = rule.group_size or max(columns, 1)
        groups = -(-columns // size)
        parts.check("scales", FLOATS, (groups, out))
        if parts.has("qzeros") or not rule.symmetric:
            parts.check("qzeros", ("I32",), (groups, words(out, rule.bits)))

        def read(first: int, last: int) -> Tensor:
            scale = parts.finite("scales", parts.scale("scales"), 2.0**rule.bits).t()
            zero: Tensor | float = 2.0 ** (rule.bits - 1)
            if parts.has("qzeros"):
                zero = self._zero_points(parts.read("qzeros"), rule.bits, out).t().float()
            order = parts.column_groups("g_idx", columns, groups) if parts.has("g_idx") else None
            codes = parts.read("qweight")

            def of_rows(start: int, stop: int) -> Tensor:
                return unpack(codes[:, start:stop].t(), rule.bits, columns)

            return decode(columns, first, last, of_rows, Grid(scale, (1, size), zero, order))

        return Weight((out, columns), read)

    def _zero_points(self, packed: Tensor, bits: int, out: int) -> Tensor:
        if self._second_layout:
            return unpack(packed, bits, out)
        if bits in _ONES:
            # GPTQModel takes 1 from every code by one subtraction from the word, and a zero point of
            # 0 borrows from its neighbour; one addition to the word gives that back.
            return unpack(packed + _ONES[bits], bits, out)
        return (unpack(packed, bits, out) + 1) & (2**bits - 1)


def _rule(settings: Settings, base: _Rule | None) -> _Rule:
    bits = settings.whole("bits", min(_WIDTHS), max(_WIDTHS), base.bits if base else None)
    if bits not in _WIDTHS:
        raise settings.refuse("bits", ", ".join(map(str, _WIDTHS)))
    inherited = base is not None and "group_size" not in settings
    size = base.group_size if base is not None and inherited else settings.group_size(128)
    return _Rule(bits, size, settings.flag("sym", base.symmetric if base else True))


def _columns(parts: Parts, rule: _Rule, high: int) -> int:
    """The inputs of the layer: those of `g_idx`, since the last word may be part full."""
    if not parts.has("g_idx"):
        return high * 32 // rule.bits
    shape = parts.info("g_idx").shape
    columns = shape[0] if len(shape) == 1 else -1
    if words(columns, rule.bits) != high:
        raise parts.refuse("g_idx", f"is {list(shape)}, but qweight has {high} rows of {rule.bits}-bit codes")
    parts.check("g_idx", ("I32", "I64"), (columns,))
    return columns
