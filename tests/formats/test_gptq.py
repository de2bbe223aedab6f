"""GPTQ against a slow reference made from the description of its layout, one code at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm5.errors import CheckpointError
from glm5.formats.bits import words
from tests.checkpoint.checkpoint_fixture import refused
from tests.formats.format_fixture import (
    MODULE,
    NAME,
    form,
    generator,
    pack,
    read_back,
    signed,
    stored,
)

few = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 2**32)


def packed_down(codes: list[list[int]], width: int) -> Tensor:
    """[n, m] codes to int32 [words(n), m], each column one string of bits."""
    columns = [pack(list(column), width) for column in zip(*codes, strict=True)]
    return torch.tensor(columns, dtype=torch.int32).t()


def packed_across(codes: list[list[int]], width: int) -> Tensor:
    return torch.tensor([pack(row, width) for row in codes], dtype=torch.int32)


class Layer:
    """Random codes, zero points, scales and an order of the groups; its weight by the formula."""

    def __init__(self, width: int, out: int, columns: int, size: int, ordered: bool, seed: int) -> None:
        draw, groups = generator(seed), -(-columns // size)
        self.width = width
        self.codes_IO = torch.randint(0, 2**width, (columns, out), generator=draw).tolist()
        self.zeros_GO = torch.randint(0, 2**width, (groups, out), generator=draw).tolist()
        self.scales_GO = (torch.rand(groups, out, generator=draw) + 0.01).half()
        self.order = torch.randint(0, groups, (columns,), generator=draw).tolist()
        if ordered:
            self.order = [column // size for column in range(columns)]

    def weight(self) -> Tensor:
        columns, out = len(self.order), len(self.codes_IO[0])
        found = torch.empty(out, columns)
        for column, group in enumerate(self.order):
            for row in range(out):
                shifted = self.codes_IO[column][row] - self.zeros_GO[group][row]
                found[row, column] = shifted * self.scales_GO[group, row].item()
        return found

    def tensors(self) -> dict[str, Tensor]:
        """As `gptq_v2`."""
        return {
            "qweight": packed_down(self.codes_IO, self.width),
            "qzeros": packed_across(self.zeros_GO, self.width),
            "scales": self.scales_GO,
            "g_idx": torch.tensor(self.order, dtype=torch.int32),
        }


@few
@given(
    st.sampled_from([2, 3, 4, 8]), st.integers(1, 40), st.integers(1, 70), st.sampled_from([1, 7, 32, 100]),
    st.booleans(), seeds,
)  # fmt: skip
def test_the_second_layout_is_that_of_the_reference(
    width: int, out: int, columns: int, size: int, ordered: bool, seed: int
) -> None:
    layer = Layer(width, out, columns, size, ordered, seed)
    format = form(quant_method="gptq", bits=width, group_size=size, sym=False, checkpoint_format="gptq_v2")
    assert torch.equal(read_back(format, layer.tensors()), layer.weight())


@few
@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 40), st.booleans(), seeds)
def test_the_first_layout_adds_one_to_its_zero_points(width: int, out: int, ordered: bool, seed: int) -> None:
    """As written by AutoGPTQ, where no zero point is 0."""
    layer = Layer(width, out, 32, 8, ordered, seed)
    layer.zeros_GO = [[max(zero, 1) for zero in row] for row in layer.zeros_GO]
    tensors = layer.tensors()
    tensors["qzeros"] = packed_across([[zero - 1 for zero in row] for row in layer.zeros_GO], width)
    format = form(quant_method="gptq", bits=width, group_size=8, sym=False)
    assert torch.equal(read_back(format, tensors), layer.weight())


@few
@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 40), seeds)
def test_zero_points_of_nought_come_back_from_the_first_layout(width: int, out: int, seed: int) -> None:
    """As written by GPTQModel: 1 is taken from all codes of a word at once, and may borrow."""
    layer = Layer(width, out, 16, 8, True, seed)
    tensors = layer.tensors()
    if width == 3:  # codes that cross words are wrapped one by one
        tensors["qzeros"] = packed_across([[(zero - 1) % 8 for zero in row] for row in layer.zeros_GO], 3)
    else:
        ones = sum(1 << place for place in range(0, 32, width))
        tensors["qzeros"] = torch.tensor(
            [[signed((word - ones) & 0xFFFFFFFF) for word in row] for row in tensors["qzeros"].tolist()],
            dtype=torch.int32,
        )
    format = form(quant_method="gptq", bits=width, group_size=8, sym=False, checkpoint_format="gptq")
    assert torch.equal(read_back(format, tensors), layer.weight())


def test_three_bits_are_kept_as_the_kernels_expect_them() -> None:
    """32 codes in 3 words, as AutoGPTQ's packing loop has it: 10 codes, 2 + 1 bits, 10, 1 + 2, 10."""
    codes = torch.randint(0, 8, (32,), generator=generator(3)).tolist()
    first = sum(code << 3 * place for place, code in enumerate(codes[:10])) | codes[10] << 30
    second = codes[10] >> 2 | sum(code << 3 * place + 1 for place, code in enumerate(codes[11:21]))
    third = codes[21] >> 1 | sum(code << 3 * place + 2 for place, code in enumerate(codes[22:]))
    loop = [signed(w & 0xFFFFFFFF) for w in (first, second | codes[21] << 31, third)]
    assert loop == pack(codes, 3)


def test_groups_may_be_whole_rows_and_the_order_left_out() -> None:
    layer = Layer(4, 8, 24, 24, True, 1)
    tensors = layer.tensors()
    del tensors["g_idx"]
    format = form(quant_method="gptq", bits=4, group_size=-1, sym=False, checkpoint_format="gptq_v2")
    assert torch.equal(read_back(format, tensors), layer.weight())


def test_symmetric_weights_may_come_without_zero_points() -> None:
    layer = Layer(4, 8, 16, 8, True, 2)
    layer.zeros_GO = [[8] * 8] * 2
    tensors = layer.tensors()
    del tensors["qzeros"]
    assert torch.equal(read_back(form(quant_method="gptq", bits=4, group_size=8), tensors), layer.weight())
    with stored(tensors) as index, refused(CheckpointError, index.directory, f"{MODULE}.qzeros is missing"):
        form(quant_method="gptq", bits=4, group_size=8, sym=False).shape(NAME, index)


@pytest.mark.parametrize("pattern", [".*experts.*", "+:.*experts.*", "+:^(?!.*attn)"])
def test_some_modules_may_have_other_bits_and_groups(pattern: str) -> None:
    layer = Layer(8, 6, 32, 16, True, 4)
    dynamic: dict[str, Any] = {"-:.*gate$": {}, pattern: {"bits": 8, "group_size": 16}, ".*": {"bits": 2}}
    format = form(
        quant_method="gptq", bits=4, group_size=128, sym=False, dynamic=dynamic, checkpoint_format="gptq_v2"
    )
    assert torch.equal(read_back(format, layer.tensors()), layer.weight())


def test_a_weight_without_rows_is_read() -> None:
    layer = Layer(4, 8, 16, 8, True, 5)
    tensors = {name: t[..., :0] if t.dim() == 2 else t for name, t in layer.tensors().items()}
    assert read_back(form(quant_method="gptq", bits=4, group_size=8), tensors).shape == (0, 16)
    assert words(0, 4) == 0
