"""A whole decoder layer in one native call, for any number of tokens over a cache.

`DecoderLayer` holds a layer's weights, `Pass` what all layers of one forward pass share; both check their
tensors once, so that a layer's call costs a few microseconds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from glm5.kernels.cpu.attention import MAX_INDEX_HEADS, MAX_INDEX_WIDTH
from glm5.kernels.cpu.experts import MoeLayer, Told
from glm5.kernels.cpu.matrix import Matrix, Vector
from glm5.kernels.cpu.native import ACTIVATIONS, address, fill, inside, library, need, whole
from glm5.kernels.slots import Slots

IntArray = npt.NDArray[np.int32]


class CacheRows(NamedTuple):
    """Where a layer's cache lies, [pages, tokens, ..]: latents or keys, values (GQA), index keys (DSA)."""

    latents: Tensor
    values: Tensor | None = None
    index_keys: Tensor | None = None


class DecoderLayer:
    """The weights of a decoder layer. matrices, vectors and sizes are named as the fields of `plan.h` are.

    feed: the layer's feed-forward half; None = a call ends after attention, with fp32.
    Raises ValueError when sizes contradict each other.
    """

    def __init__(
        self, matrices: dict[str, Matrix], vectors: dict[str, Tensor], feed: MoeLayer | None, **sizes: Any
    ) -> None:
        self.handle = library.DecoderLayer()
        self.sizes, self.feed = sizes, feed
        self.kept: list[object] = [matrices, feed]
        self._rows: tuple[CacheRows, dict[str, Any]] | None = None
        for name, value in sizes.items():
            setattr(self.handle, name, value)
        for name, matrix in matrices.items():
            setattr(self.handle, name, matrix.handle)
        for name, values in vectors.items():
            vector = Vector(values)
            self.kept.append(vector)
            setattr(self.handle, name, vector.handle)
        if feed is not None:
            need(feed.hidden == sizes["hidden"], "the feed-forward half is of another width")
            self.handle.set_feed(feed.handle)
        self._check(matrices, vectors)

    def _check(self, matrices: dict[str, Matrix], vectors: dict[str, Tensor]) -> None:
        size = self.sizes
        hidden, heads, query = size["hidden"], size["heads"], size["nope"] + size["rotary"]
        index, wide = size.get("index_heads", 0), size.get("index_width", 0)
        shapes = {"o": (hidden, heads * size["value"])}
        lengths = {"input_norm": hidden, "post_norm": hidden}
        optional = {"o_bias": hidden}
        if size["grouped"]:
            groups = size["kv_heads"]
            need(groups > 0 and heads % groups == 0, f"{heads} heads do not share {groups} key heads")
            shapes |= {"q_in": (heads * query, hidden), "kv_in": (groups * query, hidden)}
            shapes["v"] = (groups * size["value"], hidden)
            optional |= {"q_norm": query, "kv_norm": query, "v_bias": groups * size["value"]}
        else:
            shapes["kv_in"] = (size["latent"] + size["rotary"], hidden)
            shapes["kv_b"] = (heads * (size["nope"] + size["value"]), size["latent"])
            lengths["kv_norm"] = size["latent"]
            rank = matrices["q_in"].rows if "q_in" in matrices else 0
            if "q_norm" in vectors:
                shapes |= {"q_in": (rank, hidden), "q_b": (heads * query, rank)}
                lengths["q_norm"] = rank
            else:
                shapes["q_in"] = (heads * query, hidden)
            if index:
                need(index <= MAX_INDEX_HEADS and wide <= MAX_INDEX_WIDTH, f"{index} index heads of {wide}")
                shapes |= {"index_q": (index * wide, rank), "index_k": (wide, hidden)}
                shapes["index_weights"] = (index, hidden)
                lengths |= {"index_norm": wide, "index_norm_bias": wide}
        if "q_in" in matrices and "kv_in" in matrices:
            optional |= {"q_bias": matrices["q_in"].rows, "kv_bias": matrices["kv_in"].rows}
        need(size["rotary"] % 2 == 0 and min(heads, query, size["value"]) > 0, "a head has no width")
        _same_names(matrices, shapes, {}, "matrix")
        _same_names(vectors, lengths, optional, "vector")
        for name, matrix in matrices.items():
            found = (matrix.rows, matrix.columns)
            need(found == shapes[name], f"{name} is {list(found)}, the layer asks for {list(shapes[name])}")
        for name, values in vectors.items():
            wanted = {**lengths, **optional}[name]
            need(values.numel() == wanted, f"{name} has {values.numel()} values, not {wanted}")
        if self.feed is not None and self.feed.bank is not None:
            need(self.feed.topk > 0, "the feed-forward half has experts and no router")

    def checked_rows(self, rows: CacheRows) -> dict[str, Any]:
        """Where a cache lies, by name: (address, bytes of a page). Kept: a cache lives for many passes."""
        kept = self._rows
        if kept is None or not all(old is new for old, new in zip(kept[0], rows, strict=True)):
            kept = self._rows = (rows, self._checked_rows(rows))
        return kept[1]

    def _checked_rows(self, rows: CacheRows) -> dict[str, Any]:
        size, latents = self.sizes, rows.latents
        head, groups = size["nope"] + size["rotary"], size.get("kv_heads", 1)
        widths = {"latents": groups * head if size["grouped"] else size["latent"] + size["rotary"]}
        widths |= {"values": groups * size.get("value", 0), "index_keys": size.get("index_width", 0)}
        need(latents.dtype in ACTIVATIONS, f"the cache is {latents.dtype}, not fp32 or bf16")
        pages, tokens = latents.shape[:2]
        found: dict[str, Any] = {"bf16": latents.dtype == torch.bfloat16, "pages": pages, "tokens": tokens}
        for name, buffer in zip(widths, rows, strict=True):
            if buffer is None:
                found[name] = (0, 0)
                continue
            like = buffer.dtype == latents.dtype and buffer.shape[:2] == latents.shape[:2]
            inner = buffer.stride(1) == widths[name] and buffer[0, 0].is_contiguous()
            need(
                like and inner and buffer[0, 0].numel() == widths[name] and buffer.device.type == "cpu",
                f"{name} are not {latents.dtype} [{pages}, {tokens}, {widths[name]}]",
            )
            found[name] = (buffer.data_ptr(), buffer.stride(0) * buffer.element_size())
        need(not size.get("index_heads") or rows.index_keys is not None, "the layer needs index keys")
        need(not size["grouped"] or rows.values is not None, "the layer needs values")
        return found


