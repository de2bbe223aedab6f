"""A decode step recorded once and replayed: one launch a token instead of some hundred.

A CUDA graph repeats fixed addresses and shapes, so the step sees its cache whole, with a mask of what
is held; the ordinary cache's own memory, so that either can go on where the other stopped.
On other devices the same step runs as plain calls. The recording itself was never run: no GPU was at hand.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor

from glm5.errors import RequestError
from glm5.model.masks import TokenPlaces
from glm5.model.transformer import GlmForCausalLM

_WARM_UP = 3  # launches compile and allocate; a recording must not


class SteadyCache:
    """A `glm5.runtime.cache.Cache` seen with the same shapes at every step of one token.

    `length` is on the device, int64 [1]; whoever steps sets it.
    """

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.length = torch.full((1,), cache.length, dtype=torch.int64, device=cache.device)
        self._slots = torch.arange(cache.capacity, device=cache.device)
        self.layers = [copy(layer) for layer in cache.layers]
        for layer in self.layers:
            layer._owner = self  # their memory is the cache's, what they write goes through us
            for buffer in vars(layer).values():
                if isinstance(buffer, Tensor):  # hidden slots have no weight, but 0 times NaN is NaN
                    buffer[:, cache.length :].zero_()

    def write(self, buffer: Tensor, rows: Tensor) -> Tensor:
        return buffer.index_copy_(1, self.length, rows.to(buffer.dtype))

    def next_positions(self, batch: int) -> Tensor:
        if self.cache._valid is not None:
            held: Tensor = self.cache._valid & (self._slots < self.length)
            return held.sum(dim=1, keepdim=True)
        last: Tensor = self.cache._positions.index_select(1, (self.length - 1).clamp(min=0))
        return torch.where(self.length > 0, last + 1, 0)

    def append_places(self, places: TokenPlaces) -> TokenPlaces:
        cache = self.cache
        cache._positions.index_copy_(1, self.length, places.positions.expand(cache.batch, -1))
        held = (self._slots <= self.length).expand(cache.batch, -1)
        for flags, new in ((cache._valid, True), (cache._prefix, False)):
            if flags is not None:
                flags.index_fill_(1, self.length, new)
        valid = held if cache._valid is None else held & cache._valid
        return TokenPlaces(cache._positions, valid, cache._prefix)

    def advance(self, tokens: int) -> None:
        """The caller counts, in the cache."""


class GraphedStep:
    """The next token's logits, from the model and a cache that an ordinary prefill has filled.

    On a GPU the experts must be packed (or small): unpacked large ones ask the device what to run.
    """

    def __init__(self, model: GlmForCausalLM, cache: Any) -> None:
        self.model, self.cache = model, cache
        self._steady = SteadyCache(cache)
        self._ids = torch.zeros(cache.batch, 1, dtype=torch.int64, device=cache.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        if cache.length >= cache.capacity:
            raise RequestError(f"the cache is full: it holds {cache.capacity} tokens")
        if cache.device.type == "cuda":
            with torch.cuda.device(cache.device):
                self._record()

    @torch.inference_mode()
    def __call__(self, ids: Tensor) -> Tensor:
        """ids: int64 [B, 1]. Logits [B, 1, vocab], overwritten by the next call.

        Raises RequestError when the cache is full.
        """
        cache = self.cache
        if cache.length >= cache.capacity:
            raise RequestError(f"the cache holds {cache.capacity} tokens, {cache.length + 1} are needed")
        self._ids.copy_(ids)
        self._steady.length.fill_(cache.length)  # also after the cache was truncated
        if self._graph is None:
            self._logits = self._step()
        else:
            self._graph.replay()
        cache.advance(1)
        return self._logits

    def _step(self) -> Tensor:
        return self.model(self._ids, cache=self._steady, logits_to_keep=1).logits

    @torch.inference_mode()
    def _record(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._step()  # writes behind what is held, where the first real step writes again
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._step()
