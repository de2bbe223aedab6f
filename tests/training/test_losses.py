"""Losses against plain formulas, gradients against autograd."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from glm5.model.masks import TokenPositions, visibility
from glm5.model.routing import Routing
from glm5.training import losses
from tests.model_fixture import random_ids, tiny_config, tiny_model

quick = settings(deadline=None, max_examples=25)


@quick
@given(st.integers(1, 700), st.integers(2, 40), st.integers(1, 90), st.integers(0, 2**31))
def test_linear_cross_entropy_equals_the_plain_one(rows: int, width: int, vocab: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < 0.3] = losses.IGNORED
    targets[0] = 0
    mine = losses.linear_cross_entropy(hidden, weight, targets)
    gradients = torch.autograd.grad(mine * 3, (hidden, weight))
    plain = F.cross_entropy(hidden @ weight.T, targets, ignore_index=losses.IGNORED)
    wanted = torch.autograd.grad(plain * 3, (hidden, weight))
    torch.testing.assert_close(mine.double(), plain, rtol=1e-5, atol=1e-5)
    for got, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_cross_entropy_without_targets_is_zero() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    loss = losses.linear_cross_entropy(hidden, torch.randn(5, 4), torch.full((3,), losses.IGNORED))
    loss.backward()
    assert float(loss.detach()) == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


@quick
@given(st.integers(1, 3), st.integers(0, 2**31))
def test_targets_stay_inside_their_document(ahead: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (2, 12), generator=generator)
    documents = torch.randint(0, 3, (2, 12), generator=generator).sort(dim=1).values
    learned = torch.rand(2, 12, generator=generator) < 0.7
    targets = losses.shifted_targets(ids, documents, learned, ahead)
    for row in range(2):
        for t in range(12):
            s = t + ahead
            good = s < 12 and documents[row, s] == documents[row, t] and bool(learned[row, s])
            assert int(targets[row, t]) == (int(ids[row, s]) if good else losses.IGNORED)


ALL = torch.ones(8, 64, dtype=torch.bool)


def routing_of(ids: torch.Tensor, scores: torch.Tensor) -> Routing:
    return Routing(ids, torch.ones_like(ids, dtype=torch.float32), scores)


def test_balance_loss_is_one_when_even_and_grows_with_imbalance() -> None:
    even = torch.tensor([[0, 1], [2, 3], [0, 1], [2, 3]])
    flat = torch.full((4, 4), 0.5)
    assert float(losses.balance_loss(routing_of(even, flat), ALL[:1, :4])) == 1.0
    lopsided = torch.tensor([[0, 1]] * 4)
    scores = torch.tensor([[0.9, 0.9, 0.1, 0.1]] * 4)
    assert float(losses.balance_loss(routing_of(lopsided, scores), ALL[:1, :4])) > 1.5


@quick
@given(st.integers(1, 3), st.integers(1, 6), st.integers(2, 8), st.integers(0, 2**31))
def test_balance_loss_follows_its_formula(rows: int, length: int, experts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows * length, experts, generator=generator)
    ids = scores.topk(2, dim=-1).indices
    wanted = 0.0
    for row in range(rows):
        part = slice(row * length, (row + 1) * length)
        for expert in range(experts):
            f = experts / (2 * length) * int((ids[part] == expert).sum())
            p = float((scores[part, expert] / scores[part].sum(dim=-1)).mean())
            wanted += f * p / rows
    got = losses.balance_loss(routing_of(ids, scores), ALL[:rows, :length])
    torch.testing.assert_close(got, torch.tensor(wanted), rtol=1e-4, atol=1e-5)


def test_bias_moves_towards_idle_experts() -> None:
    bias = torch.zeros(4)
    losses.update_router_bias(bias, torch.tensor([10.0, 0.0, 5.0, 5.0]), 0.001)
    torch.testing.assert_close(bias, torch.tensor([-0.001, 0.001, 0.0, 0.0]))


def test_indexer_loss_teaches_the_indexer_only_and_falls() -> None:
    model = tiny_model(tiny_config(num_nextn_predict_layers=0))
    ids = random_ids(2, 24, model.config.vocab_size)
    positions = TokenPositions(torch.arange(24).expand(2, 24))
    visible, angles = visibility(positions, positions), model.angles(positions.positions)
    attention = model.model.layers[0].self_attn
    served = [(attention, model.model.layers[0].input_layernorm(model.model.embed_tokens(ids)).detach())]
    learned = torch.ones(2, 24, dtype=torch.bool)
    optimizer = torch.optim.Adam(attention.indexer.parameters(), lr=3e-2)
    first = last = None
    for _ in range(30):
        model.zero_grad()
        loss = losses.indexer_loss(served, angles, visible, learned)
        loss.backward()
        touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert touched
        assert all(".indexer." in name for name in touched)
        optimizer.step()
        first, last = first if first is not None else float(loss.detach()), float(loss.detach())
    assert first > last > 0
