"""Solved matrices on disk, a file each, until the shard that holds them is written."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm5.disk.files import atomic_path
from glm5.disk.safetensors_file import PlannedTensor, SafetensorsFile, write_safetensors
from glm5.formats.packing import words_per_row
from glm5.layers.loading import round_finite
from glm5.quantize.plan import Item
from glm5.quantize.sources import WeightSource


@dataclass(frozen=True)
class Result:
    """Packed codes int32 [rows, words], scales bf16 [rows, groups], and the receipt's figures for them."""

    words: Tensor
    scales: Tensor
    figures: dict[str, float]


class Results:
    """One owner of the folder's `*.solved` files; each is there whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __contains__(self, name: str) -> bool:
        return self._path(name).exists()

    def save(self, name: str, result: Result) -> None:
        tensors = {"words": result.words, "scales": result.scales}
        tensors |= {key: torch.tensor(value, dtype=torch.float64) for key, value in result.figures.items()}
        with atomic_path(self._path(name)) as temporary:
            write_tensors(temporary, tensors)

    def load(self, name: str) -> Result:
        tensors = read_tensors(self._path(name))
        words, scales = tensors.pop("words"), tensors.pop("scales")
        return Result(words, scales, {key: float(value) for key, value in tensors.items()})

    def forget(self, names: Iterable[str]) -> None:
        for name in names:
            self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.solved"


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    def values(tensor: Tensor) -> Any:
        return lambda: tensor

    write_safetensors(
        path, [PlannedTensor(n, t.dtype, tuple(t.shape), values(t)) for n, t in tensors.items()]
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    file = SafetensorsFile(path)
    return {name: file.read(name) for name in file.tensors}


def nearest(source: WeightSource, item: Item) -> Result:
    """The codes next to each weight; CheckpointError when one is not finite."""
    assert item.scheme is not None
    rows, columns = item.shape
    words = torch.empty(rows, words_per_row(columns, item.scheme.bits), dtype=torch.int32)
    scales = torch.empty(rows, columns // item.scheme.group, dtype=item.scheme.scale_dtype)
    error = energy = 0.0
    first = 0
    for band in source.rows(item.name):
        rounded = round_finite(band, item.scheme, item.name, source.path)
        words[first : first + len(band)] = rounded.words
        scales[first : first + len(band)] = rounded.scales
        error, energy, first = error + rounded.error, energy + rounded.energy, first + len(band)
    return Result(words, scales, {"relative_error": math.sqrt(error / energy) if energy else 0.0})
