"""The selection against a sorted list, and the scores against the published formula."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import layer_norm, pad

from glm5.model.indexer import Indexer, Selection, select
from glm5.model.masks import Visibility
from glm5.model.rotary import rotate, rotation
from glm5.model.step import Step
from tests.model_fixture import tiny_config, tiny_model

quick = settings(max_examples=200, deadline=None)
CPU = torch.device("cpu")


@st.composite
def tied_scores(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """(scores from four values, visible, topk): almost every choice is between equals."""
    batch, queries, keys = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 16))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores = torch.randint(-1, 3, (batch, queries, keys), generator=generator).float()
    visible = torch.rand(batch, queries, keys, generator=generator) < draw(st.sampled_from([0.2, 0.7, 1.0]))
    return scores, visible, draw(st.integers(1, keys))


def select_slowly(scores: Tensor, visible: Tensor, topk: int) -> list[list[list[int]]]:
    """Chosen slots in rising order, for every row and query."""

    def of_query(row: list[float], seen: list[bool]) -> list[int]:
        best = sorted((slot for slot, ok in enumerate(seen) if ok), key=lambda slot: (-row[slot], slot))
        return sorted(best[:topk])

    return [
        [of_query(row, seen) for row, seen in zip(rows, all_seen, strict=True)]
        for rows, all_seen in zip(scores.tolist(), visible.tolist(), strict=True)
    ]


def as_lists(mask: Tensor) -> list[list[list[int]]]:
    return [[row.nonzero().flatten().tolist() for row in rows] for rows in mask]


@quick
@given(tied_scores())
def test_select_takes_the_largest_and_the_lowest_slot_of_equals(case: tuple[Tensor, Tensor, int]) -> None:
    scores, visible, topk = case
    assert as_lists(select(scores, visible, topk).mask_BTS) == select_slowly(scores, visible, topk)


@quick
@given(tied_scores(), st.data())
def test_select_does_not_depend_on_batch_or_chunks(
    case: tuple[Tensor, Tensor, int], data: st.DataObject
) -> None:
    scores, visible, topk = case
    whole = select(scores, visible, topk).mask_BTS
    cut = data.draw(st.integers(0, scores.shape[1]))
    chunks = [select(scores[:, part], visible[:, part], topk) for part in (slice(cut), slice(cut, None))]
    assert torch.equal(torch.cat([chunk.mask_BTS for chunk in chunks], dim=1), whole)
    singly = [select(scores[[row]], visible[[row]], topk).mask_BTS for row in range(len(scores))]
    assert torch.equal(torch.cat(singly), whole)
    # Slots that nobody may see (a longer cache, padding at its end) change nothing.
    longer = select(pad(scores, (0, 3), value=9.0), pad(visible, (0, 3)), topk).mask_BTS
    assert torch.equal(longer, pad(whole, (0, 3)))
    shared_mask = select(scores, visible[:1], topk).mask_BTS
    assert as_lists(shared_mask) == select_slowly(scores, visible[:1].expand_as(scores), topk)


@quick
@given(tied_scores())
def test_slots_are_the_mask_in_rising_order(case: tuple[Tensor, Tensor, int]) -> None:
    scores, visible, topk = case
    selection = select(scores, visible, topk)
    slots = selection.slots_BTK
    assert slots.dtype == torch.int64
    assert slots.shape == (*scores.shape[:2], topk)
    chosen_of = as_lists(selection.mask_BTS.flatten(0, 1).unsqueeze(0))[0]
    for ours, chosen in zip(slots.flatten(0, 1).tolist(), chosen_of, strict=True):
        assert ours == chosen + [-1] * (topk - len(chosen))


def test_slots_of_a_cache_shorter_than_topk() -> None:
    mask = torch.tensor([[[True, False, True]]])
    assert Selection(mask, topk=8).slots_BTK.tolist() == [[[0, 2, -1]]]


# --- the module ------------------------------------------------------------------------------


def indexer_and_inputs(seed: int, length: int) -> tuple[Indexer, Tensor, Tensor]:
    indexer = tiny_model(tiny_config(num_hidden_layers=1), seed).indexers()[0]
    generator = torch.Generator().manual_seed(seed)
    indexer.k_norm.weight.data.normal_(1.0, 0.2, generator=generator)
    indexer.k_norm.bias.data.normal_(0.0, 0.2, generator=generator)
    x = torch.randn(2, length, 64, generator=generator)
    return indexer, x, torch.randn(2, length, 48, generator=generator)


def scores_by_loops(indexer: Indexer, x: Tensor, q_latent: Tensor) -> Tensor:
    """I[t, s] = sum_h w[t, h] relu(q[t, h] . k[s] d^-0.5), w = (W x) heads^-0.5; RoPE comes first."""
    heads, d, rotary = indexer.num_heads, indexer.head_dim, indexer.rotary_dim
    batch, length, _ = x.shape
    angles = rotation(torch.arange(length).expand(batch, -1), rotary, 10_000.0)
    q = (q_latent @ indexer.wq_b.weight.T).view(batch, length, heads, d)
    k = layer_norm(x @ indexer.wk.weight.T, (d,), indexer.k_norm.weight, indexer.k_norm.bias, 1e-6)
    q = torch.cat((rotate(q[..., :rotary], angles, interleaved=True), q[..., rotary:]), dim=-1)
    k = torch.cat((rotate(k[..., :rotary], angles, interleaved=True), k[..., rotary:]), dim=-1)
    w = (x @ indexer.weights_proj.weight.T) * heads**-0.5
    out = torch.zeros(batch, length, length)
    for h in range(heads):
        for s in range(length):
            out[:, :, s] += w[:, :, h] * ((q[:, :, h] * k[:, None, s]).sum(-1) * d**-0.5).relu()
    return out


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.integers(9, 14), st.data())
def test_scores_are_the_formula_and_chunks_choose_the_same(
    seed: int, length: int, data: st.DataObject
) -> None:
    indexer, x, q_latent = indexer_and_inputs(seed, length)
    angles = rotation(torch.arange(length).expand(2, -1), indexer.rotary_dim, 10_000.0)
    causal = Visibility(length, is_causal=True)
    with torch.no_grad():
        expected = scores_by_loops(indexer, x, q_latent)
        keys = indexer.keys(x, angles)
        scores = indexer.scores(x, q_latent, keys, angles)
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)
        selection = indexer(x, q_latent, Step(angles, causal), None)
        assert selection.topk == 8
        at = data.draw(st.integers(1, length - 1))
        tail = type(angles)(angles.turns[:, at:])
        late = indexer.scores(x[:, at:], q_latent[:, at:], keys, tail)
    torch.testing.assert_close(late, scores[:, at:], atol=1e-5, rtol=1e-4)
    assert torch.equal(selection.mask_BTS, select(scores, causal.as_mask(length, CPU), 8).mask_BTS)
    counts = selection.mask_BTS.sum(dim=-1)
    assert counts.tolist() == [[min(8, t + 1) for t in range(length)]] * 2


def test_a_short_context_selects_everything() -> None:
    indexer, x, q_latent = indexer_and_inputs(0, 8)
    angles = rotation(torch.arange(8).expand(2, -1), indexer.rotary_dim, 10_000.0)
    assert indexer(x, q_latent, Step(angles, Visibility(8, is_causal=True)), None) is None


def test_scores_are_fp32_under_bf16_weights() -> None:
    indexer, x, q_latent = indexer_and_inputs(0, 10)
    indexer, x, q_latent = indexer.bfloat16(), x.bfloat16(), q_latent.bfloat16()
    angles = rotation(torch.arange(10).expand(2, -1), indexer.rotary_dim, 10_000.0)
    assert indexer.scores(x, q_latent, indexer.keys(x, angles), angles).dtype == torch.float32
