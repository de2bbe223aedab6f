"""A decoder layer in one native call, for any number of tokens: prompts, chunks of them, single tokens.

It is the only way a layer runs on the CPU without gradients, so that how tokens are grouped into calls
changes no bit. Between its two ends everything is fp32; in a bf16 model the residual stream is rounded once
a layer. With gradients, on other devices and for other dtypes the modules run one by one, as the paper has
them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glm5.kernels import cpu
from glm5.kernels.slots import Slots
from glm5.layers.movable import Movable, runs_natively
from glm5.layers.native import NativeExperts, NativeLinear
from glm5.layers.packed import PackedExperts, PackedLinear
from glm5.layers.selection import SlotSelection, slots_of
from glm5.model.attention import GroupedQueryAttention, MultiHeadLatentAttention
from glm5.model.indexer import Selection
from glm5.model.layer import DecoderLayer
from glm5.model.moe import MLP, MixtureOfExperts
from glm5.model.routing import Routing
from glm5.model.step import LayerCache, Step


class FusedLayer(Movable, DecoderLayer):
    """Attention, feed-forward and what lies between, without leaving the library.

    A bank of experts that is not all in memory stands behind its own call; so does every other part that the
    library does not know. The result is the same either way.
    """

    def __init__(self, layer: DecoderLayer) -> None:
        DecoderLayer.__init__(self, *layer.parts())

    @property
    def handle(self) -> cpu.DecoderLayer | None:
        """The weights as the library takes them; None once a part is replaced by one it does not know."""
        found: cpu.DecoderLayer | None = self.kept(
            "handle", lambda: (layer_handle(self) if can_fuse(self) else None,)
        )[0]
        return found

    def forward(
        self, x_BTD: Tensor, step: Step, selection: Selection | None
    ) -> tuple[Tensor, Selection | None]:
        on_cpu = runs_natively(x_BTD) and self.input_layernorm.weight.device.type == "cpu"
        handle = self.handle if on_cpu else None
        if handle is None:
            return super().forward(x_BTD, step, selection)
        probe = step.probe
        if probe is not None and probe.hears("attention_input"):
            probe.attention_input(self.index, self.input_layernorm(x_BTD))
        run = _pass_of(x_BTD, step)
        rows = cache_rows(step.layer_cache(self.index), handle, x_BTD)
        slots = found = None
        if rows.index_keys is not None:
            found = _room_for_choice(run, handle.sizes["topk"])
        elif selection is not None:
            slots = slots_of(selection)
        told = None
        if probe is not None and handle.feed is not None and handle.feed.bank is not None:
            told = cpu.Told(x_BTD.shape[0] * x_BTD.shape[1], handle.feed.topk, handle.feed.num_experts)
        chosen = None if found is None else found.chosen
        out = run.run(handle, x_BTD, rows, slots=slots, chosen=chosen, told=told)
        if handle.feed is None:
            out = self._feed(out, step).to(x_BTD.dtype)
        if probe is not None:
            if told is not None:
                probe.routing(self.index, Routing(told.ids.long(), told.weights, told.scores))
            probe.hidden(self.index, out)
        return out, selection if rows.index_keys is None else found

    def _feed(self, x: Tensor, step: Step) -> Tensor:
        """The feed-forward half where the library does not hold all of it: x fp32, every sum in its order."""
        norm = self.post_attention_layernorm
        normed = cpu.rms_norm(x, norm.weight.detach().float(), norm.eps)
        mlp = self.mlp
        if not isinstance(mlp, MixtureOfExperts):
            return x + mlp(normed.to(norm.weight.dtype)).float()
        rows = normed.flatten(0, 1)
        told = self.kept("router", lambda: _router(mlp)).route(rows)
        if step.probe is not None:
            step.probe.routing(self.index, Routing(told.ids.long(), told.weights, told.scores))
        out = mlp.experts(rows, told.ids, told.weights)
        if mlp.shared_experts is not None:
            shared = self.kept("shared", lambda: feed_handle(mlp.shared_experts))
            out = out + (
                mlp.shared_experts(rows.to(norm.weight.dtype)).float() if shared is None else shared(rows)
            )
        return out.view_as(x) + x


def _room_for_choice(run: cpu.Pass, topk: int) -> SlotSelection | None:
    """Where the indexer writes what it chooses; None where every key is kept."""
    if run.keys <= topk:
        return None
    chosen = Slots(torch.zeros(run.count, topk, dtype=torch.int32), torch.empty(run.count, dtype=torch.int32))
    return SlotSelection(chosen, run.shape[0], run.keys, topk)


def _pass_of(x: Tensor, step: Step) -> cpu.Pass:
    """What the layers of one pass share, made by the first of them."""
    run: cpu.Pass | None = step.shared.get("native")
    fits = run is not None and run.shape == x.shape and run.dtype == x.dtype
    if run is not None and fits and step.cache is not None and run.of is not step.angles.turns:
        run.renew(step.angles.turns, step.cache.places.keys)
    if run is None or not fits:
        turns = step.angles.turns.expand(x.shape[0], x.shape[1], -1)
        if step.cache is None:
            visible = step.parts[0].visible
            run = cpu.Pass.of_rows(x, turns, causal=visible.is_causal, visible=visible.mask_BTS)
        else:
            at = step.cache.places
            run = cpu.Pass(
                x, turns.flatten(0, 1), tables=at.tables, starts=at.starts, rows=at.rows, slots=at.slots,
                limits=at.limits, keys=at.keys, page_tokens=at.page_tokens, causal=at.causal,
            )  # fmt: skip
        run.of = step.angles.turns
        step.shared["native"] = run
    return run


def cache_rows(cache: LayerCache | None, handle: cpu.DecoderLayer, x: Tensor) -> cpu.CacheRows:
    """The layer's cache; without one memory that is dropped after the call."""
    if cache is not None:
        return cpu.CacheRows(*cache.buffers())
    size, (batch, tokens, _) = handle.sizes, x.shape

    def fresh(*shape: int) -> Tensor:
        return torch.empty(batch, tokens, *shape, dtype=x.dtype)

    if size["grouped"]:
        head = size["nope"] + size["rotary"]
        return cpu.CacheRows(fresh(size["kv_heads"], head), fresh(size["kv_heads"], size["value"]))
    index = fresh(size["index_width"]) if size["index_heads"] else None
    return cpu.CacheRows(fresh(size["latent"] + size["rotary"]), None, index)


