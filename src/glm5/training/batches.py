"""Packs pieces of many sources into rows of equal length, the same way every time.

Each source is cut into items of at most one row, shuffled anew every epoch; the next item comes
from the source that is furthest behind its share. All state is a few numbers, so that a resumed
run continues with the very next token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glm5.errors import RecipeError
from glm5.text.tokenizer import Tokenizer
from glm5.training.corpus import Corpus
from glm5.training.recipe import Recipe, Stage
from glm5.training.shards import Shard, build_shards, open_shards

# Less room than this at a row's end is padded: so short a piece teaches nothing.
_LEAST_PIECE = 8


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens. documents: equal within a piece, -1 on padding."""

    ids: Tensor  # int64 [B, T]
    documents: Tensor  # int64 [B, T]
    positions: Tensor  # int64 [B, T], from 0 in each piece
    learned: Tensor  # bool [B, T]: tokens that are to be predicted
    prefix: Tensor | None  # bool [B, T]: tokens of a bidirectional prefix


def batches_of(
    recipe: Recipe, corpus: Corpus, tokenizer: Tokenizer, rows: int, say: Callable[[str], None]
) -> PackedBatches:
    """Batches of a recipe's own mix; encodes what of its corpus is not encoded yet."""
    infos = build_shards(corpus, recipe.shard_dir, tokenizer, say)
    return PackedBatches(
        open_shards(recipe.shard_dir, infos, tokenizer.vocab_size),
        recipe.data.stages,
        rows=rows,
        length=recipe.data.sequence_length,
        seed=recipe.seed,
        attention=recipe.data.attention,
        pad_id=tokenizer.pad_token_id or 0,
    )


