"""DSA's choice: the keys of largest index score, on every instruction set."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm5.kernels import cpu
from tests.kernels.kernel_fixture import INSTRUCTION_SETS, on_threads, using


def plain_scores(q: Tensor, turns: Tensor, weights: Tensor, keys: Tensor, rounds: bool) -> Tensor:
    """fp64 [queries, keys]; `rounds`: the turned query is rounded to bf16."""
    rotary = 2 * turns.shape[-1]
    pairs = torch.view_as_complex(q[..., :rotary].float().unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * turns.unsqueeze(1)).flatten(-2)
    whole = torch.cat((turned, q[..., rotary:].float()), dim=-1)
    whole = whole.bfloat16() if rounds else whole
    products = torch.einsum("nhd,nsd->nhs", whole.double(), keys.double()).relu()
    return torch.einsum("nhs,nh->ns", products, weights.double())


@settings(deadline=None, max_examples=50)
@given(
    heads=st.sampled_from([1, 8, 16, 20, 32, 64]),
    width=st.sampled_from([16, 48, 128]),
    keys=st.integers(1, 90) | st.sampled_from([1024, 1500]),
    topk=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_largest_scores_are_chosen(
    heads: int, width: int, keys: int, topk: int, dtype: torch.dtype, masked: bool, seed: int
) -> None:
    generator, n = torch.Generator().manual_seed(seed), 1 + seed % 3
    q = torch.randn(n, heads, width, generator=generator).to(dtype)
    cache = torch.randn(n, keys, width, generator=generator).to(dtype)
    turns = torch.polar(torch.ones(n, 8), torch.rand(n, 8, generator=generator) * 6)
    weights = torch.randn(n, heads, generator=generator)
    seen = torch.ones(n, keys, dtype=torch.bool)
    if masked:
        seen = torch.rand(n, keys, generator=generator) > 0.4
        seen[:, : keys // 3] &= seed % 2 == 0  # whole stretches that nobody sees
    rows = torch.arange(n, dtype=torch.int32)
    for name in INSTRUCTION_SETS:
        rounds = name == "avx512bf16" and dtype == torch.bfloat16
        scores = plain_scores(q, turns, weights, cache, rounds).masked_fill(~seen, float("-inf"))
        with using(name), on_threads(1 + seed % 3):
            chosen = cpu.select(q, turns, weights, cache, rows, topk, seen if masked else None)
            alone = cpu.select(
                q[:1], turns[:1], weights[:1], cache, rows[:1], topk, seen[:1] if masked else None
            )
        assert chosen.slots is not None and alone.slots is not None
        for t in range(n):
            count = int(chosen.counts[t])
            slots = chosen.slots[t, :count].long()
            assert count == min(topk, int(seen[t].sum())), name
            assert torch.equal(slots, slots.unique()) and bool(seen[t, slots].all()), name
            left = scores[t].clone()
            left[slots] = float("-inf")
            if count and count < int(seen[t].sum()):
                slack = 1e-4 * scores[t][seen[t]].abs().max()
                assert scores[t, slots].min() >= left.max() - slack, name
        assert torch.equal(alone.slots[0, : alone.counts[0]], chosen.slots[0, : chosen.counts[0]]), name
