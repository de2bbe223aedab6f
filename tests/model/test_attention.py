"""The two forms of MLA against each other and against loops over heads; GQA against loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from glm5.model.attention import GroupedQueryAttention, MultiHeadLatentAttention
from glm5.model.indexer import Selection, select
from glm5.model.masks import TokenPositions, Visibility, visibility
from glm5.model.rotary import Rotation, rotate, rotation
from glm5.model.step import Step
from tests.model_fixture import tiny_config, tiny_model

quick = settings(max_examples=40, deadline=None)
CPU = torch.device("cpu")
seeds = st.integers(0, 2**31)


def attention_layer(seed: int, model_type: str = "glm_moe_dsa", **changes: Any) -> Any:
    """One attention module with random norms and biases too: a skipped one must show."""
    config = tiny_config(model_type, num_hidden_layers=1, num_nextn_predict_layers=0, **changes)
    layer = tiny_model(config, seed).model.layers[0].self_attn
    generator = torch.Generator().manual_seed(seed)
    for module in layer.modules():
        if type(module).__name__ == "RMSNorm":
            module.weight.data.normal_(1.0, 0.2, generator=generator)
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.data.normal_(0.0, 0.2, generator=generator)
    return layer


@st.composite
def sequences(draw: st.DrawFn) -> tuple[Tensor, Tensor, Visibility]:
    """(x, positions, visible): plain, or with left padding and a prefix."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 14))
    x = torch.randn(batch, length, 64, generator=torch.Generator().manual_seed(draw(seeds)))
    positions = torch.arange(length).expand(batch, -1)
    places = TokenPositions(positions)
    if draw(st.booleans()):
        padding = torch.tensor([[draw(st.integers(0, length - 1))] for _ in range(batch)])
        prefix = torch.tensor([[draw(st.integers(0, length))] for _ in range(batch)])
        places = TokenPositions((positions - padding).clamp(min=0), positions >= padding, positions < prefix)
    return x, places.positions, visibility(places, places)


def angles_of(positions: Tensor, rotary_dim: int) -> Rotation:
    return rotation(positions, rotary_dim, 10_000.0)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.pow(2).mean(dim=-1, keepdim=True) + 1e-5).rsqrt() * weight


def attend(q_Td: Tensor, k_Sd: Tensor, v_Sd: Tensor, mask_TS: Tensor) -> Tensor:
    """Softmax attention of one head, one query at a time."""
    rows = []
    for query, seen in zip(q_Td, mask_TS, strict=True):
        scores = k_Sd[seen] @ query * q_Td.shape[-1] ** -0.5
        rows.append(scores.softmax(dim=0) @ v_Sd[seen])
    return torch.stack(rows)


def mla_by_loops(layer: MultiHeadLatentAttention, x: Tensor, positions: Tensor, mask_BTS: Tensor) -> Tensor:
    """The formula of MLA, head by head."""
    nope, rope, value, latent = layer.nope_dim, layer.rotary_dim, layer.value_dim, layer.latent_dim
    angles = angles_of(positions, rope)
    q_latent = rms(x @ layer.q_a_proj.weight.T, layer.q_a_layernorm.weight)
    c, k_rope = (x @ layer.kv_a_proj_with_mqa.weight.T).split([latent, rope], dim=-1)
    c, k_rope = rms(c, layer.kv_a_layernorm.weight), rotate(k_rope, angles, interleaved=True)
    outputs = []
    for head in range(layer.num_heads):
        q_rows = layer.q_b_proj.weight[head * (nope + rope) :][: nope + rope]
        kv_rows = layer.kv_b_proj.weight[head * (nope + value) :][: nope + value]
        q_nope, q_rope = (q_latent @ q_rows.T).split([nope, rope], dim=-1)
        q = torch.cat((q_nope, rotate(q_rope, angles, interleaved=True)), dim=-1)
        k = torch.cat((c @ kv_rows[:nope].T, k_rope), dim=-1)
        v = c @ kv_rows[nope:].T
        outputs.append(torch.stack([attend(q[b], k[b], v[b], mask_BTS[b]) for b in range(len(x))]))
    return torch.cat(outputs, dim=-1) @ layer.o_proj.weight.T


# --- MLA -------------------------------------------------------------------------------------


