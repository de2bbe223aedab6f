"""Weights stored as the floats they are: bf16, fp16, fp32 and fp64."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from glm5.disk.json_file import read_json
from glm5.disk.shards import CONFIG_FILE, ShardIndex
from glm5.errors import CheckpointError
from glm5.formats.format import Format

FLOATS = ("F64", "F32", "F16", "BF16")
_AS_STORED = (torch.float32, torch.float16, torch.bfloat16)


class PlainFloats(Format):
    """One tensor a weight, under the weight's own name."""

    def stored_names(self, name: str, index: ShardIndex) -> list[str] | None:
        return [name] if name in index else None

    def shape(self, name: str, index: ShardIndex) -> tuple[int, ...]:
        info = index[name]
        if info.dtype_name == "F8_E4M3":
            raise CheckpointError(
                f"{index.file(name).path}: {name} is FP8 {list(info.shape)}; only matrices have block scales"
            )
        if info.dtype_name not in FLOATS:
            raise CheckpointError(
                f"{index.file(name).path}: {name} is stored as {info.dtype_name}, expected a float or FP8"
                f"{_hint(index.directory)}"
            )
        return info.shape

    def dtype(self, name: str, index: ShardIndex) -> torch.dtype:
        stored = index[name].dtype
        return stored if stored in _AS_STORED else torch.float32

    def read(self, name: str, index: ShardIndex, rows: slice | None = None) -> Tensor:
        values = torch.empty(index[name].shape, dtype=self.dtype(name, index))
        self.fill(name, index, values)
        return values if rows is None else values[rows]

    def fill(self, name: str, index: ShardIndex, target: Tensor) -> None:
        if self.lies_as(name, index, target) and target.is_contiguous() and target.device.type == "cpu":
            index.file(name).read_into(name, target.detach())
        else:
            target.copy_(index.file(name).read(name))

    @property
    def is_decoded(self) -> bool:
        return False

    def lies_as(self, name: str, index: ShardIndex, target: Tensor) -> bool:
        return index[name].dtype == target.dtype


def _hint(directory: Path) -> str:
    """What the directory says of codes that config.json does not describe."""
    if (directory / "hf_quant_config.json").exists():
        return (
            "; hf_quant_config.json is not read: copy what it says into quantization_config of config.json, "
            "or get another copy"
        )
    try:
        if isinstance(read_json(directory / CONFIG_FILE).get("quantization"), dict):
            return "; it looks like an MLX checkpoint, which glm5 does not read: get the original"
    except CheckpointError:
        pass
    return ""
