"""Checkpoints of a run: a loadable model directory plus what resuming needs, written whole or not.

`step-0000500/` is an ordinary checkpoint directory (fp32) with `optimizer.safetensors` and
`trainer.json` beside the weights. It is built under another name and renamed when complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm5.checkpoint import names
from glm5.checkpoint.writing import save_model
from glm5.disk.files import fsync_directory, write_atomic
from glm5.disk.json_file import read_json
from glm5.disk.safetensors_file import PlannedTensor, SafetensorsFile, write_safetensors
from glm5.disk.shards import ShardIndex
from glm5.errors import CheckpointError, TrainingError
from glm5.model.transformer import GlmForCausalLM
from glm5.text.tokenizer import Tokenizer

STATE_FILE = "trainer.json"
OPTIMIZER_FILE = "optimizer.safetensors"
_NAME = re.compile(r"step-(\d{7,})")
_UNFINISHED = ".step-"


def save_snapshot(
    run: Path,
    step: int,
    model: GlmForCausalLM,
    optimizers: Sequence[torch.optim.Optimizer],
    tokenizer: Tokenizer,
    state: Mapping[str, Any],
) -> Path:
    """Write `run/step-<step>` whole, or not at all.

    Raises TrainingError, with nothing written, when a weight is not finite.
    """
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise TrainingError(
                f"step {step}: {name} is not finite; lower optimizer.lr and go on from the last snapshot"
            )
    run.mkdir(parents=True, exist_ok=True)
    target = run / f"step-{step:07d}"
    temporary = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=run))
    try:
        save_model(model, temporary, stored="fp32", beside=tokenizer.save_pretrained)
        write_safetensors(temporary / OPTIMIZER_FILE, _optimizer_tensors(model, optimizers))
        write_atomic(temporary / STATE_FILE, json.dumps({"step": step, **state}, indent=1) + "\n")
        temporary.chmod(0o755)
        fsync_directory(temporary)
        replaced = run / f"{target.name}.replaced"
        if target.exists():  # a kill may strike between two steps: one of them is there
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(target, replaced)
        os.replace(temporary, target)
        fsync_directory(run)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` snapshots."""
    for old in list_snapshots(run)[:-keep]:
        shutil.rmtree(old)


def remove_unfinished(run: Path) -> None:
    """Remove what kills left of snapshots that were being written; what was to be replaced comes back."""
    for path in run.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path)
    for path in run.glob("step-*.replaced"):
        if path.with_suffix("").exists():
            shutil.rmtree(path)
        else:
            os.replace(path, path.with_suffix(""))


def set_aside(snapshot: Path) -> Path:
    """Rename a snapshot from which no step can be made, so that a run goes on from the one before."""
    target = snapshot.with_name(f"{snapshot.name}.unusable")
    if target.exists():
        shutil.rmtree(target)
    os.replace(snapshot, target)
    return target


def list_snapshots(run: Path) -> list[Path]:
    """The snapshots of a run, oldest first."""
    found = [path for path in run.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def read_state(directory: Path) -> dict[str, Any]:
    """What `save_snapshot` was given as `state`, with the `step`."""
    return read_json(directory / STATE_FILE)


def load_snapshot(
    directory: Path, model: GlmForCausalLM, optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    """Put weights and optimizer state back."""
    index = ShardIndex(directory)
    tensors = names.state_tensors(model)
    with torch.no_grad():
        for piece in names.pieces(model):
            if piece.name not in index or index[piece.name].shape != piece.of(tensors[piece.parameter]).shape:
                raise CheckpointError(
                    f"{directory}: {piece.name} does not fit the recipe's [model]; "
                    "start a new output directory"
                )
            piece.of(tensors[piece.parameter]).copy_(index.file(piece.name).read(piece.name))
    _load_optimizers(SafetensorsFile(directory / OPTIMIZER_FILE), model, optimizers)


def _optimizer_tensors(
    model: GlmForCausalLM, optimizers: Sequence[torch.optim.Optimizer]
) -> list[PlannedTensor]:
    planned = []
    names_of: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                name = f"{names_of[parameter]}/{key}"
                values: Tensor = value
                planned.append(
                    PlannedTensor(name, values.dtype, tuple(values.shape), partial(_detached, values))
                )
    return planned


def _detached(values: Tensor) -> Tensor:
    return values.detach()


def _load_optimizers(
    file: SafetensorsFile, model: GlmForCausalLM, optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    by_parameter: dict[str, list[str]] = {}
    for name in file.tensors:
        by_parameter.setdefault(name.rpartition("/")[0], []).append(name)
    parameters = dict(model.named_parameters())
    for optimizer in optimizers:
        owned = {p for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in parameters.items():
            if parameter in owned:
                stored = by_parameter.get(name, [])
                optimizer.state[parameter] = {key.rpartition("/")[2]: file.read(key) for key in stored}
