"""Fills a model from a checkpoint directory, a tensor at a time.

Peak memory is the model plus one tensor. Every name, shape and dtype is checked against the
configuration before the first weight is read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from reprlib import repr as cut
from typing import TypeVar

import torch
from torch import Tensor, nn

from glm5.checkpoint import names
from glm5.checkpoint.fp8 import BLOCK, SCALE_SUFFIX, block_dequantise
from glm5.checkpoint.names import Piece
from glm5.checkpoint.safetensors_file import shown
from glm5.checkpoint.shards import CONFIG_FILE, STAGING, ShardIndex
from glm5.config import ModelConfig
from glm5.errors import CheckpointError, ConfigError
from glm5.model.transformer import GlmForCausalLM

logger = logging.getLogger(__name__)

_FLOATS = ("F64", "F32", "F16", "BF16")
# Far past any model (GLM-5 has 2^40); torch cannot even describe much larger ones.
MAX_PARAMETERS = 1 << 48
MAX_BLOCK = 1 << 16
Progress = Callable[[int, int], None]
M = TypeVar("M", bound=GlmForCausalLM)


def load_model(
    directory: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    config: ModelConfig | None = None,
    progress: Progress | None = None,
    model_class: type[M] = GlmForCausalLM,  # type: ignore[assignment]
) -> M:
    """The model of a checkpoint directory, in eval mode.

    dtype: of the weights in memory; None = as stored (FP8 becomes bf16). Router biases stay fp32.
    config: overrides the directory's `config.json`.
    progress: called with (bytes read, bytes in all).
    model_class: GlmForCausalLM or a subclass that adds no tensors.

    Raises:
        CheckpointError: a tensor is missing, unknown, of a wrong shape or dtype, or damaged.
        ConfigError: `config.json` cannot be used.
    """
    _refuse_interrupted_save(directory)
    config = config or ModelConfig.from_pretrained(directory)
    if config.total_params(mtp=True) > MAX_PARAMETERS:
        raise ConfigError(f"{directory / CONFIG_FILE}: asks for more than 2^48 parameters; check its sizes")
    index = ShardIndex(directory)
    block = _block_size(directory, config)
    config = _without_absent_mtp(directory, config, index)
    with torch.device("meta"):
        model = model_class(config)
    sources = _match(directory, model, index, block)
    dtype = dtype or _stored_dtype(config, index)
    _materialise(model, dtype, torch.device(device))
    tensors = names.state_tensors(model)
    done, total = 0, sum(index[name].num_bytes for name, _ in sources)
    with torch.no_grad():
        for name, piece in sources:
            _fill(index, name, piece.of(tensors[piece.parameter]), block)
            done += index[name].num_bytes
            if progress is not None:
                progress(done, total)
    return model.eval()


def _refuse_interrupted_save(directory: Path) -> None:
    if (directory / STAGING / CONFIG_FILE).is_file() and not (directory / CONFIG_FILE).exists():
        raise CheckpointError(
            f"{directory}: a save was cut off while it moved its files into place; "
            f"move those in {STAGING} up, {CONFIG_FILE} last, or save again"
        )


def _block_size(directory: Path, config: ModelConfig) -> tuple[int, int]:
    """Rows and columns that share an FP8 scale; refuses other quantisations."""
    path, settings = directory / CONFIG_FILE, config.extra.get("quantization_config") or {}
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: quantization_config is {cut(settings)}, not an object")
    method = settings.get("quant_method", "fp8")
    if method != "fp8":
        raise CheckpointError(
            f"{path}: quantised by {cut(method)}, which glm5 does not read yet; use a bf16 or FP8 copy"
        )
    block = settings.get("weight_block_size") or [BLOCK, BLOCK]
    sizes = isinstance(block, list) and all(type(b) is int and 0 < b <= MAX_BLOCK for b in block)
    if not sizes or len(block) != 2:
        raise CheckpointError(f"{path}: weight_block_size {cut(block)} is not two sizes")
    return block[0], block[1]


def _without_absent_mtp(directory: Path, config: ModelConfig, index: ShardIndex) -> ModelConfig:
    """`transformers` drops the MTP layer when it saves; the config it writes still counts one."""
    if config.num_nextn_predict_layers and not any(names.is_mtp(name, config) for name in index.names):
        logger.info("%s: has no MTP layer although config.json counts one; loaded without", directory)
        return config.with_changes(num_nextn_predict_layers=0)
    return config


def _match(
    directory: Path, model: GlmForCausalLM, index: ShardIndex, block: tuple[int, int]
) -> list[tuple[str, Piece]]:
    """(tensor on disk, where it goes) for the whole model; nothing missing, nothing left over."""
    shapes = {name: tensor.shape for name, tensor in names.state_tensors(model).items()}
    sources = _sources(directory, model, index)
    used = set(sources)
    for name, piece in sources.items():
        wanted = piece.of(torch.empty(shapes[piece.parameter], device="meta")).shape
        info = index[name]
        if info.shape != tuple(wanted):
            raise CheckpointError(
                f"{index.file(name).path}: {name} has shape {list(info.shape)}, "
                f"config.json asks for {list(wanted)}"
            )
        if info.dtype_name == "F8_E4M3":
            _check_scale(index, name, block)
            used.add(name + SCALE_SUFFIX)
        elif info.dtype_name not in _FLOATS:
            raise CheckpointError(
                f"{index.file(name).path}: {name} is stored as {info.dtype_name}, expected a float or FP8"
            )
    _check_leftovers(index, used, model.config)
    # File order, so that a disk reads forward.
    return sorted(sources.items(), key=lambda item: (index.file(item[0]).path, index[item[0]].start))


def _sources(directory: Path, model: GlmForCausalLM, index: ShardIndex) -> dict[str, Piece]:
    """Where each wanted tensor goes, by its name on disk: expert by expert, or a layer's bank whole."""
    sources: dict[str, Piece] = {}
    for piece in names.pieces(model):
        fused = names.fused_name(piece, model.config)
        has_fused = fused is not None and fused in index
        if piece.name in index and has_fused:
            raise CheckpointError(
                f"{index.file(piece.name).path}: {piece.name} is stored a second time within {fused}"
            )
        if piece.name in index:
            sources[piece.name] = piece
        elif fused is not None and has_fused:
            sources[fused] = Piece(fused, piece.parameter, ())
        else:
            raise CheckpointError(f"{directory}: {piece.name} is missing; config.json asks for it")
    return sources


