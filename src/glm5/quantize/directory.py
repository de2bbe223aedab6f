"""The whole job: plan every tensor, write shard after shard, put the directory into place.

The plan needs headers only, so that disk space is known and the job can be taken up again: a
finished shard is never made twice, each byte of the source is read once, and memory holds one
tensor; what a calibrated job needs besides is `calibrated`'s. Within a shard the experts come first,
each one run of bytes on a 4 KiB boundary (docs/quantize.md draws it).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm5.checkpoint import names
from glm5.config import ModelConfig
from glm5.disk.files import atomic_path, remove_temporaries, write_atomic
from glm5.disk.lock import locked
from glm5.disk.safetensors_file import PlannedTensor, write_safetensors
from glm5.disk.shards import CONFIG_FILE, INDEX_FILE, SINGLE_FILE
from glm5.disk.staged import move_up
from glm5.errors import CheckpointError
from glm5.formats.packed import Scheme
from glm5.formats.packing import words_per_row
from glm5.quantize.calibrated import CalibratedRounding
from glm5.quantize.calibration import Calibration
from glm5.quantize.plan import Item, plan
from glm5.quantize.recipe import Recipe
from glm5.quantize.results import nearest
from glm5.quantize.sources import WeightSource, open_source

WORKING = ".glm5-quantizing"
CALIBRATION_FOLDER = "calibration"
PLAN_FILE = "plan.json"
RECEIPT_FILE = "quantization_receipt.json"
SHARD_BYTES = 5_000_000_000
ALIGNMENT = 4096
Progress = Callable[[int, int], None]


def quantize(
    source: str | Path | WeightSource,
    destination: str | Path,
    recipe: Recipe | None = None,
    *,
    calibration: Calibration | None = None,
    shard_bytes: int = SHARD_BYTES,
    restart: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write `destination` as a compressed-tensors W4A16 checkpoint of `source`; returns the receipt.

    source: a checkpoint directory (bf16, fp16, fp32, FP8, or quantized by others), a GGUF file, or any
        other source of float weights.
    calibration: None = every weight goes to the nearest code; else GPTQ (Frantar et al. 2022) on these
        tokens, a layer after the other.
    restart: throw away what an unfinished job left in `destination`.
    progress: called with (source bytes read, source bytes in all).

    An interrupted job is taken up by the same call. Raises CheckpointError: the source cannot be
    read or has a weight that is not finite, a group does not divide a width, the destination holds
    something else, or the disk is too small; what was there stays.
    """
    destination, recipe = Path(destination), recipe or Recipe()
    working = destination / WORKING
    path = Path(source) if isinstance(source, (str, Path)) else source.path
    _refuse_other_weights(path, destination, working)
    weights = open_source(path) if isinstance(source, (str, Path)) else source
    _refuse_packed_source(weights, path)
    shards = list(_shards(plan(weights, recipe), shard_bytes))
    settings = {"source": weights.identity(), "recipe": recipe.as_dict(), "shard_bytes": shard_bytes}
    if calibration is not None:
        _check_ids(calibration, weights)
        settings["calibration"] = calibration.as_dict()
    job = json.dumps(settings, indent=1)
    with locked(destination, CheckpointError):
        _refuse_other_weights(path, destination, working)  # what another process did meanwhile
        try:
            if (destination / CONFIG_FILE).exists():  # cut when all but the plan had gone
                whole = (destination / RECEIPT_FILE).exists()
                last = whole and [path.name for path in working.iterdir()] == [PLAN_FILE]
                if not last or (working / PLAN_FILE).read_text(encoding="utf-8") != job:
                    raise CheckpointError(
                        f"{destination}: holds a checkpoint already; name another directory"
                    )
                shutil.rmtree(working)
                return _read_receipt(destination)
            if restart:
                _throw_away(working, destination)
            _take_up(working, job)
            if not (working / CONFIG_FILE).exists():
                side_files = weights.side_files()  # what is wrong with them is said before the work
                receipts = _write_shards(weights, shards, working, calibration, progress)
                _finish(weights, recipe, calibration, shards, receipts, working, side_files)
            _put_in_place(working, destination)
        except OSError as error:
            raise CheckpointError(
                f"{destination}: cannot be written ({error.strerror}); the same command goes on from here"
            ) from None
        return _read_receipt(destination)


def _read_receipt(destination: Path) -> dict[str, Any]:
    receipt: dict[str, Any] = json.loads((destination / RECEIPT_FILE).read_text(encoding="utf-8"))
    return receipt


