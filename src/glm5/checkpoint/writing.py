"""Writes a model as a checkpoint directory that `transformers` and vLLM load as it is.

Config, weights and what goes beside them appear together or not at all (`glm5.disk.staged`), and nothing of
an earlier model stays behind.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm5.checkpoint import names
from glm5.config import ModelConfig
from glm5.disk.files import write_atomic
from glm5.disk.safetensors_file import PlannedTensor, write_safetensors
from glm5.disk.shards import INDEX_FILE, SINGLE_FILE
from glm5.disk.staged import staged
from glm5.errors import CheckpointError
from glm5.formats.fp8 import BLOCK, SCALE_SUFFIX, block_quantize, is_quantized, scale_shape
from glm5.model.transformer import GlmForCausalLM

FORMATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
SHARD_BYTES = 5_000_000_000
_WEIGHTS = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors")
_BESIDE = (
    INDEX_FILE, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip


def belongs_to_a_model(name: str) -> bool:
    """Is a file of this name a part of a checkpoint, to be replaced with it?"""
    return name in _BESIDE or _WEIGHTS.fullmatch(name) is not None


def save_model(
    model: GlmForCausalLM,
    directory: Path,
    *,
    stored: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Write a checkpoint into `directory`, in place of the one it holds.

    stored: `fp32`, `fp16`, `bf16` or `fp8` (the official 128x128 blocks); None = the model's dtype.
    shard_bytes: the largest shard; a single tensor may exceed it.
    beside: writes what goes with the weights (tokenizer, generation defaults) into the folder it is given.

    Raises:
        CheckpointError: `stored` is unknown, a weight is not finite and cannot be FP8 or is too large
            for fp16, or the disk refuses; an older checkpoint in `directory` stays as it was.
    """
    stored = stored or next((k for k, v in FORMATS.items() if v == model.dtype), "fp32")
    if stored not in FORMATS:
        raise CheckpointError(f"stored is {stored!r}; use one of {', '.join(FORMATS)}")
    _refuse_packed(model)
    with staged(directory, belongs_to_a_model) as staging:
        if beside is not None:
            beside(staging)
        _stage(model, staging, stored, shard_bytes)


def _refuse_packed(model: GlmForCausalLM) -> None:
    with torch.device("meta"):
        wanted = names.state_tensors(GlmForCausalLM(model.config))
    if wanted.keys() - names.state_tensors(model).keys():
        raise CheckpointError(
            "packed integers are not saved from memory; copy the model's directory or quantize its source"
        )


def _stage(model: GlmForCausalLM, staging: Path, stored: str, shard_bytes: int) -> None:
    """The complete checkpoint, on the disk; `config.json` last."""
    shards = list(_shards(_planned(model, stored), shard_bytes))
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        name = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(staging / name, tensors)
        weight_map |= dict.fromkeys((tensor.name for tensor in tensors), name)
    if len(shards) > 1:
        total = sum(tensor.num_bytes for tensors in shards for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_atomic(staging / INDEX_FILE, json.dumps(index, indent=2) + "\n")
    stored_config(model.config, stored).save_pretrained(staging)


def stored_config(config: ModelConfig, stored: str) -> ModelConfig:
    """The config to write beside weights stored in this format."""
    extra: dict[str, Any] = {k: v for k, v in config.extra.items() if k != "quantization_config"}
    if stored == "fp8":
        extra["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": _kept_modules(config),
        }
    names_of = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
    return replace(config, dtype=names_of[FORMATS[stored]], extra=extra)


def _kept_modules(config: ModelConfig) -> list[str]:
    """Linear layers that stay in bf16, spelt out since readers convert every other one."""
    kept = ["lm_head", "model.embed_tokens"]
    for layer in range(config.num_hidden_layers + config.num_nextn_predict_layers):
        where = f"model.layers.{layer}"
        if config.is_sparse(layer):
            kept.append(f"{where}.mlp.gate")
        if config.has_indexer(layer):
            kept.append(f"{where}.self_attn.indexer.weights_proj")
        if layer >= config.num_hidden_layers:
            kept.append(f"{where}.eh_proj")
    return kept


def _planned(model: GlmForCausalLM, stored: str) -> Iterator[PlannedTensor]:
    tensors = names.state_tensors(model)
    for piece in names.pieces(model):
        tensor = piece.of(tensors[piece.parameter].detach())
        shape = tuple(tensor.shape)
        if stored == "fp8" and is_quantized(piece.name):
            blocks = _Blocks(piece.name, tensor)
            yield PlannedTensor(piece.name, torch.float8_e4m3fn, shape, blocks.codes)
            yield PlannedTensor(piece.name + SCALE_SUFFIX, torch.float32, scale_shape(shape), blocks.scale)
            continue
        # Router biases are fp32 in every published checkpoint.
        dtype = torch.float32 if piece.name.endswith("e_score_correction_bias") else FORMATS[stored]
        yield PlannedTensor(piece.name, dtype, shape, partial(_cast, piece.name, tensor, dtype))


class _Blocks:
    """A matrix quantized once: its codes are written, then the scales that were found with them."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        self._name, self._tensor = name, tensor
        self._scale: Tensor | None = None

    def codes(self) -> Tensor:
        try:
            codes, self._scale = block_quantize(self._tensor)
        except CheckpointError as error:
            raise CheckpointError(f"{self._name}: {error}") from None
        return codes

    def scale(self) -> Tensor:
        assert self._scale is not None, "a file's codes stand before their scales"
        return self._scale


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype)
    if dtype != torch.float32 and bool((cast.isinf() & tensor.isfinite()).any()):
        largest, other = ("65504", "bf16") if dtype == torch.float16 else ("3.39e38", "fp32")
        kind = "fp16" if dtype == torch.float16 else "bf16"
        raise CheckpointError(
            f"{name}: a weight is past {largest} and cannot be stored in {kind}; use {other}"
        )
    return cast


def _shards(tensors: Iterator[PlannedTensor], limit: int) -> Iterator[list[PlannedTensor]]:
    shard: list[PlannedTensor] = []
    size = 0
    for tensor in tensors:
        if shard and size + tensor.num_bytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.num_bytes
    yield shard