def _check_scale(index: ShardIndex, name: str, block: tuple[int, int]) -> None:
    path, shape, scale = index.file(name).path, index[name].shape, name + SCALE_SUFFIX
    if len(shape) != 2:
        raise CheckpointError(f"{path}: {name} is FP8 {list(shape)}; only matrices have block scales")
    if scale not in index:
        raise CheckpointError(f"{path}: {name} is FP8 but {scale} is missing")
    found, wanted = index[scale], (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    if found.shape != wanted or found.dtype_name not in _FLOATS:
        raise CheckpointError(
            f"{index.file(scale).path}: {scale} is {found.dtype_name} {list(found.shape)}, "
            f"expected F32 {list(wanted)}"
        )


def _check_leftovers(index: ShardIndex, used: set[str], config: ModelConfig) -> None:
    extra = [name for name in index.names if name not in used and not names.is_borrowed(name, config)]
    if config.num_nextn_predict_layers == 0:
        extra = [name for name in extra if not names.is_mtp(name, config)]
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise CheckpointError(
            f"{index.file(extra[0]).path}: {shown(extra[0])}{more} has no place in the model of config.json"
        )


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
        scale = _read_scale(index, name + SCALE_SUFFIX)
        block_dequantise(values.to(target.device), scale.to(target.device), block, out=target)
    else:
        target.copy_(values)


def _read_scale(index: ShardIndex, name: str) -> Tensor:
    scale = index.file(name).read(name).float()
    if not bool(torch.isfinite(scale).all()):
        raise CheckpointError(
            f"{index.file(name).path}: {name} holds a NaN or infinite scale; download it again"
        )
    return scale
