"""Codes in words, against the library whose layout it is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm5.formats.packing import BITS, dequantize, pack, unpack, words_per_row
from tests.kernels.kernel_fixture import generator

pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

quick = settings(deadline=None)


@st.composite
def code_matrices(draw: st.DrawFn) -> tuple[Tensor, int]:
    """(int8 codes of any width, bits)"""
    bits, half = (width := draw(st.sampled_from(BITS))), 1 << (width - 1)
    shape = (draw(st.integers(1, 9)), draw(st.integers(1, 75)))
    random = generator(draw(st.integers(0, 2**31)))
    return torch.randint(-half, half, shape, generator=random, dtype=torch.int8), bits


@quick
@given(code_matrices())
def test_words_are_those_of_compressed_tensors(case: tuple[Tensor, int]) -> None:
    codes, bits = case
    words = pack(codes, bits)
    assert words.shape == (codes.shape[0], words_per_row(codes.shape[1], bits))
    assert torch.equal(words, pack_to_int32(codes, bits))


@quick
@given(code_matrices())
def test_codes_come_back(case: tuple[Tensor, int]) -> None:
    codes, bits = case
    words = pack_to_int32(codes, bits)
    found = unpack(words, bits, codes.shape[1])
    assert torch.equal(found, codes)
    assert torch.equal(found, unpack_from_int32(words, bits, codes.shape))


@quick
@given(code_matrices(), st.integers(1, 5))
def test_a_weight_is_its_code_times_the_scale_of_its_columns(case: tuple[Tensor, int], group: int) -> None:
    codes, bits = case
    columns = codes.shape[1] // group * group
    if not columns:
        return
    codes = codes[:, :columns].contiguous()
    scales = torch.rand(codes.shape[0], columns // group, generator=generator(columns)).bfloat16()
    found = dequantize(pack(codes, bits), scales, bits, columns)
    for row in range(codes.shape[0]):
        for column in range(columns):
            assert found[row, column] == codes[row, column] * scales[row, column // group].float()


@pytest.mark.parametrize(
    ("codes", "bits", "word"),
    [([-8, -7, 0, 7], 4, 0xF810), ([-128, -127, 0, 127], 8, 0xFF800100 - (1 << 32)), ([7] * 8, 4, -1)],
)
def test_the_first_column_is_lowest(codes: list[int], bits: int, word: int) -> None:
    assert pack(torch.tensor([codes], dtype=torch.int8), bits).tolist() == [[word]]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_single_row_may_have_any_strides(bits: int) -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8).view(16, 1).T
    assert torch.equal(pack(codes, bits), pack(codes.repeat(2, 1), bits)[:1])
