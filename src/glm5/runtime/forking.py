"""A forked child answers too: PyTorch's threads do not survive a fork, and it would wait for them."""

from __future__ import annotations

import os

import torch


def answer_after_forks() -> None:
    """Let a child of this process use one thread of PyTorch; our own kernels make new threads there."""
    global _asked
    if not _asked and hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_one_thread)
    _asked = True


def _one_thread() -> None:
    torch.set_num_threads(1)


_asked = False
