"""MLA's absorbed form and the indexer of a model on a GPU, around the kernels.

What comes before and after them (projections, rotations, W_UK and W_UV) stays PyTorch's.
Letters: B rows, T queries, N = B T, S slots, H heads, C latent + rotary, K selected.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glm5.kernels import cuda
from glm5.kernels.cpu import Slots
from glm5.model.attention import MultiHeadLatentAttention
from glm5.model.indexer import Indexer, Selection
from glm5.model.masks import Visibility
from glm5.model.rotary import Rotation, rotate


def absorbed(
    attention: MultiHeadLatentAttention, q_nope: Tensor, q_rope: Tensor, latents_BSC: Tensor,
    visible: Visibility, selection: Selection | None,
) -> Tensor:  # fmt: skip
    """What `MultiHeadLatentAttention._absorbed` computes, [B, T, H, v], reading the cache once."""
    from glm5.kernels.attention import SlotSelection

    batch, queries, heads, nope = q_nope.shape
    count, device = batch * queries, q_nope.device
    up = attention.kv_b_proj.weight.view(heads, nope + attention.value_dim, attention.latent_dim)
    w_uk, w_uv = up.split_with_sizes([nope, attention.value_dim], dim=1)
    q_latent = torch.bmm(q_nope.reshape(count, heads, nope).transpose(0, 1), w_uk).transpose(0, 1)
    q_NHC = torch.cat((q_latent, q_rope.reshape(count, heads, -1)), dim=-1)
    mask = None
    if isinstance(selection, SlotSelection):
        chosen = selection.chosen
    else:
        mask = _seen(visible if selection is None else selection, batch, queries)
        counts = torch.full((count,), visible.num_keys, dtype=torch.int32, device=device)
        if mask is None and visible.is_causal:
            last = torch.arange(1, queries + 1, dtype=torch.int32, device=device)
            counts = (last + (visible.num_keys - queries)).repeat(batch)
        chosen = Slots(None, counts)
    mixed_NHR = cuda.attend(
        q_NHC, latents_BSC, _rows(batch, queries, device), chosen, latent=attention.latent_dim,
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

    def forward(
        self,
        x_BTD: Tensor,
        q_latent_BTR: Tensor,
        angles: Rotation,
        visible: Visibility,
        cache: Any | None = None,
    ) -> Selection | None:
        if not cuda.runs_here(x_BTD):
            return super().forward(x_BTD, q_latent_BTR, angles, visible, cache)
        from glm5.kernels.attention import SlotSelection

        batch, queries, _ = x_BTD.shape
        keys_BSd = self.keys(x_BTD, angles)
        if cache is not None:
            keys_BSd = cache.append_index_keys(keys_BSd)
        num_keys = keys_BSd.shape[1]
        if num_keys <= self.topk:
            return None
        q = self.wq_b(q_latent_BTR).view(batch, queries, self.num_heads, self.head_dim)
        rotary, rest = q.split_with_sizes([self.rotary_dim, self.head_dim - self.rotary_dim], dim=-1)
        q = torch.cat((rotate(rotary, angles, interleaved=self.interleaved), rest), dim=-1)
        weights = self.weights_proj(x_BTD).float() * (self.num_heads**-0.5 * self.head_dim**-0.5)
        mask = None
        if visible.is_causal:
            mask = visible.as_mask(queries, x_BTD.device).expand(batch, -1, -1).reshape(-1, num_keys)
        else:
            mask = _seen(visible, batch, queries)
        rows = _rows(batch, queries, x_BTD.device)
        chosen = cuda.select(q.flatten(0, 1), weights.flatten(0, 1), keys_BSd, rows, self.topk, mask)
        return SlotSelection(chosen, batch, num_keys, self.topk)


def _seen(rule: Visibility | Selection, batch: int, queries: int) -> Tensor | None:
    """The rule's own mask, bool [N, S]."""
    mask = rule.mask_BTS
    return None if mask is None else mask.expand(batch, -1, -1).reshape(batch * queries, -1)


def _rows(batch: int, queries: int, device: torch.device) -> Tensor:
    rows = torch.arange(batch, dtype=torch.int32, device=device)
    return rows.unsqueeze(1).expand(-1, queries).reshape(-1)
