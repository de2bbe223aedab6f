"""Memory for weights: on 2 MiB pages where the system gives them.

Decoding reads gigabytes a second; with 4 KiB pages the address look-ups alone cost a fifth of the
bandwidth.
"""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20


def empty_weights(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialized (on the CPU: zero until written) memory; pages are taken when first written."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    # Private: what is shared between processes has a setting of its own and gets small pages.
    pages = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(pages, dtype=torch.uint8)  # keeps the pages alive
    start = -whole.data_ptr() % _HUGE_PAGE
    return whole[start : start + size].view(dtype).view(shape)
