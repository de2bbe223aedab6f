"""DSA's choice known by its slots, as kernels make and take it: a row a query.

Letters: B rows, T queries, N = B T, S slots, K selected.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm5.kernels.slots import Slots
from glm5.lazy import lazy
from glm5.model.indexer import Selection
from glm5.model.masks import Visibility
from glm5.model.step import Part


class SlotSelection(Selection):
    """A selection known by its slots; the mask is made only when somebody asks for it."""

    def __init__(self, chosen: Slots, batch: int, num_keys: int, topk: int) -> None:
        self.chosen, self.topk = chosen, topk
        self._shape = (batch, len(chosen.counts) // batch, num_keys)

    def of(self, number: int, part: Part) -> Selection:
        if part.tokens == slice(None):
            return self
        slots, counts = self.chosen
        assert slots is not None
        own = Slots(slots[part.tokens], counts[part.tokens])
        return SlotSelection(own, 1, part.visible.num_keys, self.topk)

    @lazy
    def mask_BTS(self) -> Tensor:
        batch, queries, keys = self._shape
        slots = self.chosen.slots
        assert slots is not None
        mask = torch.zeros(batch * queries, keys + 1, dtype=torch.bool, device=slots.device)
        valid = torch.arange(slots.shape[1], device=slots.device) < self.chosen.counts.unsqueeze(1)
        mask.scatter_(1, torch.where(valid, slots.long(), keys), True)
        return mask[:, :keys].view(self._shape)

    @property
    def slots_BTK(self) -> Tensor:
        slots = self.chosen.slots
        assert slots is not None
        valid = torch.arange(slots.shape[1], device=slots.device) < self.chosen.counts.unsqueeze(1)
        return torch.where(valid, slots.long(), -1).view(*self._shape[:2], -1)


def slots_of(selection: Selection) -> Slots:
    """The slots of any selection."""
    if isinstance(selection, SlotSelection):
        return selection.chosen
    slots_NK = selection.slots_BTK.flatten(0, 1)
    counts = (slots_NK >= 0).sum(dim=1, dtype=torch.int32)
    return Slots(slots_NK.clamp(min=0).to(torch.int32).contiguous(), counts)


def query_rows(batch: int, queries: int, device: torch.device) -> Tensor:
    """The cache row of each query, int32 [N]."""
    return torch.arange(batch, dtype=torch.int32, device=device).repeat_interleave(queries)


def query_mask(mask_BTS: Tensor, batch: int, queries: int) -> Tensor:
    """A mask [B or 1, T, S] as [N, S]."""
    return mask_BTS.expand(batch, -1, -1).reshape(batch * queries, -1)


def visible_slots(visible: Visibility, batch: int, queries: int, device: torch.device) -> Tensor | None:
    """Which keys each query may attend to, bool [N, S]; None = every key."""
    if visible.mask_BTS is None and (not visible.is_causal or queries == 1):
        return None
    return query_mask(visible.as_mask(queries, device), batch, queries)
