"""The cache: reserved once, written where it lies, honest about what it holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm5.config import MODEL_TYPES
from glm5.errors import RequestError
from glm5.model.masks import TokenPositions
from glm5.model.transformer import token_positions
from glm5.runtime.cache import Cache
from tests.model_fixture import random_ids, tiny_config, tiny_model

quick = settings(max_examples=40, deadline=None)
SHARED = {"num_hidden_layers": 4, "indexer_types": ["full", "shared", "shared", "full"]}


def tiny_cache(model_type: str = "glm_moe_dsa", batch: int = 2, capacity: int = 12, **changes: Any) -> Cache:
    return Cache(tiny_config(model_type, **changes), batch, capacity, dtype=torch.float32)


def cuts(data: st.DataObject, length: int) -> list[int]:
    """Random chunk sizes that add up to `length`."""
    sizes = []
    while sum(sizes) < length:
        sizes.append(data.draw(st.integers(1, length - sum(sizes))))
    return sizes


# --- memory ----------------------------------------------------------------------------------


@quick
@given(st.integers(1, 12), st.data())
def test_a_growing_cache_is_never_copied(length: int, data: st.DataObject) -> None:
    cache, width = tiny_cache(), 40
    rows, held, where = torch.randn(2, length, width), None, set()
    for chunk in rows.split(cuts(data, length), dim=1):
        held = cache.layers[0].append_latents(chunk)
        cache.advance(chunk.shape[1])
        where.add(held.data_ptr())
        assert held._is_view()
    assert len(where) == 1
    assert torch.equal(held, rows)


def test_keys_and_values_and_index_keys_grow_in_place_too() -> None:
    cache, layer = tiny_cache("glm4_moe"), 0
    first = cache.layers[layer].append_key_values(torch.ones(2, 3, 2, 24), torch.zeros(2, 3, 2, 24))
    cache.advance(3)
    second = cache.layers[layer].append_key_values(torch.zeros(2, 1, 2, 24), torch.ones(2, 1, 2, 24))
    assert [t.data_ptr() for t in first] == [t.data_ptr() for t in second]
    assert second[0].shape == (2, 4, 2, 24)
    assert second[0].sum() == 2 * 3 * 2 * 24

    cache = tiny_cache()
    first_keys = cache.layers[0].append_index_keys(torch.ones(2, 3, 12))
    cache.advance(3)
    assert cache.layers[0].append_index_keys(torch.ones(2, 1, 12)).data_ptr() == first_keys.data_ptr()


def test_only_layers_with_an_indexer_hold_index_keys() -> None:
    cache = tiny_cache(**SHARED)
    assert [layer._index_keys is not None for layer in cache.layers] == [True, False, False, True]


def test_the_draft_layer_gets_a_cache_of_its_own() -> None:
    config = tiny_config()
    cache = Cache(config, 1, 8, dtype=torch.float32, layers=range(3, 4))
    assert len(cache.layers) == 1
    assert cache.layers[0]._index_keys is not None
    assert Cache(config, 1, 8, dtype=torch.float32, layers=range(0)).layers == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_cache_has_the_dtype_it_was_asked_for(dtype: torch.dtype) -> None:
    cache = Cache(tiny_config(), 1, 4, dtype=dtype)
    assert cache.layers[0].append_latents(torch.ones(1, 2, 40, dtype=dtype)).dtype == dtype


# --- limits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@torch.inference_mode()
def test_more_than_the_capacity_is_refused_in_one_line_and_changes_nothing(model_type: str) -> None:
    model = tiny_model(tiny_config(model_type))
    cache, ids = tiny_cache(model_type, batch=1, capacity=10), random_ids(1, 11)
    model(ids[:, :8], cache=cache)
    with pytest.raises(RequestError, match="holds 10 tokens, 11 are needed") as caught:
        model(ids[:, 8:], cache=cache)
    assert "\n" not in str(caught.value)
    assert cache.length == 8
    after = model(ids[:, 8:10], cache=cache).logits
    torch.testing.assert_close(after, model(ids[:, :10]).logits[:, 8:], atol=2e-5, rtol=1e-4)


def test_a_layer_refuses_what_does_not_fit() -> None:
    cache = tiny_cache(capacity=4)
    with pytest.raises(RequestError, match="holds 4 tokens, 5 are needed"):
        cache.layers[0].append_latents(torch.zeros(2, 5, 40))
    with pytest.raises(RequestError, match="is for 2 rows, not 1"):
        cache.layers[0].append_latents(torch.zeros(1, 1, 40))
    with pytest.raises(RequestError, match="is for 2 rows, not 3"):
        cache.append_positions(token_positions(random_ids(3, 2), cache=cache))


def test_packed_documents_are_refused() -> None:
    cache, ids = tiny_cache(), random_ids(2, 4)
    with pytest.raises(RequestError, match="packed documents"):
        cache.append_positions(token_positions(ids, document_ids=torch.zeros_like(ids), cache=cache))


@quick
@given(st.integers(1, 10), st.data())
def test_truncated_tokens_are_forgotten(length: int, data: st.DataObject) -> None:
    cache, kept = tiny_cache(), data.draw(st.integers(0, length))
    rows = torch.randn(2, length + 1, 40)
    cache.append_positions(token_positions(random_ids(2, length), cache=cache))
    cache.layers[0].append_latents(rows[:, :length])
    cache.advance(length)
    cache.truncate(kept)
    assert cache.length == kept
    places = token_positions(random_ids(2, 1), cache=cache)
    assert places.positions.tolist() == [[kept], [kept]]
    assert cache.append_positions(places).positions.tolist() == [list(range(kept + 1))] * 2
    held = cache.layers[0].append_latents(rows[:, length:])
    assert torch.equal(held, torch.cat((rows[:, :kept], rows[:, length:]), dim=1))


# --- places ----------------------------------------------------------------------------------


def spelt_out(places: TokenPositions) -> tuple[Tensor, Tensor, Tensor]:
    shape = places.positions.shape
    valid = torch.ones(shape, dtype=torch.bool) if places.valid is None else places.valid
    prefix = torch.zeros(shape, dtype=torch.bool) if places.prefix is None else places.prefix
    return places.positions, valid, prefix


@quick
@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.booleans(), st.data())
def test_places_are_the_same_in_chunks_and_in_one_piece(
    lengths: list[int], has_prefix: bool, data: st.DataObject
) -> None:
    batch, longest = len(lengths), max(lengths)
    ids = random_ids(batch, longest)
    mask = torch.arange(longest) >= longest - torch.tensor(lengths).unsqueeze(1)
    prefix = None
    if has_prefix:
        prefix = torch.tensor([data.draw(st.integers(0, length)) for length in lengths])
    cache = tiny_cache(batch=batch)
    held = None
    for at in torch.arange(longest).split(cuts(data, longest)):
        places = token_positions(ids[:, at], attention_mask=mask[:, at], prefix_lengths=prefix, cache=cache)
        held = cache.append_positions(places)
        cache.advance(len(at))
    whole = token_positions(ids, attention_mask=mask, prefix_lengths=prefix)
    for chunked, expected in zip(spelt_out(held), spelt_out(whole), strict=True):
        assert torch.equal(chunked, expected)
    following = token_positions(ids[:, :1], cache=cache).positions
    assert following.flatten().tolist() == lengths


def test_rows_that_stand_at_different_positions_count_on_from_their_own() -> None:
    cache = tiny_cache()
    first = token_positions(random_ids(2, 2), position_ids=torch.tensor([[0, 1], [5, 6]]), cache=cache)
    cache.append_positions(first)
    cache.advance(2)
    assert token_positions(random_ids(2, 2), cache=cache).positions.tolist() == [[2, 3], [7, 8]]
