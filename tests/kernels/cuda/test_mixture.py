"""A bank of packed experts: the reference's sum, whatever the load, and a token as it would be alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm5.formats.packed import PROJECTIONS
from glm5.kernels import reference
from glm5.layers.packed import PackedExperts
from tests.kernels.cuda.cuda_fixture import CLOSE, DEVICE, distance, generator, normal, packed_experts

pytest.importorskip("triton", reason="pip install 'glm5[cuda]'")
from glm5.kernels.cuda.mixture import experts, sort_by_expert


def wanted(x: Tensor, ids: Tensor, weights: Tensor, bank: PackedExperts) -> Tensor:
    whole = [tuple(bank.weight(e, name).cpu() for name in PROJECTIONS) for e in range(bank.num_experts)]
    return reference.mixture(x.cpu(), ids.cpu(), weights.cpu(), whole)  # type: ignore[arg-type]


def routing(tokens: int, num_experts: int, topk: int, seed: int) -> tuple[Tensor, Tensor]:
    random = generator(seed)
    ids = torch.rand(tokens, num_experts, generator=random).topk(topk, dim=1).indices
    return ids.to(DEVICE), torch.rand(tokens, topk, generator=random).to(DEVICE)


@pytest.mark.parametrize(
    ("tokens", "num_experts", "topk", "hidden", "width", "bits", "group", "dtype"),
    [
        (1, 6, 3, 96, 32, 4, 32, torch.float32),
        (2, 4, 2, 64, 64, 8, 64, torch.bfloat16),
        (9, 40, 2, 64, 32, 4, 32, torch.float32),  # most experts idle, one tile each
        (50, 3, 2, 192, 64, 4, 64, torch.float32),  # several tiles an expert
        (40, 5, 1, 128, 128, 8, 128, torch.float16),
    ],
)
def test_experts_are_the_reference(
    tokens: int, num_experts: int, topk: int, hidden: int, width: int, bits: int, group: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    bank = packed_experts(num_experts, hidden, width, bits, group, seed=tokens)
    x = normal(tokens, hidden, seed=1, dtype=dtype)
    ids, weights = routing(tokens, num_experts, topk, seed=2)
    found = experts(x, ids, weights, bank.runs)
    assert found.dtype == dtype
    assert distance(found.cpu(), wanted(x, ids, weights, bank)) < 2 * CLOSE[dtype]


def test_all_tokens_may_want_the_same_experts() -> None:
    bank = packed_experts(8, 64, 32, 4, 32, seed=3)
    for tokens in (2, 37):
        x, weights = normal(tokens, 64, seed=4), torch.rand(tokens, 2, generator=generator(5)).to(DEVICE)
        ids = torch.tensor([[7, 0]], device=DEVICE, dtype=torch.int32).expand(tokens, -1)
        assert distance(experts(x, ids, weights, bank.runs).cpu(), wanted(x, ids, weights, bank)) < 6e-6


def test_one_expert_a_token_may_be_an_expanded_view() -> None:
    bank, x = packed_experts(3, 64, 32, 4, 32, seed=13), normal(3, 64, seed=14)
    ids, weights = (torch.ones(1, 1, dtype=kind, device=DEVICE) for kind in (torch.int32, torch.float32))
    found = experts(x, ids.expand(3, 1), weights.expand(3, 1), bank.runs)
    assert torch.equal(found, experts(x, ids.repeat(3, 1), weights.repeat(3, 1), bank.runs))


def test_a_token_does_not_depend_on_its_batch() -> None:
    bank = packed_experts(6, 64, 32, 4, 32, seed=6)
    x, (ids, weights) = normal(40, 64, seed=7, dtype=torch.bfloat16), routing(40, 6, 2, seed=8)
    for few, some in ((4, slice(2, 3)), (40, slice(11, 38))):  # both sides of one kernel's range
        together = experts(x[:few], ids[:few], weights[:few], bank.runs)
        part = experts(x[some], ids[some], weights[some], bank.runs)
        assert torch.equal(part, together[some])


def test_no_tokens_are_fine() -> None:
    bank = packed_experts(2, 32, 32, 4, 32, seed=9)
    ids, weights = routing(0, 2, 1, seed=10)
    assert experts(normal(0, 32, seed=0), ids, weights, bank.runs).shape == (0, 32)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.sampled_from([1, 3, 16]), st.integers(0, 1000))
def test_tiles_cover_every_assignment_once(count: int, num_experts: int, tile: int, seed: int) -> None:
    ids = torch.randint(0, num_experts, (count,), generator=generator(seed), dtype=torch.int32).to(DEVICE)
    found = sort_by_expert(ids, num_experts, tile)
    covered = []
    for expert, first, rows in zip(*(t.tolist() for t in found[1:]), strict=True):
        assert 0 <= rows <= tile and 0 <= expert < num_experts
        places = found.assignment_A[first : first + rows].tolist()
        assert places == sorted(places)  # in the order of the tokens
        assert all(ids[place] == expert for place in places)
        covered += places
    assert sorted(covered) == list(range(count))


def test_what_does_not_fit_is_refused() -> None:
    bank, x = packed_experts(2, 32, 32, 4, 32, seed=11).runs, torch.zeros(3, 32, device=DEVICE)
    ids, weights = routing(3, 2, 1, seed=12)
    for arguments in ((x[:2], ids, weights), (x, ids, weights[:2]), (x.double(), ids, weights)):
        with pytest.raises(ValueError):  # noqa: PT011
            experts(*arguments, bank)
