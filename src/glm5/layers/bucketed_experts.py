"""A bank of small experts in a few batched products, with a hand-written backward: what training swaps in.

Letters as in `glm5.model.moe`, and P padded rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glm5.model.moe import ExpertBank

# Experts at most this large are multiplied in batches (their weights are copied together first);
# larger ones one by one, straight from where they lie. 1 Mi weights = 4 MB in fp32.
SMALL_EXPERT_WEIGHTS = 1 << 20
# Experts are sorted by load and padded within buckets: fewer, fuller products against less padding.
EXPERTS_PER_BUCKET = 16


class BucketedBank(nn.Module):
    """The same parameters and results as the `ExpertBank` it takes the place of."""

    def __init__(self, bank: ExpertBank) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = bank.gate_up_proj, bank.down_proj

    def forward(self, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        kind = x_TD.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_TD.dtype
        out: Tensor = BucketedExperts.apply(
            x_TD, topk_ids_TK, topk_weights_TK, self.gate_up_proj, self.down_proj, dtype
        )
        return out


def is_small(bank: Any) -> bool:
    """Are these experts multiplied faster in batches than one by one?"""
    return bank.gate_up_proj[0].numel() <= SMALL_EXPERT_WEIGHTS


class _Buckets(NamedTuple):
    """How T*K assignments lie in P padded rows: experts by rising load, equal rows in a bucket."""

    spans: list[tuple[int, int, int]]  # (first expert in `experts`, experts, rows each)
    experts: Tensor  # expert ids by rising load, idle experts left out
    row_token_P: Tensor  # token of each padded row; padding repeats token 0
    row_of_TK: Tensor  # padded row of each assignment


def _bucket(topk_ids_TK: Tensor, num_experts: int) -> _Buckets:
    tokens, k = topk_ids_TK.shape
    flat = topk_ids_TK.reshape(-1)
    device = flat.device
    counts = torch.bincount(flat, minlength=num_experts)
    by_load = counts.argsort(stable=True)
    loads: list[int] = counts[by_load].tolist()
    idle = sum(load == 0 for load in loads)
    experts, loads = by_load[idle:], loads[idle:]

    spans, first_rows, rows = [], [], 0
    for first in range(0, len(loads), EXPERTS_PER_BUCKET):
        bucket_loads = loads[first : first + EXPERTS_PER_BUCKET]
        each = bucket_loads[-1]
        spans.append((first, len(bucket_loads), each))
        for _ in bucket_loads:
            first_rows.append(rows)
            rows += each

    first_row_of_expert = torch.zeros(num_experts, dtype=torch.int64, device=device)
    first_row_of_expert[experts] = torch.tensor(first_rows, dtype=torch.int64, device=device)
    order = flat.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    sorted_ids = flat[order]
    rank = torch.arange(tokens * k, device=device) - starts[sorted_ids]
    row_of = torch.empty_like(order)
    row_of[order] = first_row_of_expert[sorted_ids] + rank
    row_token = torch.zeros(rows, dtype=torch.int64, device=device)
    row_token[row_of] = torch.arange(tokens, device=device).repeat_interleave(k)
    return _Buckets(spans, experts, row_token, row_of)


class BucketedExperts(torch.autograd.Function):
    """The expert bank as a few batched products, with a hand-written backward.

    Padding rows repeat token 0 and are never gathered back, so they cost time but touch no result;
    in the backward their incoming gradient is set to zero. Gathers only, no scatter-adds: the sum
    over a token's experts is always taken in the order of its top-k.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        topk_ids_TK: Tensor,
        topk_weights_TK: Tensor,
        gate_up_EFD: Tensor,
        down_EDI: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        tokens, k = topk_ids_TK.shape
        hidden, width = x_TD.shape[1], down_EDI.shape[2]
        buckets = _bucket(topk_ids_TK, gate_up_EFD.shape[0])
        rows_PD = x_TD.to(dtype).index_select(0, buckets.row_token_P)
        gate_up_PF = rows_PD.new_empty(rows_PD.shape[0], 2 * width)
        gate_up = gate_up_EFD.index_select(0, buckets.experts).to(dtype)
        down = down_EDI.index_select(0, buckets.experts).to(dtype)
        for rows, experts, shape in _walk(buckets.spans):
            torch.bmm(
                rows_PD[rows].view(*shape, hidden),
                gate_up[experts].transpose(1, 2),
                out=gate_up_PF[rows].view(*shape, -1),
            )
        gate, up = gate_up_PF.chunk(2, dim=-1)
        act_PI = F.silu(gate) * up
        out_PD = torch.empty_like(rows_PD)
        for rows, experts, shape in _walk(buckets.spans):
            torch.bmm(
                act_PI[rows].view(*shape, width),
                down[experts].transpose(1, 2),
                out=out_PD[rows].view(*shape, hidden),
            )
        picked_TKD = out_PD.index_select(0, buckets.row_of_TK).view(tokens, k, hidden)
        weights = topk_weights_TK.to(dtype)
        out_TD = torch.bmm(weights.unsqueeze(1), picked_TKD).squeeze(1)

        ctx.buckets, ctx.spans, ctx.dtypes = buckets, buckets.spans, (x_TD.dtype, topk_weights_TK.dtype)
        ctx.save_for_backward(rows_PD, gate_up_PF, picked_TKD, weights, gate_up, down)
        ctx.weight_shapes = (gate_up_EFD.shape, down_EDI.shape, gate_up_EFD.dtype)
        return out_TD.to(x_TD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_PD, gate_up_PF, picked_TKD, weights_TK, gate_up, down = ctx.saved_tensors
        buckets: _Buckets = ctx.buckets
        tokens, k, hidden = picked_TKD.shape
        width = down.shape[2]
        grad_TD = grads[0].to(rows_PD.dtype)

        grad_weights_TK = torch.bmm(picked_TKD, grad_TD.unsqueeze(2)).squeeze(2).to(ctx.dtypes[1])
        row_weight_P = rows_PD.new_zeros(rows_PD.shape[0])
        row_weight_P[buckets.row_of_TK] = weights_TK.reshape(-1)
        grad_out_PD = grad_TD.index_select(0, buckets.row_token_P)
        grad_out_PD.mul_(row_weight_P.unsqueeze(1))

        gate, up = gate_up_PF.chunk(2, dim=-1)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        act_PI = silu * up
        grad_act_PI = torch.empty_like(act_PI)
        grad_down = torch.empty_like(down)
        for rows, experts, shape in _walk(ctx.spans):
            grad_out = grad_out_PD[rows].view(*shape, hidden)
            torch.bmm(grad_out, down[experts], out=grad_act_PI[rows].view(*shape, width))
            torch.bmm(grad_out.transpose(1, 2), act_PI[rows].view(*shape, width), out=grad_down[experts])
        grad_gate = grad_act_PI * up * (sigmoid + silu * (1 - sigmoid))
        grad_gate_up_PF = torch.cat((grad_gate, grad_act_PI * silu), dim=-1)
        grad_rows_PD = grad_out_PD  # its memory is free again
        grad_gate_up = torch.empty_like(gate_up)
        for rows, experts, shape in _walk(ctx.spans):
            grad = grad_gate_up_PF[rows].view(*shape, -1)
            torch.bmm(grad, gate_up[experts], out=grad_rows_PD[rows].view(*shape, hidden))
            torch.bmm(grad.transpose(1, 2), rows_PD[rows].view(*shape, hidden), out=grad_gate_up[experts])
        grad_x = grad_rows_PD.index_select(0, buckets.row_of_TK).view(tokens, k, hidden).sum(dim=1)
        gate_up_shape, down_shape, dtype = ctx.weight_shapes
        full_gate_up = torch.zeros(gate_up_shape, dtype=dtype, device=grad_x.device)
        full_down = torch.zeros(down_shape, dtype=dtype, device=grad_x.device)
        full_gate_up[buckets.experts] = grad_gate_up.to(dtype)
        full_down[buckets.experts] = grad_down.to(dtype)
        return grad_x.to(ctx.dtypes[0]), None, grad_weights_TK, full_gate_up, full_down, None


def _walk(spans: list[tuple[int, int, int]]) -> Any:
    """Yield (row slice, expert slice, (experts, rows each)) of each bucket."""
    row = 0
    for first, experts, each in spans:
        yield slice(row, row + experts * each), slice(first, first + experts), (experts, each)
        row += experts * each
