"""Programs of `glm5.kernels.cuda.products`, where the letters are said."""

# No `from __future__ import annotations` in files with programs: Triton reads their annotations.
import triton
import triton.language as tl

from glm5.kernels.cuda.programs.codes import band, unit_product


@triton.jit
def few_rows(
    x_ptr, words_ptr, scales_ptr, bias_ptr, out_ptr, tokens, rows, units, row_words, groups, tiles,
    bits: tl.constexpr, unit_columns: tl.constexpr, units_per_group: tl.constexpr, tile_units: tl.constexpr,
    tiles_per_split: tl.constexpr, together: tl.constexpr, band_rows: tl.constexpr, split: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * together  # fastest: its neighbours find the band in the second cache
    row = tl.program_id(1) * band_rows + tl.arange(0, band_rows)
    part = tl.program_id(2)
    columns = units * unit_columns
    last = tokens - 1
    in_rows = row < rows
    sum0, sum1, sum2, sum3 = band(
        words_ptr, scales_ptr, row * row_words, row * groups, in_rows,
        x_ptr + token * columns, x_ptr + tl.minimum(token + 1, last) * columns,
        x_ptr + tl.minimum(token + 2, last) * columns, x_ptr + tl.minimum(token + 3, last) * columns,
        part * tiles_per_split, tl.minimum(part * tiles_per_split + tiles_per_split, tiles), units,
        bits, unit_columns, units_per_group, tile_units, together,
    )  # fmt: skip
    at = (part * tokens + token) * rows + row
    if not split and bias_ptr is not None:
        bias = tl.load(bias_ptr + row, mask=in_rows, other=0.0).to(tl.float32)
        sum0, sum1, sum2, sum3 = sum0 + bias, sum1 + bias, sum2 + bias, sum3 + bias
    kind: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptr + at, sum0.to(kind), mask=in_rows)
    if together > 1:
        tl.store(out_ptr + at + rows, sum1.to(kind), mask=in_rows & (token + 1 < tokens))
    if together > 2:
        tl.store(out_ptr + at + 2 * rows, sum2.to(kind), mask=in_rows & (token + 2 < tokens))
        tl.store(out_ptr + at + 3 * rows, sum3.to(kind), mask=in_rows & (token + 3 < tokens))


@triton.jit
def add_parts(parts_ptr, bias_ptr, out_ptr, rows, size, splits: tl.constexpr, block: tl.constexpr):
    """Parts [splits, T, R] to one, in rising order."""
    row = tl.program_id(1) * block + tl.arange(0, block)
    at = tl.program_id(0) * rows + row
    total = tl.zeros((block,), tl.float32)
    for part in range(splits):
        total += tl.load(parts_ptr + part * size + at, mask=row < rows, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + row, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=row < rows)


@triton.jit
def many_rows(
    x_ptr, words_ptr, scales_ptr, bias_ptr, out_ptr, tokens, rows, units, row_words, groups,
    bits: tl.constexpr, unit_columns: tl.constexpr, units_per_group: tl.constexpr,
    tile_tokens: tl.constexpr, tile_rows: tl.constexpr, product: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * tile_tokens + tl.arange(0, tile_tokens)
    row = tl.program_id(1) * tile_rows + tl.arange(0, tile_rows)
    in_tokens, in_rows = token < tokens, row < rows
    column = tl.arange(0, unit_columns)
    columns = units * unit_columns
    acc = tl.zeros((tile_tokens, tile_rows), tl.float32)
    for unit in range(units):
        at = token.to(tl.int64)[:, None] * columns + (unit * unit_columns + column)[None, :]
        x = tl.load(x_ptr + at, mask=in_tokens[:, None], other=0.0).to(product)
        acc += unit_product(
            x, words_ptr, row * row_words, scales_ptr, row * groups + unit // units_per_group, in_rows, unit,
            bits, unit_columns, product,
        )  # fmt: skip
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + row, mask=in_rows, other=0.0).to(tl.float32)[None, :]
    at = token.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=in_tokens[:, None] & in_rows[None, :])
