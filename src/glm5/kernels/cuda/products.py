"""x W^T with W in packed integers: few rows of activations (decoding) and many (a prompt).

Few: a program reads a band of weight rows as one stream, whole 128-bit words, and meets up to four
activation rows with it; narrow matrices are split along the columns, the parts added in rising order.
Many: tiles for the tensor cores. Codes are exact there (4 or 8 bits fit any float); the scale of a
unit multiplies its fp32 sums. Letters: T rows of activations, R weight rows, U units, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm5.kernels.cuda.launch import ACTIVATIONS, ceil_div, need, on_its_device, product_type
from glm5.kernels.cuda.programs import products as programs
from glm5.kernels.cuda.tiles import BAND_ROWS, BAND_WARPS, FEW_ROWS, Units, bands_of, linear_tile, units_of


@on_its_device
def linear(
    x: Tensor, words: Tensor, scales: Tensor, *, bits: int, group: int, bias: Tensor | None = None
) -> Tensor:
    """W x + bias, [..., R] in the dtype of x; sums in fp32, rounded once.

    x: bf16, fp16 or fp32 [..., columns]. words: int32 [R, columns * bits / 32]. scales: float [R, G].
    A row of up to 8 gets the same bits whatever stands beside it; so does one of more than 8.

    Raises ValueError when sizes contradict each other or a group is no multiple of 32.
    """
    columns, rows = x.shape[-1], words.shape[0]
    units = units_of(columns, bits, group)
    need(x.dtype in ACTIVATIONS, f"activations are {x.dtype}, not a float of 16 or 32 bits")
    need(words.dtype == torch.int32 and words.is_contiguous(), "words must be contiguous int32")
    need(words.shape[1] == units.row_words, f"activations are {columns} wide, the weights are not")
    need(tuple(scales.shape) == (rows, units.groups), "scales are not [rows, groups]")
    need(scales.is_contiguous(), "scales must be contiguous")
    need(bias is None or (tuple(bias.shape) == (rows,) and bias.is_contiguous()), "bias is not [rows]")
    x_TD = x.reshape(-1, columns).contiguous()
    out_TR = torch.empty(x_TD.shape[0], rows, dtype=x.dtype, device=x.device)
    if len(x_TD):
        multiply = _few_rows if len(x_TD) <= FEW_ROWS else _many_rows
        multiply(x_TD, words, scales, units, bias, out_TR)
    return out_TR.view(*x.shape[:-1], rows)


def _few_rows(
    x_TD: Tensor, words: Tensor, scales: Tensor, units: Units, bias: Tensor | None, out_TR: Tensor
) -> None:
    tokens, rows = out_TR.shape
    bands = bands_of(rows, units)
    together = 1 if tokens == 1 else 2 if tokens == 2 else 4
    parts = out_TR
    if bands.splits > 1:
        parts = torch.empty(bands.splits, tokens, rows, dtype=torch.float32, device=out_TR.device)
    programs.few_rows[ceil_div(tokens, together), ceil_div(rows, BAND_ROWS), bands.splits](
        x_TD, words, scales, bias, parts, tokens, rows, units.across, units.row_words, units.groups,
        bands.tiles, tile_units=bands.tile_units, tiles_per_split=bands.tiles_per_split, together=together,
        band_rows=BAND_ROWS, split=bands.splits > 1, num_warps=BAND_WARPS, **units.constants(),
    )  # fmt: skip
    if bands.splits > 1:
        block = 256
        programs.add_parts[tokens, ceil_div(rows, block)](
            parts, bias, out_TR, rows, tokens * rows, splits=bands.splits, block=block
        )


def _many_rows(
    x_TD: Tensor, words: Tensor, scales: Tensor, units: Units, bias: Tensor | None, out_TR: Tensor
) -> None:
    tokens, rows = out_TR.shape
    tile = linear_tile(tokens, rows, x_TD.element_size())
    programs.many_rows[ceil_div(tokens, tile.tokens), ceil_div(rows, tile.rows)](
        x_TD, words, scales, bias, out_TR, tokens, rows, units.across, units.row_words, units.groups,
        product=product_type(x_TD.dtype), **units.constants(), **tile.constants(),
    )  # fmt: skip
