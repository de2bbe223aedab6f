"""The rotation against multiplication of complex numbers, and what it is for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm5.model.rotary import rotate, rotation

quick = settings(max_examples=100, deadline=None)
pairs = st.integers(1, 8)
thetas = st.sampled_from([10_000.0, 1_000_000.0, 8_000_000.0])
seeds = st.integers(0, 2**31)


def random_tensor(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotate_complex(x: Tensor, positions: Tensor, theta: float, *, interleaved: bool) -> Tensor:
    """(a + ib) * exp(i pos theta^(-2j/r)) for x [B, T, heads, r]; pairs stay where they were."""
    width = x.shape[-1]
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., : width // 2], x[..., width // 2 :])
    frequency = torch.tensor([math.exp(-2 * j / width * math.log(theta)) for j in range(width // 2)])
    angle = positions.double()[..., None, None] * frequency.double()
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
    if interleaved:
        return torch.stack((turned.real, turned.imag), dim=-1).flatten(-2)
    return torch.cat((turned.real, turned.imag), dim=-1)


@quick
@given(pairs, thetas, seeds, st.booleans(), st.integers(0, 500))
def test_rotation_is_a_complex_product(
    half: int, theta: float, seed: int, interleaved: bool, start: int
) -> None:
    x = random_tensor(seed, 2, 5, 3, 2 * half)
    positions = torch.stack((torch.arange(5) + start, torch.arange(5)))
    ours = rotate(x, rotation(positions, 2 * half, theta), interleaved=interleaved)
    torch.testing.assert_close(
        ours, rotate_complex(x, positions, theta, interleaved=interleaved), atol=5e-4, rtol=0
    )
    one_head = rotate(x[:, :, 0], rotation(positions, 2 * half, theta), interleaved=interleaved)
    torch.testing.assert_close(one_head, ours[:, :, 0], atol=1e-6, rtol=0)


@quick
@given(pairs, thetas, seeds, st.booleans(), st.integers(0, 200), st.integers(0, 200), st.integers(0, 200))
def test_dot_products_depend_on_the_distance_only(
    half: int, theta: float, seed: int, interleaved: bool, q_at: int, k_at: int, shift: int
) -> None:
    q, k = random_tensor(seed, 2, 1, 1, 1, 2 * half)

    def product(q_position: int, k_position: int) -> Tensor:
        at = [rotation(torch.tensor([[p]]), 2 * half, theta) for p in (q_position, k_position)]
        turned = [rotate(x, a, interleaved=interleaved) for x, a in zip((q, k), at, strict=True)]
        return (turned[0] * turned[1]).sum()

    size = float(q.norm() * k.norm())
    torch.testing.assert_close(
        product(q_at, k_at), product(q_at + shift, k_at + shift), atol=1e-4 * size, rtol=0
    )


@quick
@given(pairs, seeds)
def test_the_two_layouts_are_one_permutation_apart(half: int, seed: int) -> None:
    x = random_tensor(seed, 1, 4, 2, 2 * half)
    angles = rotation(torch.arange(4).unsqueeze(0), 2 * half, 10_000.0)
    halves_first = torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)
    turned = rotate(x, angles, interleaved=True)
    expected = rotate(halves_first, angles, interleaved=False)
    torch.testing.assert_close(
        torch.cat((turned[..., 0::2], turned[..., 1::2]), dim=-1), expected, atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_position_zero_turns_nothing_and_dtype_is_kept(dtype: torch.dtype) -> None:
    x = random_tensor(0, 1, 1, 2, 8).to(dtype)
    out = rotate(x, rotation(torch.zeros(1, 1, dtype=torch.int64), 8, 10_000.0), interleaved=False)
    assert out.dtype == dtype
    assert torch.equal(out, x)
