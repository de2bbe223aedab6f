"""A decoder layer in one native call, for few tokens over a cache.

The layer is `DecoderLayer` itself with another forward. A token of a small model costs more in
calls than in arithmetic, and so do the small steps between the products of a large one. Prompts,
gradients and recorded routing take the modules one by one. In 16 bits the residual stream is
rounded once a layer instead of at each step.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from glm5.kernels import _cpu, cpu  # type: ignore[attr-defined]
from glm5.layers.native_attention import NativeAttention, NativeIndexer
from glm5.layers.packed import Movable, NativeLinear, PackedLinear, PackedMixture, PackedMLP
from glm5.layers.selection import SlotSelection
from glm5.model.indexer import Selection
from glm5.model.masks import Visibility
from glm5.model.mtp import MTPLayer
from glm5.model.rotary import Rotation
from glm5.model.transformer import DecoderLayer

FEW_TOKENS = 16


class NativeDecoderLayer(Movable, DecoderLayer):
    """Attention, feed-forward and what lies between, without leaving the library."""

    _kept_by_address = ("_handle",)

    @classmethod
    def of(cls, layer: DecoderLayer) -> DecoderLayer:
        """The same layer, changed where all of its parts are of kinds that the library knows."""
        if all_native(layer):
            layer.__class__ = NativeMTPLayer if isinstance(layer, MTPLayer) else NativeDecoderLayer
        return layer

    @cached_property
    def _handle(self) -> Any:
        return _handle_of(self)

    def forward(
        self,
        x_BTD: Tensor,
        angles: Rotation,
        visible: Visibility,
        cache: Any | None,
        selection: Selection | None,
    ) -> tuple[Tensor, Selection | None]:
        if cache is None or not self._applies(x_BTD, visible):
            return super().forward(x_BTD, angles, visible, cache, selection)
        batch, queries, _ = x_BTD.shape
        latents, index_keys = cache.room(queries)
        if latents.shape[0] != batch or latents.dtype not in (torch.float32, torch.bfloat16):
            return super().forward(x_BTD, angles, visible, cache, selection)
        attention: Any = self.self_attn
        mask, chosen, found = visible.mask_BTS, None, None
        if index_keys is not None and visible.num_keys > attention.indexer.topk:
            topk = attention.indexer.topk
            slots = torch.empty(batch * queries, topk, dtype=torch.int32)
            found = SlotSelection(
                cpu.Slots(slots, torch.empty(batch * queries, dtype=torch.int32)),
                batch, visible.num_keys, topk,
            )  # fmt: skip
        elif index_keys is None and isinstance(selection, SlotSelection):
            chosen = selection.chosen
        elif index_keys is None and selection is not None:
            mask = selection.mask_BTS
        x_BTD = x_BTD.contiguous()
        turns = angles.turns.expand(batch, queries, -1).contiguous()
        mask = None if mask is None else mask.contiguous()
        out = torch.empty_like(x_BTD)
        _cpu.decode_layer(
            self._handle, x_BTD.data_ptr(), out.data_ptr(), x_BTD.dtype == torch.bfloat16, batch, queries,
            visible.num_keys, visible.is_causal, turns.data_ptr(), latents.data_ptr(), _row_bytes(latents),
            _address(index_keys), 0 if index_keys is None else _row_bytes(index_keys),
            latents.dtype == torch.bfloat16, _address(mask),
            0 if mask is None or mask.shape[0] == 1 else queries * visible.num_keys,
            *((0, 0, 0) if chosen is None else _slots(chosen)),
            *((0, 0) if found is None else _slots(found.chosen)[:2]),
        )  # fmt: skip
        return out, selection if index_keys is None else found

    def _applies(self, x_BTD: Tensor, visible: Visibility) -> bool:
        attention, mlp = self.self_attn, self.mlp
        assert isinstance(attention, NativeAttention)
        few = x_BTD.shape[0] * x_BTD.shape[1] <= FEW_TOKENS and attention._applies(x_BTD, visible)
        recorded = attention.record_input or (isinstance(mlp, PackedMixture) and mlp.record_routing)
        return few and not recorded


class NativeMTPLayer(NativeDecoderLayer, MTPLayer):
    """The MTP layer's own decoder layer in one call."""


def all_native(layer: DecoderLayer) -> bool:
    """Is every part of the layer packed, or float and read natively?"""
    attention, mlp = layer.self_attn, layer.mlp
    if type(layer) not in (DecoderLayer, MTPLayer) or not isinstance(attention, NativeAttention):
        return False
    if isinstance(mlp, PackedMixture):
        if not isinstance(mlp.shared_experts, PackedMLP | None):
            return False
    elif not isinstance(mlp, PackedMLP):
        return False
    indexer = attention.indexer
    if indexer is not None and not (isinstance(indexer, NativeIndexer) and indexer.fits):
        return False
    linears = [m for m in attention.modules() if isinstance(m, (nn.Linear, PackedLinear))]
    return all(isinstance(module, (NativeLinear, PackedLinear)) for module in linears)


def _handle_of(layer: NativeDecoderLayer) -> Any:
    attention: Any = layer.self_attn
    handle = _cpu.DecoderLayer()
    handle.hidden, handle.heads = layer.input_layernorm.weight.shape[0], attention.num_heads
    handle.nope, handle.rotary = attention.nope_dim, attention.rotary_dim
    handle.latent, handle.value, handle.scale = attention.latent_dim, attention.value_dim, attention.scale
    handle.input_norm, handle.eps = _list(layer.input_layernorm.weight), layer.input_layernorm.eps
    handle.post_norm = _list(layer.post_attention_layernorm.weight)
    handle.latent_eps = attention.kv_a_layernorm.eps
    handle.kv_norm = _list(attention.kv_a_layernorm.weight)
    down = attention.q_proj if attention.q_a_proj is None else attention.q_a_proj
    parts = {"down": down, "kv_a": attention.kv_a_proj_with_mqa, "o": attention.o_proj}
    if attention.q_a_proj is not None:
        parts["q_b"] = attention.q_b_proj
        handle.q_norm = _list(attention.q_a_layernorm.weight)
    indexer = attention.indexer
    if indexer is not None:
        parts |= {"index_q": indexer.wq_b, "index_k": indexer.wk, "index_weights": indexer.weights_proj}
        handle.index_heads, handle.index_width = indexer.num_heads, indexer.head_dim
        handle.topk, handle.index_eps = indexer.topk, indexer.k_norm.eps
        handle.index_norm, handle.index_norm_bias = _list(indexer.k_norm.weight), _list(indexer.k_norm.bias)
    for name, module in parts.items():
        setattr(handle, name, module.matrix.handle)
    for name in ("down", "kv_a", "o"):
        if parts[name].bias is not None:
            setattr(handle, f"{name}_bias", _list(parts[name].bias))
    handle.kv_b = attention._kv_b.handle
    mlp: Any = layer.mlp
    handle.set_feed(mlp._layer.handle)
    return handle


def _list(values: Tensor) -> list[float]:
    floats: list[float] = values.detach().float().tolist()
    return floats


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _row_bytes(buffer: Tensor) -> int:
    return buffer.stride(0) * buffer.element_size()


def _slots(chosen: cpu.Slots) -> tuple[int, int, int]:
    """Addresses of slots and counts, and how many slots a query has room for."""
    assert chosen.slots is not None
    return chosen.slots.data_ptr(), chosen.counts.data_ptr(), chosen.slots.shape[1]