@quick
@given(sequences(), seeds, st.sampled_from([2, 100]))
@torch.no_grad()
def test_both_forms_are_the_loops_with_and_without_selection(
    sequence: tuple[Tensor, Tensor, Visibility], seed: int, topk: int
) -> None:
    x, positions, visible = sequence
    layer = attention_layer(seed, index_topk=topk)
    outputs = {}
    for form in ("expanded", "absorbed", "auto"):
        layer.form = form
        outputs[form], selection = layer(x, Step(angles_of(positions, layer.rotary_dim), visible))
    assert (selection is None) == (x.shape[1] <= topk)
    mask = visible.as_mask(x.shape[1], CPU) if selection is None else selection.mask_BTS
    expected = mla_by_loops(layer, x, positions, mask.expand(len(x), -1, -1))
    for out in outputs.values():
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@quick
@given(sequences(), seeds, st.data())
@torch.no_grad()
def test_few_queries_on_a_long_cache_gather_or_not(
    sequence: tuple[Tensor, Tensor, Visibility], seed: int, data: st.DataObject
) -> None:
    x, positions, visible = sequence
    length, layer = x.shape[1], attention_layer(seed)
    queries = data.draw(st.integers(1, length))
    angles = angles_of(positions, layer.rotary_dim)
    _, q_nope, q_rope = layer.queries(x, angles)
    q_nope, q_rope, latents = q_nope[:, -queries:], q_rope[:, -queries:], layer.latents(x, angles)
    late = Visibility(length, mask_BTS=visible.as_mask(length, CPU).expand(len(x), -1, -1)[:, -queries:])
    topk = data.draw(st.integers(1, length))
    scores = torch.randint(3, (len(x), queries, length), generator=torch.Generator().manual_seed(seed))
    for selection in (None, select(scores.float(), late.as_mask(queries, CPU), topk)):
        expanded = layer.expanded(q_nope, q_rope, latents, late, selection)
        absorbed = layer.absorbed(q_nope, q_rope, latents, late, selection)
        torch.testing.assert_close(absorbed, expanded, atol=1e-5, rtol=1e-5)
    q_wide = torch.randn(len(x), queries, 4, latents.shape[-1])
    gathered = layer._attend_gathered(q_wide, latents, selection)
    masked = layer._attend_cache(q_wide, latents, late, selection)
    torch.testing.assert_close(gathered, masked, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_without_a_query_latent_and_with_biases_the_forms_agree() -> None:
    x = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0))
    for q_lora_rank in (None, 48):
        layer = attention_layer(0, "glm4_moe_lite", q_lora_rank=q_lora_rank, attention_bias=True)
        outputs = []
        for form in ("expanded", "absorbed"):
            layer.form = form
            angles = angles_of(torch.arange(6).expand(2, -1), 8)
            outputs.append(layer(x, Step(angles, Visibility(6, is_causal=True)))[0])
        torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_selection_from_below_is_used_and_passed_on() -> None:
    layer = attention_layer(0, "glm4_moe_lite")  # MLA that owns no indexer
    x, positions = torch.randn(1, 6, 64), torch.arange(6).unsqueeze(0)
    given_one = Selection(torch.eye(6, dtype=torch.bool).unsqueeze(0), topk=1)
    angles, causal = angles_of(positions, layer.rotary_dim), Visibility(6, is_causal=True)
    out, passed = layer(x, Step(angles, causal), given_one)
    assert passed is given_one
    expected = mla_by_loops(layer, x, positions, given_one.mask_BTS)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_the_language_model_loss_does_not_reach_the_indexer() -> None:
    layer = attention_layer(0, index_topk=2)
    read: list[Tensor] = []
    layer.indexer.register_forward_pre_hook(lambda _module, inputs: read.extend(inputs[:2]))
    x = torch.randn(1, 6, 64, requires_grad=True)
    out, _ = layer(x, Step(angles_of(torch.arange(6).unsqueeze(0), 8), Visibility(6, is_causal=True)))
    out.sum().backward()
    assert x.grad is not None
    assert [tensor.requires_grad for tensor in read] == [False, False]
    assert all(parameter.grad is None for parameter in layer.indexer.parameters())


@pytest.mark.parametrize(("queries", "keys", "absorbed"), [(1, 4096, True), (512, 512, False)])
def test_the_cheaper_form_is_taken(queries: int, keys: int, absorbed: bool) -> None:
    assert attention_layer(0).absorbed_is_cheaper(queries, keys) is absorbed


# --- GQA -------------------------------------------------------------------------------------


@quick
@given(sequences(), seeds, st.sampled_from([1, 2, 4]), st.booleans(), st.sampled_from([0.25, 0.5, 1.0]))
@torch.no_grad()
def test_grouped_query_attention_is_the_loops(
    sequence: tuple[Tensor, Tensor, Visibility], seed: int, kv_heads: int, norms: bool, share: float
) -> None:
    x, positions, visible = sequence
    rope = {"rope_theta": 10_000.0, "partial_rotary_factor": share}
    changes = {"num_key_value_heads": kv_heads, "use_qk_norm": norms, "rope_parameters": rope}
    layer: GroupedQueryAttention = attention_layer(seed, "glm4_moe", **changes)
    width, rotary = 24, int(24 * share)
    angles, mask = angles_of(positions, rotary), visible.as_mask(x.shape[1], CPU).expand(len(x), -1, -1)

    def head_of(projection: nn.Linear, head: int, norm: nn.Module | None, *, turned: bool = True) -> Tensor:
        rows = slice(head * width, (head + 1) * width)
        out = x @ projection.weight[rows].T + projection.bias[rows]
        out = out if norm is None else rms(out, norm.weight)
        if not turned:
            return out
        return torch.cat((rotate(out[..., :rotary], angles, interleaved=False), out[..., rotary:]), dim=-1)

    outputs = []
    for head in range(4):
        shared = head // (4 // kv_heads)
        q, k = head_of(layer.q_proj, head, layer.q_norm), head_of(layer.k_proj, shared, layer.k_norm)
        v = head_of(layer.v_proj, shared, None, turned=False)
        outputs.append(torch.stack([attend(q[b], k[b], v[b], mask[b]) for b in range(len(x))]))
    expected = torch.cat(outputs, dim=-1) @ layer.o_proj.weight.T
    out, selection = layer(x, Step(angles, visible))
    assert selection is None
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