def can_fuse(layer: DecoderLayer) -> bool:
    """Does the library know attention of this kind, made of these parts?"""
    attention = layer.self_attn
    linears = [m for m in attention.modules() if isinstance(m, nn.Linear | PackedLinear)]
    if not all(isinstance(module, NativeLinear | PackedLinear) for module in linears):
        return False
    if any(module.bias is not None for module in _without_bias(attention)):
        return False
    if isinstance(attention, GroupedQueryAttention):
        return type(attention) is GroupedQueryAttention
    if type(attention) is not MultiHeadLatentAttention or not attention.interleaved:
        return False
    indexer = attention.indexer
    if indexer is None:
        return True
    fits = indexer.num_heads <= cpu.MAX_INDEX_HEADS and indexer.head_dim <= cpu.MAX_INDEX_WIDTH
    return fits and indexer.interleaved


def _without_bias(attention: Any) -> list[Any]:
    """Linear layers that have none in any GLM, and whose bias the library would not read."""
    if isinstance(attention, GroupedQueryAttention):
        return [attention.o_proj]
    indexer = [] if attention.indexer is None else [attention.indexer.wq_b, attention.indexer.wk]
    second = [] if attention.q_a_proj is None else [attention.q_b_proj]
    weights = [] if attention.indexer is None else [attention.indexer.weights_proj]
    return [attention.kv_b_proj, *second, *indexer, *weights]


def layer_handle(layer: DecoderLayer) -> cpu.DecoderLayer:
    """The layer's weights as the library takes them."""
    attention = layer.self_attn
    make = _grouped if isinstance(attention, GroupedQueryAttention) else _latent
    matrices, vectors, sizes = make(attention)
    vectors |= {
        "input_norm": layer.input_layernorm.weight, "post_norm": layer.post_attention_layernorm.weight,
    }  # fmt: skip
    sizes |= {"hidden": layer.input_layernorm.weight.shape[0], "eps": layer.input_layernorm.eps}
    return cpu.DecoderLayer(matrices, vectors, feed_handle(layer.mlp), **sizes)


