"""The logical weights of a directory, stored one by one or in the bank of a layer."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from glm5.checkpoint import names
from glm5.checkpoint.names import BankPart
from glm5.config import ModelConfig
from glm5.disk.safetensors_file import shown
from glm5.disk.shards import ShardIndex
from glm5.errors import CheckpointError
from glm5.formats import Format

# What stands in a tensor's name behind its module, in any form; the weight itself is the module's `weight`.
_PART = re.compile(
    r"\.(weight(_[a-z_]+)?|qweight|qzeros|scales|g_idx|input_scale|input_zero_point|input_global_scale"
    r"|output_scale|output_zero_point)$"
)


class StoredWeights:
    """Weights by their logical names (`model.layers.0.mlp.experts.3.gate_proj.weight`)."""

    def __init__(
        self, directory: Path, index: ShardIndex, formats: tuple[Format, ...], config: ModelConfig
    ) -> None:
        self.directory, self.index, self.formats = directory, index, formats
        self._config = config
        # Where each weight was found: asked for several times a weight, of files that do not change.
        self._found: dict[str, tuple[Format, list[str]] | None] = {}

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

    def _place(self, name: str) -> tuple[Format, list[str]] | None:
        if name not in self._found:
            every = ((form, form.stored_names(name, self.index)) for form in self.formats)
            self._found[name] = next(((form, own) for form, own in every if own is not None), None)
        return self._found[name]

    def _own(self, name: str) -> list[str] | None:
        place = self._place(name)
        return None if place is None else place[1]

    def form(self, name: str) -> Format:
        """How a weight is stored. Raises CheckpointError when it is not there."""
        place = self._place(name)
        if place is None:
            raise CheckpointError(f"{self.directory}: {name} is missing; config.json asks for it")
        return place[0]

    def parts(self, name: str) -> list[str]:
        """`names`, of a weight that must be there."""
        found = self.names(name)
        if found is None:
            raise CheckpointError(f"{self.directory}: {name} is missing; config.json asks for it")
        return found

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
        return self.form(name).shape(name, self.index)

    def check(self, name: str, wanted: tuple[int, ...]) -> None:
        """Every header of a weight, before anything is read."""
        shape, where = self.shape(name), self.parts(name)[0]
        if shape != wanted:
            raise CheckpointError(
                f"{self.index.file(where).path}: {name} has shape {list(shape)}, "
                f"config.json asks for {list(wanted)}"
            )

    def is_decoded(self, name: str) -> bool:
        """Is the weight stored as codes with scales?"""
        return self.bank(name) is None and self.form(name).is_decoded

    def fill(self, name: str, target: Tensor) -> None:
        """Read a weight into memory of any float dtype and device."""
        part = self.bank(name)
        if part is not None:
            target.copy_(self._read_part(part))
        else:
            self.form(name).fill(name, self.index, target)

    def lies_as(self, name: str, target: Tensor) -> bool:
        """Can the bytes go from the file into `target` as they are?"""
        part = self.bank(name)
        if part is not None:
            return self.index[part.bank].dtype == target.dtype
        return self.form(name).lies_as(name, self.index, target)

    def dtype(self, name: str) -> torch.dtype:
        """What `read` gives: fp32, fp16 and bf16 as they are stored, anything else as fp32."""
        part = self.bank(name)
        stored = name if part is None else part.bank
        return self.form(stored).dtype(stored, self.index)

    def read(self, name: str) -> Tensor:
        """The values of a weight in its `dtype`."""
        part = self.bank(name)
        if part is not None:
            return self._read_part(part).to(self.dtype(name))
        return self.form(name).read(name, self.index)

    def _read_part(self, part: BankPart) -> Tensor:
        """One run of bytes; the rest of the bank is not read."""
        columns, dtype = part.shape[2], self.index[part.bank].dtype
        values = torch.empty(part.rows.stop - part.rows.start, columns, dtype=dtype)
        offset = (part.expert * part.shape[1] + part.rows.start) * columns * dtype.itemsize
        self.index.file(part.bank).read_into(part.bank, values, offset)
        return values


def check_leftovers(index: ShardIndex, used: set[str], config: ModelConfig) -> None:
    """Refuse tensors that the model of this config has no place for.

    What is passed over is so in every stored form: by the weight that a tensor belongs to, not by its name.
    """
    extra = [
        name for name in index.names if name not in used and not names.is_borrowed(weight_of(name), config)
    ]
    if config.num_nextn_predict_layers == 0:
        extra = [name for name in extra if not names.is_mtp(name, config)]
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise CheckpointError(
            f"{index.file(extra[0]).path}: {shown(extra[0])}{more} has no place in the model of config.json"
        )


def weight_of(name: str) -> str:
    """The logical weight that a tensor on disk is a part of: `x.weight` of `x.weight_packed`, `x.qzeros`."""
    match = _PART.search(name)
    return f"{name[: match.start()]}.weight" if match else name
