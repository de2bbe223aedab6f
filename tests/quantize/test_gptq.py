"""Rounding with error feedback: what it must be where the answer is known, and better everywhere else."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm5.formats.packed import Scheme
from glm5.formats.packing import dequantize
from glm5.kernels import cpu
from glm5.quantize import gptq
from glm5.quantize.gptq import Factor, Hessian, Solved, output_errors, solve


def correlated(inputs: int, columns: int, seed: int) -> Tensor:
    """Inputs [T, C] that mix a third as many causes, with a common one."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(inputs, max(1, columns // 3), generator=generator)
    mixing = torch.randn(causes.shape[1], columns, generator=generator)
    return causes @ mixing + torch.randn(inputs, 1, generator=generator)


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def hessian_of(x: Tensor, group: int = 32) -> Hessian:
    hessian = Hessian(x.shape[1], group)
    hessian.add(x)
    return hessian


def unpacked(solved: Solved | cpu.Rounded, scheme: Scheme, columns: int) -> Tensor:
    return dequantize(solved.words, solved.scales, scheme.bits, columns)


def assert_nearest(weight: Tensor, hessian: Hessian, scheme: Scheme) -> None:
    found = solve(weight, Factor.of(hessian), scheme)
    wanted = cpu.round_weights(weight, bits=scheme.bits, group=scheme.group)
    assert torch.equal(found.words, wanted.words)
    assert torch.equal(found.scales, wanted.scales)
    assert found.error == pytest.approx(wanted.error, rel=1e-4)
    assert found.energy == pytest.approx(wanted.energy, rel=1e-4)


# --- against rounding to the nearest -----------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(24, 60),
    groups=st.integers(1, 5),
    group=st.sampled_from([32, 64, 96, 128]),
    bits=st.sampled_from([4, 8]),
    seed=st.integers(0, 1000),
)
def test_outputs_lose_less_than_with_nearest_codes(
    rows: int, groups: int, group: int, bits: int, seed: int
) -> None:
    scheme, columns = Scheme(bits, group), groups * group
    weight, x = weights(rows, columns, seed), correlated(3 * columns, columns, seed)
    hessian = hessian_of(x, group)
    solved = solve(weight, Factor.of(hessian), scheme)
    nearest = cpu.round_weights(weight, bits=bits, group=group)

    def loss(found: Solved | cpu.Rounded) -> float:
        return float((x @ (unpacked(found, scheme, columns) - weight).T).norm() / (x @ weight.T).norm())

    assert loss(solved) < 0.95 * loss(nearest)  # of some rows: for a single one, luck can count for more
    told = output_errors(weight, hessian, solved, scheme)
    assert told == pytest.approx((loss(nearest), loss(solved)), rel=1e-2)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_independent_inputs_give_the_nearest_codes(bits: int, group: int) -> None:
    hessian = Hessian(384, group)
    hessian.add(3 * torch.eye(384))
    assert_nearest(weights(50, 384), hessian, Scheme(bits, group))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_single_row_and_group(bits: int) -> None:
    solved = solve(weights(1, 32), Factor.of(hessian_of(correlated(99, 32, 0))), Scheme(bits, 32))
    assert solved.words.shape == (1, bits) and solved.scales.shape == (1, 1)
    assert 0 < solved.relative_error < 0.3


def test_no_inputs_give_the_nearest_codes() -> None:
    assert_nearest(weights(20, 128), Hessian(128, 32), Scheme(4, 32))


