"""Fills a model from a checkpoint directory, a tensor at a time.

Peak memory is the model plus one tensor. Every name, shape and dtype is checked against the
configuration before the first weight is read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glm5.checkpoint import names
from glm5.checkpoint.fp8 import BLOCK, SCALE_SUFFIX, block_dequantise
from glm5.checkpoint.names import Piece
from glm5.checkpoint.shards import ShardIndex
from glm5.config import ModelConfig
from glm5.errors import CheckpointError
from glm5.model.transformer import GlmForCausalLM

logger = logging.getLogger(__name__)

_FLOATS = ("F64", "F32", "F16", "BF16")
Progress = Callable[[int, int], None]


def load_model(
    directory: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    config: ModelConfig | None = None,
    progress: Progress | None = None,
) -> GlmForCausalLM:
    """The model of a checkpoint directory, in eval mode.

    dtype: of the weights in memory; None = as stored (FP8 becomes bf16). Router biases stay fp32.
    config: overrides the directory's `config.json`.
    progress: called with (bytes read, bytes in all).

    Raises:
        CheckpointError: a tensor is missing, unknown, of a wrong shape or dtype, or damaged.
        ConfigError: `config.json` cannot be used.
    """
    config = config or ModelConfig.from_pretrained(directory)
    index = ShardIndex(directory)
    _check_quantisation(directory, config)
    config = _without_absent_mtp(directory, config, index)
    with torch.device("meta"):
        model = GlmForCausalLM(config)
    sources = _match(directory, model, index)
    dtype = dtype or _stored_dtype(config, index)
    _materialise(model, dtype, torch.device(device))
    tensors = names.state_tensors(model)
    done, total = 0, sum(index[name].num_bytes for name, _ in sources)
    block = _block_size(directory, config)
    with torch.no_grad():
        for name, piece in sources:
            _fill(index, name, piece.of(tensors[piece.parameter]), block)
            done += index[name].num_bytes
            if progress is not None:
                progress(done, total)
    return model.eval()


def _check_quantisation(directory: Path, config: ModelConfig) -> None:
    method = (config.extra.get("quantization_config") or {}).get("quant_method", "fp8")
    if method != "fp8":
        raise CheckpointError(
            f"{directory}: quantised by {method!r}, which glm5 does not read yet; use a bf16 or FP8 copy"
        )


def _without_absent_mtp(directory: Path, config: ModelConfig, index: ShardIndex) -> ModelConfig:
    """`transformers` drops the MTP layer when it saves; the config it writes still counts one."""
    if config.num_nextn_predict_layers and not any(names.is_mtp(name, config) for name in index.names):
        logger.info("%s: has no MTP layer although config.json counts one; loaded without", directory)
        return config.with_changes(num_nextn_predict_layers=0)
    return config


def _match(directory: Path, model: GlmForCausalLM, index: ShardIndex) -> list[tuple[str, Piece]]:
    """(tensor on disk, where it goes) for the whole model; nothing missing, nothing left over."""
    config, shapes = model.config, {name: t.shape for name, t in names.state_tensors(model).items()}
    sources: dict[str, Piece] = {}
    for piece in names.pieces(model):
        fused = names.fused_name(piece, config)
        if piece.name in index:
            sources[piece.name] = piece
        elif fused is not None and fused in index:
            sources[fused] = Piece(fused, piece.parameter, ())
        else:
            raise CheckpointError(f"{directory}: {piece.name} is missing; config.json asks for it")
    used = set(sources)
    for name, piece in sources.items():
        wanted = piece.of(torch.empty(shapes[piece.parameter], device="meta")).shape
        info = index[name]
        if info.shape != tuple(wanted):
            raise CheckpointError(
                f"{index.file(name).path}: {name} has shape {list(info.shape)}, "
                f"config.json asks for {list(wanted)}"
            )
        scale = name + SCALE_SUFFIX
        if info.dtype_name == "F8_E4M3":
            if scale not in index:
                raise CheckpointError(f"{index.file(name).path}: {name} is FP8 but {scale} is missing")
            used.add(scale)
        elif info.dtype_name not in _FLOATS:
            raise CheckpointError(
                f"{index.file(name).path}: {name} is stored as {info.dtype_name}, expected a float or FP8"
            )
    extra = [name for name in index.names if name not in used and not names.is_borrowed(name, config)]
    if config.num_nextn_predict_layers == 0:
        extra = [name for name in extra if not names.is_mtp(name, config)]
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise CheckpointError(
            f"{index.file(extra[0]).path}: {extra[0]}{more} has no place in the model of config.json"
        )
    # File order, so that a disk reads forward.
    return sorted(sources.items(), key=lambda item: (index.file(item[0]).path, index[item[0]].start))


def _stored_dtype(config: ModelConfig, index: ShardIndex) -> torch.dtype:
    """The dtype most float weights are stored in; bf16 for FP8."""
    largest = next((name for name in index.bytes_by_dtype() if name in (*_FLOATS, "F8_E4M3")), "BF16")
    return {"F64": torch.float32, "F32": torch.float32, "F16": torch.float16}.get(largest, torch.bfloat16)


def _materialise(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Give every meta tensor memory, without initialising it."""
    seen: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in seen:  # a tied head shares one parameter
                values = torch.empty(parameter.shape, dtype=dtype, device=device)
                seen[id(parameter)] = nn.Parameter(values)
            setattr(module, name, seen[id(parameter)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.zeros(buffer.shape, dtype=buffer.dtype, device=device))


def _fill(index: ShardIndex, name: str, target: Tensor, block: tuple[int, int]) -> None:
    info, file = index[name], index.file(name)
    if info.dtype == target.dtype and target.is_contiguous() and target.device.type == "cpu":
        file.read_into(name, target.detach())
        return
    values = file.read(name)
    if info.dtype_name == "F8_E4M3":
        values = block_dequantise(values, _checked_scale(index, name, block), block)
    target.copy_(values)


def _checked_scale(index: ShardIndex, name: str, block: tuple[int, int]) -> Tensor:
    scale_name = name + SCALE_SUFFIX
    shape, found = index[name].shape, index[scale_name]
    wanted = (-(-shape[0] // block[0]), -(-shape[1] // block[1])) if len(shape) == 2 else ()
    path = index.file(scale_name).path
    if found.shape != wanted or found.dtype_name not in _FLOATS:
        raise CheckpointError(
            f"{path}: {scale_name} is {found.dtype_name} {list(found.shape)}, expected F32 {list(wanted)}"
        )
    scale = index.file(scale_name).read(scale_name).float()
    if not bool(torch.isfinite(scale).all()):
        raise CheckpointError(f"{path}: {scale_name} holds a NaN or infinite scale; download it again")
    return scale


def _block_size(directory: Path, config: ModelConfig) -> tuple[int, int]:
    settings: dict[str, Any] = config.extra.get("quantization_config") or {}
    block = settings.get("weight_block_size") or [BLOCK, BLOCK]
    if not (isinstance(block, list) and len(block) == 2 and all(isinstance(b, int) and b > 0 for b in block)):
        raise CheckpointError(f"{directory}/config.json: weight_block_size {block!r} is not two sizes")
    return block[0], block[1]
