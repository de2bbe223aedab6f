"""Fills a model from a checkpoint directory, a few tensors at a time.

Peak memory is the model plus the one tensor that is being decoded. Every name, shape and dtype is
checked against the configuration before the first weight is read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as cut
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from glm5.checkpoint import names
from glm5.checkpoint.names import BankPart, Piece
from glm5.config import ModelConfig
from glm5.disk.safetensors_file import shown
from glm5.disk.shards import CONFIG_FILE, STAGING, ShardIndex
from glm5.errors import CheckpointError, ConfigError
from glm5.formats import Format, format_of
from glm5.formats.fp8 import BLOCK, SCALE_SUFFIX, block_dequantize
from glm5.kernels.memory import empty_weights
from glm5.layers.swap import (
    PackedWeight,
    SchemeOf,
    fill_packed,
    pack_modules,
    place_modules,
    round_into,
    stored_scheme,
)
from glm5.model.transformer import GlmForCausalLM

logger = logging.getLogger(__name__)

_FLOATS = ("F64", "F32", "F16", "BF16")
_READ_AS_STORED = (torch.float32, torch.float16, torch.bfloat16)
# Far past any model (GLM-5 has 2^40); torch cannot even describe much larger ones.
MAX_PARAMETERS = 1 << 48
MAX_BLOCK = 1 << 16
# Some copy while others wait for the disk.
READERS = 8
Progress = Callable[[int, int], None]
M = TypeVar("M", bound=GlmForCausalLM)


@torch.inference_mode(False)  # other threads, which do not inherit the mode, could not fill its tensors
def load_model(
    directory: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    config: ModelConfig | None = None,
    progress: Progress | None = None,
    model_class: type[M] = GlmForCausalLM,  # type: ignore[assignment]
    quantize: SchemeOf | None = None,
) -> M:
    """The model of a checkpoint directory, in eval mode.

    dtype: of the weights in memory; None = as stored (FP8 becomes bf16). Router biases stay fp32.
    config: overrides the directory's `config.json`.
    progress: called with (bytes read, bytes in all).
    model_class: GlmForCausalLM or a subclass that adds no tensors.
    quantize: a scheme for each module (by its name on disk) that is to be rounded while it is read;
        None = as stored. Packed int4 and int8 stay packed, other forms become floats of `dtype`.

    Raises:
        CheckpointError: a tensor is missing, unknown, of a wrong shape or dtype, or damaged.
        ConfigError: `config.json` cannot be used.
    """
    _refuse_interrupted_save(directory)
    config = config or ModelConfig.from_pretrained(directory)
    if config.total_params(mtp=True) > MAX_PARAMETERS:
        raise ConfigError(f"{directory / CONFIG_FILE}: asks for more than 2^48 parameters; check its sizes")
    index = ShardIndex(directory)
    form, block = _form(directory, config), _block_size(directory, config)
    config = _without_absent_mtp(directory, config, index)
    with torch.device("meta"):
        model = model_class(config)
    packed = pack_modules(model, quantize or stored_scheme(form, index))
    stored = Stored(directory, index, form, block, config)
    sources = _match(stored, model, packed)
    dtype = dtype or _stored_dtype(config, index)
    device = torch.device(device)
    materialize(model, dtype, device)
    if packed:
        place_modules(model, device)
    tensors = names.state_tensors(model)

    decoding = Lock()  # takes memory for the tensor once more

    @torch.no_grad()  # a setting of each thread
    def fill(source: Source) -> int:
        if source.packed is None:
            piece = source.piece
            assert piece is not None
            target = piece.of(tensors[piece.parameter])
            with nullcontext() if stored.lies_as(source.name, target) else decoding:
                stored.fill(source.name, target)
        elif quantize is None:
            fill_packed(source.packed, index)
        else:
            round_into(source.packed, stored.read(source.name), index.file(source.first).path)
        return source.num_bytes

    # What is rounded keeps all cores busy by itself, and one tensor in memory.
    _in_order(fill, sources, READERS if quantize is None else 1, progress)
    return model.eval()


def _in_order(
    fill: Callable[[Source], int], sources: list[Source], readers: int, progress: Progress | None
) -> None:
    """Call `fill` on every source, a few at once; the first failure in their order is raised."""
    done, total = 0, sum(source.num_bytes for source in sources)
    pool = ThreadPoolExecutor(readers)
    try:
        for count in pool.map(fill, sources):
            done += count
            if progress is not None:
                progress(done, total)
    finally:
        pool.shutdown(cancel_futures=True)


def stored_weights(directory: Path) -> tuple[ModelConfig, Stored]:
    """What a directory holds, by logical names, from its headers alone; the config without an absent MTP."""
    _refuse_interrupted_save(directory)
    config = ModelConfig.from_pretrained(directory)
    index = ShardIndex(directory)
    config = _without_absent_mtp(directory, config, index)
    return config, Stored(directory, index, _form(directory, config), _block_size(directory, config), config)


def _refuse_interrupted_save(directory: Path) -> None:
    if (directory / STAGING / CONFIG_FILE).is_file() and not (directory / CONFIG_FILE).exists():
        raise CheckpointError(
            f"{directory}: a save was cut off while it moved its files into place; "
            f"move those in {STAGING} up, {CONFIG_FILE} last, or save again"
        )


def _settings(directory: Path, config: ModelConfig) -> dict[str, Any]:
    settings = config.extra.get("quantization_config") or {}
    if not isinstance(settings, dict):
        raise CheckpointError(
            f"{directory / CONFIG_FILE}: quantization_config is {cut(settings)}, not an object"
        )
    return settings


def _form(directory: Path, config: ModelConfig) -> Format | None:
    """How others' quantized weights are stored; None for floats and official FP8."""
    settings = _settings(directory, config)
    if settings.get("quant_method", "fp8") == "fp8":
        return None
    return format_of(settings, directory / CONFIG_FILE)


