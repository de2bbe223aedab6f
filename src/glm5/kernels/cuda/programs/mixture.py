"""Programs of `glm5.kernels.cuda.mixture`, where the letters are said."""

# No `from __future__ import annotations` in files with programs: Triton reads their annotations.
import triton
import triton.language as tl

from glm5.kernels.cuda.programs.codes import band, unit_product


@triton.jit
def few_gate_up(
    x_ptr, words_ptr, scales_ptr, gate_words, gate_scales, up_words, up_scales, ids_ptr, out_ptr,
    rows, units, row_words, groups, tiles, stride_words, stride_scales, topk: tl.constexpr,
    bits: tl.constexpr, unit_columns: tl.constexpr, units_per_group: tl.constexpr, tile_units: tl.constexpr,
    band_rows: tl.constexpr,
):  # fmt: skip
    assignment = tl.program_id(0)
    expert = tl.load(ids_ptr + assignment).to(tl.int64)
    row = tl.program_id(1) * band_rows + tl.arange(0, band_rows)
    words_ptr += expert * stride_words
    scales_ptr += expert * stride_scales
    x_ptr += assignment // topk * units * unit_columns
    gate, _, _, _ = band(
        words_ptr + gate_words, scales_ptr + gate_scales, row * row_words, row * groups, row < rows,
        x_ptr, x_ptr, x_ptr, x_ptr, 0, tiles, units, bits, unit_columns, units_per_group, tile_units, 1,
    )  # fmt: skip
    up, _, _, _ = band(
        words_ptr + up_words, scales_ptr + up_scales, row * row_words, row * groups, row < rows,
        x_ptr, x_ptr, x_ptr, x_ptr, 0, tiles, units, bits, unit_columns, units_per_group, tile_units, 1,
    )  # fmt: skip
    act = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + assignment * rows + row, act.to(out_ptr.dtype.element_ty), mask=row < rows)


@triton.jit
def few_down(
    act_ptr, words_ptr, scales_ptr, down_words, down_scales, ids_ptr, weights_ptr, out_ptr,
    rows, units, row_words, groups, tiles, stride_words, stride_scales,
    bits: tl.constexpr, unit_columns: tl.constexpr, units_per_group: tl.constexpr, tile_units: tl.constexpr,
    band_rows: tl.constexpr,
):  # fmt: skip
    assignment = tl.program_id(0)
    expert = tl.load(ids_ptr + assignment).to(tl.int64)
    row = tl.program_id(1) * band_rows + tl.arange(0, band_rows)
    act_ptr += assignment * units * unit_columns
    down, _, _, _ = band(
        words_ptr + expert * stride_words + down_words, scales_ptr + expert * stride_scales + down_scales,
        row * row_words, row * groups, row < rows, act_ptr, act_ptr, act_ptr, act_ptr, 0, tiles, units,
        bits, unit_columns, units_per_group, tile_units, 1,
    )  # fmt: skip
    weighted = down * tl.load(weights_ptr + assignment)
    tl.store(out_ptr + assignment * rows + row, weighted, mask=row < rows)


@triton.jit
def add_topk(parts_ptr, out_ptr, hidden, topk: tl.constexpr, block: tl.constexpr):
    """Rows [T K, D] to [T, D], each token's in the order of its top-k."""
    token = tl.program_id(0)
    column = tl.program_id(1) * block + tl.arange(0, block)
    total = tl.zeros((block,), tl.float32)
    for place in range(topk):
        at = (token * topk + place).to(tl.int64) * hidden + column
        total += tl.load(parts_ptr + at, mask=column < hidden, other=0.0)
    tl.store(out_ptr + token * hidden + column, total.to(out_ptr.dtype.element_ty), mask=column < hidden)


@triton.jit
def many_gate_up(
    x_ptr, words_ptr, scales_ptr, gate_words, gate_scales, up_words, up_scales, assignment_ptr, expert_ptr,
    first_ptr, count_ptr, out_ptr, rows, units, row_words, groups, stride_words, stride_scales,
    topk: tl.constexpr, bits: tl.constexpr, unit_columns: tl.constexpr, units_per_group: tl.constexpr,
    tile_tokens: tl.constexpr, tile_rows: tl.constexpr, product: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    count = tl.load(count_ptr + tile)
    if count == 0:
        return
    expert = tl.load(expert_ptr + tile).to(tl.int64)
    words_ptr += expert * stride_words
    scales_ptr += expert * stride_scales
    place = tl.arange(0, tile_tokens)
    here = place < count
    sorted_place = tl.load(first_ptr + tile) + place
    token = tl.load(assignment_ptr + sorted_place, mask=here, other=0) // topk
    row = tl.program_id(1) * tile_rows + tl.arange(0, tile_rows)
    in_rows = row < rows
    column = tl.arange(0, unit_columns)
    columns = units * unit_columns
    gate = tl.zeros((tile_tokens, tile_rows), tl.float32)
    up = tl.zeros((tile_tokens, tile_rows), tl.float32)
    for unit in range(units):
        at = token.to(tl.int64)[:, None] * columns + (unit * unit_columns + column)[None, :]
        x = tl.load(x_ptr + at, mask=here[:, None], other=0.0).to(product)
        group = row * groups + unit // units_per_group
        gate += unit_product(
            x, words_ptr + gate_words, row * row_words, scales_ptr + gate_scales, group, in_rows, unit,
            bits, unit_columns, product,
        )  # fmt: skip
        up += unit_product(
            x, words_ptr + up_words, row * row_words, scales_ptr + up_scales, group, in_rows, unit,
            bits, unit_columns, product,
        )  # fmt: skip
    act = gate * tl.sigmoid(gate) * up
    at = sorted_place.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(out_ptr + at, act.to(out_ptr.dtype.element_ty), mask=here[:, None] & in_rows[None, :])


@triton.jit
def many_down(
    act_ptr, words_ptr, scales_ptr, down_words, down_scales, assignment_ptr, expert_ptr, first_ptr, count_ptr,
    weights_ptr, out_ptr, rows, units, row_words, groups, stride_words, stride_scales,
    bits: tl.constexpr, unit_columns: tl.constexpr, units_per_group: tl.constexpr,
    tile_tokens: tl.constexpr, tile_rows: tl.constexpr, product: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    count = tl.load(count_ptr + tile)
    if count == 0:
        return
    expert = tl.load(expert_ptr + tile).to(tl.int64)
    words_ptr += expert * stride_words + down_words
    scales_ptr += expert * stride_scales + down_scales
    place = tl.arange(0, tile_tokens)
    here = place < count
    sorted_place = tl.load(first_ptr + tile) + place
    assignment = tl.load(assignment_ptr + sorted_place, mask=here, other=0)
    row = tl.program_id(1) * tile_rows + tl.arange(0, tile_rows)
    in_rows = row < rows
    column = tl.arange(0, unit_columns)
    columns = units * unit_columns
    acc = tl.zeros((tile_tokens, tile_rows), tl.float32)
    for unit in range(units):
        at = sorted_place.to(tl.int64)[:, None] * columns + (unit * unit_columns + column)[None, :]
        act = tl.load(act_ptr + at, mask=here[:, None], other=0.0).to(product)
        acc += unit_product(
            act, words_ptr, row * row_words, scales_ptr, row * groups + unit // units_per_group, in_rows,
            unit, bits, unit_columns, product,
        )  # fmt: skip
    acc *= tl.load(weights_ptr + assignment, mask=here, other=0.0)[:, None]
    at = assignment.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(out_ptr + at, acc, mask=here[:, None] & in_rows[None, :])
