"""Rotary position embedding, interleaved (GLM-5, 4.7-Flash) and half-split (GLM-4.5..4.7).

An interleaved pair is one complex number and its rotation one product, taken in fp32 and rounded
once. (transformers writes the pairs de-interleaved; dot products are the same, cached keys are not.)
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Position times frequency as cos + i sin, complex64 [B, T, rotary_dim / 2]."""

    turns: Tensor

    @property
    def cos(self) -> Tensor:
        return self.turns.real

    @property
    def sin(self) -> Tensor:
        return self.turns.imag


def rotation(positions_BT: Tensor, rotary_dim: int, theta: float) -> Rotation:
    """Angles pos * theta^(-2j / rotary_dim), j = 0 .. rotary_dim/2 - 1 (RoFormer, section 3.2.2)."""
    angles = positions_BT.to(torch.float32).unsqueeze(-1) * _frequencies(
        rotary_dim, theta, positions_BT.device
    )
    return Rotation(torch.polar(torch.ones_like(angles), angles))


@lru_cache(maxsize=16)
def _frequencies(rotary_dim: int, theta: float, device: torch.device) -> Tensor:
    """Kept: after a token's weights have gone through the caches each small operation takes 25 us."""
    with torch.inference_mode(False):
        exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device)
        return 1.0 / (theta ** (exponent / rotary_dim))


def rotate(x: Tensor, angles: Rotation, *, interleaved: bool) -> Tensor:
    """Rotate the last dimension of `x` [B, T, r] or [B, T, heads, r] by its position's angles."""
    if interleaved:
        turns = angles.turns if x.dim() == 3 else angles.turns.unsqueeze(2)
        return torch.view_as_real(_as_complex(x) * turns).flatten(-2).to(x.dtype)
    cos, sin = angles.cos.to(x.dtype), angles.sin.to(x.dtype)
    if x.dim() == 4:
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _as_complex(x: Tensor) -> Tensor:
    """[..., r] as r/2 complex numbers; a view where the memory allows it."""
    pairs = x.float().unflatten(-1, (-1, 2))
    try:
        return torch.view_as_complex(pairs)
    except RuntimeError:  # pairs that do not lie on even addresses
        return torch.view_as_complex(pairs.contiguous())
