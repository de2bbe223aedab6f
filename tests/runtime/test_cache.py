"""The cache in pages: shared, copied before it is written, honest about what it holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm5.config import MODEL_TYPES
from glm5.errors import RequestError
from glm5.runtime.cache import Cache, Coming, OutOfPagesError, PagePool, Sequence
from tests.model_fixture import random_ids, tiny_config, tiny_model

quick = settings(max_examples=40, deadline=None)
SHARED = {"num_hidden_layers": 4, "indexer_types": ["full", "shared", "shared", "full"]}


def tiny_pool(
    pages: int = 8, model_type: str = "glm_moe_dsa", page_tokens: int = 4, **changes: Any
) -> PagePool:
    return PagePool(tiny_config(model_type, **changes), pages, dtype=torch.float32, page_tokens=page_tokens)


def written(sequence: Sequence, values: list[float]) -> None:
    """Append a token a value, whose latents are that value in layer 0."""
    coming = Coming(sequence.pool, [sequence], [len(values)])
    coming.layer(0).append_latents(torch.tensor(values).view(1, -1, 1).expand(1, -1, 40))
    coming.advance()


def read(sequence: Sequence) -> list[float]:
    size, pages = sequence.pool.page_tokens, sequence.pool.layers[0].first
    return [float(pages[sequence.pages[at // size], at % size, 0]) for at in range(sequence.length)]


# --- pages -----------------------------------------------------------------------------------


@quick
@given(st.data())
def test_forks_and_cuts_never_change_each_other(data: st.DataObject) -> None:
    """Random appends, forks, cuts and releases, against plain lists; at the end no page is lost."""
    pool = tiny_pool(pages=24)
    live: list[tuple[Sequence, list[float]]] = [(Sequence(pool), [])]
    value = 0.0
    for _ in range(data.draw(st.integers(1, 25))):
        place = data.draw(st.integers(0, len(live) - 1))
        sequence, expected = live[place]
        what = data.draw(st.sampled_from(["append", "append", "fork", "cut", "release"]))
        if what == "append":
            new = [value + i for i in range(data.draw(st.integers(1, 9)))]
            value += 100
            try:
                written(sequence, new)
                expected += new
            except OutOfPagesError:
                assert pool.free_pages < sequence.pages_missing(sequence.length + len(new))
        elif what == "fork" and len(live) < 5:
            at = data.draw(st.integers(0, sequence.length))
            live.append((sequence.fork(at), expected[:at]))
        elif what == "cut":
            at = data.draw(st.integers(0, sequence.length))
            sequence.truncate(at)
            del expected[at:]
        elif what == "release" and len(live) > 1:
            sequence.release()
            live.pop(place)
        for each, values in live:
            assert read(each) == values
    for each, _ in live:
        each.release()
    assert pool.free_pages == pool.num_pages
    assert pool.references == [0] * pool.num_pages


def test_a_fork_copies_nothing_until_it_is_written() -> None:
    pool = tiny_pool()
    one = Sequence(pool)
    written(one, [1, 2, 3, 4, 5, 6])
    other = one.fork()
    assert other.pages == one.pages
    assert pool.free_pages == 6
    written(other, [7])
    assert other.pages[0] == one.pages[0]
    assert other.pages[1] != one.pages[1]
    assert (read(one), read(other)) == ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7])


def test_without_room_nothing_is_taken() -> None:
    pool = tiny_pool(pages=3)
    one, other = Sequence(pool), Sequence(pool)
    written(one, [1.0] * 6)
    with pytest.raises(OutOfPagesError, match="2 pages are needed, 1 of 3 are free"):
        Coming(pool, [one, other], [3, 1])
    assert (len(one.pages), len(other.pages), pool.free_pages) == (2, 0, 1)
    with pytest.raises(OutOfPagesError, match="2 pages are needed, 1 of 3 are free"):
        other.reserve(8)
    assert (len(other.pages), pool.free_pages) == (0, 1)


def test_only_layers_with_an_indexer_hold_index_keys() -> None:
    pool = tiny_pool(**SHARED)
    assert [layer.index_keys is not None for layer in pool.layers.values()] == [True, False, False, True]
    draft = PagePool(tiny_config(), 2, dtype=torch.float32, layers=range(3, 4))
    assert list(draft.layers) == [3]
    assert draft.layers[3].index_keys is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_cache_has_the_dtype_it_was_asked_for(dtype: torch.dtype) -> None:
    pool = PagePool(tiny_config(), 1, dtype=dtype)
    (held,) = Coming(pool, [Sequence(pool)], [2]).layer(0).append_latents(torch.ones(1, 2, 40, dtype=dtype))
    assert held.dtype == dtype


# --- the plain network over pages --------------------------------------------------------------


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**31), st.data())
def test_a_step_over_many_sequences_is_each_ones_own_pass(
    model_type: str, seed: int, data: st.DataObject
) -> None:
    """PyTorch's modules, page by page, in any mix; index_topk is 8, so that the selection is at work."""
    model = tiny_model(tiny_config(model_type, index_n_heads=8), seed)
    rows = [random_ids(1, data.draw(st.integers(1, 20)), seed=seed + i)[0] for i in range(3)]
    pool = PagePool(model.config, 24, dtype=model.dtype, page_tokens=4)
    sequences, found = [Sequence(pool) for _ in rows], [[] for _ in rows]
    with torch.inference_mode():
        while any(s.length < len(row) for s, row in zip(sequences, rows, strict=True)):
            some = [i for i, row in enumerate(rows) if sequences[i].length < len(row)]
            counts = [data.draw(st.integers(1, len(rows[i]) - sequences[i].length)) for i in some]
            ids = torch.cat([rows[i][sequences[i].length :][:n] for i, n in zip(some, counts, strict=True)])
            out = model.extend(ids, Coming(pool, [sequences[i] for i in some], counts))
            for i, own in zip(some, out.split(counts), strict=True):
                found[i].append(own)
        for row, own in zip(rows, found, strict=True):
            alone = model(row.unsqueeze(0)).hidden[0]
            torch.testing.assert_close(torch.cat(own), alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("cut", [6, 9])
@torch.inference_mode()
def test_a_prefix_and_what_stands_behind_it(model_type: str, cut: int) -> None:
    """The prompt of 6 alone, or with what was written behind it, in one step."""
    model = tiny_model(tiny_config(model_type, index_n_heads=8, attention_mask_type="prefix"))
    ids = random_ids(1, 14)[0]
    cache = Cache(model.config, 1, 20, dtype=model.dtype)
    first = model.extend(ids[:cut], cache.coming([cut], [6]))
    rest = [model.extend(ids[i : i + 1], cache.coming([1], [6])) for i in range(cut, 14)]
    alone = model(ids.unsqueeze(0), prefix_lengths=torch.tensor([6])).hidden[0]
    torch.testing.assert_close(torch.cat([first, *rest]), alone, atol=2e-5, rtol=1e-4)


# --- a cache by itself -----------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@torch.inference_mode()
def test_more_than_the_capacity_is_refused_in_one_line_and_changes_nothing(model_type: str) -> None:
    model = tiny_model(tiny_config(model_type))
    cache, ids = Cache(model.config, 1, 10, dtype=model.dtype), random_ids(1, 11)
    model(ids[:, :8], cache=cache)
    with pytest.raises(RequestError, match="holds 10 tokens, 11 are needed") as caught:
        model(ids[:, 8:], cache=cache)
    assert "\n" not in str(caught.value)
    assert cache.length == 8
    after = model(ids[:, 8:10], cache=cache).logits
    torch.testing.assert_close(after, model(ids[:, :10]).logits[:, 8:], atol=2e-5, rtol=1e-4)
    cache.truncate(8)
    assert torch.equal(model(ids[:, 8:10], cache=cache).logits, after)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_mask": torch.tensor([[0, 1]])}, "attention_mask does not go with a cache"),
        ({"position_ids": torch.tensor([[5, 6]])}, "position_ids does not go with a cache"),
        ({"document_ids": torch.tensor([[0, 1]])}, "document_ids does not go with a cache"),
    ],
)
def test_what_a_cache_does_not_take_is_refused(options: dict[str, Any], message: str) -> None:
    model = tiny_model(tiny_config())
    cache = Cache(model.config, 1, 10, dtype=model.dtype)
    with pytest.raises(RequestError, match=message):
        model(random_ids(1, 2), cache=cache, **options)
    with pytest.raises(RequestError, match="is for 1 rows, not 3"):
        model(random_ids(3, 2), cache=cache)
    model(random_ids(1, 2), torch.ones(1, 2), cache=cache)  # a mask that hides nothing