def _same_names(given: dict[str, Any], wanted: dict[str, Any], optional: dict[str, Any], what: str) -> None:
    missing = sorted(wanted.keys() - given.keys())
    unknown = sorted(given.keys() - wanted.keys() - optional.keys())
    need(not missing and not unknown, f"missing {what}: {missing}; unknown: {unknown}")


class Pass:
    """One forward pass: N new tokens of any sequences, which all layers write to the same places.

    x: fp32 or bf16 [.., D], N rows in all. turns: complex64 [N, rotary / 2]. tables: int32, the page numbers
    of all sequences, one behind the other; `starts` says where each begins. rows, slots, limits: int32 [N], a
    token's sequence, the slot it is written to, and how many slots it sees. A page has `page_tokens` slots, a
    power of two. causal: no token sees a later one of this pass. visible: bool [sequences or 1, slots, keys],
    what a token sees within its limit; only where a sequence's tokens are all in this pass.
    """

    def __init__(
        self, x: Tensor, turns: Tensor, *, tables: IntArray, starts: list[int], rows: IntArray,
        slots: IntArray, limits: IntArray, keys: int, page_tokens: int, causal: bool = True,
        visible: Tensor | None = None,
    ) -> None:  # fmt: skip
        count, self.hidden = x.numel() // x.shape[-1], x.shape[-1]
        need(
            x.dtype in ACTIVATIONS and x.device.type == "cpu", f"activations are {x.dtype}, not fp32 or bf16"
        )
        need(x.numel() < 1 << 31, f"{count} tokens are too many for one pass; give fewer at once")
        need(page_tokens & (page_tokens - 1) == 0, f"pages of {page_tokens} tokens are no power of two")
        self.shape, self.dtype, self.keys, self.count = x.shape, x.dtype, keys, count
        self.page_tokens = page_tokens
        self.of: Tensor | None = None  # whose rotations these are
        self.turns = whole(turns.contiguous(), (count, turns.shape[-1]), torch.complex64, "turns")
        self.visible = visible
        for values, name in ((rows, "rows"), (slots, "slots"), (limits, "limits"), (tables, "tables")):
            fits = values.dtype == np.int32 and values.ndim == 1 and values.flags.c_contiguous
            need(fits and (name == "tables" or len(values) == count), f"{name} are not int32 [{count}]")
        if visible is not None:
            wanted = (len(starts) if len(visible) > 1 else 1, keys, keys)
            self.visible = whole(visible.contiguous(), wanted, torch.bool, "visible")
        begins = np.array(starts)
        pointers = tables.ctypes.data + 4 * begins
        where = library.Pages()
        where.tables, where.shift = pointers.ctypes.data, page_tokens.bit_length() - 1
        # One call for all layers; each sets what is its own.
        self._call = call = library.LayerCall()
        call.bf16, call.count, call.keys, call.causal = x.dtype == torch.bfloat16, count, keys, causal
        call.rows, call.at, call.limits = rows.ctypes.data, slots.ctypes.data, limits.ctypes.data
        call.pages, call.turns, call.visible = where, self.turns.data_ptr(), address(self.visible)
        call.visible_at = 0 if self.visible is None or len(self.visible) == 1 else keys * keys
        self._sizes = (begins.ctypes.data, len(starts), len(tables))
        self._kept = (tables, rows, slots, limits, pointers, begins)
        self._check()

    def _check(self) -> None:
        most = library.check_places(self._call, *self._sizes)
        need(most >= 0, "a token lies behind the pages of its sequence")
        self.pages = most + 1

    def renew(self, turns: Tensor, keys: int) -> None:
        """The next pass of the same shape, whose slots and limits were changed where they lie."""
        self.of = turns
        self.turns = whole(turns.reshape(self.count, -1), self.turns.shape, torch.complex64, "turns")
        self.keys = self._call.keys = keys
        self._call.turns = self.turns.data_ptr()
        self._check()

    @classmethod
    def of_rows(cls, x: Tensor, turns: Tensor, *, causal: bool, visible: Tensor | None) -> Pass:
        """A pass over B sequences that nothing is held of: x [B, T, D], turns [B, T, rotary / 2]."""
        batch, tokens, _ = x.shape
        tables, slots = np.arange(batch, dtype=np.int32), np.arange(tokens, dtype=np.int32)
        limits = slots + np.int32(1) if causal else np.full_like(slots, tokens)
        return cls(
            x, turns.reshape(batch * tokens, -1), tables=tables, starts=list(range(batch)),
            rows=tables.repeat(tokens), slots=np.tile(slots, batch), limits=np.tile(limits, batch),
            keys=tokens, page_tokens=1 << 30, causal=causal, visible=visible,
        )  # fmt: skip

    def run(
        self, layer: DecoderLayer, x: Tensor, rows: CacheRows, *, slots: Slots | None = None,
        chosen: Slots | None = None, told: Told | None = None, exact: bool = False,
    ) -> Tensor:  # fmt: skip
        """The layer's output, like x; without a feed-forward half fp32 after attention.

        slots: what an earlier layer chose for each query. chosen: filled with what this layer's indexer
        chooses. told: filled with what the router chose. exact: integer weights meet unrounded activations.
        """
        need(x.shape == self.shape and x.dtype == self.dtype, "x is not of this pass")
        size = layer.sizes
        need(self.hidden == size["hidden"], f"x is {self.hidden} wide, the layer {size['hidden']}")
        need(2 * self.turns.shape[-1] == size["rotary"], "turns are of another width")
        x = x.contiguous()
        out = torch.empty(x.shape, dtype=torch.float32 if layer.feed is None else x.dtype)
        call, count = self._call, self.count
        call.x, call.out, call.exact = x.data_ptr(), out.data_ptr(), exact
        self._set_cache(layer, rows)
        call.slots = call.counts = call.room = 0
        if slots is not None:
            assert slots.slots is not None
            whole(slots.counts, (count,), torch.int32, "counts")
            room = slots.slots.shape[1]
            inside(whole(slots.slots, (count, room), torch.int32, "slots"), 0, self.keys, "slots")
            inside(slots.counts, 0, room + 1, "counts")
            fill(call, slots=slots.slots, counts=slots.counts, room=room)
        call.chosen_slots = call.chosen_counts = 0
        if chosen is not None:
            assert chosen.slots is not None
            whole(chosen.slots, (count, size["topk"]), torch.int32, "chosen slots")
            whole(chosen.counts, (count,), torch.int32, "counts")
            fill(call, chosen_slots=chosen.slots, chosen_counts=chosen.counts)
        else:
            need(
                not size.get("index_heads") or self.keys <= size["topk"], "the layer chooses slots: give room"
            )
        call.expert_ids = call.expert_weights = call.expert_scores = 0
        if told is not None:
            assert layer.feed is not None
            told.check(count, layer.feed.topk, layer.feed.num_experts)
            fill(call, expert_ids=told.ids, expert_weights=told.weights, expert_scores=told.scores)
        library.decode_layer(layer.handle, call)
        return out

    def _set_cache(self, layer: DecoderLayer, rows: CacheRows) -> None:
        found = layer.checked_rows(rows)
        need(found["pages"] >= self.pages, "the cache has too few pages")
        need(found["tokens"] >= min(self.keys, self.page_tokens), "a page has too few tokens")
        call = self._call
        call.cache_bf16 = found["bf16"]
        for name in ("latents", "values", "index_keys"):
            setattr(call, name, found[name][0])
        call.latents_page_bytes, call.values_page_bytes = found["latents"][1], found["values"][1]
        call.index_page_bytes = found["index_keys"][1]
