"""Who sees whom: causal and GLM's prefix attention, packed documents, padding.

One `Visibility` is built per forward pass and shared by every layer and by the indexer, so that
training, prefill and cached decoding cannot disagree about the rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenPlaces:
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
    """Which of S key slots each of T queries may attend to.

    Exactly one of three forms: `is_causal` (T == S, lower triangle), `mask_BTS` (bool, True =
    visible, first dimension B or 1), or neither (everything is visible).
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


def visibility(queries: TokenPlaces, keys: TokenPlaces) -> Visibility:
    """Apply the rule: key j is visible to query i iff j is not padding, in the same document, and
    stands at or before i, or in the prefix (SPEC 13).

    The queries are the last T of the S keys. A padding query sees every slot: its output is
    never used, but it must stay finite.
    """
    num_queries, num_keys = queries.positions.shape[1], keys.positions.shape[1]
    if queries.is_plain and keys.is_plain:
        if num_queries == 1:
            return Visibility(num_keys)
        if num_queries == num_keys:
            return Visibility(num_keys, is_causal=True)
        mask = torch.ones(1, num_queries, num_keys, dtype=torch.bool, device=keys.positions.device)
        return Visibility(num_keys, mask_BTS=mask.tril(num_keys - num_queries))

    mask = keys.positions.unsqueeze(1) <= queries.positions.unsqueeze(2)
    if keys.prefix is not None:
        mask = mask | keys.prefix.unsqueeze(1)
    if keys.documents is not None and queries.documents is not None:
        mask = mask & (keys.documents.unsqueeze(1) == queries.documents.unsqueeze(2))
    if keys.valid is not None:
        mask = mask & keys.valid.unsqueeze(1)
    if queries.valid is not None:
        mask = mask | ~queries.valid.unsqueeze(2)
    return Visibility(num_keys, mask_BTS=mask)
