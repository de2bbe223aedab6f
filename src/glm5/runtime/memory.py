"""How the C library treats the large buffers of a forward pass."""

from __future__ import annotations

import ctypes

# malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4
# The most that glibc accepts as a threshold.
_LARGEST_THRESHOLD = 32 << 20


def keep_freed_memory(*, of_any_size: bool = False) -> None:
    """Let glibc reuse buffers instead of giving them back to the kernel after every product.

    By default blocks above 128 KiB come from the kernel and are faulted in page by page each time:
    the experts of a 512-token prefill of the embedded model took four times as long (12 ms instead
    of 3 a layer, 2 threads). Buffers to 32 MiB are kept, so that weights still go back when a model
    is dropped; `of_any_size` keeps all of them (training). Process-wide; a no-op with other C
    libraries.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_TOP_PAD, 64 << 20)
        if of_any_size:
            libc.mallopt(_MMAP_MAX, 0)
        else:
            libc.mallopt(_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
    except (OSError, AttributeError):
        return
