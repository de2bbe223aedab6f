"""What decoding remembers of earlier tokens, in pages: compressed latents, index keys, or K and V.

A page holds `page_tokens` tokens of all layers. Sequences that begin with the same tokens share pages; a page
that somebody else holds too is copied before it is written. Memory for all pages is reserved at once and
written where it lies (pages that no token reached yet are reserved, not used).
Letters: N new tokens of a step, R sequences, S tokens held of one, P tokens of a page.
"""

from __future__ import annotations

from collections.abc import Sequence as Series
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glm5.config import ModelConfig
from glm5.errors import RequestError
from glm5.kernels.memory import empty_weights
from glm5.lazy import lazy
from glm5.model.masks import TokenPositions, Visibility, visibility
from glm5.model.step import Part, Places

PAGE_TOKENS = 64
_TABLE = 16  # entries of a sequence's table at first


class OutOfPagesError(RequestError):
    """No page is free; what holds some must let go first."""


class LayerPages:
    """One layer's buffers, [pages, P, ..]. Only those that its kind of attention needs exist."""

    def __init__(self, pool: PagePool, layer: int) -> None:
        config = pool.config
        if config.uses_mla:
            assert config.kv_lora_rank is not None
            self.first = pool.reserve(config.kv_lora_rank + config.qk_rope_head_dim)
            self.values = None
        else:
            heads, width = config.num_key_value_heads, config.attention_head_dim
            self.first, self.values = pool.reserve(heads, width), pool.reserve(heads, width)
        # Layers that share another's selection hold no index keys (IndexShare).
        self.index_keys = pool.reserve(config.index_head_dim) if config.has_indexer(layer) else None
        self.buffers = tuple(b for b in (self.first, self.values, self.index_keys) if b is not None)


