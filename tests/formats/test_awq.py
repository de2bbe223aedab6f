"""AWQ against the converter of compressed-tensors, and against the order of its nibbles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm5.errors import CheckpointError
from tests.checkpoint.checkpoint_fixture import refused
from tests.formats.format_fixture import MODULE, NAME, form, generator, read_back, signed, stored

few = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**32)


def random_tensors(words: int, groups: int, size: int, seed: int) -> dict[str, Tensor]:
    draw = generator(seed)
    low, high = -(2**31), 2**31
    return {
        "qweight": torch.randint(low, high, (groups * size, words), generator=draw).int(),
        "qzeros": torch.randint(low, high, (groups, words), generator=draw).int(),
        "scales": (torch.rand(groups, words * 8, generator=draw) + 0.01).half(),
    }


def awq(size: int = 8, **more: Any) -> Any:
    return form(quant_method="awq", bits=4, group_size=size, **{"version": "gemm", **more})


@few
@given(st.integers(1, 6), st.integers(1, 4), st.sampled_from([1, 5, 8, 32]), st.booleans(), seeds)
def test_weights_are_those_of_the_converter(
    words: int, groups: int, size: int, zero_point: bool, seed: int
) -> None:
    module = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq")
    from compressed_tensors.compressors import BaseCompressor

    tensors = random_tensors(words + 1, groups, size, seed)
    if not zero_point:
        del tensors["qzeros"]
    converter = module.AutoAWQConverter(group_size=size, zero_point=zero_point)
    converted = converter.process({f"{MODULE}.{suffix}": tensor for suffix, tensor in tensors.items()})
    scheme = next(iter(converter._build_quant_config().config_groups.values()))
    compressor: Any = BaseCompressor.get_value_from_registry("pack-quantized")
    parts = {name.removeprefix(f"{MODULE}."): tensor for name, tensor in converted.items()}
    wanted = compressor.decompress(parts, scheme)["weight"]
    assert wanted.dtype == torch.float16
    assert torch.equal(read_back(awq(size, zero_point=zero_point), tensors).half(), wanted)


def test_a_word_holds_the_outputs_0_2_4_6_1_3_5_7() -> None:
    codes = [3, 1, 4, 15, 9, 2, 6, 5]
    word = sum(codes[output] << 4 * place for place, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
    tensors = {
        "qweight": torch.tensor([[signed(word)]], dtype=torch.int32),
        "qzeros": torch.zeros(1, 1, dtype=torch.int32),
        "scales": torch.ones(1, 8, dtype=torch.float16),
    }
    assert read_back(awq(-1, modules_to_not_convert=["visual"]), tensors).flatten().tolist() == codes


def test_zero_points_that_config_denies_are_refused() -> None:
    tensors = random_tensors(1, 1, 8, 1)
    with stored(tensors) as index, refused(CheckpointError, "model.safetensors", MODULE, "zero_point false"):
        awq(zero_point=False).read(NAME, index)
    tensors["qzeros"] = torch.full((1, 1), signed(0x88888888), dtype=torch.int32)
    assert read_back(awq(zero_point=False), tensors).shape == (8, 8)


def test_a_weight_without_rows_is_read() -> None:
    assert read_back(awq(), random_tensors(0, 2, 8, 1)).shape == (0, 16)
