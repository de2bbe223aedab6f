"""Router and experts against a loop over tokens, the hand-written backward against autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import silu

from glm5.layers import bucketed_experts
from glm5.layers.bucketed_experts import BucketedBank, BucketedExperts
from glm5.layers.swap import swap_for_training
from glm5.model.moe import ExpertBank, Router
from glm5.model.routing import Routing
from glm5.model.step import Probe
from tests.model_fixture import random_ids, tiny_config, tiny_model

quick = settings(max_examples=80, deadline=None)
seeds = st.integers(0, 2**31)


def random_router(seed: int, **changes: Any) -> tuple[Router, Tensor]:
    """A router whose bias moves choices, and 6 tokens for it."""
    generator = torch.Generator().manual_seed(seed)
    router = Router(tiny_config(**changes))
    router.weight.data.normal_(0.0, 0.2, generator=generator)
    router.e_score_correction_bias.normal_(0.0, 0.3, generator=generator)
    return router, torch.randn(6, 64, generator=generator)


# --- router ----------------------------------------------------------------------------------


def route_slowly(router: Router, x_D: list[float]) -> dict[int, float]:
    """Expert -> weight of one token, in Python's double precision (DeepSeek-V3 report, 2.1.2)."""
    weight, bias = router.weight.tolist(), router.e_score_correction_bias.tolist()
    logits = [sum(a * b for a, b in zip(row, x_D, strict=True)) for row in weight]
    scores = [1 / (1 + math.exp(-logit)) for logit in logits]
    choice = [score + b for score, b in zip(scores, bias, strict=True)]
    if router.n_group > 1:
        size = len(choice) // router.n_group
        groups = [range(g * size, (g + 1) * size) for g in range(router.n_group)]
        groups.sort(key=lambda group: sum(sorted(choice[e] for e in group)[-2:]), reverse=True)
        allowed = [expert for group in groups[: router.topk_group] for expert in group]
    else:
        allowed = list(range(len(choice)))
    chosen = sorted(allowed, key=lambda e: choice[e], reverse=True)[: router.num_experts_per_tok]
    total = sum(scores[e] for e in chosen) if router.norm_topk_prob else 1.0
    return {e: router.routed_scaling_factor * scores[e] / total for e in chosen}


@quick
@given(seeds, st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 3), (4, 4)]), st.integers(1, 4), st.booleans())
def test_routing_is_the_rule(seed: int, groups: tuple[int, int], k: int, norm: bool) -> None:
    changes = {"n_group": groups[0], "topk_group": groups[1], "norm_topk_prob": norm}
    router, x = random_router(seed, num_experts_per_tok=k, routed_scaling_factor=2.5, **changes)
    routing = router(x)
    for t, (ids, weights) in enumerate(zip(routing.topk_ids_TK, routing.topk_weights_TK, strict=True)):
        ours = dict(zip(ids.tolist(), weights.tolist(), strict=True))
        assert ours == pytest.approx(route_slowly(router, x[t].tolist()), rel=1e-4)
    if norm:
        torch.testing.assert_close(routing.topk_weights_TK.sum(dim=1), torch.full((6,), 2.5))


def test_the_bias_chooses_but_does_not_weigh() -> None:
    router, x = random_router(0, norm_topk_prob=False, routed_scaling_factor=1.0)
    router.e_score_correction_bias.zero_()
    router.e_score_correction_bias[[3, 5]] = 100.0
    routing = router(x)
    assert routing.topk_ids_TK.sort(dim=1).values.tolist() == [[3, 5]] * 6
    assert torch.equal(routing.topk_weights_TK, routing.scores_TE.gather(1, routing.topk_ids_TK))


def test_arithmetic_is_fp32_under_bf16_weights_and_autocast() -> None:
    router, x = random_router(0)
    router.weight.data = router.weight.data.bfloat16()
    x = x.bfloat16()
    ours = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = router(x)
    expected = (x.float() @ router.weight.float().T).sigmoid()
    for routing in (ours, cast):
        assert routing.scores_TE.dtype == routing.topk_weights_TK.dtype == torch.float32
        torch.testing.assert_close(routing.scores_TE, expected, atol=1e-6, rtol=0)


def test_expert_dropout_acts_in_training_only_and_keeps_k_experts() -> None:
    router, x = random_router(0)
    published = router.eval()(x).topk_ids_TK
    router.expert_dropout = 1.0
    assert torch.equal(router(x).topk_ids_TK, published)
    dropped = router.train()(x).topk_ids_TK
    assert all(len(set(ids)) == 2 for ids in dropped.tolist())


# --- experts ---------------------------------------------------------------------------------


