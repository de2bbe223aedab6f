"""Block FP8 against a reference built from the definition of e4m3."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm5.errors import CheckpointError
from glm5.formats.fp8 import BLOCK, block_dequantize, block_quantize, is_quantized, scale_shape
from tests.checkpoint.checkpoint_fixture import bits

quick = settings(max_examples=40, deadline=None)
TINY = torch.finfo(torch.float32).tiny


def value_of(code: int) -> float:
    """e4m3 by its definition: 1 sign, 4 exponent bits of bias 7, 3 mantissa bits, no infinity."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, code >> 3 & 0xF, code & 7
    if code & 0x7F == 0x7F:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


VALUES = torch.tensor([value_of(code) for code in range(256)], dtype=torch.float64)


def nearest(x: Tensor) -> Tensor:
    """The nearest e4m3 value; between two, the one with the even mantissa."""
    magnitudes, wanted = VALUES[:127], x.abs().double()
    above = torch.searchsorted(magnitudes, wanted).clamp(1, 126)
    to_above, to_below = magnitudes[above] - wanted, wanted - magnitudes[above - 1]
    up = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    return magnitudes[torch.where(up, above, above - 1)] * x.sign()


def naive(weight: Tensor) -> Tensor:
    """Quantize and dequantize, a block at a time."""
    out = torch.empty(weight.shape, dtype=torch.float32)
    for top in range(0, weight.shape[0], BLOCK):
        for left in range(0, weight.shape[1], BLOCK):
            here = slice(top, top + BLOCK), slice(left, left + BLOCK)
            block = weight[here].float()
            scale = block.abs().max() / 448 if block.any() else torch.tensor(1.0)
            out[here] = (nearest(block / scale) * scale.double()).float()
    return out


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Odd shapes around the block's borders; magnitudes from 1e-30 to 1e30, zero blocks among them."""
    sides = st.sampled_from([1, 2, 127, 128, 129, 200, 257])
    rows, columns = draw(sides), draw(sides)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = torch.randn(rows, columns, generator=generator) * 10.0 ** draw(st.integers(-30, 30))
    if draw(st.booleans()):
        weight[:BLOCK, :BLOCK] = 0
    return weight.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))


def test_torch_decodes_e4m3_as_defined() -> None:
    decoded = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    assert torch.equal(decoded.nan_to_num(999), VALUES.nan_to_num(999))


@quick
@given(matrices())
def test_codes_are_those_of_the_naive_reference(weight: Tensor) -> None:
    codes, scale = block_quantize(weight)
    assert (codes.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert codes.shape == weight.shape and tuple(scale.shape) == scale_shape(tuple(weight.shape))
    assert torch.equal(block_dequantize(codes, scale), naive(weight))


@quick
@given(matrices())
def test_the_error_is_at_most_half_a_step_and_the_peak_lands_on_448(weight: Tensor) -> None:
    codes, scale = block_quantize(weight)
    steps = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[
        : weight.shape[0], : weight.shape[1]
    ]
    bound = torch.maximum(weight.float().abs() * 2**-4, steps * 2**-10) * 1.00001
    assert ((block_dequantize(codes, scale) - weight.float()).abs() <= bound).all()
    for down in range(scale.shape[0]):
        for across in range(scale.shape[1]):
            here = slice(down * BLOCK, (down + 1) * BLOCK), slice(across * BLOCK, (across + 1) * BLOCK)
            peak = codes[here].float().abs().max().item()
            assert peak == (448 if weight[here].any() else 0)
            assert weight[here].any() or scale[down, across] == 1


@pytest.mark.parametrize("tiny", [1e-45, 1e-42, TINY, 400 * TINY, 448 * TINY])
def test_weights_near_the_smallest_number_stay_finite(tiny: float) -> None:
    weight = torch.zeros(130, 3)
    weight[0, 0], weight[129, 2] = tiny, -tiny
    codes, scale = block_quantize(weight)
    assert (scale >= TINY).all()
    assert ((block_dequantize(codes, scale) - weight).abs() <= max(tiny * 2**-4, TINY)).all()


@quick
@given(matrices(), st.sampled_from([(128, 128), (1, 128), (64, 32), (300, 7)]))
def test_decoding_works_for_any_block_and_into_any_memory(weight: Tensor, block: tuple[int, int]) -> None:
    codes, (rows, columns) = block_quantize(weight)[0], weight.shape
    scale = torch.rand(-(-rows // block[0]), -(-columns // block[1]))
    row, column = torch.arange(rows) // block[0], torch.arange(columns) // block[1]
    wanted = codes.float() * scale[row][:, column]
    assert torch.equal(block_dequantize(codes, scale, block), wanted)
    bank = torch.zeros(2, rows, columns, dtype=torch.bfloat16)
    block_dequantize(codes, scale, block, out=bank[1])
    assert torch.equal(bits(bank[1]), bits(wanted.bfloat16()))
    assert not bank[0].any()


def test_a_transposed_weight_and_one_without_rows_are_quantized() -> None:
    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(0))
    assert torch.equal(bits(block_quantize(weight.t())[0]), bits(block_quantize(weight.t().contiguous())[0]))
    assert block_quantize(torch.empty(0, 5))[1].shape == (0, 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weight = torch.ones(130, 130)
    weight[129, 1] = bad
    with pytest.raises(CheckpointError, match="infinite or NaN"):
        block_quantize(weight)


def test_the_official_choice_of_tensors() -> None:
    layer = "model.layers.3."
    for name in ("self_attn.kv_b_proj", "self_attn.indexer.wk", "mlp.experts.0.up_proj", "mlp.down_proj"):
        assert is_quantized(f"{layer}{name}.weight")
    for name in ("self_attn.indexer.weights_proj", "mlp.gate", "eh_proj", "self_attn.q_a_layernorm"):
        assert not is_quantized(f"{layer}{name}.weight")
    assert not is_quantized("lm_head.weight") and not is_quantized(f"{layer}self_attn.q_proj.bias")
