"""The same products on a GPU, in Triton, from the same bytes.

Triton is imported at the first call, never with glm5: `available()` says whether that will work.
The functions take tensors on one device and launch there without waiting for it, so that all of them
can be part of a CUDA graph. What they compute: `glm5.kernels.reference`.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from glm5.kernels.cuda.bank import Bank
from glm5.kernels.slots import Slots

__all__ = ["Bank", "Slots", "attend", "available", "experts", "linear", "runs_here", "select"]


@cache
def available() -> bool:
    """Whether Triton is installed; without it layers unpack their weights, as on any other device."""
    return importlib.util.find_spec("triton") is not None


@cache
def _has_tensor_cores_for_bf16(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def runs_here(x: Tensor) -> bool:
    """Whether the kernels take these activations: on a GPU (Ampere or later), without gradients."""
    if not x.is_cuda or torch.is_grad_enabled():
        return False
    return available() and _has_tensor_cores_for_bf16(x.device)


def linear(
    x: Tensor, words: Tensor, scales: Tensor, *, bits: int, group: int, bias: Tensor | None = None
) -> Tensor:
    """See `products.linear`."""
    from glm5.kernels.cuda import products

    return products.linear(x, words, scales, bits=bits, group=group, bias=bias)


def experts(x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, bank: Bank) -> Tensor:
    """See `mixture.experts`."""
    from glm5.kernels.cuda import mixture

    return mixture.experts(x_TD, topk_ids_TK, topk_weights_TK, bank)


def attend(
    q_NHC: Tensor, cache_BSC: Tensor, rows: Tensor, chosen: Slots, *, latent: int, scale: float,
    visible_NS: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `mla.attend`."""
    from glm5.kernels.cuda import mla

    return mla.attend(q_NHC, cache_BSC, rows, chosen, latent=latent, scale=scale, visible_NS=visible_NS)


def select(
    q_NHd: Tensor, weights_NH: Tensor, cache_BSd: Tensor, rows: Tensor, topk: int,
    visible_NS: Tensor | None = None,
) -> Slots:  # fmt: skip
    """See `index.select`."""
    from glm5.kernels.cuda import index

    return index.select(q_NHd, weights_NH, cache_BSd, rows, topk, visible_NS)
