"""Absorbed attention over the cache: softmax in fp64 over what each query sees."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glm5.kernels.cpu import Slots
from tests.kernels.cuda.cuda_fixture import CLOSE, DEVICE, distance, generator, normal

pytest.importorskip("triton", reason="pip install 'glm5[cuda]'")
from glm5.kernels.cuda import mla

DTYPES = [torch.float32, torch.bfloat16]


def reference(q: Tensor, cache: Tensor, rows: Tensor, seen_NS: Tensor, latent: int, scale: float) -> Tensor:
    keys = cache[rows.long()].double()
    scores = torch.einsum("nhc,nsc->nhs", q.double(), keys) * scale
    weights = scores.masked_fill(~seen_NS.unsqueeze(1), float("-inf")).softmax(dim=-1)
    return torch.einsum("nhs,nsr->nhr", weights, keys[..., :latent])


def case(count: int, heads: int, latent: int, rotary: int, slots: int, dtype: torch.dtype, seed: int = 0):
    """q, a cache that is a part of a larger one, rows of it, a random mask that leaves none blind."""
    q = normal(count, heads, latent + rotary, seed=seed, dtype=dtype)
    cache = normal(2, slots + 5, latent + rotary, seed=seed + 1, dtype=dtype)[:, :slots]
    rows = torch.arange(count, dtype=torch.int32, device=DEVICE) % 2
    mask = torch.rand(count, slots, generator=generator(seed)) < 0.4
    mask[:, seed % slots] = True
    return q, cache, rows, mask.to(DEVICE)


def slots_of(mask: Tensor, room: int = 0) -> Slots:
    counts = mask.sum(dim=1, dtype=torch.int32)
    order = torch.argsort(~mask, dim=1, stable=True)[:, : int(counts.max()) + room]
    return Slots(order.to(torch.int32).contiguous(), counts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "latent", "rotary", "slots"), [(5, 48, 16, 37), (17, 32, 8, 150)])
def test_attention_is_the_reference(
    heads: int, latent: int, rotary: int, slots: int, dtype: torch.dtype
) -> None:
    q, cache, rows, mask = case(3, heads, latent, rotary, slots, dtype)
    counts = torch.tensor([slots, 1, slots // 2], dtype=torch.int32, device=DEVICE)
    first = torch.arange(slots, device=DEVICE) < counts.unsqueeze(1)
    everything = torch.full_like(counts, slots)
    for seen, chosen, visible in (
        (first, Slots(None, counts), None),
        (mask, slots_of(mask, room=4), None),
        (mask, Slots(None, everything), mask),
    ):
        found = mla.attend(q, cache, rows, chosen, latent=latent, scale=0.2, visible_NS=visible)
        assert distance(found, reference(q, cache, rows, seen, latent, 0.2)) < CLOSE[dtype]


def test_large_scores_do_not_overflow() -> None:
    q, cache, rows, mask = case(2, 4, 32, 16, 140, torch.float32, seed=1)
    found = mla.attend(q * 100, cache, rows, slots_of(mask), latent=32, scale=1.0)
    assert distance(found, reference(q * 100, cache, rows, mask, 32, 1.0)) < 1e-4


def test_a_query_does_not_depend_on_its_batch_or_on_the_room_in_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, cache, rows, mask = case(4, 5, 32, 16, 200, torch.float32, seed=2)
    mask[0, 70:] = False  # one that sees little, beside others that see more
    together = mla.attend(q, cache, rows, slots_of(mask), latent=32, scale=0.3)
    for n in range(4):
        one = slice(n, n + 1)
        alone = mla.attend(q[one], cache, rows[one], slots_of(mask[one]), latent=32, scale=0.3)
        assert torch.equal(alone, together[one])
    counts = torch.full((4,), 90, dtype=torch.int32, device=DEVICE)
    short = mla.attend(q, cache[:, :90], rows, Slots(None, counts), latent=32, scale=0.3)
    assert torch.equal(mla.attend(q, cache, rows, Slots(None, counts), latent=32, scale=0.3), short)
    monkeypatch.setattr(mla, "MOST_SUMS", 1)  # a query at a time
    assert torch.equal(mla.attend(q, cache, rows, slots_of(mask), latent=32, scale=0.3), together)


def test_rows_and_counts_may_be_expanded() -> None:
    """One cache row for all queries, as a view that holds one number."""
    q, cache, _, _ = case(3, 4, 32, 16, 30, torch.float32, seed=4)
    one = torch.ones(1, dtype=torch.int32, device=DEVICE)
    found = mla.attend(q, cache, one.expand(3), Slots(None, (20 * one).expand(3)), latent=32, scale=0.3)
    wanted = mla.attend(q, cache, one.repeat(3), Slots(None, (20 * one).repeat(3)), latent=32, scale=0.3)
    assert torch.equal(found, wanted)


def test_a_query_that_sees_nothing_gets_zeros() -> None:
    q, cache, rows, _ = case(2, 4, 32, 16, 30, torch.float32, seed=3)
    counts = torch.tensor([0, 30], dtype=torch.int32, device=DEVICE)
    found = mla.attend(q, cache, rows, Slots(None, counts), latent=32, scale=0.3)
    assert not found[0].any() and found[1].isfinite().all() and found[1].any()


def test_what_does_not_fit_is_refused() -> None:
    q, cache, rows, mask = case(2, 4, 32, 16, 30, torch.float32)
    whole = Slots(None, torch.full((2,), 30, dtype=torch.int32, device=DEVICE))
    for arguments, options in (
        ((q[..., :40], cache, rows, whole), {}),
        ((q.bfloat16(), cache, rows, whole), {}),
        ((q, cache, rows[:1], whole), {}),
        ((q, cache, rows, slots_of(mask)), {"visible_NS": mask}),
        ((q, cache, rows, whole), {"visible_NS": mask[:, :20]}),
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            mla.attend(*arguments, latent=32, scale=0.3, **options)