def test_codes_do_not_depend_on_the_rows_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, factor = weights(70, 192), Factor.of(hessian_of(correlated(500, 192, 1)))
    whole = solve(weight, factor, Scheme(4, 32))
    monkeypatch.setattr(gptq, "BAND_WEIGHTS", 32 * 192)
    banded = solve(weight, factor, Scheme(4, 32))
    differing = (unpacked(whole, Scheme(4, 32), 192) != unpacked(banded, Scheme(4, 32), 192)).float().mean()
    assert differing < 0.01  # sums in another order
    assert banded.error == pytest.approx(whole.error, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_of_every_float_type(dtype: torch.dtype) -> None:
    weight, factor = weights(16, 64).to(dtype), Factor.of(hessian_of(correlated(200, 64, 2)))
    found, wanted = (solve(w, factor, Scheme(4, 32)) for w in (weight, weight.float()))
    assert torch.equal(found.words, wanted.words) and torch.equal(found.scales, wanted.scales)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_told(value: float) -> None:
    weight = weights(16, 64)
    weight[15, 63] = value
    assert math.isnan(solve(weight, Factor.of(Hessian(64, 32)), Scheme(4, 32)).energy)


# --- Hessians that are hard ---------------------------------------------------------------------------


def test_the_factor_is_that_of_the_inverse() -> None:
    x = correlated(400, 96, 3).double()
    factor = Factor.of(hessian_of(x), dampening_frac=0.02)
    h = x.T @ x
    mean = h.diagonal().mean()
    wanted = torch.linalg.inv(h / mean + 0.02 * torch.eye(96).double())
    upper = factor.blocks[0].double()
    assert torch.equal(upper, upper.triu())
    assert torch.allclose(upper.T @ upper, wanted, atol=2e-3 * float(wanted.abs().max()))


def test_dead_columns_are_rounded_by_themselves() -> None:
    """An input that is always zero says nothing; the weights that read it may matter elsewhere."""
    x, weight = correlated(300, 128, 4), weights(30, 128)
    dead = torch.zeros(128, dtype=torch.bool)
    dead[32:64] = True
    x[:, dead] = 0
    found = solve(weight, Factor.of(hessian_of(x)), Scheme(4, 32))
    wanted = cpu.round_weights(weight, bits=4, group=32)
    values, nearest = unpacked(found, Scheme(4, 32), 128), unpacked(wanted, Scheme(4, 32), 128)
    assert torch.equal(values[:, dead], nearest[:, dead])
    assert not torch.equal(values, nearest)
    assert torch.isfinite(values).all()


@pytest.mark.parametrize("inputs", [1, 2, 40])
def test_fewer_inputs_than_columns_are_solved(inputs: int) -> None:
    x, weight = correlated(inputs, 128, 5), weights(30, 128)
    hessian = hessian_of(x)
    solved = solve(weight, Factor.of(hessian), Scheme(4, 32))
    nearest, after = output_errors(weight, hessian, solved, Scheme(4, 32))
    assert after < 0.5 * nearest
    assert solved.relative_error < 0.5


def test_damping_grows_until_the_hessian_has_a_factor() -> None:
    hessian = Hessian(64, 32)
    hessian.blocks[0].fill_(1.0)
    hessian.blocks[0].diagonal().sub_(0.5)  # not even positive: what rounding may leave of a singular one
    factor = Factor.of(hessian, dampening_frac=1e-9)
    assert torch.isfinite(factor.blocks[0]).all()


def test_wide_inputs_are_taken_in_blocks_of_whole_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "WIDEST_WHOLE", 128)
    monkeypatch.setattr(gptq, "BLOCK_COLUMNS", 100)
    x, weight = correlated(900, 224, 6), weights(40, 224)
    hessian = hessian_of(x)
    assert [(s.start, s.stop) for s in hessian.spans] == [(0, 96), (96, 192), (192, 224)]
    blocks = solve(weight, Factor.of(hessian), Scheme(4, 32))
    for span in hessian.spans:
        alone = solve(weight[:, span], Factor.of(hessian_of(x[:, span])), Scheme(4, 32))
        groups = slice(span.start // 32, span.stop // 32)
        assert torch.equal(blocks.words[:, span.start // 8 : span.stop // 8], alone.words)
        assert torch.equal(blocks.scales[:, groups], alone.scales)


def test_blending_adds_average_inputs() -> None:
    own, other = hessian_of(correlated(10, 64, 8)), hessian_of(correlated(1000, 64, 9))
    before = own.blocks[0].clone()
    own.blend(other, 50)
    assert own.count == 60
    assert torch.allclose(own.blocks[0] - before, other.blocks[0] * 0.05, rtol=1e-3, atol=1e-2)
    own.blend(Hessian(64, 32), 50)  # of nothing
    assert torch.isfinite(own.blocks[0]).all()