def _latent(attention: Any) -> tuple[dict[str, cpu.Matrix], dict[str, Tensor], dict[str, Any]]:
    first = attention.q_proj if attention.q_a_proj is None else attention.q_a_proj
    parts = {
        "q_in": first,
        "kv_in": attention.kv_a_proj_with_mqa,
        "kv_b": attention.kv_b_proj,
        "o": attention.o_proj,
    }
    vectors = {"kv_norm": attention.kv_a_layernorm.weight}
    sizes = {
        "grouped": False, "heads": attention.num_heads, "nope": attention.nope_dim,
        "rotary": attention.rotary_dim, "latent": attention.latent_dim,
        "value": attention.value_dim, "scale": attention.scale,
        "head_eps": attention.kv_a_layernorm.eps, "index_heads": 0, "index_width": 0, "topk": 0,
    }  # fmt: skip
    if attention.q_a_proj is not None:
        parts["q_b"] = attention.q_b_proj
        vectors["q_norm"] = attention.q_a_layernorm.weight
    indexer = attention.indexer
    if indexer is not None:
        parts |= {"index_q": indexer.wq_b, "index_k": indexer.wk, "index_weights": indexer.weights_proj}
        vectors |= {"index_norm": indexer.k_norm.weight, "index_norm_bias": indexer.k_norm.bias}
        sizes |= {"index_heads": indexer.num_heads, "index_width": indexer.head_dim, "topk": indexer.topk}
        sizes["index_eps"] = indexer.k_norm.eps
    biases = {"q_bias": first, "kv_bias": attention.kv_a_proj_with_mqa, "o_bias": attention.o_proj}
    return _matrices(parts), vectors | _biases(biases), sizes


def _grouped(attention: Any) -> tuple[dict[str, cpu.Matrix], dict[str, Tensor], dict[str, Any]]:
    parts = {
        "q_in": attention.q_proj,
        "kv_in": attention.k_proj,
        "v": attention.v_proj,
        "o": attention.o_proj,
    }
    sizes = {
        "grouped": True, "heads": attention.num_heads, "kv_heads": attention.num_key_value_heads,
        "nope": attention.head_dim - attention.rotary_dim, "rotary": attention.rotary_dim,
        "value": attention.head_dim, "scale": attention.scale,
    }  # fmt: skip
    vectors = {}
    if attention.q_norm is not None:
        vectors = {"q_norm": attention.q_norm.weight, "kv_norm": attention.k_norm.weight}
        sizes["head_eps"] = attention.q_norm.eps
    biases = {"q_bias": attention.q_proj, "kv_bias": attention.k_proj, "v_bias": attention.v_proj}
    return _matrices(parts), vectors | _biases(biases), sizes


def _matrices(parts: dict[str, Any]) -> dict[str, cpu.Matrix]:
    return {name: module.matrix for name, module in parts.items()}


def _biases(parts: dict[str, Any]) -> dict[str, Tensor]:
    return {name: module.bias for name, module in parts.items() if module.bias is not None}


def feed_handle(mlp: nn.Module | None) -> cpu.MoeLayer | None:
    """The feed-forward half as the library takes it; None where it does not know all of its parts."""
    if type(mlp) is MLP:
        parts = _feed(mlp)
        return None if parts is None else cpu.MoeLayer(parts[0].columns, shared=parts)
    if type(mlp) is not MixtureOfExperts or not isinstance(mlp.experts, PackedExperts | NativeExperts):
        return None
    shared = None
    if mlp.shared_experts is not None:
        shared = _feed(mlp.shared_experts)
        if shared is None:
            return None
    bank = mlp.experts.bank
    layer = cpu.MoeLayer(bank.hidden, bank, shared)
    _set_router(layer, mlp)
    return layer


def _router(mlp: MixtureOfExperts) -> cpu.MoeLayer:
    """The router by itself, for a bank that stands elsewhere."""
    layer = cpu.MoeLayer(mlp.gate.weight.shape[1])
    _set_router(layer, mlp)
    return layer


def _set_router(layer: cpu.MoeLayer, mlp: MixtureOfExperts) -> None:
    gate = mlp.gate
    layer.set_router(
        cpu.Matrix(gate.weight.detach()), gate.e_score_correction_bias, topk=gate.num_experts_per_tok,
        groups=gate.n_group, topk_groups=gate.topk_group, normalize=gate.norm_topk_prob,
        factor=gate.routed_scaling_factor,
    )  # fmt: skip


def _feed(mlp: MLP) -> tuple[cpu.Matrix, cpu.Matrix, cpu.Matrix] | None:
    modules: list[Any] = [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    if not all(isinstance(m, NativeLinear | PackedLinear) and m.bias is None for m in modules):
        return None
    gate, up, down = (module.matrix for module in modules)
    return gate, up, down