def _block_size(directory: Path, config: ModelConfig) -> tuple[int, int]:
    """Rows and columns that share an FP8 scale."""
    block = _settings(directory, config).get("weight_block_size") or [BLOCK, BLOCK]
    sizes = isinstance(block, list) and all(type(b) is int and 0 < b <= MAX_BLOCK for b in block)
    if not sizes or len(block) != 2:
        raise CheckpointError(f"{directory / CONFIG_FILE}: weight_block_size {cut(block)} is not two sizes")
    return block[0], block[1]


def _without_absent_mtp(directory: Path, config: ModelConfig, index: ShardIndex) -> ModelConfig:
    """`transformers` drops the MTP layer when it saves; the config it writes still counts one."""
    if config.num_nextn_predict_layers and not any(names.is_mtp(name, config) for name in index.names):
        logger.info("%s: has no MTP layer although config.json counts one; loaded without", directory)
        return config.with_changes(num_nextn_predict_layers=0)
    return config


@dataclass(frozen=True)
class Source:
    """Tensors on disk (`first` of them decides the order) and what they fill: a piece or a packed weight."""

    name: str
    first: str
    num_bytes: int
    piece: Piece | None = None
    packed: PackedWeight | None = None


class Stored:
    """Logical weights of a directory, however they are stored: experts one by one or as a layer's bank."""

    def __init__(
        self, directory: Path, index: ShardIndex, form: Format | None, block: tuple[int, int],
        config: ModelConfig,
    ) -> None:  # fmt: skip
        self.directory, self.index, self.form, self.block = directory, index, form, block
        self._config = config

    def names(self, name: str) -> list[str] | None:
        """The tensors on disk that make up a weight, or the bank that holds it; None = it is not there."""
        part = self.bank(name)
        return self._own(name) if part is None else [part.bank]

    def bank(self, name: str) -> BankPart | None:
        """Where in a bank the weight lies; None = it is stored by itself, or not at all."""
        part = names.bank_part(name, self._config)
        if part is None or part.bank not in self.index:
            return None
        own = self._own(name)
        if own is not None:
            where = self.index.file(own[0]).path
            raise CheckpointError(f"{where}: {name} is stored a second time within {part.bank}")
        return part

    def _own(self, name: str) -> list[str] | None:
        found = None if self.form is None else self.form.stored_names(name, self.index)
        if found is not None:
            return found
        if name not in self.index:
            return None
        is_fp8 = self.form is None and self.index[name].dtype_name == "F8_E4M3"
        return [name, name + SCALE_SUFFIX] if is_fp8 else [name]

    def num_bytes(self, name: str) -> int:
        """What is read for a weight that is there."""
        part = self.bank(name)
        if part is not None:
            rows = part.rows.stop - part.rows.start
            return rows * part.shape[2] * self.index[part.bank].dtype.itemsize
        return sum(self.index[own].num_bytes for own in self._own(name) or [] if own in self.index)

    def shape(self, name: str) -> tuple[int, ...]:
        """The logical shape, after every header of the weight is checked."""
        part = self.bank(name)
        if part is not None:
            self.check(part.bank, part.shape)
            return part.rows.stop - part.rows.start, part.shape[2]
        if self.is_formed(name):
            assert self.form is not None
            return self.form.shape(name, self.index)
        info = self.index[name]
        if info.dtype_name == "F8_E4M3":
            _check_scale(self.index, name, self.block)
        elif info.dtype_name not in _FLOATS:
            raise CheckpointError(
                f"{self.index.file(name).path}: {name} is stored as {info.dtype_name}, "
                "expected a float or FP8"
            )
        return info.shape

    def is_formed(self, name: str) -> bool:
        return self.form is not None and self.form.stored_names(name, self.index) is not None

    def check(self, name: str, wanted: tuple[int, ...]) -> None:
        """Every header of a weight, before anything is read."""
        shape, where = self.shape(name), (self.names(name) or [name])[0]
        if shape != wanted:
            raise CheckpointError(
                f"{self.index.file(where).path}: {name} has shape {list(shape)}, "
                f"config.json asks for {list(wanted)}"
            )

    def is_decoded(self, name: str) -> bool:
        """Is the weight stored as codes with scales?"""
        return self.is_formed(name) or (name in self.index and self.index[name].dtype_name == "F8_E4M3")

    def fill(self, name: str, target: Tensor) -> None:
        part = self.bank(name)
        if part is not None:
            target.copy_(self._read_part(part))
        elif self.is_formed(name):
            assert self.form is not None
            target.copy_(self.form.read(name, self.index))
        else:
            _fill(self.index, name, target, self.block)

    def lies_as(self, name: str, target: Tensor) -> bool:
        """Can the bytes go from the file into `target` as they are?"""
        return not self.is_formed(name) and self.index[name].dtype == target.dtype

    def dtype(self, name: str) -> torch.dtype:
        """What `read` gives: fp32, fp16 and bf16 as they are stored, anything else as fp32.

        A code times its scale has more bits than bf16 keeps, and who rounds the weight again should be
        the only one that rounds it.
        """
        if self.is_decoded(name):
            return torch.float32
        stored = self.index[(self.names(name) or [name])[0]].dtype
        return stored if stored in _READ_AS_STORED else torch.float32

    def read(self, name: str) -> Tensor:
        """The values of a weight in its `dtype`."""
        part = self.bank(name)
        if part is not None:
            return self._read_part(part).to(self.dtype(name))
        if self.is_formed(name):
            assert self.form is not None
            return self.form.read(name, self.index)
        values = torch.empty(self.index[name].shape, dtype=self.dtype(name))
        _fill(self.index, name, values, self.block)
        return values

    def _read_part(self, part: BankPart) -> Tensor:
        """One run of bytes; the rest of the bank is not read."""
        columns, dtype = part.shape[2], self.index[part.bank].dtype
        values = torch.empty(part.rows.stop - part.rows.start, columns, dtype=dtype)
        offset = (part.expert * part.shape[1] + part.rows.start) * columns * dtype.itemsize
        self.index.file(part.bank).read_into(part.bank, values, offset)
        return values