class PackedBatches:
    """Endless batches of a stage's mix."""

    def __init__(
        self,
        shards: Sequence[Shard],
        stages: Sequence[Stage],
        *,
        rows: int,
        length: int,
        seed: int,
        attention: str = "causal",
        pad_id: int = 0,
    ) -> None:
        self.rows, self.length, self.seed, self.pad_id = rows, length, seed, pad_id
        self.draws_prefix = attention == "prefix"
        self.shards = {shard.info.source: shard for shard in shards}
        self.items = {name: _items(shard, length) for name, shard in self.shards.items()}
        self.shares = [_shares(stage.mix, shards) for stage in stages]
        self.stage = 0
        self.drawn = 0  # items, for the prefix draw
        self.served = dict.fromkeys(self.shards, 0)  # tokens, in this stage
        self.cursor = dict.fromkeys(self.shards, 0)  # items taken, in all epochs
        self.carry: tuple[str, int, int] | None = None  # the rest of a cut item
        self._orders: dict[str, tuple[int, np.ndarray]] = {}

    def enter_stage(self, stage: int) -> None:
        """Change the mix; a no-op when already there."""
        if stage != self.stage:
            self.stage = stage
            self.served = dict.fromkeys(self.shards, 0)

    def next(self) -> Batch:
        rows = [self._row() for _ in range(self.rows)]
        ids, documents, positions, learned, prefix = (np.stack(part) for part in zip(*rows, strict=True))
        return Batch(
            torch.from_numpy(ids),
            torch.from_numpy(documents),
            torch.from_numpy(positions),
            torch.from_numpy(learned),
            torch.from_numpy(prefix) if self.draws_prefix else None,
        )

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON."""
        carry = list(self.carry) if self.carry else None
        return {
            "stage": self.stage,
            "drawn": self.drawn,
            "served": self.served,
            "cursor": self.cursor,
            "carry": carry,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        if set(state["cursor"]) != set(self.shards):
            raise RecipeError("the checkpoint was trained on other sources; start a new output directory")
        self.stage, self.drawn = state["stage"], state["drawn"]
        self.served, self.cursor = dict(state["served"]), dict(state["cursor"])
        self.carry = tuple(state["carry"]) if state["carry"] else None

    # ---------------------------------------------------------------- one row

    def _row(self) -> tuple[np.ndarray, ...]:
        length = self.length
        ids = np.full(length, self.pad_id, dtype=np.int64)
        documents = np.full(length, -1, dtype=np.int64)
        positions = np.zeros(length, dtype=np.int64)
        learned = np.zeros(length, dtype=bool)
        prefix = np.zeros(length, dtype=bool)
        filled = piece = 0
        while length - filled >= _LEAST_PIECE:
            taken = self._take(length - filled)
            if taken is None:
                break
            source, start, end, prompt = taken
            here = slice(filled, filled + end - start)
            ids[here] = self.shards[source].tokens[start:end]
            documents[here] = piece
            positions[here] = np.arange(end - start)
            skipped = self._prefix_length(end - start, prompt)
            learned[filled + skipped : here.stop] = True
            prefix[filled : filled + skipped] = True
            filled, piece = here.stop, piece + 1
        return ids, documents, positions, learned, prefix

    def _prefix_length(self, tokens: int, prompt: int) -> int:
        """Tokens of a piece that are given, not learned: the prompt or, in text, a drawn prefix."""
        self.drawn += 1
        if prompt or not self.draws_prefix:
            return prompt
        draw = np.random.default_rng((self.seed, self.drawn)).random()
        return int(draw * tokens / 2)  # at least half of every piece is learned

    def _take(self, room: int) -> tuple[str, int, int, int] | None:
        """(source, first token, end, prompt length) of the next piece that fits, or None."""
        if self.carry is not None:
            source, start, end = self.carry
            self.carry = None
            return self._cut(source, start, end, room)
        shares = self.shares[self.stage]
        behind = sorted(shares, key=lambda name: (self.served[name] / shares[name], name))
        for source in behind:
            start, end, prompt = self._peek(source)
            if self.shards[source].info.chat:
                if end - start > room:
                    continue  # a chat row is whole or not there
                self.cursor[source] += 1
                self.served[source] += end - start
                return source, start, end, prompt
            self.cursor[source] += 1
            return self._cut(source, start, end, room)
        return None

    def _cut(self, source: str, start: int, end: int, room: int) -> tuple[str, int, int, int]:
        stop = min(end, start + room)
        if end - stop >= _LEAST_PIECE:
            self.carry = (source, stop, end)
        self.served[source] += stop - start
        return source, start, stop, 0

    def _peek(self, source: str) -> tuple[int, int, int]:
        items = self.items[source]
        epoch, place = divmod(self.cursor[source], len(items))
        known = self._orders.get(source)
        if known is None or known[0] != epoch:
            name = int.from_bytes(source.encode()[:8], "little")
            order = np.random.default_rng((self.seed, name, epoch)).permutation(len(items))
            self._orders[source] = known = (epoch, order)
        start, end, prompt = items[known[1][place]].tolist()
        return start, end, prompt


def _items(shard: Shard, length: int) -> np.ndarray:
    """Documents cut to at most `length` tokens: int64 [items, 3] of (start, end, prompt)."""
    items: list[tuple[int, int, int]] = []
    for start, end, prompt in shard.documents.tolist():
        if shard.info.chat:
            if end - start <= length:
                items.append((start, end, prompt))
            continue
        for first in range(start, end, length):
            if min(end, first + length) - first >= _LEAST_PIECE:
                items.append((first, min(end, first + length), 0))
    if not items:
        raise RecipeError(f"source {shard.info.source}: no document fits in {length} tokens")
    return np.asarray(items, dtype=np.int64)


def _shares(mix: Mapping[str, float], shards: Sequence[Shard]) -> dict[str, float]:
    """Share of the tokens of each source. A language's weight is split by size among its sources
    that have no weight of their own.
    """
    names = {shard.info.source for shard in shards} | {shard.info.language for shard in shards}
    unknown = sorted(set(mix) - names)
    if unknown:
        raise RecipeError(f"data.stages.mix: {unknown[0]!r} is no source and no language of the corpus")
    shares = {s.info.source: mix[s.info.source] for s in shards if s.info.source in mix}
    for language, weight in mix.items():
        members = [s for s in shards if s.info.language == language and s.info.source not in mix]
        total = sum(s.info.tokens for s in members)
        shares.update({s.info.source: weight * s.info.tokens / total for s in members})
    whole = sum(shares.values())
    found = {name: share / whole for name, share in shares.items() if share > 0} if whole > 0 else {}
    if not found or not all(1e-9 <= share <= 1 for share in found.values()):
        raise RecipeError(
            f"data.stages.mix: {dict(mix)} leaves a source less than a billionth, or nothing to train on"
        )
    return found
