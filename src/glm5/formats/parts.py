"""The tensors on disk that make up one quantized weight: header checks first, then checked values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from glm5.disk.safetensors_file import TensorInfo, shown
from glm5.disk.shards import ShardIndex
from glm5.errors import CheckpointError

FLOATS = ("F32", "BF16", "F16", "F64")
SCALAR = ((), (1,), (1, 1))


@dataclass(frozen=True)
class Parts:
    """What the headers say of the tensors `module.SUFFIX`."""

    index: ShardIndex
    module: str

    def has(self, suffix: str) -> bool:
        return f"{self.module}.{suffix}" in self.index

    def names(self, suffixes: Iterable[str]) -> list[str]:
        """Those that exist, by their full names."""
        return [f"{self.module}.{suffix}" for suffix in suffixes if self.has(suffix)]

    def info(self, suffix: str) -> TensorInfo:
        """Raises CheckpointError when the tensor is missing."""
        name = f"{self.module}.{suffix}"
        if name not in self.index:
            raise CheckpointError(
                f"{self.index.directory}: {shown(name)} is missing, a part of {shown(self.module)}.weight; "
                "download this checkpoint again"
            )
        return self.index[name]

    def dtype(self, suffix: str) -> str | None:
        """The stored dtype; None when there is no such tensor."""
        return self.info(suffix).dtype_name if self.has(suffix) else None

    def refuse(self, suffix: str, what: str, advice: str = "download it again") -> CheckpointError:
        """The error for one of the tensors: its file, its name, `what` is wrong and what to do."""
        name = f"{self.module}.{suffix}"
        return CheckpointError(f"{self.index.file(name).path}: {shown(name)} {what}; {advice}")

    def check(self, suffix: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> None:
        """Raises CheckpointError unless the tensor has one of these dtypes and shapes."""
        info = self.info(suffix)
        if info.dtype_name not in dtypes or info.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise self.refuse(
                suffix, f"is {info.dtype_name} {list(info.shape)}, expected {' or '.join(dtypes)} {wanted}"
            )

    def matrix(self, suffix: str, *dtypes: str) -> tuple[int, int]:
        """The two extents of a matrix of one of these dtypes."""
        info = self.info(suffix)
        if info.dtype_name not in dtypes or len(info.shape) != 2:
            wanted = " or ".join(dtypes)
            raise self.refuse(suffix, f"is {info.dtype_name} {list(info.shape)}, expected a {wanted} matrix")
        return info.shape[0], info.shape[1]

    def read(self, suffix: str) -> Tensor:
        """The values, in the stored dtype."""
        name = f"{self.module}.{suffix}"
        return self.index.file(name).read(name)

    def scale(self, suffix: str) -> Tensor:
        """The values in fp32, all of them finite."""
        return self.finite(suffix, self.read(suffix).to(torch.float32))

    def finite(self, suffix: str, scale: Tensor, peak: float = 1.0) -> Tensor:
        """`scale` itself, once it is known that `peak` times it is a number.

        peak: the largest magnitude that is going to be multiplied by it.
        """
        if not bool(torch.isfinite(scale * peak).all()):
            raise self.refuse(suffix, "holds a scale that is NaN, infinite or makes infinite weights")
        return scale

    def numbers(self, suffix: str) -> Tensor:
        """FP8 values as they are stored, none of them NaN."""
        values = self.read(suffix)
        # e4m3 has no infinity; its NaN is 127 in the bits below the sign.
        if bool(((values.view(torch.uint8) & 127) == 127).any()):
            raise self.refuse(suffix, "holds a NaN")
        return values

    def column_groups(self, suffix: str, columns: int, groups: int) -> Tensor:
        """The group of each column (`g_idx`), int64 [columns], every one in range."""
        self.check(suffix, ("I32", "I64"), (columns,))
        indices = self.read(suffix).to(torch.int64)
        if columns and not bool(((indices >= 0) & (indices < groups)).all()):
            raise self.refuse(suffix, f"points past the {groups} groups of this weight")
        return indices
