"""The official FP8 of GLM-5: e4m3 weights with one fp32 scale a 128x128 block.

W = fp8 * scale; the stored name is `weight_scale_inv` all the same.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor
from torch.nn import functional as F

from glm5.errors import CheckpointError

BLOCK = 128
FP8_MAX = 448.0
SCALE_SUFFIX = "_scale_inv"

_QUANTIZED = re.compile(
    r"\.(q_a_proj|q_b_proj|q_proj|k_proj|v_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj|wq_b|wk"
    r"|gate_proj|up_proj|down_proj)\.weight$"
)


def is_quantized(name: str) -> bool:
    """Whether the official FP8 checkpoints store this tensor in FP8."""
    return _QUANTIZED.search(name) is not None


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Blocks down and across of a matrix; border blocks may be part full."""
    return -(-shape[0] // BLOCK), -(-shape[1] // BLOCK)


def block_quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] to (e4m3 [out, in], fp32 scales [ceil(out/128), ceil(in/128)]).

    A block's largest magnitude lands on 448; an all-zero block gets scale 1. Scales are normal
    numbers: the peaks of blocks below 448 * 2^-126 land lower.
    Raises CheckpointError when the weight is not finite.
    """
    rows, columns = weight.shape
    down, across = scale_shape((rows, columns))
    padded = F.pad(weight.float(), (0, across * BLOCK - columns, 0, down * BLOCK - rows))
    blocks = padded.reshape(down, BLOCK, across, BLOCK)
    peak = blocks.abs().amax(dim=(1, 3))
    if not torch.isfinite(peak).all():
        raise CheckpointError("a weight is infinite or NaN and cannot be stored in FP8")
    smallest = torch.finfo(torch.float32).tiny
    scale = torch.where(peak > 0, (peak / FP8_MAX).clamp(min=smallest), 1.0)
    codes = (blocks / scale[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    codes = codes.view(down * BLOCK, across * BLOCK)[:rows, :columns]
    return codes.contiguous(), scale


def block_dequantize(
    codes: Tensor, scale: Tensor, block: tuple[int, int] = (BLOCK, BLOCK), out: Tensor | None = None
) -> Tensor:
    """e4m3 [out, in] and its block scales to `out` (any float dtype), or to a new fp32 matrix."""
    rows, columns = codes.shape
    weight = torch.empty_like(codes, dtype=torch.float32) if out is None else out
    # One row of blocks at a time, so that the matrix never exists in fp32 beside `out`.
    for index, first in enumerate(range(0, rows, block[0])):
        across = scale[index].float()  # [1] meets every column as it is
        if columns > block[1]:
            across = across.repeat_interleave(block[1])[:columns]
        band = slice(first, first + block[0])
        weight[band] = codes[band].to(torch.float32).mul_(across)
    return weight
