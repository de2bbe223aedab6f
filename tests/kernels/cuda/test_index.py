"""DSA's selection: the model's own, its rule for ties included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glm5.model.indexer import select as model_select
from tests.kernels.cuda.cuda_fixture import DEVICE, generator, normal

pytest.importorskip("triton", reason="pip install 'glm5[cuda]'")
from glm5.kernels.cuda.index import index_order, select


def scores(q: Tensor, weights: Tensor, cache: Tensor, rows: Tensor) -> Tensor:
    products = torch.einsum("nhd,nsd->nhs", q.double(), cache[rows.long()].double()).relu()
    return torch.einsum("nh,nhs->ns", weights.double(), products).float()


def chosen_by_model(scores_NS: Tensor, seen_NS: Tensor, topk: int) -> list[list[int]]:
    mask = model_select(scores_NS.unsqueeze(1), seen_NS.unsqueeze(1), topk).mask_BTS.squeeze(1)
    return [row.nonzero().flatten().tolist() for row in mask]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "width", "slots", "topk"), [(3, 12, 37, 8), (16, 32, 200, 50), (32, 128, 66, 65)]
)
def test_the_models_choice(heads: int, width: int, slots: int, topk: int, dtype: torch.dtype) -> None:
    q, cache = normal(3, heads, width, seed=1, dtype=dtype), normal(2, slots, width, seed=2, dtype=dtype)
    weights, rows = normal(3, heads, seed=3), torch.tensor([1, 0, 1], dtype=torch.int32, device=DEVICE)
    mask = (torch.rand(3, slots, generator=generator(4)) < 0.7).to(DEVICE)
    mask[0, 3:] = False  # fewer visible than are wanted
    for visible in (None, mask):
        seen = torch.ones_like(mask) if visible is None else visible
        found = select(q, weights, cache, rows, topk, visible)
        assert found.slots is not None and found.slots.dtype == found.counts.dtype == torch.int32
        mine = [row[:count].tolist() for row, count in zip(found.slots, found.counts.tolist(), strict=True)]
        assert mine == chosen_by_model(scores(q, weights, cache, rows), seen, topk)


def test_equal_scores_go_to_the_lowest_slot() -> None:
    """Zeros of both signs, and one key many times: as relu and repeated tokens make them."""
    q, weights = normal(1, 4, 16, seed=5), -normal(1, 4, seed=6).abs()  # every score is -0 or below
    cache = normal(1, 1, 16, seed=7).repeat(1, 90, 1)
    cache[0, 10:40] = 0
    cache[0, 60:70] = -20 * q[0].sum(dim=0)
    rows = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    found = select(q, weights, cache, rows, 20)
    assert found.slots is not None and found.counts.tolist() == [20]
    assert found.slots[0].tolist() == chosen_by_model(
        scores(q, weights, cache, rows), torch.ones(1, 90, dtype=torch.bool, device=DEVICE), 20
    )[0]  # fmt: skip


def test_rows_may_be_expanded() -> None:
    q, weights, cache = normal(3, 4, 16, seed=11), normal(3, 4, seed=12), normal(2, 20, 16, seed=13)
    one = torch.ones(1, dtype=torch.int32, device=DEVICE)
    found = index_order(q, weights, cache, one.expand(3))
    assert torch.equal(found, index_order(q, weights, cache, one.repeat(3)))


def test_the_order_rises_with_the_score_and_falls_with_the_slot() -> None:
    q, cache = normal(1, 4, 16, seed=8), normal(1, 70, 16, seed=9)
    cache[0, 30:35] = cache[0, 2]
    weights, rows = normal(1, 4, seed=10), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    order = index_order(q, weights, cache, rows)[0]
    assert len(order.unique()) == 70
    found = order.sort(descending=True).indices.tolist()
    exact = scores(q, weights, cache, rows)[0].tolist()
    assert found == sorted(range(70), key=lambda slot: (-exact[slot], slot))


def test_what_does_not_fit_is_refused() -> None:
    q, cache, weights = normal(1, 4, 16, seed=0), normal(1, 20, 16, seed=0), normal(1, 4, seed=0)
    rows = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    for arguments in (
        (q, weights, cache[..., :8], rows),
        (q, weights.bfloat16(), cache, rows),
        (q.half(), weights, cache, rows),
        (q, weights, cache, rows, torch.ones(1, 19, dtype=torch.bool, device=DEVICE)),
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            index_order(*arguments)
