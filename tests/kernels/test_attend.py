"""Absorbed MLA over integer weights, against the same attention of unpacked ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm5.formats.packing import dequantize, pack
from glm5.kernels import cpu
from tests.kernels.kernel_fixture import FUSED, INSTRUCTION_SETS, assert_same_bits, on_each, on_threads, using
from tests.kernels.kernel_fixture import instruction_set as instruction_set

HEADS, NOPE, ROTARY, VALUE = 5, 24, 16, 40
SLOTS = 50


def packed_weight(latent: int, bits: int, group: int) -> tuple[cpu.Matrix, Tensor]:
    """A random kv_b_proj in integers, and its values."""
    generator, top = torch.Generator().manual_seed(latent + bits), 1 << (bits - 1)
    rows = HEADS * (NOPE + VALUE)
    codes = torch.randint(-top, top, (rows, latent), generator=generator).to(torch.int8)
    words = pack(codes, bits)
    scales = (torch.rand(rows, latent // group, generator=generator) + 0.5).bfloat16() / (10 * top)
    values = dequantize(words, scales, bits, latent)
    return cpu.Matrix(words, scales, bits=bits, columns=latent, group=group), values


def attend(kv_b: cpu.Matrix, latent: int, exact: bool, tokens: slice = slice(0, 4)) -> Tensor:
    """Four queries of two cache rows, two of them over chosen slots."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(4, HEADS, NOPE + ROTARY, generator=generator)
    cache = torch.randn(2, SLOTS, latent + ROTARY, generator=generator)
    angles = torch.rand(4, ROTARY // 2, generator=generator) * 6
    slots = torch.rand(4, SLOTS, generator=generator).argsort(dim=1)[:, :30].sort(dim=1).values.int()
    counts = torch.tensor([30, 7, 1, 16], dtype=torch.int32)
    rows = torch.tensor([0, 1, 1, 0], dtype=torch.int32)
    chosen = cpu.Slots(slots[tokens].contiguous(), counts[tokens].contiguous())
    turns = torch.polar(torch.ones_like(angles), angles)[tokens]
    return cpu.attend(
        query[tokens], kv_b, turns, cache, rows[tokens].contiguous(), chosen, nope=NOPE, value=VALUE,
        scale=0.3, exact=exact,
    )  # fmt: skip


sizes = pytest.mark.parametrize(
    ("latent", "bits", "group"), [(64, 4, 32), (64, 8, 64), (128, 4, 128), (192, 8, 32), (512, 4, 64)]
)


@sizes
def test_integers_unpack_on_the_way(instruction_set: str, latent: int, bits: int, group: int) -> None:
    kv_b, values = packed_weight(latent, bits, group)
    wanted = attend(cpu.Matrix(values), latent, exact=True)
    assert torch.allclose(attend(kv_b, latent, exact=True), wanted, atol=2e-5)
    rounded = attend(kv_b, latent, exact=False)
    assert (rounded - wanted).norm() < 0.01 * wanted.norm()
    assert not torch.equal(rounded, wanted)


@sizes
def test_a_query_depends_on_nothing_around_it(latent: int, bits: int, group: int) -> None:
    kv_b, _ = packed_weight(latent, bits, group)
    together = attend(kv_b, latent, exact=False)
    for t in range(4):
        with on_threads(1 + t % 3):
            assert_same_bits(attend(kv_b, latent, False, slice(t, t + 1)), together[t : t + 1])
    for name, found in on_each(FUSED, lambda: attend(kv_b, latent, exact=False)).items():
        assert torch.allclose(found, together, atol=1e-4), name


# --- caches in bf16 ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    latent=st.sampled_from([16, 48, 64, 96, 128, 208]),
    rotary=st.sampled_from([0, 16, 32]),
    heads=st.integers(1, 9),
    counts=st.lists(st.integers(1, 100), min_size=1, max_size=4),
    chosen=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_cache_in_bf16_is_read_as_its_floats(
    latent: int, rotary: int, heads: int, counts: list[int], chosen: bool, seed: int
) -> None:
    generator, n, capacity = torch.Generator().manual_seed(seed), len(counts), 100
    kv_b = cpu.Matrix(torch.randn(heads * 32, latent, generator=generator) * latent**-0.5)
    query = torch.randn(n, heads, 16 + rotary, generator=generator)
    cache = torch.randn(n, capacity, latent + rotary, generator=generator).bfloat16()
    turns = torch.polar(torch.ones(n, rotary // 2), torch.rand(n, rotary // 2, generator=generator) * 6)
    order = torch.rand(n, capacity, generator=generator).argsort(dim=1)
    for i, count in enumerate(counts):
        order[i, :count] = order[i, :count].sort().values
        cache[i, order[i, count:] if chosen else slice(count, None)] = float("nan")  # never read
    slots = order.int() if chosen else None

    def run(held: Tensor, rows: slice = slice(None)) -> Tensor:
        return cpu.attend(
            query[rows], kv_b, turns[rows], held, torch.arange(n, dtype=torch.int32)[rows].contiguous(),
            cpu.Slots(None if slots is None else slots[rows].contiguous(),
                      torch.tensor(counts, dtype=torch.int32)[rows].contiguous()),
            nope=16, value=16, scale=0.2, exact=True,
        )  # fmt: skip

    for name in INSTRUCTION_SETS:
        with using(name):
            found, wanted = run(cache), run(cache.float())
            assert (found - wanted).norm() <= (0.01 if name == "avx512bf16" else 1e-6) * wanted.norm(), name
            with on_threads(1 + seed % 3):
                for t in range(n):
                    assert_same_bits(run(cache, slice(t, t + 1)), found[t : t + 1])
