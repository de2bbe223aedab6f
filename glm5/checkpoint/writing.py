"""Writes a model as a checkpoint directory that `transformers` and vLLM load as it is.

Every file is written whole under another name and renamed; the index comes last.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm5.checkpoint import names
from glm5.checkpoint.fp8 import BLOCK, SCALE_SUFFIX, block_quantise, is_quantised, scale_shape
from glm5.checkpoint.safetensors_file import PlannedTensor, write_safetensors
from glm5.checkpoint.shards import INDEX_FILE, SINGLE_FILE
from glm5.config import ModelConfig
from glm5.errors import CheckpointError
from glm5.files import atomic_path, write_atomic
from glm5.model.transformer import GlmForCausalLM

FORMATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
SHARD_BYTES = 5_000_000_000


def save_model(
    model: GlmForCausalLM, directory: Path, *, stored: str | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write `config.json` and the weights into `directory`.

    stored: `fp32`, `fp16`, `bf16` or `fp8` (the official 128x128 blocks); None = the model's dtype.
    shard_bytes: the largest shard; a single tensor may exceed it.

    Raises:
        CheckpointError: `stored` is unknown, or a weight is not finite and cannot be FP8.
    """
    stored = stored or next((k for k, v in FORMATS.items() if v == model.dtype), "fp32")
    if stored not in FORMATS:
        raise CheckpointError(f"stored is {stored!r}; use one of {', '.join(FORMATS)}")
    directory.mkdir(parents=True, exist_ok=True)
    shards = list(_shards(_planned(model, stored), shard_bytes))
    old = set(directory.glob("model*.safetensors"))
    if len(shards) == 1:
        written = [directory / SINGLE_FILE]
    else:
        written = [directory / f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for path, tensors in zip(written, shards, strict=True):
        with atomic_path(path) as temporary:
            write_safetensors(temporary, tensors)
    if len(shards) > 1:
        sizes = sum(tensor.num_bytes for tensors in shards for tensor in tensors)
        weight_map = {t.name: path.name for path, tensors in zip(written, shards, strict=True) for t in tensors}
        index = {"metadata": {"total_size": sizes}, "weight_map": weight_map}
        write_atomic(directory / INDEX_FILE, json.dumps(index, indent=2) + "\n")
    else:
        (directory / INDEX_FILE).unlink(missing_ok=True)
    for stale in old - set(written):
        stale.unlink()
    stored_config(model.config, stored).save_pretrained(directory)


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
        if stored == "fp8" and is_quantised(piece.name):
            yield PlannedTensor(piece.name, torch.float8_e4m3fn, shape, partial(_codes, piece.name, tensor))
            yield PlannedTensor(
                piece.name + SCALE_SUFFIX, torch.float32, scale_shape(shape), partial(_scale, tensor)
            )
            continue
        # Router biases are fp32 in every published checkpoint.
        dtype = torch.float32 if piece.name.endswith("e_score_correction_bias") else FORMATS[stored]
        yield PlannedTensor(piece.name, dtype, shape, partial(_cast, tensor, dtype))


def _codes(name: str, tensor: Tensor) -> Tensor:
    try:
        return block_quantise(tensor)[0]
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None


def _scale(tensor: Tensor) -> Tensor:
    return block_quantise(tensor)[1]


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype)


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