@st.composite
def banks(draw: st.DrawFn) -> tuple[ExpertBank, Tensor, Tensor, Tensor]:
    """(bank, x, ids, weights) in float64; some experts are idle, the loads are uneven."""
    experts, tokens = draw(st.integers(1, 40)), draw(st.integers(1, 24))
    busy = draw(st.integers(1, experts))
    k = draw(st.integers(1, min(busy, 4)))
    generator = torch.Generator().manual_seed(draw(seeds))
    sizes = {"n_routed_experts": experts, "num_experts_per_tok": 1}
    hidden, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    bank = ExpertBank(tiny_config(hidden_size=hidden, moe_intermediate_size=width, **sizes)).double()
    for parameter in bank.parameters():
        parameter.data.normal_(0.0, 0.5, generator=generator)
    names = torch.randperm(experts, generator=generator)[:busy]  # which experts are not idle
    likely = torch.rand(busy, generator=generator, dtype=torch.float64).pow(3) + 1e-3
    ids = names[torch.multinomial(likely.expand(tokens, -1), k, generator=generator)]
    x = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64)
    return bank, x, ids, torch.rand(tokens, k, generator=generator, dtype=torch.float64)


def experts_by_loop(bank: ExpertBank, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """sum_k weight_k down(silu(gate x) * up x), one token and one expert at a time."""
    rows = []
    for token, chosen, shares in zip(x, ids.tolist(), weights, strict=True):
        out = torch.zeros_like(token)
        for expert, share in zip(chosen, shares, strict=True):
            gate, up = (bank.gate_up_proj[expert] @ token).chunk(2)
            out = out + share * (bank.down_proj[expert] @ (silu(gate) * up))
        rows.append(out)
    return torch.stack(rows)


def bucketed(bank: ExpertBank, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return BucketedExperts.apply(x, ids, weights, bank.gate_up_proj, bank.down_proj, x.dtype)


@quick
@given(banks())
def test_both_ways_give_the_loop(case: tuple[ExpertBank, Tensor, Tensor, Tensor]) -> None:
    bank, *inputs = case
    with torch.no_grad():
        expected = experts_by_loop(bank, *inputs)
        torch.testing.assert_close(bank(*inputs), expected)
        torch.testing.assert_close(bucketed(bank, *inputs), expected)


@quick
@given(banks(), seeds)
def test_the_hand_written_backward_is_autograd(
    case: tuple[ExpertBank, Tensor, Tensor, Tensor], seed: int
) -> None:
    bank, x, ids, weights = case
    wanted = (x.requires_grad_(), weights.requires_grad_(), bank.gate_up_proj, bank.down_proj)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    expected = torch.autograd.grad(experts_by_loop(bank, x, ids, weights), wanted, upstream)
    for way in (bucketed, ExpertBank.forward):
        ours = torch.autograd.grad(way(bank, x, ids, weights), wanted, upstream)
        for gradient, reference in zip(ours, expected, strict=True):
            torch.testing.assert_close(gradient, reference)


def test_large_experts_are_multiplied_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model(), random_ids(2, 9)
    before = model(ids).logits
    monkeypatch.setattr(bucketed_experts, "SMALL_EXPERT_WEIGHTS", 0)
    swap_for_training(model)
    assert not any(isinstance(module, BucketedBank) for module in model.modules())
    monkeypatch.undo()
    swap_for_training(model)
    assert sum(isinstance(module, BucketedBank) for module in model.modules()) == 3
    torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-5)


def test_under_autocast_gradients_have_the_dtype_of_their_weights() -> None:
    plain = tiny_model().moe_layers()[0].experts
    bank, x = BucketedBank(plain), torch.randn(9, 64, requires_grad=True)
    ids, weights = torch.arange(18).view(9, 2) % 8, torch.rand(9, 2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = bank(x, ids, weights)
    out.sum().backward()
    for tensor in (x, weights, *bank.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), experts_by_loop(plain, x, ids, weights), atol=0.02, rtol=0.02)


# --- together --------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_the_shared_expert_is_added_once_and_unscaled(shared: int) -> None:
    layer = tiny_model(tiny_config(n_shared_experts=shared, routed_scaling_factor=2.5)).moe_layers()[0]
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        flat = x.flatten(0, 1)
        routing = layer.gate(flat)
        expected = experts_by_loop(layer.experts, flat, routing.topk_ids_TK, routing.topk_weights_TK)
        if shared:
            mlp = layer.shared_experts
            assert mlp.gate_proj.weight.shape == (40 * shared, 64)
            gate, up = flat @ mlp.gate_proj.weight.T, flat @ mlp.up_proj.weight.T
            expected = expected + (silu(gate) * up) @ mlp.down_proj.weight.T
        torch.testing.assert_close(layer(x), expected.view_as(x), atol=1e-5, rtol=1e-5)


class Listener(Probe):
    def __init__(self) -> None:
        self.heard: list[tuple[int, Routing]] = []

    def routing(self, layer: int, routing: Routing) -> None:
        self.heard.append((layer, routing))


def test_a_probe_is_told_of_the_routing() -> None:
    model, listener = tiny_model(), Listener()
    model(torch.arange(3).view(1, 3), probe=listener)
    assert [layer for layer, _ in listener.heard] == [1, 2]
    assert listener.heard[0][1].topk_ids_TK.shape == (3, 2)