class PagePool:
    """Memory for `num_pages` pages of a run of layers, and who holds how many of them.

    layers: which layers of the config; None = the decoder's. MTP layers follow the last one.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_pages: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        layers: range | None = None,
        page_tokens: int = PAGE_TOKENS,
    ) -> None:
        self.config, self.num_pages, self.page_tokens = config, num_pages, page_tokens
        self.dtype, self.device = dtype, torch.device(device)
        layers = range(config.num_hidden_layers) if layers is None else layers
        self.layers = {layer: LayerPages(self, layer) for layer in layers}
        self.references = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # the lowest first: pages beside each other

    def reserve(self, *shape: int) -> Tensor:
        return empty_weights((self.num_pages, self.page_tokens, *shape), self.dtype, self.device)

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """A page that nobody holds. Raises OutOfPagesError."""
        if not self._free:
            raise OutOfPagesError(f"all {self.num_pages} pages of the cache are in use")
        page = self._free.pop()
        self.references[page] = 1
        return page

    def share(self, page: int) -> int:
        assert self.references[page] > 0
        self.references[page] += 1
        return page

    def drop(self, page: int) -> None:
        self.references[page] -= 1
        assert self.references[page] >= 0
        if self.references[page] == 0:
            self._free.append(page)

    def copy(self, page: int, tokens: int) -> int:
        """A page of one's own with the first `tokens` of another."""
        mine = self.take()
        for layer in self.layers.values():
            for buffer in layer.buffers:
                buffer[mine, :tokens] = buffer[page, :tokens]
        return mine

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, over all layers."""
        buffers = (b for layer in self.layers.values() for b in layer.buffers)
        return sum(b[0].numel() * b.element_size() for b in buffers)


class Sequence:
    """One timeline of tokens in a pool: `length` of them are held, in `pages`."""

    def __init__(self, pool: PagePool) -> None:
        self.pool, self.length = pool, 0
        self.changes = 0  # of the table
        self.pages: list[int] = []
        self._table = np.zeros(_TABLE, dtype=np.int32)

    @property
    def table(self) -> np.ndarray:
        """int32, the numbers of its pages."""
        return self._table[: len(self.pages)]

    def append(self, page: int) -> None:
        """Hold one more page, which the caller has taken or shared."""
        if len(self.pages) == len(self._table):
            self._table = np.concatenate((self._table, np.zeros_like(self._table)))
        self._table[len(self.pages)] = page
        self.pages.append(page)
        self.changes += 1

    def pages_missing(self, tokens: int) -> int:
        """How many pages `reserve` would take."""
        size, pages = self.pool.page_tokens, self.pages
        begun = self.length // size
        if begun < len(pages) and tokens <= len(pages) * size and self.pool.references[pages[begun]] == 1:
            return 0
        more = max(0, -(-tokens // size) - len(pages))
        is_shared = tokens > self.length and begun < len(pages) and self.pool.references[pages[begun]] > 1
        return more + is_shared

    def reserve(self, tokens: int) -> None:
        """Have pages for so many tokens, and those behind `length` for oneself. Raises OutOfPagesError."""
        missing = self.pages_missing(tokens)
        if missing > self.pool.free_pages:
            raise OutOfPagesError(
                f"{missing} pages are needed, {self.pool.free_pages} of {self.pool.num_pages} are free"
            )
        size = self.pool.page_tokens
        begun = self.length // size
        if begun < len(self.pages) and tokens > self.length:
            page = self.pages[begun]
            if self.pool.references[page] > 1:
                self._replace(begun, self.pool.copy(page, self.length % size))
        while len(self.pages) * size < tokens:
            self.append(self.pool.take())

    def _replace(self, place: int, page: int) -> None:
        self.pool.drop(self.pages[place])
        self.pages[place] = page
        self._table[place] = page
        self.changes += 1

    def fork(self, length: int | None = None) -> Sequence:
        """Another timeline that begins with the first `length` tokens (None = all) and shares their pages."""
        other = Sequence(self.pool)
        other.length = self.length if length is None else length
        assert 0 <= other.length <= self.length
        for page in self.pages[: -(-other.length // self.pool.page_tokens)]:
            other.append(self.pool.share(page))
        return other

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens, and the pages behind them."""
        assert 0 <= length <= self.length
        self.length = length
        self._keep_pages(-(-length // self.pool.page_tokens))

    def release(self) -> None:
        """Hold nothing any more."""
        self.length = 0
        self._keep_pages(0)

    def _keep_pages(self, count: int) -> None:
        while len(self.pages) > count:
            self.pool.drop(self.pages.pop())
            self.changes += 1


class Coming:
    """One step over the layers of a pool: `counts` new tokens of each of its sequences (`ComingTokens`).

    prefix_lengths: how many tokens of each sequence see each other in both directions; they come in one step.

    Raises:
        OutOfPagesError: before anything is changed.
        RequestError: a prefix that sees ahead is cut.
    """

    def __init__(
        self,
        pool: PagePool,
        sequences: Series[Sequence],
        counts: Series[int],
        *,
        prefix_lengths: Series[int] | None = None,
    ) -> None:
        self.shared: dict[str, Any] = {}
        self._pool, self._sequences, self._counts = pool, sequences, counts
        self._starts = [s.length for s in sequences]
        self._prefixes = prefix_lengths
        ends = [s + n for s, n in zip(self._starts, counts, strict=True)]
        self._ends = ends
        if prefix_lengths is not None:
            for start, end, prefix in zip(self._starts, ends, prefix_lengths, strict=True):
                if start < prefix and end < prefix:
                    raise RequestError(
                        f"a prompt of {prefix} tokens that see each other cannot be read in pieces"
                    )
        missing = sum(s.pages_missing(end) for s, end in zip(sequences, ends, strict=True))
        if missing > pool.free_pages:
            raise OutOfPagesError(
                f"{missing} pages are needed, {pool.free_pages} of {pool.num_pages} are free"
            )
        for sequence, end in zip(sequences, ends, strict=True):
            sequence.reserve(end)
        self._changes = [sequence.changes for sequence in sequences]

    def again(self) -> bool:
        """Become the next step of the same sequences, a token each, where nothing but the places changes."""
        for sequence, end in zip(self._sequences, self._ends, strict=True):
            if sequence.length != end or sequence.pages_missing(end + 1):
                return False
        if self._changes != [sequence.changes for sequence in self._sequences]:
            return False
        if self._prefixes is not None or max(self._counts) > 1 or "places" not in self.__dict__:
            return False
        self._starts, self._ends = self._ends, [end + 1 for end in self._ends]
        places = self.places
        self._slots += 1
        places.slots[:] = self._slots
        places.limits[:] = self._slots + 1
        places.keys = max(self._ends)
        for made in ("_limits", "parts", "written", "held"):
            self.__dict__.pop(made, None)
        return True

    @lazy
    def _slots(self) -> np.ndarray:
        """int64 [N], each token's slot in its sequence."""
        if len(self._counts) == 1:
            return np.arange(self._starts[0], self._ends[0])
        if max(self._counts) == 1:
            return np.array(self._starts)
        return np.concatenate([np.arange(a, b) for a, b in zip(self._starts, self._ends, strict=True)])

    @lazy
    def positions(self) -> Tensor:
        """int64 [1, N]."""
        return torch.from_numpy(self._slots).to(self._pool.device).unsqueeze(0)

    @lazy
    def _limits(self) -> np.ndarray:
        limits = self._slots + 1
        if self._prefixes is not None:
            prefixes = np.repeat(np.array(self._prefixes), self._counts)
            limits = np.where(self._slots < prefixes, np.maximum(prefixes, limits), limits)
        return limits

    @lazy
    def places(self) -> Places:
        tables = [sequence.table for sequence in self._sequences]
        starts = [0, *accumulate(len(table) for table in tables[:-1])]
        limits = self._limits
        return Places(
            tables=tables[0] if len(tables) == 1 else np.concatenate(tables),
            starts=starts,
            rows=np.repeat(np.arange(len(tables), dtype=np.int32), self._counts),
            slots=self._slots.astype(np.int32),
            limits=limits.astype(np.int32),
            keys=int(limits.max()),
            page_tokens=self._pool.page_tokens,
            causal=self._prefixes is None,
        )

    @lazy
    def parts(self) -> list[Part]:
        found, begin = [], 0
        for number, count in enumerate(self._counts):
            found.append(Part(slice(begin, begin + count), self._visible(number)))
            begin += count
        return found

    def _visible(self, number: int) -> Visibility:
        start, end = self._starts[number], self._ends[number]
        prefix = 0 if self._prefixes is None else self._prefixes[number]
        if start >= prefix:
            return Visibility(end, is_causal=True)
        if end == prefix:
            return Visibility(end)
        slots = torch.arange(end, device=self._pool.device).unsqueeze(0)
        return visibility(TokenPositions(slots[:, start:]), TokenPositions(slots, prefix=slots < prefix))

    @lazy
    def written(self) -> Tensor:
        """int64 [N], where the new tokens lie in a buffer [pages * P, ..]."""
        sizes = [range(a, b) for a, b in zip(self._starts, self._ends, strict=True)]
        flat = [self._flat(s, r.start, r.stop) for s, r in zip(self._sequences, sizes, strict=True)]
        return torch.from_numpy(np.concatenate(flat)).to(self._pool.device)

    @lazy
    def held(self) -> list[slice | Tensor]:
        """For each sequence where all that it holds lies; a slice where its pages follow each other."""
        found: list[slice | Tensor] = []
        for sequence, end in zip(self._sequences, self._ends, strict=True):
            flat = self._flat(sequence, 0, end)
            if flat[-1] - flat[0] == end - 1 and bool((np.diff(sequence.table) == 1).all()):
                found.append(slice(int(flat[0]), int(flat[0]) + end))
            else:
                found.append(torch.from_numpy(flat).to(self._pool.device))
        return found

    def _flat(self, sequence: Sequence, start: int, end: int) -> np.ndarray:
        at = np.arange(start, end)
        size = self._pool.page_tokens
        return sequence.table[at // size].astype(np.int64) * size + at % size

    def layer(self, index: int) -> LayerView:
        """The pages of a layer of the config; MTP layers follow the decoder's last."""
        return LayerView(self, self._pool.layers[index])

    def advance(self) -> None:
        """The tokens are written: from now on their sequences hold them."""
        for sequence, end in zip(self._sequences, self._ends, strict=True):
            sequence.length = end


class LayerView:
    """One layer's memory in a step (`LayerCache`)."""

    def __init__(self, coming: Coming, pages: LayerPages) -> None:
        self._coming, self._pages = coming, pages

    def buffers(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Latents or keys, values, index keys, [pages, P, ..], for a layer that writes where they lie."""
        return self._pages.first, self._pages.values, self._pages.index_keys

    def append_latents(self, latents_1NC: Tensor) -> list[Tensor]:
        return self._write(self._pages.first, latents_1NC)

    def append_index_keys(self, keys_1Nd: Tensor) -> list[Tensor]:
        assert self._pages.index_keys is not None
        return self._write(self._pages.index_keys, keys_1Nd)

    def append_key_values(self, keys_1NHd: Tensor, values_1NHd: Tensor) -> list[tuple[Tensor, Tensor]]:
        assert self._pages.values is not None
        keys = self._write(self._pages.first, keys_1NHd)
        return list(zip(keys, self._write(self._pages.values, values_1NHd), strict=True))

    def _write(self, buffer: Tensor, rows: Tensor) -> list[Tensor]:
        flat = buffer.flatten(0, 1)
        flat[self._coming.written] = rows[0].to(flat.dtype)
        return [flat[where].unsqueeze(0) for where in self._coming.held]


class Cache:
    """Sequences of at most `capacity` tokens each, in a pool of their own: `model(ids, cache=cache)`."""

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        layers: range | None = None,
    ) -> None:
        """layers: which layers of the config; None = the decoder's. MTP layers follow the last one."""
        self.capacity = capacity
        pages = batch * -(-capacity // PAGE_TOKENS)
        self.pool = PagePool(config, pages, dtype=dtype, device=device, layers=layers)
        self.sequences = [Sequence(self.pool) for _ in range(batch)]
        for sequence in self.sequences:
            sequence.reserve(capacity)

    @property
    def length(self) -> int:
        """Tokens held of each sequence, of the longest where they differ."""
        return max(sequence.length for sequence in self.sequences)

    def coming(self, counts: Series[int], prefix_lengths: Series[int] | None = None) -> Coming:
        """A step that adds so many tokens to each sequence; raises RequestError when there is no room."""
        if len(counts) != len(self.sequences):
            raise RequestError(f"the cache is for {len(self.sequences)} rows, not {len(counts)}")
        end = max(s.length + n for s, n in zip(self.sequences, counts, strict=True))
        if end > self.capacity:
            raise RequestError(f"the cache holds {self.capacity} tokens, {end} are needed")
        return Coming(self.pool, self.sequences, counts, prefix_lengths=prefix_lengths)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens of each sequence; their room stays theirs."""
        for sequence in self.sequences:
            assert length >= 0
            sequence.length = min(length, sequence.length)
