"""DSA's choice of slots: index scores of every cached token, and the best K of them.

The rule for equal scores is the model's: the lowest slot first. It is in the number that is sorted:
the score's bits in an order of integers, and below them the slot counted down, so that no two are
equal and whatever `torch.topk` does with ties does not matter.
Letters: N queries, B cache rows, S slots, H index heads, d their width, K selected.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm5.kernels.cuda.launch import ACTIVATIONS, ceil_div, need, next_power, on_its_device, product_type
from glm5.kernels.cuda.programs import index as programs
from glm5.kernels.slots import Slots

SLOTS = 64  # of a program
UNSEEN = -(1 << 63)


@on_its_device
def select(
    q_NHd: Tensor, weights_NH: Tensor, cache_BSd: Tensor, rows: Tensor, topk: int,
    visible_NS: Tensor | None = None,
) -> Slots:  # fmt: skip
    """The topk visible slots of largest index score, in rising order; equal scores: the lowest slot.

    Slots int32 [N, min(topk, S)] of which the first `counts` [N] are valid; the others are S.
    q, cache: see `index_order`. Raises ValueError when sizes contradict each other.
    """
    order_NS = index_order(q_NHd, weights_NH, cache_BSd, rows, visible_NS)
    keys = order_NS.shape[1]
    best = order_NS.topk(min(topk, keys), dim=1, sorted=False).values
    seen = best != UNSEEN
    slots = torch.where(seen, 0xFFFFFFFF - (best & 0xFFFFFFFF), keys)
    return Slots(slots.to(torch.int32).sort(dim=1).values, seen.sum(dim=1, dtype=torch.int32))


@on_its_device
def index_order(
    q_NHd: Tensor, weights_NH: Tensor, cache_BSd: Tensor, rows: Tensor, visible_NS: Tensor | None = None
) -> Tensor:
    """int64 [N, S] that rises with sum_h w_h relu(q_h . k_s), fp32, and falls with s; unseen: the least.

    q: float [N, H, d], rotated. weights: fp32 [N, H], scaled. cache: like q, [B, S, d].
    rows: int32 [N]. visible: bool [N, S]; None = every slot. NaN scores have no place in this order.
    """
    count, heads, width = q_NHd.shape
    keys = cache_BSd.shape[1]
    need(q_NHd.dtype in ACTIVATIONS and cache_BSd.dtype == q_NHd.dtype, "query and keys differ in dtype")
    need(cache_BSd.shape[2] == width and cache_BSd.stride(2) == 1, "keys are not contiguous or as wide")
    need(tuple(weights_NH.shape) == (count, heads), "weights are not [N, H]")
    need(weights_NH.dtype == torch.float32, "weights are not fp32")
    need(tuple(rows.shape) == (count,), "rows are not [N]")
    if visible_NS is not None:
        fits = tuple(visible_NS.shape) == (count, keys) and visible_NS.dtype == torch.bool
        need(fits, "visible is not bool [N, S]")
        visible_NS = visible_NS.contiguous()
    order_NS = torch.empty(count, keys, dtype=torch.int64, device=q_NHd.device)
    if order_NS.numel():
        programs.index[ceil_div(keys, SLOTS), count](
            q_NHd.contiguous(), weights_NH.contiguous(), cache_BSd, rows.contiguous(), visible_NS, order_NS,
            heads, keys, cache_BSd.stride(0), cache_BSd.stride(1), width=width,
            width_block=max(16, next_power(width)), head_block=max(16, next_power(heads)), slot_block=SLOTS,
            product=product_type(q_NHd.dtype), num_warps=4,
        )  # fmt: skip
    return order_NS
