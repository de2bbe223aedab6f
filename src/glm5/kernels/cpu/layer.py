"""A whole decoder layer in one native call, for any number of tokens over a cache.

`DecoderLayer` holds a layer's weights, `Pass` what all layers of one forward pass share; both check their
tensors once, so that a layer's call costs a few microseconds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from glm5.kernels.cpu.experts import MoeLayer, Told
from glm5.kernels.cpu.matrix import Matrix, Vector
from glm5.kernels.cpu.native import ACTIVATIONS, address, fill, library, need, whole
from glm5.kernels.slots import Slots


class CacheRows(NamedTuple):
    """Where a layer's cache lies, [B, capacity, ..]: latents or keys, values (GQA), index keys (DSA)."""

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
        shapes = {"o": (hidden, heads * size["value"])}
        lengths = {"input_norm": hidden, "post_norm": hidden}
        if size["grouped"]:
            kv = size["kv_heads"]
            shapes |= {"q_in": (heads * query, hidden), "kv_in": (kv * query, hidden)}
            shapes |= {"v": (kv * size["value"], hidden)}
            lengths |= {"q_norm": query, "kv_norm": query}
        else:
            rank = matrices["q_in"].rows
            width = rank if "q_norm" in vectors else heads * query
            shapes |= {"q_in": (width, hidden), "kv_in": (size["latent"] + size["rotary"], hidden)}
            shapes |= {"kv_b": (heads * (size["nope"] + size["value"]), size["latent"])}
            shapes |= {"q_b": (heads * query, rank)}
            index = size.get("index_heads", 0) * size.get("index_width", 0)
            shapes |= {"index_q": (index, rank), "index_k": (size.get("index_width", 0), hidden)}
            shapes |= {"index_weights": (size.get("index_heads", 0), hidden)}
            lengths |= {"q_norm": rank, "kv_norm": size["latent"], "index_norm": size.get("index_width", 0)}
        for name, matrix in matrices.items():
            found = (matrix.rows, matrix.columns)
            need(found == shapes[name], f"{name} is {list(found)}, the layer asks for {list(shapes[name])}")
        for name, values in vectors.items():
            if name in lengths:
                need(
                    values.numel() == lengths[name],
                    f"{name} has {values.numel()} values, not {lengths[name]}",
                )


class Pass:
    """One forward pass over a cache: `queries` new tokens of each row, the last of `keys`.

    x: fp32 or bf16 [B, T, D]. turns: complex64 [B, T, rotary / 2]. causal: no token sees a later one of
    this call, and without `visible` it sees every earlier one. visible: bool [B or 1, T, keys].
    """

    def __init__(self, x: Tensor, turns: Tensor, keys: int, *, causal: bool, visible: Tensor | None) -> None:
        batch, queries, self.hidden = x.shape
        need(
            x.dtype in ACTIVATIONS and x.device.type == "cpu", f"activations are {x.dtype}, not fp32 or bf16"
        )
        need(queries <= keys, f"{queries} tokens do not fit in {keys} keys")
        self.shape, self.dtype, self.keys = x.shape, x.dtype, keys
        self.turns = whole(turns.contiguous(), (batch, queries, turns.shape[-1]), torch.complex64, "turns")
        self.visible = None
        if visible is not None:
            rows = visible.shape[0]
            need(rows in (1, batch), f"visible has {rows} rows, not 1 or {batch}")
            self.visible = whole(visible.contiguous(), (rows, queries, keys), torch.bool, "visible")
        self._fixed = {
            "bf16": x.dtype == torch.bfloat16, "batch": batch, "queries": queries, "keys": keys,
            "causal": causal, "turns": self.turns.data_ptr(), "visible": address(self.visible),
            "visible_at": 0 if self.visible is None or len(self.visible) == 1 else queries * keys,
        }  # fmt: skip

    def run(
        self, layer: DecoderLayer, x: Tensor, rows: CacheRows, *, slots: Slots | None = None,
        chosen: Slots | None = None, told: Told | None = None, exact: bool = False,
    ) -> Tensor:  # fmt: skip
        """The layer's output, like x; without a feed-forward half fp32 [B, T, D] after attention.

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
        count = self.shape[0] * self.shape[1]
        if slots is not None:
            assert slots.slots is not None
            whole(slots.counts, (count,), torch.int32, "counts")
            whole(slots.slots, (count, slots.slots.shape[1]), torch.int32, "slots")
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
        need(latents.dtype in ACTIVATIONS, f"the cache is {latents.dtype}, not fp32 or bf16")
        call.cache_bf16, item = latents.dtype == torch.bfloat16, latents.element_size()
        for name, buffer in zip(("latents", "values", "index_keys"), rows, strict=True):
            if buffer is None:
                continue
            fits = buffer.shape[0] == self.shape[0] and buffer.shape[1] >= self.keys
            need(fits and buffer.dtype == latents.dtype, f"{name} do not hold {self.keys} tokens of each row")
            setattr(call, name, buffer.data_ptr())
            setattr(
                call,
                f"{name}_row_bytes" if name != "index_keys" else "index_row_bytes",
                buffer.stride(0) * item,
            )
        need(not size.get("index_heads") or rows.index_keys is not None, "the layer needs index keys")
        need(not size["grouped"] or rows.values is not None, "the layer needs values")
