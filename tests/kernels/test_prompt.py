"""Attention of a prompt, against plain softmax, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm5.kernels import cpu
from tests.kernels.kernel_fixture import INSTRUCTION_SETS, on_each, on_threads


def plain(
    q: Tensor, k: Tensor, v: Tensor, scale: float, shared: tuple[Tensor, Tensor] | None, seen: Tensor
) -> Tensor:
    repeat = q.shape[2] // k.shape[2]
    k, v = k.float().repeat_interleave(repeat, 2), v.float().repeat_interleave(repeat, 2)
    scores = torch.einsum("bthd,bshd->bhts", q.float(), k)
    if shared is not None:
        scores = scores + torch.einsum("bthd,bsd->bhts", shared[0].float(), shared[1].float())
    scores = (scores * scale).masked_fill(~seen.unsqueeze(1), float("-inf"))
    return torch.einsum("bhts,bshd->bthd", scores.softmax(dim=-1).nan_to_num(0.0), v)


def tensors(seed: int, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@settings(deadline=None)
@given(
    batch=st.integers(1, 2),
    queries=st.integers(1, 20) | st.just(300),
    more=st.integers(0, 70),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 3)]),
    widths=st.tuples(*[st.sampled_from([16, 48])] * 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    rule=st.sampled_from(["all", "causal", "mask", "one mask"]),
    with_shared=st.booleans(),
    seed=st.integers(0, 99),
)
def test_prompt_attention_is_softmax(
    batch: int, queries: int, more: int, heads: tuple[int, int], widths: tuple[int, int, int],
    dtype: torch.dtype, rule: str, with_shared: bool, seed: int,
) -> None:  # fmt: skip
    keys, (own, shared_width, value) = queries + more, widths
    q, qs, both = tensors(
        seed, dtype, (batch, queries, heads[0], own), (batch, queries, heads[0], shared_width),
        (batch, keys, heads[1], own + value),
    )  # fmt: skip
    k, v = both.split([own, value], dim=-1)
    (ks,) = tensors(seed + 1, torch.bfloat16, (batch, keys, shared_width))
    seen = torch.ones(batch, queries, keys, dtype=torch.bool)
    mask = None
    if rule == "causal":
        seen = seen.tril(more)
    elif "mask" in rule:
        rows = 1 if rule == "one mask" else batch
        mask = torch.rand(rows, queries, keys, generator=torch.Generator().manual_seed(seed)) > 0.6
        seen = mask.expand(batch, -1, -1)
    wanted = plain(q, k, v, 0.2, (qs, ks) if with_shared else None, seen)

    def attend() -> Tensor:
        return cpu.attend_prompt(
            q, k, v, scale=0.2, causal=rule == "causal", visible_BTS=mask,
            q_shared_BTHr=qs if with_shared else None, k_shared_BSr=ks if with_shared else None,
        )  # fmt: skip

    for name, found in on_each(INSTRUCTION_SETS, attend).items():
        assert found.dtype == dtype and found.shape == (batch, queries, heads[0], value)
        assert (found.float() - wanted).abs().max() <= (2e-5 if dtype == torch.float32 else 2e-2), name


def test_a_query_knows_neither_its_neighbours_nor_what_it_does_not_see() -> None:
    q, k, v = tensors(3, torch.float32, (1, 290, 2, 32), (1, 290, 2, 32), (1, 290, 2, 32))
    whole = cpu.attend_prompt(q, k, v, scale=0.3, causal=True)
    for first, last in ((0, 70), (131, 132), (250, 290)):
        part = cpu.attend_prompt(q[:, first:last], k[:, :last], v[:, :last], scale=0.3, causal=True)
        assert torch.equal(part, whole[:, first:last])
    k[:, 200:], v[:, 200:] = float("nan"), float("nan")
    again = cpu.attend_prompt(q, k, v, scale=0.3, causal=True)
    assert torch.equal(again[:, :192], whole[:, :192])


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_a_bit(threads: int) -> None:
    q, k, v = tensors(4, torch.bfloat16, (2, 40, 4, 16), (2, 40, 4, 16), (2, 40, 4, 16))
    wanted = cpu.attend_prompt(q, k, v, scale=0.3, causal=True)
    with on_threads(threads):
        assert torch.equal(cpu.attend_prompt(q, k, v, scale=0.3, causal=True), wanted)


def test_bad_shapes_are_refused() -> None:
    q, k, v = tensors(5, torch.float32, (1, 4, 2, 16), (1, 4, 2, 16), (1, 4, 2, 24))
    with pytest.raises(ValueError, match="multiples of 16"):
        cpu.attend_prompt(q, k, v, scale=1.0)
    with pytest.raises(ValueError, match="dtypes differ"):
        cpu.attend_prompt(q, k.bfloat16(), v[..., :16].clone(), scale=1.0)
    with pytest.raises(ValueError, match="too few keys"):
        cpu.attend_prompt(q, k[:, :2], v[:, :2, :, :16], scale=1.0, causal=True)