def _match(stored: Stored, model: GlmForCausalLM, packed: list[PackedWeight]) -> list[Source]:
    """What to read for the whole model, in file order; nothing missing, nothing left over."""
    index, directory = stored.index, stored.directory
    shapes = {name: tensor.shape for name, tensor in names.state_tensors(model).items()}
    used: set[str] = set()
    sources: list[Source] = []

    def add(name: str, shape: tuple[int, ...], piece: Piece | None, weight: PackedWeight | None) -> None:
        stored.check(name, shape)
        parts = stored.names(name) or [name]
        used.update(parts)
        sources.append(Source(name, parts[0], stored.num_bytes(name), piece, weight))

    for name, piece in _sources(stored, model).items():
        wanted = piece.of(torch.empty(shapes[piece.parameter], device="meta")).shape
        add(name, tuple(wanted), piece, None)
    for weight in packed:
        if stored.names(weight.name) is None:
            raise CheckpointError(f"{directory}: {weight.name} is missing; config.json asks for it")
        add(weight.name, weight.shape, None, weight)
    check_leftovers(index, used, model.config)
    return sorted(sources, key=lambda source: (index.file(source.first).path, index[source.first].start))


def _sources(stored: Stored, model: GlmForCausalLM) -> dict[str, Piece]:
    """Where each wanted tensor goes, by its name on disk: expert by expert, or a layer's bank whole."""
    sources: dict[str, Piece] = {}
    for piece in names.pieces(model):
        if stored.names(piece.name) is None:
            raise CheckpointError(f"{stored.directory}: {piece.name} is missing; config.json asks for it")
        part = stored.bank(piece.name)
        if part is None:
            sources[piece.name] = piece
        else:
            sources[part.bank] = Piece(part.bank, piece.parameter, ())
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


def check_leftovers(index: ShardIndex, used: set[str], config: ModelConfig) -> None:
    """Refuse tensors that the model of this config has no place for."""
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


def materialize(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Give every meta tensor memory (large pages where there are), without initializing it."""
    seen: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in seen:  # a tied head shares one parameter
                values = empty_weights(tuple(parameter.shape), dtype, device)
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
        block_dequantize(values.to(target.device), scale.to(target.device), block, out=target)
    else:
        target.copy_(values)


def _read_scale(index: ShardIndex, name: str) -> Tensor:
    scale = index.file(name).read(name).float()
    if not bool(torch.isfinite(scale).all()):
        raise CheckpointError(
            f"{index.file(name).path}: {name} holds a NaN or infinite scale; download it again"
        )
    return scale