def _throw_away(working: Path, destination: Path) -> None:
    """Forget an unfinished job, with the files that it had moved up already."""
    if (working / PLAN_FILE).is_file():
        for path in [*destination.glob("model*.safetensors"), destination / INDEX_FILE]:
            path.unlink(missing_ok=True)
    shutil.rmtree(working, ignore_errors=True)


def _refuse_other_weights(source: Path, destination: Path, working: Path) -> None:
    """Nothing in the destination may be lost; weights that a cut-off move of ours left are no obstacle."""
    if source.resolve() == destination.resolve():
        raise CheckpointError(f"{destination}: is the source; name another directory")
    moving = (working / PLAN_FILE).is_file()
    if (destination / CONFIG_FILE).exists() and not moving:
        raise CheckpointError(f"{destination}: holds a checkpoint already; name another directory")
    if destination.is_dir() and not moving:
        other = next((path.name for path in destination.iterdir() if path.suffix == ".safetensors"), None)
        if other is not None:
            raise CheckpointError(f"{destination}: holds {other} already; name another directory")


def _check_ids(calibration: Calibration, weights: WeightSource) -> None:
    limit = weights.config.vocab_size
    wrong = next((i for window in calibration.input_ids for i in window if not 0 <= i < limit), None)
    if wrong is not None:
        raise CheckpointError(
            f"{weights.path}: calibration token {wrong} is none of its {limit}; use its own tokenizer"
        )


def _refuse_packed_source(weights: WeightSource, source: Path) -> None:
    settings = weights.config.extra.get("quantization_config")
    if not isinstance(settings, dict):
        return
    groups = settings.get("config_groups")
    ours = settings.get("format") in ("pack-quantized", "mixed-precision") and isinstance(groups, dict)
    if settings.get("quant_method") == "compressed-tensors" and ours and settings.get("glm5"):
        raise CheckpointError(f"{source}: is quantized by glm5 already; start from its source")


def _take_up(working: Path, job: str) -> None:
    """Make the working folder, or check that the one that is there belongs to the same job."""
    plan_path = working / PLAN_FILE
    if working.is_dir():
        remove_temporaries(working)
    if working.exists() and any(working.iterdir()):
        if not plan_path.is_file() or plan_path.read_text(encoding="utf-8") != job:
            raise CheckpointError(
                f"{working}: holds an unfinished job with another source or recipe; "
                "finish that one, or use --restart to throw it away"
            )
        return
    working.mkdir(parents=True, exist_ok=True)
    write_atomic(plan_path, job)


def _put_in_place(working: Path, destination: Path) -> None:
    """Move the finished files up, `config.json` last; the plan goes only when nothing else is left."""
    shutil.rmtree(working / CALIBRATION_FOLDER, ignore_errors=True)
    for path in working.glob("shard-*.json"):
        path.unlink()
    move_up(working, destination, belongs=lambda name: False, stays=frozenset({PLAN_FILE}))
    (working / PLAN_FILE).unlink()
    working.rmdir()


def _shards(items: list[Item], limit: int) -> Iterator[list[Item]]:
    """Runs of about `limit` bytes that never part an expert; experts first within each."""
    shard: list[Item] = []
    size = 0
    for unit in _units(items):
        bytes_of = sum(item.written_bytes for item in unit)
        if shard and size + bytes_of > limit:
            yield sorted(shard, key=lambda item: not item.is_expert)
            shard, size = [], 0
        shard += unit
        size += bytes_of
    yield sorted(shard, key=lambda item: not item.is_expert)


def _units(items: list[Item]) -> Iterator[list[Item]]:
    """An expert's three matrices are one unit."""
    unit: list[Item] = []
    for item in items:
        expert = item.name.rsplit(".", 2)[0] if item.is_expert else item.name
        if unit and (not item.is_expert or not unit[0].name.startswith(expert + ".")):
            yield unit
            unit = []
        unit.append(item)
    if unit:
        yield unit


