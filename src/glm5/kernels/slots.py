"""Which slots of a cache each query reads, as the kernels of every device take it: a row a query."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Slots(NamedTuple):
    """Chosen cache slots of N queries: int32 [N, K], rising; the first `counts` (int32 [N]) are valid."""

    slots: Tensor | None  # None: the first `counts` slots
    counts: Tensor
