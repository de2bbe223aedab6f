"""x W^T from packed codes: the reference's numbers, and the same bits for a row in any company."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm5.formats.packing import dequantize
from tests.kernels.cuda.cuda_fixture import CLOSE, DEVICE, distance, normal, packed_codes

pytest.importorskip("triton", reason="pip install 'glm5[cuda]'")
from glm5.kernels.cuda.products import linear
from glm5.kernels.cuda.tiles import FEW_ROWS, bands_of, units_of

few = settings(max_examples=8, deadline=None)


def reference(x: Tensor, words: Tensor, scales: Tensor, bits: int) -> Tensor:
    return x.double() @ dequantize(words, scales, bits, x.shape[1]).double().T


@few
@given(
    st.sampled_from([1, 2, 3, 5, 8, 9, 17, 65]), st.integers(1, 40), st.integers(1, 5),
    st.sampled_from([4, 8]), st.sampled_from([32, 64, 96, 128, 192]), st.sampled_from(list(CLOSE)),
    st.integers(0, 1000),
)  # fmt: skip
def test_a_product_is_the_reference(
    tokens: int, rows: int, groups: int, bits: int, group: int, dtype: torch.dtype, seed: int
) -> None:
    columns = groups * group
    words, scales = packed_codes(rows, columns, bits, group, seed)
    x = normal(tokens, columns, seed=seed + 1, dtype=dtype)
    found = linear(x, words, scales, bits=bits, group=group)
    assert found.dtype == dtype and found.shape == (tokens, rows)
    assert distance(found, reference(x, words, scales, bits)) < CLOSE[dtype]


@pytest.mark.parametrize("tokens", [1, 3, 11])
def test_long_rows_are_split_and_added(tokens: int) -> None:
    words, scales = packed_codes(9, 3072, 4, 64, seed=1)
    assert bands_of(9, units_of(3072, 4, 64)).splits > 1
    x, bias = normal(tokens, 3072, seed=2), normal(9, seed=3)
    found = linear(x, words, scales, bits=4, group=64, bias=bias)
    assert distance(found, reference(x, words, scales, 4) + bias) < CLOSE[torch.float32]


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
def test_scales_may_have_other_dtypes(scale_dtype: torch.dtype) -> None:
    words, scales = packed_codes(20, 128, 8, 32, seed=4)
    scales = scales.to(scale_dtype)
    for tokens in (1, 12):
        x = normal(tokens, 128, seed=5)
        assert distance(linear(x, words, scales, bits=8, group=32), reference(x, words, scales, 8)) < 3e-6


@pytest.mark.parametrize(("rows", "columns", "group"), [(21, 192, 64), (9, 1536, 32)])
def test_a_row_does_not_depend_on_its_batch(rows: int, columns: int, group: int) -> None:
    words, scales = packed_codes(rows, columns, 4, group, seed=6)
    x = normal(FEW_ROWS, columns, seed=7, dtype=torch.bfloat16)
    alone = torch.cat([linear(x[t : t + 1], words, scales, bits=4, group=group) for t in range(FEW_ROWS)])
    for count in (2, 3, 4, FEW_ROWS):
        assert torch.equal(linear(x[:count], words, scales, bits=4, group=group), alone[:count])
    many = normal(70, columns, seed=8, dtype=torch.bfloat16)
    together = linear(many, words, scales, bits=4, group=group)
    assert torch.equal(linear(many[:30], words, scales, bits=4, group=group), together[:30])
    assert torch.equal(linear(many[20:66], words, scales, bits=4, group=group), together[20:66])


def test_leading_dimensions_stay_and_no_rows_are_fine() -> None:
    words, scales = packed_codes(7, 64, 4, 64, seed=9)
    x = normal(2, 3, 64, seed=10)
    found = linear(x, words, scales, bits=4, group=64)
    assert found.shape == (2, 3, 7)
    assert torch.equal(found.view(6, 7), linear(x.view(6, 64), words, scales, bits=4, group=64))
    assert linear(x[:0], words, scales, bits=4, group=64).shape == (0, 3, 7)


def test_what_does_not_fit_is_refused() -> None:
    words, scales = packed_codes(7, 64, 4, 32, seed=11)
    x = torch.zeros(1, 64, device=DEVICE)
    for bad in (
        lambda: linear(x[:, :32], words, scales, bits=4, group=32),
        lambda: linear(x, words, scales, bits=8, group=32),
        lambda: linear(x, words, scales, bits=4, group=64),
        lambda: linear(x, words, scales, bits=4, group=16),
        lambda: linear(x.to(torch.float64), words, scales, bits=4, group=32),
        lambda: linear(x, words, scales, bits=4, group=32, bias=x[0]),
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            bad()
