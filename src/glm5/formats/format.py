"""What every stored form of quantized weights answers: which tensors, which shape, which values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from glm5.disk.safetensors_file import shown
from glm5.disk.shards import ShardIndex
from glm5.errors import CheckpointError
from glm5.formats.parts import Parts

# Past any layer. A tensor without elements may claim any extent, which torch could not count.
LARGEST_EXTENT = 1 << 32


class Weight(NamedTuple):
    """A weight whose headers are all in order, still on disk."""

    shape: tuple[int, int]  # out, in
    read: Callable[[int, int], Tensor]  # rows first..last, fp32


class Format(ABC):
    """A way to store weights. Names are logical: `model.layers.0.mlp.experts.3.gate_proj.weight`."""

    @abstractmethod
    def stored_names(self, name: str, index: ShardIndex) -> list[str] | None:
        """Every tensor on disk that belongs to this weight, the main one first.

        Those that are not used (scales of activations) count too. None: not stored in this form.
        """

    @abstractmethod
    def shape(self, name: str, index: ShardIndex) -> tuple[int, ...]:
        """The logical shape, after every header is checked.

        Raises:
            CheckpointError: a part is missing or of a wrong shape or dtype, or `stored_names` is None.
        """

    @abstractmethod
    def read(self, name: str, index: ShardIndex, rows: slice | None = None) -> Tensor:
        """The weight, or these rows of it, on the CPU in its `dtype`."""

    def dtype(self, name: str, index: ShardIndex) -> torch.dtype:
        """What `read` gives: fp32. A code times its scale has more bits than bf16 keeps, and who rounds the
        weight again should be the only one that rounds it.
        """
        return torch.float32

    def fill(self, name: str, index: ShardIndex, target: Tensor) -> None:
        """Read the weight into `target`, of any float dtype and device."""
        target.copy_(self.read(name, index))

    def lies_as(self, name: str, index: ShardIndex, target: Tensor) -> bool:
        """Can the bytes go from the file into `target` as they are?"""
        return False

    @property
    def is_decoded(self) -> bool:
        """Is a weight stored as codes with scales?"""
        return True


class CodedFormat(Format):
    """Codes with scales: matrices only, whose tensors are named after their module."""

    def stored_names(self, name: str, index: ShardIndex) -> list[str] | None:
        if not name.endswith(".weight"):
            return None
        parts = Parts(index, name.removesuffix(".weight"))
        suffixes = self.suffixes(parts)
        return None if suffixes is None else parts.names(suffixes)

    def shape(self, name: str, index: ShardIndex) -> tuple[int, ...]:
        return self._weight(name, index).shape

    def read(self, name: str, index: ShardIndex, rows: slice | None = None) -> Tensor:
        """The weight, or these rows of it, as fp32 [out, in] on the CPU.

        The stored codes are read whole in either case; `rows` saves the fp32.

        Raises:
            CheckpointError: as `shape`; a scale is not finite, a code or an index is out of range,
                or the values contradict the headers.
        """
        weight = self._weight(name, index)
        first, last, step = (rows or slice(None)).indices(weight.shape[0])
        if step != 1:
            raise ValueError("rows are read one after the other: the slice has a step")
        return weight.read(first, max(first, last))

    def _weight(self, name: str, index: ShardIndex) -> Weight:
        if self.stored_names(name, index) is None:
            raise CheckpointError(
                f"{index.directory}: {shown(name)} is not stored as {type(self).__name__}; "
                "download this checkpoint again"
            )
        weight = self.checked(Parts(index, name.removesuffix(".weight")))
        if max(weight.shape) > LARGEST_EXTENT:
            raise CheckpointError(
                f"{index.directory}: {shown(name)} would be {list(weight.shape)}, larger than any layer; "
                "download this checkpoint again"
            )
        return weight

    @abstractmethod
    def suffixes(self, parts: Parts) -> tuple[str, ...] | None:
        """What may stand after the module's name, when its weight is stored in this form."""

    @abstractmethod
    def checked(self, parts: Parts) -> Weight:
        """Check every header, read no data."""