def _write_shards(
    source: WeightSource,
    shards: list[list[Item]],
    working: Path,
    calibration: Calibration | None,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    total = sum(item.read_bytes for shard in shards for item in shard)
    missing = [n for n in range(len(shards)) if not (working / _receipt_name(n)).exists()]
    needed = sum(item.written_bytes for n in missing for item in shards[n]) + (64 << 20)
    if calibration is not None:
        needed += _walk_bytes(shards, source.config, calibration)
    free = shutil.disk_usage(working).free
    if needed > free:
        raise CheckpointError(
            f"{working.parent}: {needed / 1e9:.1f} GB are needed, the disk has {free / 1e9:.1f} GB; "
            "free some or name another directory"
        )
    meter = _Meter(total, progress)
    calibrated = None
    if calibration is not None and missing:
        items = [item for shard in shards for item in shard]
        calibrated = CalibratedRounding(
            source, items, calibration, working / CALIBRATION_FOLDER, meter.advance
        )
    receipts = []
    for number, shard in enumerate(shards):
        name = _shard_name(number, len(shards))
        receipt_path = working / _receipt_name(number)
        if receipt_path.exists() and (working / name).exists():
            receipts.append(json.loads(receipt_path.read_text(encoding="utf-8")))
            meter.advance(sum(item.read_bytes for item in shard))
        else:
            writer = _ShardWriter(source, shard, meter.advance, calibrated)
            with atomic_path(working / name) as temporary:
                write_safetensors(temporary, writer.tensors(), alignment=ALIGNMENT)
            write_atomic(receipt_path, json.dumps(writer.receipt))
            receipts.append(writer.receipt)
            meter.advance(0)
        if calibrated is not None:
            calibrated.forget(shard)
    return receipts


class _Meter:
    """Bytes of the source that are dealt with."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def advance(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total)


def _walk_bytes(shards: list[list[Item]], config: ModelConfig, calibration: Calibration) -> int:
    """What a walk has on disk beside the shards: codes of a layer and a shard, hidden states twice."""
    layers: dict[str, int] = {}
    for item in (item for shard in shards for item in shard if item.scheme is not None):
        layer = ".".join(item.name.split(".")[:3])
        layers[layer] = layers.get(layer, 0) + item.written_bytes
    largest = max(sum(item.written_bytes for item in shard) for shard in shards)
    return largest + max(layers.values(), default=0) + 2 * 4 * calibration.num_tokens * config.hidden_size


class _ShardWriter:
    """Turns the items of a shard into the tensors of a file, each made when its turn comes."""

    def __init__(
        self,
        source: WeightSource,
        shard: list[Item],
        advance: Callable[[int], None],
        calibrated: CalibratedRounding | None = None,
    ) -> None:
        self._source, self._shard = source, shard
        self._advance, self._calibrated = advance, calibrated
        self.receipt: dict[str, Any] = {}
        self._scales: dict[str, Tensor] = {}

    def tensors(self) -> Iterator[PlannedTensor]:
        shapes = []
        for item in self._shard:
            if item.scheme is None:
                yield PlannedTensor(item.name, item.dtype, item.shape, partial(self._copied, item))
                continue
            module, (rows, columns) = item.name.removesuffix(".weight"), item.shape
            words = (rows, words_per_row(columns, item.scheme.bits))
            groups = (rows, columns // item.scheme.group)
            yield PlannedTensor(f"{module}.weight_packed", torch.int32, words, partial(self._codes, item))
            yield PlannedTensor(f"{module}.weight_scale", torch.bfloat16, groups, partial(self._scale, item))
            shape = partial(torch.tensor, item.shape)
            shapes.append(PlannedTensor(f"{module}.weight_shape", torch.int64, (2,), shape))
        # Last, so that they do not push the experts off their boundaries.
        yield from shapes

    def _scale(self, item: Item) -> Tensor:
        return self._scales.pop(item.name)

    def _copied(self, item: Item) -> Iterator[Tensor]:
        for band in self._source.bands(item.name):
            yield band
            self._advance(round(item.read_bytes * band.numel() / math.prod(item.shape)))

    def _codes(self, item: Item) -> Tensor:
        assert item.scheme is not None
        result = self._calibrated(item) if self._calibrated is not None else None
        if result is None:
            result = nearest(self._source, item)
            self._advance(item.read_bytes)
        self._scales[item.name] = result.scales
        self.receipt[item.name] = {
            "bits": item.scheme.bits, "group": item.scheme.group,
            **{name: round(value, 6) for name, value in result.figures.items()},
        }  # fmt: skip
        return result.words


def _finish(
    source: WeightSource,
    recipe: Recipe,
    calibration: Calibration | None,
    shards: list[list[Item]],
    receipts: list[dict[str, Any]],
    working: Path,
    side_files: dict[str, bytes],
) -> None:
    """Index, side files, receipt and, last, the config; then the working folder is a whole checkpoint."""
    items = [item for shard in shards for item in shard]
    if len(shards) > 1:
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards):
            writer = _ShardWriter(source, shard, lambda count: None)
            weight_map |= dict.fromkeys((t.name for t in writer.tensors()), _shard_name(number, len(shards)))
        total = sum(item.written_bytes for item in items)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_atomic(working / INDEX_FILE, json.dumps(index, indent=1) + "\n")
    for name, content in side_files.items():
        write_atomic(working / name, content)
    receipt = _receipt(source.config, recipe, calibration, items, receipts)
    write_atomic(working / RECEIPT_FILE, json.dumps(receipt, indent=1) + "\n")
    quantized_config(source.config, items).save_pretrained(working)


def _receipt(
    config: ModelConfig,
    recipe: Recipe,
    calibration: Calibration | None,
    items: list[Item],
    receipts: list[dict[str, Any]],
) -> dict[str, Any]:
    errors = {name: entry for part in receipts for name, entry in part.items()}
    packed = [item for item in items if item.scheme is not None]
    weights = sum(math.prod(item.shape) for item in packed)
    packed_bytes = sum(item.written_bytes for item in packed)
    share = config.num_experts_per_tok / config.n_routed_experts if config.n_routed_experts else 1.0
    token = 0.0
    for item in items:
        if names.is_mtp(item.name, config) or item.name == "model.embed_tokens.weight":
            continue
        token += item.written_bytes * (share if item.is_expert else 1.0)
    if config.tie_word_embeddings:  # read whole, as the head
        token += sum(i.written_bytes for i in items if i.name == "model.embed_tokens.weight")
    return {
        "recipe": recipe.as_dict(),
        **({"method": "nearest"} if calibration is None else calibration.as_dict()),
        "bits_per_quantized_weight": round(8 * packed_bytes / weights, 4) if weights else None,
        "total_bytes": sum(item.written_bytes for item in items),
        "source_bytes": sum(item.read_bytes for item in items),
        "bytes_per_token": round(token),
        "tensors": dict(sorted(errors.items())),
    }


def quantized_config(config: ModelConfig, items: list[Item]) -> ModelConfig:
    """The config that tells every reader how these weights are stored."""
    by_scheme: dict[Scheme, list[str]] = {}
    kept = []
    for item in items:
        module = item.name.removesuffix(".weight")
        if item.scheme is not None:
            by_scheme.setdefault(item.scheme, []).append(module)
        elif len(item.shape) == 2:
            kept.append(module)
    if config.tie_word_embeddings:
        kept.append("lm_head")
    extra = {key: value for key, value in config.extra.items() if key != "quantization_config"}
    if not by_scheme:
        return replace(config, dtype="bfloat16", extra=extra)
    groups = {}
    for number, (scheme, modules) in enumerate(sorted(by_scheme.items(), key=lambda kv: -len(kv[1]))):
        groups[f"group_{number}"] = {
            "targets": _targets(modules, by_scheme),
            "weights": {
                "num_bits": scheme.bits, "type": "int", "symmetric": True, "strategy": "group",
                "group_size": scheme.group, "dynamic": False, "observer": "minmax",
            },
            "input_activations": None,
            "output_activations": None,
        }  # fmt: skip
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(kept),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "glm5": {"layout": 1},
    }
    return replace(config, dtype="bfloat16", extra=extra | {"quantization_config": settings})


def _targets(modules: list[str], by_scheme: dict[Scheme, list[str]]) -> list[str]:
    """Patterns that name exactly these modules: numbers as `\\d+` where that takes no other's along.

    vLLM tries every pattern for every layer, so that there must not be one for each expert.
    """
    if len(by_scheme) == 1:
        # Classes of their own: to vLLM the head, to everyone the embedding.
        others = [module for module in modules if module in ("lm_head", "model.embed_tokens")]
        return ["Linear", *(_pattern(module, 0) for module in others)]
    others = [module for members in by_scheme.values() if members is not modules for module in members]
    targets: set[str] = set()
    for named in (0, 1, 2):  # numbers told: none, the layer's, the expert's too
        taken = {_pattern(module, named) for module in others}
        targets |= {_pattern(module, named) for module in modules} - taken
        modules = [module for module in modules if _pattern(module, named) in taken]
    return sorted(targets)


def _pattern(module: str, named: int) -> str:
    """The module with its first `named` numbers as they are, and any number in the place of others."""
    parts = module.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    for place in numbers[named:]:
        parts[place] = r"\d+"
    return "re:" + r"\.".join(parts) + "$"


def _shard_name(number: int, count: int) -> str:
    return SINGLE_FILE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _receipt_name(number: int) -> str:
    return f"shard-{number + 1:05d}.json"
