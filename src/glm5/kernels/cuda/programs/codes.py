"""Codes to numbers and a band of weight rows times a few activation rows, inside a program.

A code becomes a float by being put at the top of a mantissa: with `stored` = code + half,
v = 1 + stored / 2^bits is one shift and one and-or, no conversion, and exactly
code = (v - 1.5) * 2^bits. The factor goes into the scale.

A row of words is read as units: the largest power of two of columns that divides the group (at most
64), so that a unit has one scale. Letters: N weight rows, U units, W words of a unit.
"""

# No `from __future__ import annotations` in files with programs: Triton reads their annotations.
import triton
import triton.language as tl


@triton.jit
def placed(words, number: tl.constexpr, bits: tl.constexpr):
    """1 + stored code / 2^bits of the `number`-th code in each word, fp32."""
    shift: tl.constexpr = 23 - bits - number * bits
    mask: tl.constexpr = ((1 << bits) - 1) << (23 - bits)
    moved = words << shift if shift >= 0 else words >> -shift
    return ((moved & mask) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def weight_tile(words_ptr, row_starts, in_rows, unit, bits: tl.constexpr, unit_columns: tl.constexpr):
    """One unit of some weight rows, [N, unit_columns] fp32, as code / 2^bits (exact in 16 bits too)."""
    per_word: tl.constexpr = 32 // bits
    unit_words: tl.constexpr = unit_columns // per_word
    at = unit * unit_words + tl.arange(0, unit_words)
    words = tl.load(words_ptr + row_starts[:, None] + at[None, :], mask=in_rows[:, None], other=0)
    number = tl.arange(0, per_word)
    stored = (words[:, :, None] >> (number * bits)[None, None, :]) & ((1 << bits) - 1)
    mantissa = (stored << (23 - bits)) | 0x3F800000
    return (mantissa.to(tl.float32, bitcast=True) - 1.5).reshape(row_starts.shape[0], unit_columns)


@triton.jit
def unit_product(
    x, words_ptr, row_starts, scales_ptr, group, in_rows, unit,
    bits: tl.constexpr, unit_columns: tl.constexpr, product: tl.constexpr,
):  # fmt: skip
    """x [T, unit_columns] with one unit of some weight rows, scaled; fp32 [T, N]."""
    weight = weight_tile(words_ptr, row_starts, in_rows, unit, bits, unit_columns)
    sums = tl.dot(x, tl.trans(weight.to(product)), input_precision="tf32x3")
    scale = tl.load(scales_ptr + group, mask=in_rows, other=0.0).to(tl.float32)
    return sums * (scale * (1 << bits))[None, :]


@triton.jit
def _plus_word(part, value, x_ptr, column, in_units, number: tl.constexpr):
    """part + value * the activation that meets code `number` of each word, one rounding; [N, U, W]."""
    x = tl.load(x_ptr + column + number, mask=in_units, other=0.0).to(tl.float32)
    return tl.fma(value, tl.broadcast_to(x, value.shape), part)


@triton.jit
def _offset(x_ptr, column, in_units, per_word: tl.constexpr, rows: tl.constexpr):
    """-1.5 times the sum of a word's activations, what `placed` adds too much; [N, U, W]."""
    total = tl.zeros(column.shape, tl.float32)
    for number in tl.static_range(per_word):
        total += tl.load(x_ptr + column + number, mask=in_units, other=0.0).to(tl.float32)
    return tl.broadcast_to(total * -1.5, (rows, column.shape[1], column.shape[2]))


@triton.jit
def band(
    words_ptr, scales_ptr, row_starts, scale_starts, in_rows, x0_ptr, x1_ptr, x2_ptr, x3_ptr,
    first_tile, end_tile, units, bits: tl.constexpr, unit_columns: tl.constexpr,
    units_per_group: tl.constexpr, tile_units: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    """Sums of N weight rows over tiles [first_tile, end_tile) with `rows` (1, 2, 4) activation rows.

    Four fp32 [N]; those past `rows` are zero. Every sum is its own chain of fused multiply-adds and
    one tree at the end, so it does not depend on how many stand beside it.
    """
    per_word: tl.constexpr = 32 // bits
    unit_words: tl.constexpr = unit_columns // per_word
    count: tl.constexpr = row_starts.shape[0]
    shape: tl.constexpr = (count, tile_units, unit_words)
    word = tl.arange(0, unit_words)[None, None, :]
    acc0 = tl.zeros(shape, tl.float32)
    acc1 = tl.zeros(shape, tl.float32)
    acc2 = tl.zeros(shape, tl.float32)
    acc3 = tl.zeros(shape, tl.float32)
    for tile in range(first_tile, end_tile):
        unit = (tile * tile_units + tl.arange(0, tile_units))[None, :, None]
        at = unit * unit_words + word
        column = at * per_word
        in_units = (unit < units) & (word < unit_words)
        here = in_rows[:, None, None] & (unit < units)
        scale_at = scale_starts[:, None, None] + unit // units_per_group
        words = tl.load(words_ptr + row_starts[:, None, None] + at, mask=here, other=0)
        scales = tl.load(scales_ptr + scale_at, mask=here, other=0.0).to(tl.float32) * (1 << bits)
        scales = tl.broadcast_to(scales, shape)
        part0 = _offset(x0_ptr, column, in_units, per_word, count)
        part1, part2, part3 = part0, part0, part0
        if rows > 1:
            part1 = _offset(x1_ptr, column, in_units, per_word, count)
        if rows > 2:
            part2 = _offset(x2_ptr, column, in_units, per_word, count)
            part3 = _offset(x3_ptr, column, in_units, per_word, count)
        for number in tl.static_range(per_word):
            value = placed(words, number, bits)
            part0 = _plus_word(part0, value, x0_ptr, column, in_units, number)
            if rows > 1:
                part1 = _plus_word(part1, value, x1_ptr, column, in_units, number)
            if rows > 2:
                part2 = _plus_word(part2, value, x2_ptr, column, in_units, number)
                part3 = _plus_word(part3, value, x3_ptr, column, in_units, number)
        acc0 = tl.fma(part0, scales, acc0)
        if rows > 1:
            acc1 = tl.fma(part1, scales, acc1)
        if rows > 2:
            acc2 = tl.fma(part2, scales, acc2)
            acc3 = tl.fma(part3, scales, acc3)
    return _total(acc0), _total(acc1), _total(acc2), _total(acc3)


@triton.jit
def _total(acc):
    return tl.sum(tl.sum(acc, axis=2), axis=1)
