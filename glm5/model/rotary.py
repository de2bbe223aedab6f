"""Rotary position embedding, interleaved (GLM-5, 4.7-Flash) and half-split (GLM-4.5..4.7).

The interleaved rotation writes its result de-interleaved (all first members, then all second):
one permutation for queries and keys alike, so every dot product is the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """cos and sin of position times frequency, fp32, [B, T, rotary_dim / 2]."""

    cos: Tensor
    sin: Tensor


def rotation(positions_BT: Tensor, rotary_dim: int, theta: float) -> Rotation:
    """Angles pos * theta^(-2j / rotary_dim), j = 0 .. rotary_dim/2 - 1 (RoFormer, section 3.2.2)."""
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=positions_BT.device)
    inverse_frequency = 1.0 / (theta ** (exponent / rotary_dim))
    angles = positions_BT.to(torch.float32).unsqueeze(-1) * inverse_frequency
    return Rotation(angles.cos(), angles.sin())


def rotate(x: Tensor, angles: Rotation, *, interleaved: bool) -> Tensor:
    """Rotate the last dimension of `x` [B, T, r] or [B, T, heads, r] by its position's angles."""
    cos, sin = angles.cos.to(x.dtype), angles.sin.to(x.dtype)
    if x.dim() == 4:
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
