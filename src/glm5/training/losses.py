"""The losses of a training step: language model, MTP, sequence-level balance, indexer.

Letters: B rows, T tokens, D hidden, V vocabulary, E experts, S keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from glm5.model.attention import MultiHeadLatentAttention
from glm5.model.masks import Visibility
from glm5.model.rotary import Rotation
from glm5.model.routing import Routing

IGNORED = -100
# Rows at a time: their logits stay in the cache between the passes over them.
_CHUNK = 256


class LinearCrossEntropy(torch.autograd.Function):
    """Cross entropy of `hidden @ weight.T`, a chunk of rows at a time.

    The logits of a large vocabulary never exist as a whole: each chunk's gradient is made while its
    logits are at hand (as in Liger Kernel's fused linear cross entropy).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, count: Tensor, dtype: torch.dtype
    ) -> Tensor:
        weight = weight_VD.to(dtype)
        grad_hidden = torch.zeros_like(hidden_ND, dtype=torch.float32)
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        for rows in torch.arange(hidden_ND.shape[0], device=hidden_ND.device).split(_CHUNK):
            chunk = slice(int(rows[0]), int(rows[-1]) + 1)
            hidden, targets = hidden_ND[chunk].to(dtype), targets_N[chunk]
            learned = (targets != IGNORED).float()
            classes = targets.clamp(min=0).unsqueeze(1)
            log_probs = F.linear(hidden, weight).log_softmax(dim=-1, dtype=torch.float32)
            total -= (log_probs.gather(1, classes).squeeze(1) * learned).sum()
            grad = log_probs.exp_()
            grad.scatter_add_(1, classes, grad.new_full(classes.shape, -1.0))
            grad = grad.to(dtype)
            # What each row counts is multiplied in on the narrow side.
            row_weight = (learned / count).unsqueeze(1)
            grad_hidden[chunk] = (grad @ weight).float() * row_weight
            grad_weight += (grad.T @ (hidden * row_weight.to(dtype))).float()
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype
        return total / count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale, (hidden_dtype, weight_dtype) = grads[0], ctx.dtypes
        return (
            (grad_hidden * scale).to(hidden_dtype),
            (grad_weight * scale).to(weight_dtype),
            None,
            None,
            None,
        )


def linear_cross_entropy(
    hidden: Tensor, weight_VD: Tensor, targets: Tensor, count: Tensor | None = None
) -> Tensor:
    """Cross entropy summed over targets that are not IGNORED, over `count` of them; fp32 scalar.

    hidden: [..., D]; targets: int64 [...]. count: None = those of this call, so that the result is their
    mean; the whole step's where a step is cut into parts. Products are taken in autocast's dtype where it
    is on.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight_VD.dtype
    count = (targets != IGNORED).sum() if count is None else count
    loss: Tensor = LinearCrossEntropy.apply(
        hidden.flatten(0, -2), weight_VD, targets.flatten(), count.clamp(min=1), dtype
    )
    return loss


def shifted_targets(ids_BT: Tensor, documents_BT: Tensor, learned_BT: Tensor, ahead: int) -> Tensor:
    """The token `ahead` places on, IGNORED where that is another document or not to be learned."""
    targets = torch.full_like(ids_BT, IGNORED)
    same = (documents_BT[:, ahead:] == documents_BT[:, :-ahead]) & (documents_BT[:, ahead:] >= 0)
    good = same & learned_BT[:, ahead:]
    targets[:, :-ahead] = torch.where(good, ids_BT[:, ahead:], IGNORED)
    return targets


def balance_loss(routing: Routing, tokens_BT: Tensor, rows: int | None = None) -> Tensor:
    """Sum_e f_e P_e, mean over the rows: 1 when even (GLM-4.5 report; DeepSeek-V3, eq. 17-20).

    f_e: how often a row's tokens chose expert e, relative to an even share; P_e: mean share of its
    score. tokens: bool [B, T]; places that are no tokens count nowhere. rows: None = B; the whole step's
    where a step is cut into parts.
    """
    batch, length = tokens_BT.shape
    scores = routing.scores_TE.view(batch, length, -1)
    ids = routing.topk_ids_TK.view(batch, length, -1)
    counted = tokens_BT.float()
    there = counted.sum(dim=1).clamp(min=1).unsqueeze(1)
    chosen = torch.zeros(batch, scores.shape[2], device=ids.device).scatter_add_(
        1, ids.flatten(1), counted.unsqueeze(2).expand(-1, -1, ids.shape[2]).flatten(1)
    )
    frequency = chosen * scores.shape[2] / (there * ids.shape[2])
    share = (scores / scores.sum(dim=-1, keepdim=True) * counted.unsqueeze(2)).sum(dim=1) / there
    return (frequency * share).sum() / (batch if rows is None else rows)


def expert_loads(routing: Routing, tokens_BT: Tensor) -> Tensor:
    """Tokens each expert got, fp32 [E]; places that are no tokens are not counted."""
    ids = routing.topk_ids_TK[tokens_BT.flatten()]
    return torch.bincount(ids.flatten(), minlength=routing.scores_TE.shape[1]).float()


@torch.no_grad()
def update_router_bias(bias_E: Tensor, loads_E: Tensor, step: float) -> None:
    """Loss-free balancing: b += step * sign(mean load - load) (DeepSeek, arXiv 2408.15664)."""
    bias_E += step * torch.sign(loads_E.mean() - loads_E)


def indexer_loss(
    served: list[tuple[MultiHeadLatentAttention, Tensor]],
    angles: Rotation,
    visible: Visibility,
    learned_BT: Tensor,
    count: Tensor | None = None,
) -> Tensor:
    """KL(p || softmax I) of one indexer, over all visible tokens (DeepSeek-V3.2, section 2.1).

    served: the attention that owns the indexer, then those that share its choice, each with its
    (detached) input. p is the attention of all their heads, summed and normalized; nothing but
    the indexer receives a gradient. count: what the sum is divided by; None = the learned tokens here.
    """
    mask = visible.as_mask(learned_BT.shape[1], learned_BT.device)
    with torch.no_grad():
        target = torch.stack(
            [attention.probabilities(x, angles, mask).sum(dim=1) for attention, x in served]
        ).sum(dim=0)
        target = target / target.sum(dim=-1, keepdim=True)
    owner, x_BTD = served[0]
    assert owner.indexer is not None
    with torch.no_grad():
        q_latent = owner.query_latent(x_BTD)
    scores = owner.indexer.scores(x_BTD, q_latent, owner.indexer.keys(x_BTD, angles), angles)
    predicted = scores.masked_fill(~mask, float("-inf")).log_softmax(dim=-1).masked_fill(~mask, 0.0)
    divergence = (target * (target.clamp(min=1e-20).log() - predicted)).sum(dim=-1)
    count = learned_BT.sum() if count is None else count
    return (divergence * learned_BT).sum() / count.clamp(min=1)
