"""A whole decoder layer in one native call, for any number of tokens over a cache.

`DecoderLayer` holds a layer's weights, `Pass` what all layers of one forward pass share; both check their
tensors once, so that a layer's call costs a few microseconds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from glm5.kernels.cpu.attention import MAX_INDEX_HEADS, MAX_INDEX_WIDTH
from glm5.kernels.cpu.experts import MoeLayer, Told
from glm5.kernels.cpu.matrix import Matrix, Vector
from glm5.kernels.cpu.native import ACTIVATIONS, address, fill, inside, library, need, whole
from glm5.kernels.slots import Slots


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
        self, x: Tensor, turns: Tensor, *, tables: Tensor, starts: list[int], rows: Tensor, slots: Tensor,
        limits: Tensor, keys: int, page_tokens: int, causal: bool = True,
        visible: Tensor | None = None,
    ) -> None:  # fmt: skip
        count, self.hidden = x.numel() // x.shape[-1], x.shape[-1]
        need(
            x.dtype in ACTIVATIONS and x.device.type == "cpu", f"activations are {x.dtype}, not fp32 or bf16"
        )
        need(x.numel() < 1 << 31, f"{count} tokens are too many for one pass; give fewer at once")
        need(page_tokens & (page_tokens - 1) == 0, f"pages of {page_tokens} tokens are no power of two")
        self.shape, self.dtype, self.keys, self.count = x.shape, x.dtype, keys, count
        self.turns = whole(turns.contiguous(), (count, turns.shape[-1]), torch.complex64, "turns")
        self.visible = visible
        for values, name in ((rows, "rows"), (slots, "slots"), (limits, "limits")):
            whole(values, (count,), torch.int32, name)
        inside(rows, 0, len(starts), "rows")
        inside(limits, 1, keys + 1, "limits")
        inside(slots, 0, keys, "slots")
        whole(tables, (tables.numel(),), torch.int32, "tables")
        bounds = torch.tensor([*starts, tables.numel()])
        reach = bounds.diff()[rows.long()] * page_tokens
        need(bool((limits <= reach).all() and (slots < limits).all()), "a token lies behind its pages")
        self.pages = int(tables.max()) + 1
        if visible is not None:
            wanted = (len(starts) if len(visible) > 1 else 1, keys, keys)
            self.visible = whole(visible.contiguous(), wanted, torch.bool, "visible")
        self._pointers = tables.data_ptr() + 4 * bounds[:-1]
        self._kept = (tables, rows, slots, limits)
        where = fill(library.Pages(), tables=self._pointers)
        where.shift = page_tokens.bit_length() - 1
        self._fixed = {
            "bf16": x.dtype == torch.bfloat16, "count": count, "keys": keys, "causal": causal, "pages": where,
            "rows": rows.data_ptr(), "at": slots.data_ptr(), "limits": limits.data_ptr(),
            "turns": self.turns.data_ptr(), "visible": address(self.visible),
            "visible_at": 0 if self.visible is None or len(self.visible) == 1 else keys * keys,
        }  # fmt: skip

    @classmethod
    def of_rows(cls, x: Tensor, turns: Tensor, *, causal: bool, visible: Tensor | None) -> Pass:
        """A pass over B sequences that nothing is held of: x [B, T, D], turns [B, T, rotary / 2]."""
        batch, tokens, _ = x.shape
        rows = torch.arange(batch, dtype=torch.int32)
        slots = torch.arange(tokens, dtype=torch.int32)
        limits = slots + 1 if causal else torch.full_like(slots, tokens)
        return cls(
            x, turns.reshape(batch * tokens, -1), tables=rows, starts=list(range(batch)),
            rows=rows.repeat_interleave(tokens), slots=slots.repeat(batch), limits=limits.repeat(batch),
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
        call = library.LayerCall()
        for name, value in self._fixed.items():
            setattr(call, name, value)
        call.x, call.out, call.exact = x.data_ptr(), out.data_ptr(), exact
        self._set_cache(call, layer, rows)
        count = self.count
        if slots is not None:
            assert slots.slots is not None
            whole(slots.counts, (count,), torch.int32, "counts")
            room = slots.slots.shape[1]
            inside(whole(slots.slots, (count, room), torch.int32, "slots"), 0, self.keys, "slots")
            inside(slots.counts, 0, room + 1, "counts")
            fill(call, slots=slots.slots, counts=slots.counts, room=slots.slots.shape[1])
        if chosen is not None:
            assert chosen.slots is not None
            whole(chosen.slots, (count, size["topk"]), torch.int32, "chosen slots")
            fill(
                call,
                chosen_slots=chosen.slots,
                chosen_counts=whole(chosen.counts, (count,), torch.int32, "counts"),
            )
        else:
            need(
                not size.get("index_heads") or self.keys <= size["topk"], "the layer chooses slots: give room"
            )
        if told is not None:
            assert layer.feed is not None
            told.check(count, layer.feed.topk, layer.feed.num_experts)
            fill(call, expert_ids=told.ids, expert_weights=told.weights, expert_scores=told.scores)
        library.decode_layer(layer.handle, call)
        return out

    def _set_cache(self, call: Any, layer: DecoderLayer, rows: CacheRows) -> None:
        size, latents = layer.sizes, rows.latents
        head, groups = size["nope"] + size["rotary"], size.get("kv_heads", 1)
        widths = {"latents": groups * head if size["grouped"] else size["latent"] + size["rotary"]}
        widths |= {"values": groups * size["value"], "index": size.get("index_width", 0)}
        need(latents.dtype in ACTIVATIONS, f"the cache is {latents.dtype}, not fp32 or bf16")
        call.cache_bf16, item = latents.dtype == torch.bfloat16, latents.element_size()
        tokens = latents.shape[1]
        for name, buffer in zip(("latents", "values", "index"), rows, strict=True):
            if buffer is None:
                continue
            fits = buffer.shape[0] >= self.pages and buffer.shape[1] == tokens
            need(fits and buffer.dtype == latents.dtype, f"the {name} have too few or other pages")
            inner = buffer.stride(1) == widths[name] and buffer[0, 0].is_contiguous()
            need(
                inner and buffer[0, 0].numel() == widths[name] and buffer.device.type == "cpu",
                f"{name} are not [pages, tokens, {widths[name]}]",
            )
            setattr(call, "index_keys" if name == "index" else name, buffer.data_ptr())
            setattr(call, f"{name}_page_bytes", buffer.stride(0) * item)
        need(tokens >= min(self.keys, 1 << call.pages.shift), "a page has too few tokens")
        need(not size.get("index_heads") or rows.index_keys is not None, "the layer needs index keys")
        need(not size["grouped"] or rows.values is not None, "the layer needs values")
