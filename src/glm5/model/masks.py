"""Which keys each query may attend to: causal and GLM's prefix attention, packed documents, padding.

One `Visibility` is built per forward pass and shared by every layer and by the indexer, so that
training, prefill and cached decoding cannot disagree about the rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenPositions:
    """Where the tokens of a sequence stand. B rows, N tokens.

    positions: int64 [B, N], counted from 0 in each document.
    valid: bool [B, N], False on padding; None = all valid.
    prefix: bool [B, N], True on tokens of a bidirectional prefix; None = none.
    documents: int64 [B, N], equal for tokens of one packed document; None = one document a row.
    """

    positions: Tensor
    valid: Tensor | None = None
    prefix: Tensor | None = None
    documents: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """One causal document a row, no padding: slot order is the whole rule."""
        return self.valid is None and self.prefix is None and self.documents is None


@dataclass(frozen=True)
class Visibility:
    """Which of S key slots each of the last T tokens may attend to.

    is_causal: no query sees a later slot than its own; query i of T has slot S - T + i. mask_BTS: bool,
    True = visible, first dimension B or 1; None = everything that `is_causal` leaves. A mask is the whole
    rule: where both are given, it leaves out later slots itself.
    """

    num_keys: int
    is_causal: bool = False
    mask_BTS: Tensor | None = None

    def as_mask(self, num_queries: int, device: torch.device) -> Tensor:
        """The rule as a bool mask [B or 1, T, S]."""
        if self.mask_BTS is not None:
            return self.mask_BTS
        mask = torch.ones(1, num_queries, self.num_keys, dtype=torch.bool, device=device)
        return mask.tril(self.num_keys - num_queries) if self.is_causal else mask


def visibility(queries: TokenPositions, keys: TokenPositions) -> Visibility:
    """Apply the rule: key j is visible to query i iff j is not padding, in the same document, and
    stands at or before i, or in the prefix.

    The queries are the last T of the S keys. A padding query sees its own slot alone: its output is
    never used, but it must stay finite.
    """
    num_queries, num_keys = queries.positions.shape[1], keys.positions.shape[1]
    if queries.is_plain and keys.is_plain:
        return Visibility(num_keys, is_causal=True)
    mask = keys.positions.unsqueeze(1) <= queries.positions.unsqueeze(2)
    if keys.prefix is not None:
        mask = mask | keys.prefix.unsqueeze(1)
    else:  # positions that a caller made up do not let anybody see ahead
        mask = mask & mask.new_ones(num_queries, num_keys).tril(num_keys - num_queries)
    if keys.documents is not None and queries.documents is not None:
        mask = mask & (keys.documents.unsqueeze(1) == queries.documents.unsqueeze(2))
    if keys.valid is not None:
        mask = mask & keys.valid.unsqueeze(1)
    if queries.valid is not None:
        own = torch.eye(num_queries, num_keys, dtype=torch.bool, device=mask.device).roll(
            num_keys - num_queries, dims=1
        )
        mask = torch.where(queries.valid.unsqueeze(2), mask, own)
    return Visibility(num_keys, is_causal=keys.prefix is None, mask_BTS=mask)
