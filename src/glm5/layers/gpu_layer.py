"""A decoder layer with MLA on a GPU: absorbed attention and DSA's choice by Triton kernels.

What comes before and after them (projections, rotations, W_UK and W_UV) stays PyTorch's; prompts take
PyTorch's attention where the expanded form is cheaper.
Letters: B rows, T queries, N = B T, S slots, H heads, C latent + rotary, K selected.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glm5.kernels import cuda
from glm5.kernels.slots import Slots
from glm5.layers.movable import Movable
from glm5.layers.selection import SlotSelection, query_mask, query_rows, visible_slots
from glm5.model.attention import MultiHeadLatentAttention, joined
from glm5.model.indexer import Indexer, PartSelections, Selection
from glm5.model.layer import DecoderLayer
from glm5.model.masks import Visibility
from glm5.model.step import LayerCache, Step


class GpuLayer(Movable, DecoderLayer):
    """The layer it takes the place of, with other attention where its input is on a GPU."""

    def __init__(self, layer: DecoderLayer) -> None:
        DecoderLayer.__init__(self, *layer.parts())

    def forward(
        self, x_BTD: Tensor, step: Step, selection: Selection | None
    ) -> tuple[Tensor, Selection | None]:
        if not cuda.runs_here(x_BTD):
            return super().forward(x_BTD, step, selection)
        attended, selection = self._attend(self.input_layernorm(x_BTD), step, selection)
        x_BTD = x_BTD + attended
        x_BTD = x_BTD + self.mlp(self.post_attention_layernorm(x_BTD), step.probe)
        if step.probe is not None:
            step.probe.hidden(self.index, x_BTD)
        return x_BTD, selection

    def _attend(
        self, x_BTD: Tensor, step: Step, selection: Selection | None
    ) -> tuple[Tensor, Selection | None]:
        attention: Any = self.self_attn
        if step.probe is not None:
            step.probe.attention_input(self.index, x_BTD)
        angles, cache = step.angles, step.layer_cache(self.index)
        q_latent, q_nope, q_rope = attention.queries(x_BTD, angles)
        latents_BTC = attention.latents(x_BTD, angles)
        held = [latents_BTC] if cache is None else cache.append_latents(latents_BTC)
        if attention.indexer is not None:
            selection = choose(attention.indexer, x_BTD, q_latent, step, cache)
        heads_out = []
        for number, (part, latents_BSC) in enumerate(zip(step.parts, held, strict=True)):
            q = q_nope[:, part.tokens], q_rope[:, part.tokens]
            chosen = None if selection is None else selection.of(number, part)
            if attention.absorbed_is_cheaper(q[0].shape[1], latents_BSC.shape[1]):
                dtype = attention.kv_a_layernorm.weight.dtype
                # 29 MB a layer of GLM-5, unpacked once
                kv_b = self.kept("kv_b", lambda: attention.kv_b_proj.weight.detach().to(dtype))  # noqa: B023
                heads_out.append(absorbed(attention, kv_b, *q, latents_BSC, part.visible, chosen))
            else:
                heads_out.append(attention.expanded(*q, latents_BSC, part.visible, chosen))
        return attention.o_proj(joined(heads_out).flatten(2)), selection


def can_run_on_gpu(layer: DecoderLayer) -> bool:
    """Is its attention of the kind that the kernels know?"""
    return type(layer.self_attn) is MultiHeadLatentAttention


def absorbed(
    attention: MultiHeadLatentAttention, kv_b: Tensor, q_nope: Tensor, q_rope: Tensor, latents_BSC: Tensor,
    visible: Visibility, selection: Selection | None,
) -> Tensor:  # fmt: skip
    """What `MultiHeadLatentAttention.absorbed` computes, [B, T, H, v], reading the cache once.

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


def choose(
    indexer: Indexer, x_BTD: Tensor, q_latent_BTR: Tensor, step: Step, cache: LayerCache | None
) -> Selection | None:
    """What `Indexer` chooses, with scores and choice in the kernels."""
    keys_BTd = indexer.keys(x_BTD, step.angles)
    held = [keys_BTd] if cache is None else cache.append_index_keys(keys_BTd)
    if all(keys_BSd.shape[1] <= indexer.topk for keys_BSd in held):
        return None
    queries_BTHd, weights_BTH = indexer.queries(q_latent_BTR, step.angles), indexer.head_weights(x_BTD)
    found: list[Selection] = []
    for part, keys_BSd in zip(step.parts, held, strict=True):
        own = queries_BTHd[:, part.tokens]
        batch, queries, device = *own.shape[:2], own.device
        if keys_BSd.shape[1] <= indexer.topk:
            found.append(Selection(part.visible.as_mask(queries, device), indexer.topk))
            continue
        chosen = cuda.select(
            own.flatten(0, 1), weights_BTH[:, part.tokens].flatten(0, 1), keys_BSd,
            query_rows(batch, queries, device), indexer.topk,
            visible_slots(part.visible, batch, queries, device),
        )  # fmt: skip
        found.append(SlotSelection(chosen, batch, keys_BSd.shape[1], indexer.topk))
    return found[0] if len(found) == 1 else PartSelections(found)
