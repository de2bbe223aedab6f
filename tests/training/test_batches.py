"""Packing: every token in its place, shares kept, chat rows whole, resumable anywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm5.errors import RecipeError
from glm5.training.batches import Batch, PackedBatches
from glm5.training.recipe import Stage
from glm5.training.shards import Shard, ShardInfo


def shard(name: str, lengths: list[int], *, first: int, chat: bool = False, prompt: int = 0) -> Shard:
    """A source whose ids count up from `first`, so that every token tells where it came from."""
    ends = np.cumsum(lengths)
    documents = [(int(end - n), int(end), min(prompt, n)) for end, n in zip(ends, lengths, strict=True)]
    tokens = np.arange(first, first + int(ends[-1]), dtype=np.uint32)
    info = ShardInfo(name, "chat" if chat else name[:2], "CC0-1.0", chat, len(lengths), len(tokens), 0)
    return Shard(info, tokens, np.asarray(documents, dtype=np.int64))


def packer(shards: list[Shard], mix: dict[str, float], **options: object) -> PackedBatches:
    settings_ = {"rows": 2, "length": 32, "seed": 1, **options}
    return PackedBatches(shards, [Stage(mix=mix)], **settings_)  # type: ignore[arg-type]


def mixed() -> list[Shard]:
    return [
        shard("en-a", [100, 7, 45], first=1000),
        shard("zh-a", [64, 33, 20], first=2000),
        shard("tasks", [9, 12, 15], first=3000, chat=True, prompt=5),
    ]


MIX = {"en": 1.0, "zh": 1.0, "tasks": 1.0}


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.integers(0, 20), st.sampled_from(["causal", "prefix"]))
def test_restored_packer_continues_with_the_next_token(seed: int, before: int, attention: str) -> None:
    straight = packer(mixed(), MIX, seed=seed, attention=attention)
    for _ in range(before):
        straight.next()
    resumed = packer(mixed(), MIX, seed=seed, attention=attention)
    resumed.restore(straight.state())
    for _ in range(5):
        a, b = straight.next(), resumed.next()
        for name in vars(a):
            left, right = getattr(a, name), getattr(b, name)
            assert (left is None and right is None) or torch.equal(left, right)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000))
def test_pieces_are_runs_of_one_source_with_positions_from_zero(seed: int) -> None:
    batches = packer(mixed(), MIX, seed=seed)
    for _ in range(10):
        batch = batches.next()
        for ids, documents, positions in zip(batch.ids, batch.documents, batch.positions, strict=True):
            for piece in range(int(documents.max()) + 1):
                here = documents == piece
                run = ids[here]
                assert torch.equal(run, torch.arange(int(run[0]), int(run[0]) + len(run)))
                assert torch.equal(positions[here], torch.arange(len(run)))


def test_chat_rows_are_whole_and_their_prompts_not_learned() -> None:
    batches = packer(mixed(), {"tasks": 1.0, "en": 0.2})
    for _ in range(20):
        batch = batches.next()
        for ids, documents, learned in zip(batch.ids, batch.documents, batch.learned, strict=True):
            for piece in range(int(documents.max()) + 1):
                here = documents == piece
                if int(ids[here][0]) < 3000:
                    assert learned[here].all()
                    continue
                assert int(ids[here][0]) in (3000, 3009, 3021)
                assert int(here.sum()) in (9, 12, 15)
                assert learned[here].tolist() == [False] * 5 + [True] * (int(here.sum()) - 5)


def test_padding_is_no_document_and_not_learned() -> None:
    batch = packer([shard("chat", [20], first=5, chat=True)], {"chat": 1.0}, pad_id=3).next()
    padded = batch.documents == -1
    assert padded[:, 20:].all()
    assert not batch.learned[padded].any()
    assert (batch.ids[padded] == 3).all()


def test_every_item_comes_once_an_epoch() -> None:
    batches = packer([shard("en-a", [32] * 10, first=0)], {"en": 1.0}, rows=10)
    for _ in range(3):
        assert sorted(batches.next().ids.flatten().tolist()) == list(range(320))


def test_sources_get_their_shares_and_languages_split_by_size() -> None:
    shards = [
        shard("en-a", [300], first=1000),
        shard("en-b", [900], first=3000),
        shard("zh-a", [64], first=8000),
    ]
    batches = packer(shards, {"en": 3.0, "zh": 1.0}, rows=8)
    counts = {"en-a": 0, "en-b": 0, "zh-a": 0}
    for _ in range(60):
        ids = batches.next().ids
        counts["en-a"] += int((ids < 3000).sum())
        counts["en-b"] += int(((ids >= 3000) & (ids < 8000)).sum())
        counts["zh-a"] += int((ids >= 8000).sum())
    total = sum(counts.values())
    assert counts["zh-a"] / total == pytest.approx(0.25, abs=0.02)
    assert counts["en-b"] / counts["en-a"] == pytest.approx(3, rel=0.1)


def test_a_source_name_outranks_its_language() -> None:
    shards = [shard("en-a", [300], first=1000), shard("en-b", [900], first=3000)]
    batches = packer(shards, {"en": 1.0, "en-a": 3.0}, rows=8)
    ids = torch.cat([batches.next().ids for _ in range(40)])
    assert float((ids < 3000).float().mean()) == pytest.approx(0.75, abs=0.03)


def test_a_new_stage_changes_the_mix() -> None:
    stages = [Stage(until=0.5, mix={"en": 1.0}), Stage(until=1.0, mix={"zh": 1.0})]
    batches = PackedBatches(mixed(), stages, rows=2, length=32, seed=1)
    assert int(batches.next().ids.max()) < 2000
    batches.enter_stage(1)
    batches.next()  # may begin with the rest of an earlier piece
    assert int(batches.next().ids.min()) >= 2000


def test_prefix_lies_at_the_start_of_a_piece_and_is_not_learned() -> None:
    batches = packer(mixed(), MIX, attention="prefix")
    seen = 0
    for _ in range(10):
        batch: Batch = batches.next()
        assert batch.prefix is not None
        assert not (batch.prefix & batch.learned).any()
        for documents, prefix in zip(batch.documents, batch.prefix, strict=True):
            for piece in range(int(documents.max()) + 1):
                flags = prefix[documents == piece].long()
                assert (flags.diff() <= 0).all()
                seen += int(flags.sum())
    assert seen > 0


def test_unknown_mix_and_too_long_rows_are_refused() -> None:
    with pytest.raises(RecipeError, match="'fr' is no source"):
        packer(mixed(), {"fr": 1.0})
    for weights in ({"en": 1.0, "en-a": 0.0}, {"en": 5e-324, "zh": 1e300}):
        with pytest.raises(RecipeError, match=r"data\.stages\.mix"):
            packer(mixed(), weights)
    with pytest.raises(RecipeError, match="no document fits"):
        packer([shard("chat", [99], first=0, chat=True)], {"chat": 1.0})
    batches = packer(mixed(), MIX)
    with pytest.raises(RecipeError, match="other sources"):
        packer(mixed()[:2], {"en": 1.0}).restore(batches.state())
