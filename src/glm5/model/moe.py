"""Mixture of experts: the router, the bank of routed experts, the shared expert.

Router arithmetic is fp32 whatever the weights are. Letters: T tokens (batch and time flattened),
D hidden, E experts, K experts per token, I moe_intermediate_size, P padded rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glm5.config import ModelConfig
from glm5.layers.torch_cpu import Linear

# Experts at most this large are multiplied in batches (their weights are copied together first);
# larger ones one by one, straight from where they lie. 1 Mi weights = 4 MB in fp32.
SMALL_EXPERT_WEIGHTS = 1 << 20
# Experts are sorted by load and padded within buckets: fewer, fuller products against less padding.
EXPERTS_PER_BUCKET = 16


class Routing(NamedTuple):
    """Where each token goes. scores: sigmoid of the logits, fp32 [T, E]."""

    topk_ids_TK: Tensor
    topk_weights_TK: Tensor
    scores_TE: Tensor


class Router(nn.Module):
    """Sigmoid scores; the correction bias chooses, the plain scores weigh (SPEC 5.1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_experts_per_tok = config.num_experts_per_tok
        self.n_group, self.topk_group = config.n_group, config.topk_group
        self.norm_topk_prob = config.norm_topk_prob
        self.routed_scaling_factor = config.routed_scaling_factor
        # Ours, training only: the share of experts hidden from each token (0 = as published).
        self.expert_dropout = 0.0
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias: Tensor
        self.register_buffer(
            "e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32)
        )

    def forward(self, x_TD: Tensor) -> Routing:
        scores_TE = self._scores(x_TD)
        choice_TE = scores_TE.detach() + self.e_score_correction_bias
        if self.n_group > 1:
            choice_TE = self._keep_best_groups(choice_TE)
        if self.training and self.expert_dropout > 0:
            hidden = torch.rand_like(choice_TE) < self.expert_dropout
            choice_TE = choice_TE.masked_fill(hidden, -1e4)  # still choosable if too few remain
        topk_ids_TK = choice_TE.topk(self.num_experts_per_tok, dim=-1).indices
        weights_TK = scores_TE.gather(1, topk_ids_TK)
        if self.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return Routing(topk_ids_TK, weights_TK * self.routed_scaling_factor, scores_TE)

    def _scores(self, x_TD: Tensor) -> Tensor:
        kind = x_TD.device.type
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return F.linear(x_TD.float(), self.weight.float()).sigmoid()
        return F.linear(x_TD.float(), self.weight.float()).sigmoid()

    def _keep_best_groups(self, choice_TE: Tensor) -> Tensor:
        """Only the `topk_group` groups with the largest sum of their two best scores compete."""
        grouped = choice_TE.view(choice_TE.shape[0], self.n_group, -1)
        group_scores = grouped.topk(2, dim=-1).values.sum(dim=-1)
        best = group_scores.topk(self.topk_group, dim=-1).indices
        keep = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, best, True)
        return grouped.masked_fill(~keep.unsqueeze(-1), float("-inf")).flatten(1)


class ExpertBank(nn.Module):
    """All routed experts of a layer, gate and up stacked as `transformers` does in memory."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """sum_k weight_k * down(silu(gate x) * up x), [T, D]."""
        small = self.gate_up_proj.shape[1] * self.gate_up_proj.shape[2] <= SMALL_EXPERT_WEIGHTS
        if (
            small
            and x_TD.shape[0] * topk_ids_TK.shape[1] <= EXPERTS_PER_BUCKET
            and not torch.is_grad_enabled()
        ):
            return self._few_tokens(x_TD, topk_ids_TK, topk_weights_TK)
        if small:
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x_TD.dtype
            if x_TD.device.type != "cpu" and torch.is_autocast_enabled(x_TD.device.type):
                dtype = torch.get_autocast_dtype(x_TD.device.type)
            return BucketedExperts.apply(
                x_TD, topk_ids_TK, topk_weights_TK, self.gate_up_proj, self.down_proj, dtype
            )
        return self._one_by_one(x_TD, topk_ids_TK, topk_weights_TK)

    def _few_tokens(self, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        tokens, k = topk_ids_TK.shape
        ids = topk_ids_TK.reshape(-1)
        gate_up = self.gate_up_proj.index_select(0, ids)
        # The row on the left: with it on the right, MKL takes ten times as long (measured).
        rows = x_TD.unsqueeze(1).expand(tokens, k, -1).reshape(tokens * k, 1, -1)
        gate, up = torch.bmm(rows, gate_up.transpose(1, 2)).chunk(2, dim=-1)
        out = torch.bmm(F.silu(gate) * up, self.down_proj.index_select(0, ids).transpose(1, 2))
        out = out.view(tokens, k, -1)
        return torch.bmm(topk_weights_TK.to(out.dtype).unsqueeze(1), out).squeeze(1)

    def _one_by_one(self, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        tokens, k = topk_ids_TK.shape
        order = topk_ids_TK.reshape(-1).argsort(stable=True)
        counts = torch.bincount(topk_ids_TK.reshape(-1), minlength=self.gate_up_proj.shape[0]).tolist()
        rows = x_TD.index_select(0, order // k)
        outputs, start = [], 0
        for expert, count in enumerate(counts):
            if count == 0:
                continue
            gate, up = F.linear(rows[start : start + count], self.gate_up_proj[expert]).chunk(2, dim=-1)
            outputs.append(F.linear(F.silu(gate) * up, self.down_proj[expert]))
            start += count
        out_NC = torch.cat(outputs)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(tokens * k, device=order.device))
        out = out_NC.index_select(0, back).view(tokens, k, -1)
        return torch.einsum("tk,tkd->td", topk_weights_TK.to(out.dtype), out)


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


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MixtureOfExperts(nn.Module):
    """Routed experts plus the ungated shared expert.

    `last_routing` keeps the routing of the latest forward pass for the balance loss, the bias
    update and routing statistics, when `record_routing` is set.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = ExpertBank(config)
        self.shared_experts = (
            MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)
            if config.n_shared_experts
            else None
        )
        self.record_routing = False
        self.last_routing: Routing | None = None

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        routing = self.gate(x_TD)
        if self.record_routing:
            self.last_routing = routing
        out = self.experts(x_TD, routing.topk_ids_TK, routing.topk_weights_TK)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x_TD)
        return out.view_as(x)
