"""What a forward pass knows beside its hidden states: rotations, visibility, the cache, who watches.

One `Step` goes through the network. Training gives it no cache, tracing gives it a probe; nobody sets flags
on modules. Letters: B rows, T new tokens, N tokens of a cached step, S slots held with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from glm5.model.masks import Visibility
from glm5.model.rotary import Rotation
from glm5.model.routing import Routing


@dataclass(frozen=True)
class Part:
    """Tokens of a step that share their keys: every row of an uncached batch, or one cached sequence."""

    tokens: slice  # of dimension 1
    visible: Visibility


@dataclass
class Places:
    """Where the tokens of a cached step lie, as kernels take it. N tokens of R sequences, in pages.

    tables: int32, the page numbers of all sequences, one behind the other. starts: where each begins in it, R
    integers. rows, slots, limits: int32 [N], a token's sequence, its own slot, how many slots it sees. keys:
    the largest limit. causal: no token sees a later one of this step.
    """

    tables: npt.NDArray[np.int32]
    starts: list[int]
    rows: npt.NDArray[np.int32]
    slots: npt.NDArray[np.int32]
    limits: npt.NDArray[np.int32]
    keys: int
    page_tokens: int
    causal: bool


class LayerCache(Protocol):
    """One layer's memory of earlier tokens: what an `append_` writes is held; each part gets its keys."""

    def append_latents(self, latents_1NC: Tensor) -> Sequence[Tensor]:
        """MLA's rows [latent | rotated key]; returns [1, S, C] for each part."""
        ...

    def append_index_keys(self, keys_1Nd: Tensor) -> Sequence[Tensor]:
        """The indexer's keys; returns [1, S, d] for each part."""
        ...

    def append_key_values(self, keys_1NHd: Tensor, values_1NHd: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """GQA's keys and values; returns both, [1, S, H, d], for each part."""
        ...

    def buffers(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Where they lie: latents or keys, values, index keys, [pages, tokens, ..]."""
        ...


class ComingTokens(Protocol):
    """The caches of one step: N new tokens of any sequences, one sequence behind the other."""

    @property
    def positions(self) -> Tensor:
        """int64 [1, N], on the cache's device."""
        ...

    @property
    def parts(self) -> Sequence[Part]: ...

    @property
    def places(self) -> Places: ...

    @property
    def shared(self) -> dict[str, Any]:
        """As of `Step`; it outlives a step where the next one differs in its places alone."""
        ...

    def layer(self, index: int) -> LayerCache:
        """The cache of a layer; MTP layers follow the decoder's last."""
        ...

    def advance(self) -> None:
        """The tokens are written: from now on they are held."""
        ...


class KeyValueCache(Protocol):
    """A few sequences, held between calls of a model."""

    def coming(self, counts: Sequence[int], prefix_lengths: Sequence[int] | None = None) -> ComingTokens:
        """A step that adds so many tokens to each sequence. Raises RequestError when there is no room."""
        ...


class Probe:
    """Watches a pass. Every implementation of a part tells it the same things.

    Override what you want to hear; the others cost nothing. `layer` counts the decoder's layers, MTP
    layers behind the last one.
    """

    def attention_input(self, layer: int, x_BTD: Tensor) -> None:
        """The normalized input of a layer's attention."""

    def routing(self, layer: int, routing: Routing) -> None:
        """Where an expert layer sends its tokens."""

    def hidden(self, layer: int, x_BTD: Tensor) -> None:
        """The residual stream behind a layer; called once a layer, when it is done."""

    def hears(self, what: str) -> bool:
        """Is this method overridden?"""
        return getattr(type(self), what) is not getattr(Probe, what)


@dataclass(slots=True)
class Step:
    """angles: rotations of the tokens. visible: for an uncached pass, who sees whom.

    A cached step is a row of N tokens of any sequences; each part of them sees its own sequence.
    """

    angles: Rotation
    visible: Visibility | None = None
    cache: ComingTokens | None = None
    probe: Probe | None = None
    # What the layers of one pass make once for all of them, by the name of who makes it.
    shared: dict[str, Any] = field(default_factory=dict)

    @property
    def parts(self) -> Sequence[Part]:
        if self.cache is not None:
            return self.cache.parts
        assert self.visible is not None
        return (Part(slice(None), self.visible),)

    def layer_cache(self, layer: int) -> LayerCache | None:
        return None if self.cache is None else self.cache.layer(layer)
