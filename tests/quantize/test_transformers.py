"""The directory that `quantize` writes, read by `transformers` 5.24 with compressed-tensors 0.20.

`dequantize=True` turns every packed weight into a bf16 value while it loads, and knows one scheme for
all dense layers. Without it (the default) the dense layers are unpacked in the first forward pass,
exactly and each in its own scheme; the experts are bf16 values (and parameters) all the same.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

import glm5
from glm5.checkpoint import names
from glm5.config import MODEL_TYPES, ModelConfig
from glm5.layers.loading import load_model
from glm5.model.transformer import GlmForCausalLM
from glm5.quantize import Calibration, Recipe, quantize
from tests.model_fixture import random_ids
from tests.quantize.quantize_fixture import RECIPE, difference, save_source, small_config
from tests.quantize.quantize_fixture import exact_kernels as exact_kernels
from tests.quantize.quantize_fixture import no_flushing as no_flushing
from tests.quantize.quantize_fixture import no_gradients as no_gradients

pytest.importorskip("compressed_tensors")
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

pytestmark = [
    pytest.mark.usefixtures("no_gradients"),
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`"),
]
TOLERANCE = 1e-4
types = pytest.mark.parametrize("model_type", MODEL_TYPES)


def quantized(
    directory: Path, recipe: Recipe, model_type: str = "glm4_moe_lite", stored: str = "bf16",
    calibration: Calibration | None = None,
) -> Path:  # fmt: skip
    # 32 index heads: no two index scores tie.
    changes = {"index_n_heads": 32} if model_type == "glm_moe_dsa" else {}
    save_source(directory / "source", small_config(model_type, **changes), stored=stored)
    quantize(directory / "source", directory / "int4", recipe, calibration=calibration, shard_bytes=100_000)
    return directory / "int4"


def theirs(directory: Path, **options: Any) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, **options
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    # The MTP layer, which transformers does not load.
    assert all(name.startswith("model.layers.3.") for name in info["unexpected_keys"])
    for name, parameter in model.named_parameters():
        if ".experts." in name:  # left in bf16, and so would be every sum in them
            parameter.data = parameter.data.float()
    return model.eval()


def dequantized(directory: Path) -> PreTrainedModel:
    return theirs(directory, quantization_config=CompressedTensorsConfig(dequantize=True))


def ours(directory: Path, in_bf16: str) -> GlmForCausalLM:
    """Packed layers as floats; those whose name fits are rounded to bf16, as transformers does."""
    config = ModelConfig.from_pretrained(directory).with_changes(latent_norm_eps=1e-6)
    model = load_model(directory, dtype=torch.float32, config=config, quantize=lambda module: None)
    for name, tensor in names.state_tensors(model).items():
        if re.search(in_bf16, name):
            tensor.data.copy_(tensor.bfloat16())
    return model


def logits(model: Any, seed: int = 0) -> Tensor:
    return model(random_ids(2, 40, seed=seed)).logits


@types
@pytest.mark.parametrize("stored", ["bf16", "fp8"])
def test_dequantized_weights_are_our_weights(tmp_path: Path, model_type: str, stored: str) -> None:
    directory = quantized(tmp_path, RECIPE, model_type, stored)
    judge, model = dequantized(directory), ours(directory, "weight|proj")
    wanted = dict(judge.state_dict())
    for name, tensor in names.state_tensors(model).items():
        if not name.startswith("mtp"):
            assert torch.equal(tensor, wanted.pop(name)), name
    assert not wanted
    assert difference(logits(model), logits(judge)) < TOLERANCE


@types
def test_calibrated_weights_are_our_weights(tmp_path: Path, model_type: str) -> None:
    text = Calibration(tuple(tuple(row) for row in random_ids(4, 24).tolist()))
    directory = quantized(tmp_path, RECIPE, model_type, calibration=text)
    judge, model = dequantized(directory), ours(directory, "weight|proj")
    for name, tensor in names.state_tensors(model).items():
        if not name.startswith("mtp"):
            assert torch.equal(tensor, judge.state_dict()[name]), name
    assert difference(logits(model), logits(judge)) < TOLERANCE


MIXED = [
    ([], []),
    (["*.self_attn.[qo]*=8"], []),
    (["*.shared_experts.*=8"], ["*.o_proj"]),
    (["*=8", "*.kv_b_proj=keep", "*.indexer.*=keep", "*.eh_proj=keep", "lm_head=keep"], []),
    (["*.mlp.experts.*=8"], []),
    (["lm_head=8"], []),
]
# A pattern must fit something.
ABSENT = {"glm4_moe": ("*.kv_b_proj=keep", "*.indexer.*=keep"), "glm4_moe_lite": ("*.indexer.*=keep",)}


@types
@pytest.mark.parametrize(("changes", "keep"), MIXED, ids=str)
def test_compressed_weights_give_our_logits(
    tmp_path: Path, exact_kernels: None, model_type: str, changes: list[str], keep: list[str]
) -> None:
    changes = [change for change in changes if change not in ABSENT.get(model_type, ())]
    directory = quantized(tmp_path, Recipe.of(4, 32, changes, keep), model_type)
    judge = theirs(directory)
    assert difference(logits(ours(directory, r"mlp\.experts\.")), logits(judge)) < TOLERANCE
    config = ModelConfig.from_pretrained(directory).with_changes(latent_norm_eps=1e-6)
    packed = load_model(directory, dtype=torch.float32, config=config)
    assert difference(logits(packed), logits(ours(directory, "nothing"))) < TOLERANCE


@pytest.mark.parametrize(
    ("changes", "keep", "options"),
    [
        (["*.self_attn.[qo]*=8"], [], {"quantization_config": CompressedTensorsConfig(dequantize=True)}),
        ([], ["*.mlp.experts.*"], {}),
        ([], ["*.mlp.experts.*"], {"quantization_config": CompressedTensorsConfig(dequantize=True)}),
    ],
    ids=["two schemes dequantized", "float experts", "float experts dequantized"],
)
def test_what_transformers_cannot_read_it_refuses(
    tmp_path: Path, changes: list[str], keep: list[str], options: dict[str, Any]
) -> None:
    """Its limits. It does not see a further one: all experts are read in the first scheme that names any."""
    directory = quantized(tmp_path, Recipe.of(4, 32, changes, keep))
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        theirs(directory, **options)


def test_greedy_tokens_are_the_same(tmp_path: Path, exact_kernels: None) -> None:
    directory = quantized(tmp_path, RECIPE)
    judge, prompt = theirs(directory), random_ids(1, 12)
    wanted = judge.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    model = glm5.load(directory, dtype=torch.float32)
    found = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=[])
    assert found.tolist() == wanted.tolist()
