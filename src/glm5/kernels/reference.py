"""What the kernels compute, in plain PyTorch: the judge of their tests and the text to read first.

Letters: T tokens, D width of the input, G groups, R rows of a weight matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def quantize_activations(x_TD: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """int8 codes [T, D] and fp32 scales [T, D / block]; a block's largest magnitude becomes 127."""
    blocks = x_TD.float().unflatten(1, (-1, block))
    peak = blocks.abs().amax(dim=2, keepdim=True)
    # A tensor divided by a tensor: torch takes a number divided by one as a product with its reciprocal.
    inverse = torch.where(peak > 0, torch.full_like(peak, 127.0) / peak, 0.0)
    codes = (blocks * inverse).round().to(torch.int8)
    return codes.flatten(1), (peak / 127.0).squeeze(2)


def integer_linear(x_TD: Tensor, codes_RD: Tensor, scales_RG: Tensor, block: int, bits: int = 4) -> Tensor:
    """x W^T through int8 activations, fp32 [T, R].

    Sums are exact within a block; block b, in rising order, adds to partial sum b % 16, every operation
    rounded to fp32, and halves of the partial sums are added onto halves. 8-bit codes in blocks of 64
    have 8 partial sums.
    """
    partial = 8 if bits == 8 and block == 64 else 16
    acts, act_scales = quantize_activations(x_TD, block)
    tokens, width = acts.shape
    group = width // scales_RG.shape[1]
    sums_PTR = torch.zeros(partial, tokens, codes_RD.shape[0], dtype=torch.float32)
    for b in range(width // block):
        columns = slice(b * block, (b + 1) * block)
        exact = acts[:, columns].float() @ codes_RD[:, columns].float().T  # integers below 2^24
        sums_PTR[b % partial] += exact * (act_scales[:, b, None] * scales_RG[:, b * block // group].float())
    while len(sums_PTR) > 1:
        low, high = sums_PTR.chunk(2)
        sums_PTR = low + high
    return sums_PTR[0]


def feed_forward(x_TD: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate x) * up x), fp32."""
    x = x_TD.float()
    return F.linear(F.silu(F.linear(x, gate.float())) * F.linear(x, up.float()), down.float())


def mixture(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: list[tuple[Tensor, Tensor, Tensor]]
) -> Tensor:
    """sum_k weight_k * feed_forward of expert k, fp32 [T, D]."""
    out = torch.zeros(x_TD.shape, dtype=torch.float32)
    for expert, matrices in enumerate(experts):
        token, place = (ids_TK == expert).nonzero(as_tuple=True)
        if len(token):
            out[token] += weights_TK[token, place, None] * feed_forward(x_TD[token], *matrices)
    return out
