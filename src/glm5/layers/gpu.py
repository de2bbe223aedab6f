"""MLA's absorbed form and the indexer of a model on a GPU, around the kernels.

What comes before and after them (projections, rotations, W_UK and W_UV) stays PyTorch's.
Letters: B rows, T queries, N = B T, S slots, H heads, C latent + rotary, K selected.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm5.kernels import cuda
from glm5.kernels.cpu import Slots
from glm5.layers.selection import SlotSelection, query_mask, query_rows, visible_slots
from glm5.model.attention import MultiHeadLatentAttention
from glm5.model.indexer import Indexer, Selection
from glm5.model.masks import Visibility
from glm5.model.rotary import Rotation


def absorbed(
    attention: MultiHeadLatentAttention, kv_b: Tensor, q_nope: Tensor, q_rope: Tensor, latents_BSC: Tensor,
    visible: Visibility, selection: Selection | None,
) -> Tensor:  # fmt: skip
    """What `MultiHeadLatentAttention._absorbed` computes, [B, T, H, v], reading the cache once.

    kv_b: the weight of kv_b_proj in the dtype of the queries.
    """
    batch, queries, heads, nope = q_nope.shape
    count, device = batch * queries, q_nope.device
    up = kv_b.view(heads, nope + attention.value_dim, attention.latent_dim)
    w_uk, w_uv = up.split_with_sizes([nope, attention.value_dim], dim=1)
    q_latent = torch.bmm(q_nope.reshape(count, heads, nope).transpose(0, 1), w_uk).transpose(0, 1)
    q_NHC = torch.cat((q_latent, q_rope.reshape(count, heads, -1)), dim=-1)
    mask = None
    if isinstance(selection, SlotSelection):
        chosen = selection.chosen
    else:
        rule = visible if selection is None else selection
        mask = None if rule.mask_BTS is None else query_mask(rule.mask_BTS, batch, queries)
        counts = torch.full((count,), visible.num_keys, dtype=torch.int32, device=device)
        if mask is None and visible.is_causal:
            last = torch.arange(1, queries + 1, dtype=torch.int32, device=device)
            counts = (last + (visible.num_keys - queries)).repeat(batch)
        chosen = Slots(None, counts)
    mixed_NHR = cuda.attend(
        q_NHC, latents_BSC, query_rows(batch, queries, device), chosen, latent=attention.latent_dim,
        scale=attention.scale, visible_NS=mask,
    )  # fmt: skip
    out = torch.bmm(mixed_NHR.transpose(0, 1), w_uv.transpose(1, 2))
    return out.transpose(0, 1).reshape(batch, queries, heads, attention.value_dim)


class GpuIndexer(Indexer):
    """The indexer whose scores and choice run in the kernels when its input is on a GPU."""

    @classmethod
    def of(cls, indexer: Indexer) -> GpuIndexer:
        indexer.__class__ = cls
        assert isinstance(indexer, GpuIndexer)
        return indexer

    def choose(
        self, x_BTD: Tensor, q_latent_BTR: Tensor, keys_BSd: Tensor, angles: Rotation, visible: Visibility
    ) -> Selection:
        if not cuda.runs_here(x_BTD):
            return super().choose(x_BTD, q_latent_BTR, keys_BSd, angles, visible)
        batch, queries, _ = x_BTD.shape
        device = x_BTD.device
        chosen = cuda.select(
            self.queries(q_latent_BTR, angles).flatten(0, 1), self.head_weights(x_BTD).flatten(0, 1),
            keys_BSd, query_rows(batch, queries, device), self.topk,
            visible_slots(visible, batch, queries, device),
        )  # fmt: skip
        return SlotSelection(chosen, batch, keys_BSd.shape[1], self.topk)
