"""What a forward pass knows beside its hidden states: rotations, visibility, the cache, who watches.

One `Step` goes through the network. Training gives it no cache, tracing gives it a probe; nobody sets flags
on modules. Letters: B rows, T new tokens, S slots held with them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from glm5.model.masks import TokenPositions, Visibility
from glm5.model.rotary import Rotation
from glm5.model.routing import Routing


class LayerCache(Protocol):
    """One layer's memory of earlier tokens: what an `append_` writes is held, all of it comes back.

    Its owner counts the tokens: every layer of a pass writes behind the same place. Raises RequestError
    when there is no room.
    """

    def append_latents(self, latents_BTC: Tensor) -> Tensor:
        """MLA's rows [latent | rotated key]; returns [B, S, C]."""
        ...

    def append_index_keys(self, keys_BTd: Tensor) -> Tensor:
        """The indexer's keys; returns [B, S, d]."""
        ...

    def append_key_values(self, keys_BTHd: Tensor, values_BTHd: Tensor) -> tuple[Tensor, Tensor]:
        """GQA's keys and values; returns both [B, S, H, d]."""
        ...

    def buffers(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """For a layer that writes where they lie: latents or keys, values, index keys, [B, capacity, ..]."""
        ...


class KeyValueCache(Protocol):
    """The caches of a run of layers, owned by the runtime."""

    @property
    def length(self) -> Any:
        """Tokens held before this pass."""
        ...

    def layer(self, index: int) -> LayerCache:
        """The cache of a layer; MTP layers follow the decoder's last."""
        ...

    def next_positions(self, batch: int) -> Tensor | int:
        """The position of each row's next token: 0, or [B, 1]."""
        ...

    def append_positions(self, positions: TokenPositions) -> TokenPositions:
        """Note the coming tokens; returns the positions of everything held and them."""
        ...

    def advance(self, tokens: int) -> None:
        """The coming tokens are written."""
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
    """angles: rotations of the T tokens. visible: which of S slots each may attend to."""

    angles: Rotation
    visible: Visibility
    cache: KeyValueCache | None = None
    probe: Probe | None = None
    # What the layers of one pass make once for all of them, by the name of who makes it.
    shared: dict[str, Any] = field(default_factory=dict)

    def layer_cache(self, layer: int) -> LayerCache | None:
        return None if self.cache is None else self.cache.layer(layer)
