"""ModelOpt and MXFP4 against compressed-tensors, transformers, and the definition of e2m1 and e8m0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm5.errors import CheckpointError
from glm5.formats.fp4 import e2m1, e8m0
from glm5.formats.fp8 import block_dequantize, block_quantize
from tests.checkpoint.checkpoint_fixture import refused
from tests.formats.format_fixture import MODULE, NAME, form, generator, read_back, stored

few = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**32)
sides = st.integers(1, 20)


def octets(shape: tuple[int, ...], draw: torch.Generator, high: int = 256) -> Tensor:
    return torch.randint(0, high, shape, generator=draw, dtype=torch.uint8)


def test_e2m1_is_decoded_as_defined() -> None:
    for byte in range(256):
        pair = e2m1(torch.tensor([[byte]], dtype=torch.uint8))[0].tolist()
        for value, code in zip(pair, (byte & 15, byte >> 4), strict=True):
            exponent, mantissa = code >> 1 & 3, code & 1
            wanted = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
            assert str(value) == str(-wanted if code & 8 else wanted)  # tells -0.0 from 0.0


def test_e8m0_is_decoded_as_defined() -> None:
    found = e8m0(torch.arange(256, dtype=torch.uint8)).tolist()
    assert found[:255] == [2.0 ** (byte - 127) for byte in range(255)]
    assert found[255] == float("inf")


# --- ModelOpt -------------------------------------------------------------------------------------


def nvfp4_tensors(rows: int, groups: int, seed: int) -> dict[str, Tensor]:
    draw = generator(seed)
    return {
        "weight": octets((rows, groups * 8), draw),
        "weight_scale": (torch.rand(rows, groups, generator=draw) * 448).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(2.0 ** -int(torch.randint(0, 12, (), generator=draw))),
    }


@few
@given(sides, sides, st.sampled_from(["NVFP4", "W4A16_NVFP4", "MIXED_PRECISION"]), seeds)
def test_nvfp4_of_modelopt_is_that_of_the_converter(rows: int, groups: int, algo: str, seed: int) -> None:
    module = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.modelopt_nvfp4")
    from compressed_tensors.compressors import BaseCompressor

    tensors = nvfp4_tensors(rows, groups, seed)
    converted = module.ModelOptNvfp4Converter(targets=["Linear"]).process(
        {f"{MODULE}.{suffix}": tensor for suffix, tensor in tensors.items()}
    )
    parts = {name.removeprefix(f"{MODULE}."): tensor.reshape(-1) if tensor.dim() == 0 else tensor
             for name, tensor in converted.items()}  # fmt: skip
    scheme = next(iter(module.ModelOptNvfp4Converter()._build_quant_config().config_groups.values()))
    compressor: Any = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    wanted = compressor.decompress(parts, scheme)["weight"]
    format = form(quant_method="modelopt", quant_algo=algo, ignore=["lm_head"])
    found = read_back(format, tensors, unused=("input_scale",))
    assert torch.equal(found.bfloat16(), wanted)  # the library's own arithmetic ends in bf16


def test_nvfp4_is_a_product_of_three() -> None:
    tensors = nvfp4_tensors(3, 2, 5) | {"weight_scale_2": torch.tensor([0.3])}
    scale = tensors["weight_scale"].float().repeat_interleave(16, 1) * torch.tensor(0.3)
    nested = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}
    found = read_back(form(quant_method="modelopt", quantization=nested), tensors)
    assert torch.equal(found, e2m1(tensors["weight"]) * scale)


@few
@given(st.integers(1, 300), st.integers(1, 300), seeds)
def test_fp8_of_modelopt_is_known_by_the_shape_of_its_scales(rows: int, columns: int, seed: int) -> None:
    draw = generator(seed)
    codes = torch.randn(rows, columns, generator=draw).to(torch.float8_e4m3fn)
    down, across = -(-rows // 128), -(-columns // 128)
    of_tensor, of_rows = torch.rand((), generator=draw), torch.rand(rows, generator=draw)
    of_blocks = torch.rand(down, across, generator=draw)
    blocks = block_dequantize(codes, of_blocks)
    rowwise = codes.float() * of_rows.unsqueeze(1)
    for suffix, scale, wanted in [
        ("weight_scale", of_tensor, codes.float() * of_tensor),
        ("weight_scale", of_tensor.reshape(1), codes.float() * of_tensor),
        ("weight_scale", of_rows, rowwise),
        ("weight_scale", of_rows.reshape(-1, 1), rowwise),
        ("weight_scale", of_blocks.reshape(down, 1, across, 1), blocks),
        ("weight_scale_inv", of_blocks, blocks),
    ]:
        format = form(quant_method="modelopt", quant_algo="MIXED_PRECISION")
        found = read_back(format, {"weight": codes, suffix: scale}, unused=("input_scale", "k_scale"))
        assert torch.equal(found, wanted)


def test_a_smoothed_layer_is_refused() -> None:
    tensors = nvfp4_tensors(2, 1, 1) | {"pre_quant_scale": torch.ones(16)}
    with stored(tensors) as index, refused(CheckpointError, "model.safetensors", f"{MODULE}.pre_quant_scale"):
        form(quant_method="modelopt", quant_algo="NVFP4").shape(NAME, index)


# --- MXFP4 ----------------------------------------------------------------------------------------


@few
@given(sides, st.integers(1, 5), seeds)
def test_mxfp4_is_that_of_transformers(rows: int, groups: int, seed: int) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    draw = generator(seed)
    blocks = octets((rows, groups, 16), draw)
    scales = octets((rows, groups), draw, 250)
    wanted = mxfp4.convert_moe_packed_tensors(blocks[None], scales[None], dtype=torch.float32)[0].t()
    format = form(quant_method="mxfp4")
    assert torch.equal(read_back(format, {"weight_blocks": blocks, "weight_scales": scales}), wanted)
    flat = {"weight": blocks.flatten(1), "weight_scale": scales}
    assert torch.equal(read_back(format, flat), wanted)
    exponents = {"weight": blocks.flatten(1), "weight_scale": scales.view(torch.float8_e8m0fnu)}
    assert torch.equal(read_back(format, exponents), wanted)
    assert torch.equal(read_back(form(**QUARK), flat), wanted)


QUARK: dict[str, Any] = {
    "quant_method": "quark",
    "algo_config": None,
    "global_quant_config": {
        "weight": {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
    },
}


@pytest.mark.parametrize(
    "change",
    [{"algo_config": [{"name": "rotation"}]}, {"layer_quant_config": {"*": {}}}, {"global_quant_config": {}},
     {"global_quant_config": {"weight": [1]}}],
)  # fmt: skip
def test_other_schemes_of_quark_are_refused(change: dict[str, Any]) -> None:
    with refused(CheckpointError, "config.json", "quantization_config", next(iter(change))):
        form(**{**QUARK, **change})


def test_plain_weights_are_left_to_others() -> None:
    with stored({"weight": torch.ones(2, 2)}) as index:
        for method in ({"quant_method": "mxfp4"}, {"quant_method": "modelopt", "quant_algo": "FP8"}):
            assert form(**method).stored_names(NAME, index) is None


# --- the vendor's FP8 -----------------------------------------------------------------------------


@few
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([None, [128, 128], [7, 40]]), seeds)
def test_block_fp8_is_that_of_the_library(rows: int, columns: int, block: Any, seed: int) -> None:
    module = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer")
    size = tuple(block or (128, 128))
    draw = generator(seed)
    codes = block_quantize(torch.randn(rows, columns, generator=draw))[0]
    scale = torch.rand(-(-rows // size[0]), -(-columns // size[1]), generator=draw)
    library = module.FP8BlockDequantizer(weight_block_size=size, dtype=torch.float32)
    wanted = library._create_dequantized_weight(codes.view(torch.uint8).view(torch.float8_e4m3fn), scale)
    format = form(quant_method="fp8", fmt="e4m3", weight_block_size=block)
    assert torch.equal(read_back(format, {"weight": codes, "weight_scale_inv": scale}), wanted)
