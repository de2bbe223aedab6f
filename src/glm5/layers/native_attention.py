"""MLA and its indexer on the native kernels: few queries over a cache, and prompts.

The module is `MultiHeadLatentAttention` itself with other methods: where the kernels do not apply
(gradients, other rotations, widths that are no multiples of 16) it falls back to the plain ones. On a GPU
those run with Triton's absorbed form and indexer.
Letters: B rows, T queries, N = B T, S slots, H heads, C latent + rotary, K selected.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from glm5.kernels import cpu, cuda
from glm5.layers.gpu import GpuIndexer, absorbed
from glm5.layers.packed import Movable, PackedLinear, runs_natively
from glm5.layers.selection import SlotSelection, query_mask, query_rows, visible_slots
from glm5.model.attention import MultiHeadLatentAttention
from glm5.model.indexer import Selection
from glm5.model.masks import Visibility
from glm5.model.rotary import Rotation


class NativeIndexer(GpuIndexer):
    """The indexer whose scores and choice run in the native library, for any number of queries."""

    @property
    def fits(self) -> bool:
        """Does the library know indexers of these sizes?"""
        shaped = self.num_heads <= cpu.MAX_INDEX_HEADS and self.head_dim % 16 == 0 and self.head_dim <= 256
        return self.interleaved and shaped

    def choose(
        self, x_BTD: Tensor, q_latent_BTR: Tensor, keys_BSd: Tensor, angles: Rotation, visible: Visibility
    ) -> Selection:
        if not runs_natively(x_BTD) or not self.fits:
            return super().choose(x_BTD, q_latent_BTR, keys_BSd, angles, visible)
        batch, queries, _ = x_BTD.shape
        q = self.wq_b(q_latent_BTR).view(batch * queries, self.num_heads, self.head_dim)
        turns = angles.turns.expand(batch, queries, -1).flatten(0, 1)
        chosen = cpu.select(
            q, turns, self.head_weights(x_BTD).flatten(0, 1), keys_BSd, query_rows(batch, queries, q.device),
            self.topk, visible_slots(visible, batch, queries, q.device),
        )  # fmt: skip
        return SlotSelection(chosen, batch, keys_BSd.shape[1], self.topk)


class NativeAttention(Movable, MultiHeadLatentAttention):
    """MLA whose absorbed form, index scores and selection run in the native library."""

    _kept_by_address = ("_kv_b", "_kv_b_floats")

    @classmethod
    def of(cls, attention: MultiHeadLatentAttention) -> NativeAttention:
        attention.__class__ = cls
        assert isinstance(attention, NativeAttention)
        if attention.indexer is not None:
            NativeIndexer.of(attention.indexer)
        return attention

    @cached_property
    def _kv_b(self) -> cpu.Matrix:
        layer = self.kv_b_proj
        return layer.matrix if isinstance(layer, PackedLinear) else cpu.Matrix(layer.weight.detach())

    @cached_property
    def _kv_b_floats(self) -> Tensor:
        """What a GPU multiplies by parts of: 29 MB a layer of GLM-5, unpacked once."""
        return self.kv_b_proj.weight.detach().to(self.kv_a_layernorm.weight.dtype)

    def forward(
        self,
        x_BTD: Tensor,
        angles: Rotation,
        visible: Visibility,
        cache: Any | None = None,
        selection: Selection | None = None,
    ) -> tuple[Tensor, Selection | None]:
        if cache is None or not self._applies(x_BTD, visible) or self.record_input:
            return super().forward(x_BTD, angles, visible, cache, selection)
        batch, queries, _ = x_BTD.shape
        q_latent = None if self.q_a_proj is None else self.query_latent(x_BTD)
        q = self.q_proj(x_BTD) if q_latent is None else self.q_b_proj(q_latent)
        latents_BSC = cache.append_latents(self._latents(x_BTD, angles))
        turns = angles.turns.expand(batch, queries, -1).reshape(batch * queries, -1)
        rows = query_rows(batch, queries, x_BTD.device)
        if self.indexer is not None:
            assert q_latent is not None
            selection = self.indexer(x_BTD, q_latent, angles, visible, cache)
        chosen = _slots(selection, visible, batch, queries)
        out = cpu.attend(
            q.view(batch * queries, self.num_heads, -1), self._kv_b, turns, latents_BSC, rows, chosen,
            nope=self.nope_dim, value=self.value_dim, scale=self.scale,
        )  # fmt: skip
        return self.o_proj(out.view(batch, queries, -1)), selection

    def _absorbed(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        latents_BSC: Tensor,
        visible: Visibility,
        selection: Selection | None,
    ) -> Tensor:
        if cuda.runs_here(q_nope):
            return absorbed(self, self._kv_b_floats, q_nope, q_rope, latents_BSC, visible, selection)
        return super()._absorbed(q_nope, q_rope, latents_BSC, visible, selection)

    def _applies(self, x_BTD: Tensor, visible: Visibility) -> bool:
        widths = (self.latent_dim, self.latent_dim + self.rotary_dim)
        fits = self.interleaved and all(width % 16 == 0 for width in widths)
        few = self._absorbed_is_cheaper(x_BTD.shape[1], visible.num_keys)
        return runs_natively(x_BTD) and self.kv_a_layernorm.weight.device.type == "cpu" and fits and few

    def _expanded(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        latents_BSC: Tensor,
        visible: Visibility,
        selection: Selection | None,
    ) -> Tensor:
        widths = (self.nope_dim, self.rotary_dim, self.value_dim)
        if not runs_natively(q_nope) or any(width % 16 for width in widths):
            return super()._expanded(q_nope, q_rope, latents_BSC, visible, selection)
        latent, k_rope = latents_BSC.split_with_sizes([self.latent_dim, self.rotary_dim], dim=-1)
        kv = self.kv_b_proj(latent).unflatten(-1, (self.num_heads, -1))
        k_nope, value = kv.split_with_sizes([self.nope_dim, self.value_dim], dim=-1)
        mask = visible.mask_BTS if selection is None else selection.mask_BTS
        return cpu.attend_prompt(
            q_nope, k_nope, value, scale=self.scale, q_shared_BTHr=q_rope, k_shared_BSr=k_rope,
            causal=mask is None and visible.is_causal, visible_BTS=mask,
        )  # fmt: skip


def _slots(selection: Selection | None, visible: Visibility, batch: int, queries: int) -> cpu.Slots:
    """What each query reads, as the kernels want it."""
    if isinstance(selection, SlotSelection):
        return selection.chosen
    if selection is not None:
        mask = selection.mask_BTS
    elif visible.mask_BTS is None:
        last = torch.arange(1, queries + 1) + (visible.num_keys - queries)
        counts = last if visible.is_causal else torch.full((queries,), visible.num_keys)
        return cpu.Slots(None, counts.repeat(batch).to(torch.int32))
    else:
        mask = visible.mask_BTS
    mask = query_mask(mask, batch, queries)
    counts = mask.sum(dim=1)
    order = torch.argsort(~mask, dim=1, stable=True)[:, : int(counts.max())]
    return cpu.Slots(order.to(torch.int32).contiguous(), counts.to(torch.int32))
