"""Rounded while it is loaded or by `quantize`, a weight gets the same codes, whatever form it has on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glm5.checkpoint import names
from glm5.formats.fp8 import block_quantize
from glm5.layers.loading import load_model
from glm5.quantize import Recipe, quantize
from glm5.quantize.plan import plan
from glm5.quantize.sources import open_source
from tests.checkpoint.checkpoint_fixture import Tensors, assert_same_bits, with_json, with_tensors
from tests.quantize.quantize_fixture import RECIPE, all_weights, as_floats, save_source
from tests.quantize.quantize_fixture import no_flushing as no_flushing

# Attention is copied, so that copies of every form are compared as well.
MIXED = Recipe.of(4, 32, ["*.shared_experts.*=8"], ["*.[ok]*_proj*"])
FP8 = torch.float8_e4m3fn
Draw = torch.Generator
Stored = Callable[[Tensor, Draw], Tensors]  # of a weight [out, in], by what stands after its module


def compressed(kind: str, format: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"type": kind, **weights}, "format": format}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"g": group}}


def words(draw: Draw, *shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=draw).int()


def octets(draw: Draw, *shape: int, low: int = 0, high: int = 256) -> Tensor:
    return torch.randint(low, high, shape, generator=draw, dtype=torch.uint8)


def scales(draw: Draw, *shape: int) -> Tensor:
    """Of all the bits that fp32 has."""
    return (torch.rand(shape, generator=draw) + 0.5) / 100


def e4m3(weight: Tensor) -> Tensor:
    return (weight * 100).to(FP8)


def gptq(weight: Tensor, draw: Draw) -> Tensors:
    rows, columns = weight.shape
    return {
        "qweight": words(draw, columns // 8, rows), "qzeros": words(draw, columns // 32, rows // 8),
        "scales": scales(draw, columns // 32, rows).half(), "g_idx": torch.arange(columns).int() // 32,
    }  # fmt: skip


def awq(weight: Tensor, draw: Draw) -> Tensors:
    rows, columns = weight.shape
    return {
        "qweight": words(draw, columns, rows // 8), "qzeros": words(draw, columns // 32, rows // 8),
        "scales": scales(draw, columns // 32, rows).half(),
    }  # fmt: skip


def packed(weight: Tensor, draw: Draw) -> Tensors:
    rows, columns = weight.shape
    return {
        "weight_packed": words(draw, rows, columns // 4), "weight_scale": scales(draw, rows, columns // 16),
        "weight_shape": torch.tensor([rows, columns]),
    }  # fmt: skip


def nvfp4(weight: Tensor, draw: Draw, codes: str = "weight", whole: str = "weight_scale_2") -> Tensors:
    rows, columns = weight.shape
    return {
        codes: octets(draw, rows, columns // 2), "weight_scale": e4m3(scales(draw, rows, columns // 16)),
        whole: torch.tensor([0.3]),
    }  # fmt: skip


def block_fp8(weight: Tensor, draw: Draw) -> Tensors:
    codes, scale = block_quantize(weight)
    return {"weight": codes, "weight_scale_inv": scale}


# config.json's quantization_config, and what takes the place of a weight.
FORMS: dict[str, tuple[dict[str, Any] | None, Stored]] = {
    "fp64": (None, lambda weight, draw: {"weight": weight.double() / 3}),
    "fp32": (None, lambda weight, draw: {"weight": weight.float() / 3}),
    "fp16": (None, lambda weight, draw: {"weight": weight.half()}),
    "bf16": (None, lambda weight, draw: {"weight": weight.bfloat16()}),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, block_fp8),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}, gptq),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, awq),
    "packed int8": (compressed("int", "pack-quantized", num_bits=8, strategy="group", group_size=16), packed),
    "int8": (
        compressed("int", "int-quantized", num_bits=8, strategy="channel"),
        lambda weight, draw: {
            "weight": octets(draw, *weight.shape).view(torch.int8),
            "weight_scale": scales(draw, weight.shape[0], 1),
        },
    ),
    "fp8 channels": (
        compressed("float", "float-quantized", num_bits=8, strategy="channel"),
        lambda weight, draw: {"weight": e4m3(weight), "weight_scale": scales(draw, weight.shape[0], 1)},
    ),
    "mxfp8": (
        compressed("float", "mxfp8-quantized", num_bits=8, strategy="group", group_size=32),
        lambda weight, draw: {
            "weight": e4m3(weight),
            "weight_scale": octets(draw, weight.shape[0], weight.shape[1] // 32, low=118, high=124),
        },
    ),
    "nvfp4": (
        compressed("float", "nvfp4-pack-quantized", num_bits=4, strategy="tensor_group", group_size=16),
        lambda weight, draw: nvfp4(weight, draw, "weight_packed", "weight_global_scale"),
    ),
    "mxfp4": (
        {"quant_method": "mxfp4"},
        lambda weight, draw: {
            "weight_blocks": octets(draw, weight.shape[0], weight.shape[1] // 32, 16),
            "weight_scales": octets(draw, weight.shape[0], weight.shape[1] // 32, low=118, high=124),
        },
    ),
    "modelopt nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, nvfp4),
    "modelopt fp8": (
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        lambda weight, draw: {"weight": e4m3(weight), "weight_scale": torch.tensor(0.013)},
    ),
}  # fmt: skip


def source_of(directory: Path, form: str) -> Path:
    """A model of which all that `RECIPE` rounds is stored in this form."""
    save_source(directory)
    rounded = {item.name for item in plan(open_source(directory), RECIPE) if item.scheme is not None}
    settings, stored = FORMS[form]
    draw = torch.Generator().manual_seed(0)

    def change(tensors: Tensors) -> None:
        for name in sorted(rounded):
            module = name.removesuffix(".weight")
            for suffix, tensor in stored(tensors.pop(name).float(), draw).items():
                tensors[f"{module}.{suffix}"] = tensor

    with_tensors(directory, change)
    if settings is not None:
        with_json(directory / "config.json", lambda config: config.update(quantization_config=settings))
    return directory


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recipe", [RECIPE, MIXED], ids=["all", "mixed"])
def test_every_form_gets_the_same_codes_either_way(tmp_path: Path, form: str, recipe: Recipe) -> None:
    source = source_of(tmp_path / "source", form)
    quantize(source, tmp_path / "int4", recipe)
    for dtype in (torch.bfloat16, torch.float32):
        found = all_weights(load_model(source, dtype=dtype, quantize=recipe.scheme_of))
        wanted = all_weights(load_model(tmp_path / "int4", dtype=dtype))
        if dtype == torch.float32 and form not in ("fp64", "fp32", "fp16", "bf16"):
            # Copies of what had to be decoded are bf16 on disk.
            found, wanted = (
                {name: tensor for name, tensor in some.items() if tensor.dtype != torch.float32}
                for some in (found, wanted)
            )
        assert_same_bits(found, wanted)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_rounded_has_lost_nothing_before(tmp_path: Path, form: str) -> None:
    source = source_of(tmp_path / "source", form)
    weights, model = open_source(source), as_floats(source)
    rounded = {item.name for item in plan(weights, RECIPE) if item.scheme is not None}
    floats = names.state_tensors(model)
    for piece in names.pieces(model):
        if piece.name in rounded:
            read = weights.read(piece.name)
            assert torch.equal(read.float(), piece.of(floats[piece.parameter])), piece.name
            assert read.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}.get(form, torch.float32)
