"""What decoding remembers of earlier tokens: compressed latents, index keys, or K and V.

Memory for `capacity` tokens is reserved at once and written where it lies, so a growing cache is
never copied (pages that no token reached yet are reserved, not used). Dropping the newest tokens is
a change of one number, which is what speculation needs.
Letters: B rows, T new tokens, S tokens held.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm5.config import ModelConfig
from glm5.errors import RequestError
from glm5.kernels.memory import empty_weights
from glm5.model.masks import TokenPositions


class LayerCache:
    """One layer's memory. Only the buffers that its kind of attention needs exist."""

    def __init__(self, owner: Cache, layer: int) -> None:
        config = owner.config
        self._owner = owner
        if config.uses_mla:
            assert config.kv_lora_rank is not None
            self._latents = owner.reserve(config.kv_lora_rank + config.qk_rope_head_dim)
        else:
            heads, width = config.num_key_value_heads, config.attention_head_dim
            self._keys, self._values = owner.reserve(heads, width), owner.reserve(heads, width)
        # Layers that share another's selection hold no index keys (IndexShare).
        self._index_keys = owner.reserve(config.index_head_dim) if config.has_indexer(layer) else None

    def buffers(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Latents or keys, values, index keys, [B, capacity, ..], for a layer that writes where they lie."""
        if self._owner.config.uses_mla:
            return self._latents, None, self._index_keys
        return self._keys, self._values, None

    def append_latents(self, latents_BTC: Tensor) -> Tensor:
        """Add rows [latent | rotated key]; returns all of them, [B, S, C]."""
        return self._owner.write(self._latents, latents_BTC)

    def append_index_keys(self, keys_BTd: Tensor) -> Tensor:
        assert self._index_keys is not None
        return self._owner.write(self._index_keys, keys_BTd)

    def append_key_values(self, keys_BTHd: Tensor, values_BTHd: Tensor) -> tuple[Tensor, Tensor]:
        return self._owner.write(self._keys, keys_BTHd), self._owner.write(self._values, values_BTHd)


class Cache:
    """The caches of a run of layers for B rows of at most `capacity` tokens.

    `length` tokens are held; a forward pass writes behind them and then calls `advance`.
    """

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
        self.config, self.batch, self.capacity = config, batch, capacity
        self.dtype, self.device = dtype, torch.device(device)
        self.length = 0
        layers = range(config.num_hidden_layers) if layers is None else layers
        self._first = layers.start
        self._positions = torch.zeros(batch, capacity, dtype=torch.int64, device=self.device)
        self._valid: Tensor | None = None
        self._prefix: Tensor | None = None
        self.layers = [LayerCache(self, layer) for layer in layers]

    def layer(self, index: int) -> LayerCache:
        """The cache of a layer of the config; MTP layers follow the decoder's last."""
        return self.layers[index - self._first]

    def reserve(self, *shape: int) -> Tensor:
        return empty_weights((self.batch, self.capacity, *shape), self.dtype, self.device)

    def write(self, buffer: Tensor, rows: Tensor) -> Tensor:
        end = self.length + rows.shape[1]
        if rows.shape[0] != self.batch:  # one row would be spread over all of them
            raise RequestError(f"the cache is for {self.batch} rows, not {rows.shape[0]}")
        self.check_room(end)
        buffer[:, self.length : end] = rows
        return buffer[:, :end]

    def check_room(self, end: int) -> None:
        if end > self.capacity:
            raise RequestError(f"the cache holds {self.capacity} tokens, {end} are needed")

    def next_positions(self, batch: int) -> Tensor | int:
        """The position of each row's next token: 0 while nothing is held, else [B, 1]."""
        if self.length == 0:
            return 0
        if self._valid is None:
            return self._positions[:, self.length - 1 : self.length] + 1
        held = self._valid[:, : self.length].sum(dim=1, keepdim=True)
        return held.to(torch.int64)

    def append_positions(self, positions: TokenPositions) -> TokenPositions:
        """Note where the coming tokens stand; returns the positions of everything held and them."""
        if positions.documents is not None:
            raise RequestError("packed documents cannot be cached; give each its own row")
        start, end = self.length, self.length + positions.positions.shape[1]
        if positions.positions.shape[0] not in (1, self.batch):
            raise RequestError(f"the cache is for {self.batch} rows, not {positions.positions.shape[0]}")
        self.check_room(end)
        self._positions[:, start:end] = positions.positions
        self._valid = self._note(self._valid, positions.valid, start, end, absent=True)
        self._prefix = self._note(self._prefix, positions.prefix, start, end, absent=False)
        return TokenPositions(
            self._positions[:, :end],
            None if self._valid is None else self._valid[:, :end],
            None if self._prefix is None else self._prefix[:, :end],
        )

    def _note(
        self, flags: Tensor | None, new: Tensor | None, start: int, end: int, *, absent: bool
    ) -> Tensor | None:
        """Write flags of the new tokens; a buffer exists only once some token needed one."""
        if flags is None:
            if new is None or bool((new == absent).all()):
                return None
            flags = torch.full((self.batch, self.capacity), absent, dtype=torch.bool, device=self.device)
        flags[:, start:end] = absent if new is None else new
        return flags

    def advance(self, tokens: int) -> None:
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        assert 0 <= length <= self.length
        self.length = length
