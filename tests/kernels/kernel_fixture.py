"""What the kernel tests share: every instruction set in turn, random packed weights, bits compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import pytest
import torch
from torch import Tensor

from glm5.formats.packing import pack
from glm5.kernels import _cpu, cpu

INSTRUCTION_SETS = cpu.instruction_sets()
# `portable` has no fused multiply-add: its integer sums are the same, its float sums need not be.
FUSED = [name for name in INSTRUCTION_SETS if name != "portable"] or INSTRUCTION_SETS
SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

T = TypeVar("T")


@contextmanager
def using(instruction_set: str) -> Iterator[None]:
    before = _cpu.instruction_set()
    _cpu.use_instruction_set(instruction_set)
    try:
        yield
    finally:
        _cpu.use_instruction_set(before)


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs once on each instruction set of this machine."""
    with using(request.param):
        yield request.param


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    before = cpu.threads()
    cpu.set_threads(count)
    try:
        yield
    finally:
        cpu.set_threads(before)


def on_each(names: list[str], call: Callable[[], T]) -> dict[str, T]:
    """What `call` gives on each of these instruction sets."""
    found = {}
    for name in names:
        with using(name):
            found[name] = call()
    return found


def assert_same_bits(found: Tensor, wanted: Tensor, where: object = "") -> None:
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype), where
    whole = {2: torch.int16, 4: torch.int32}[found.element_size()]
    differ = found.contiguous().view(whole) != wanted.contiguous().view(whole)
    assert not differ.any(), f"{where}: {int(differ.sum())} of {differ.numel()} differ"


def relative(found: Tensor, wanted: Tensor) -> float:
    """The root mean square of the difference as a share of that of `wanted`."""
    difference = (found.double() - wanted.double()).pow(2).mean().sqrt()
    return (difference / wanted.double().pow(2).mean().sqrt()).item()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Integers(NamedTuple):
    """A packed matrix and what it is made of."""

    codes: Tensor  # int8 [rows, columns]
    scales: Tensor  # [rows, groups]
    group: int
    matrix: cpu.Matrix

    @property
    def weight(self) -> Tensor:
        """fp32 [rows, columns], exactly: a code times a scale."""
        across = self.scales.float().repeat_interleave(self.group, dim=1)[:, : self.codes.shape[1]]
        return self.codes.float() * across

    def block_scales(self, block: int) -> Tensor:
        """The scale of each block of columns, in the stored dtype [rows, columns / block]."""
        places = torch.arange(0, self.codes.shape[1], block) // self.group
        return self.scales[:, places]


def random_integers(
    rows: int, columns: int, bits: int, group: int, seed: int, dtype: torch.dtype = torch.bfloat16
) -> Integers:
    """Every code occurs; scales differ by up to ten times, and in sign."""
    random, half = generator(seed), 1 << (bits - 1)
    codes = torch.randint(-half, half, (rows, columns), generator=random, dtype=torch.int8)
    size = 0.1 ** torch.rand(rows, -(-columns // group), generator=random) / half
    sign = 1.0 - 2.0 * (torch.rand(size.shape, generator=random) < 0.2)
    scales = (size * sign).to(dtype)
    matrix = cpu.Matrix(pack(codes, bits), scales, bits=bits, columns=columns, group=group)
    return Integers(codes, scales, group, matrix)
