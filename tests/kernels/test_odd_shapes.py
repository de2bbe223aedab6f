"""Every kernel on small odd shapes, on every instruction set: what `make sanitize` runs.

Inputs lie at the very end of their memory, so that a read past it meets the sanitizer's red zone.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from glm5.formats.packing import pack, unpack
from glm5.kernels import _cpu, cpu, reference

SHAPES = [(1, 32, 4, 32), (7, 64, 4, 64), (17, 96, 4, 32), (33, 192, 4, 64), (40, 320, 8, 64), (9, 96, 8, 32),
          (65, 1088, 4, 64), (16, 1152, 4, 128), (5, 40, 4, 40)]  # fmt: skip


@pytest.fixture(params=cpu.instruction_sets(), autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _cpu.instruction_set()
    _cpu.use_instruction_set(request.param)
    yield request.param
    _cpu.use_instruction_set(before)


def matrix(rows: int, columns: int, bits: int, group: int, seed: int = 0) -> cpu.Matrix:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (rows, columns), generator=generator)
    scales = (torch.rand(rows, -(-columns // group), generator=generator) * 0.1 + 0.01).bfloat16()
    return cpu.Matrix(pack(codes.to(torch.int8), bits), scales, bits=bits, columns=columns, group=group)


def tokens(count: int, width: int, seed: int = 1) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "columns", "bits", "group"), SHAPES)
def test_integer_products(rows: int, columns: int, bits: int, group: int) -> None:
    made = matrix(rows, columns, bits, group)
    assert made.scales is not None
    for count in (1, 2, 3, 5, 14):
        x = tokens(count, columns)
        if made.block:
            codes = unpack(made.weight, bits, columns)
            wanted = reference.integer_linear(x, codes, made.scales, made.block, bits)
            assert torch.equal(cpu.linear(x, made), wanted)
        assert cpu.linear(x.bfloat16(), made, exact=True).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("columns", [16, 37, 64])
def test_float_products(dtype: torch.dtype, columns: int) -> None:
    weight = tokens(13, columns).to(dtype)
    for count in (1, 4, 6):
        x = tokens(count, columns)
        assert torch.allclose(cpu.linear(x, cpu.Matrix(weight)), x @ weight.float().T, atol=1e-4)


def test_block_fp8_products() -> None:
    weight, scales = tokens(20, 40).to(torch.float8_e4m3fn), torch.rand(2, 3) + 0.5
    whole = weight.float() * scales.repeat_interleave(16, 0)[:20].repeat_interleave(16, 1)[:, :40]
    x = tokens(3, 40)
    assert torch.allclose(cpu.linear(x, cpu.Matrix(weight, scales, group=16)), x @ whole.T, atol=1e-4)


@pytest.mark.parametrize("count", [1, 5, 19])
def test_an_expert_layer(count: int) -> None:
    hidden, width = 96, 160
    experts = [(matrix(width, hidden, 4, 32, e), matrix(width, hidden, 4, 32, e + 50),
                matrix(hidden, width, 4, 32, e + 90)) for e in range(6)]  # fmt: skip
    layer = cpu.MoeLayer(hidden, cpu.ExpertBank.of(hidden, experts), experts[0])
    layer.set_router(cpu.Matrix(tokens(6, hidden, 3)), torch.zeros(6), topk=2)
    x = tokens(count, hidden)
    told = cpu.Told(count, 2, 6)
    out = layer(x, add=x, told=told)
    assert out.isfinite().all() and told.ids.min() >= 0 and told.ids.max() < 6
    assert torch.equal(out[:1], layer(x[:1], add=x[:1]))


def test_attention_and_selection() -> None:
    heads, nope, rotary, value, latent, slots = 5, 12, 16, 10, 48, 37
    kv_b = cpu.Matrix(tokens(heads * (nope + value), latent).bfloat16())
    cache, keys = tokens(slots, latent + rotary)[None], tokens(slots, 32, 4)[None]
    rows = torch.zeros(2, dtype=torch.int32)
    turns = torch.polar(torch.ones(2, rotary // 2), torch.rand(2, rotary // 2))
    chosen = cpu.select(tokens(2 * 16, 32, 5).view(2, 16, 32), turns, torch.rand(2, 16), keys, rows, 9)
    assert chosen.slots is not None and chosen.counts.tolist() == [9, 9]
    query = tokens(2 * heads, nope + rotary, 6).view(2, heads, -1)
    for picked in (chosen, cpu.Slots(None, torch.tensor([slots, 3], dtype=torch.int32))):
        out = cpu.attend(query, kv_b, turns, cache, rows, picked, nope=nope, value=value, scale=0.2)
        assert out.shape == (2, heads, value) and out.isfinite().all()
    many = cpu.attend(
        query.repeat(20, 1, 1), kv_b, turns.repeat(20, 1), cache, rows.repeat(20),
        cpu.Slots(None, torch.tensor([slots, 3] * 20, dtype=torch.int32)), nope=nope, value=value, scale=0.2,
    )  # fmt: skip
    assert torch.equal(many[:2], out) and torch.equal(many[38:], out)


@pytest.mark.parametrize(("width", "value"), [(24, 24), (16, 40), (13, 7)])
def test_grouped_attention(width: int, value: int) -> None:
    keys, values = (
        tokens(2 * 30 * 2, width).view(2, 30, 2, width),
        tokens(120, value, 3).view(2, 30, 2, value),
    )
    q, rows = tokens(5 * 6, width, 4).view(5, 6, width), torch.tensor([0, 1, 1, 0, 1], dtype=torch.int32)
    seen = cpu.Slots(None, torch.tensor([30, 1, 17, 0, 16], dtype=torch.int32))
    for cache in ((keys, values), (keys.bfloat16(), values.bfloat16())):
        out = cpu.attend_grouped(q, *cache, rows, seen, scale=0.3)
        assert out.shape == (5, 6, value) and out.isfinite().all() and not out[3].any()


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding(bits: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rounded = cpu.round_weights(tokens(11, 96).to(dtype), bits=bits, group=32)
        assert rounded.error < 0.02 * rounded.energy
