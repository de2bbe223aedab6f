"""One safetensors file: a header that is checked before it is believed, and tensors read in place.

The official library maps whole files; here a tensor's bytes go straight into the memory where they
will stay, so that loading needs the model and no second copy. Layout: u64 header length, JSON
header, data; offsets count from the end of the header (safetensors format, README).
"""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from glm5.errors import CheckpointError

# The official reader's own limit.
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 8
# Sizes and positions past this are lies, and torch counts elements in an int64.
MAX_COUNT = 1 << 62

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "C64": torch.complex64,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Values in an element of torch's dtype: the header counts values along the last extent, torch bytes.
_VALUES = {"F4": 2}


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of a tensor; `start` and `end` are byte positions in the file.

    shape: in elements of `dtype`, of which one of F4 holds two values.
    """

    name: str
    dtype_name: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def num_bytes(self) -> int:
        return self.end - self.start


class SafetensorsFile:
    """A safetensors file open for reading.

    Raises:
        CheckpointError: the file is missing, cut short, or its header contradicts itself; the
            message names the file, the tensor and the byte.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by name, in file order, checked against the file's size."""
        try:
            size = self.path.stat().st_size
            if size < 8:
                raise CheckpointError(
                    f"{self.path}: is {size} bytes long, a header is more; download it again"
                )
            with self.path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > min(MAX_HEADER_BYTES, size - 8):
                    raise CheckpointError(
                        f"{self.path}: the header says it is {length} bytes long, the file has {size}; "
                        "download it again"
                    )
                raw = file.read(length)
        except FileNotFoundError:
            raise CheckpointError(f"{self.path}: no such file; download it again") from None
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error.strerror})") from None
        return self._checked(self._parsed(raw), 8 + length, size)

    def _parsed(self, raw: bytes) -> dict[str, Any]:
        def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            found: dict[str, Any] = {}
            for name, value in pairs:
                if name in found:
                    raise CheckpointError(
                        f"{self.path}: the header names {shown(name)} twice; do not use this file"
                    )
                found[name] = value
            return found

        try:
            header = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
        except (ValueError, RecursionError) as error:  # ValueError: bad UTF-8, bad JSON, endless number
            raise CheckpointError(
                f"{self.path}: the header is not JSON ({error}); download it again"
            ) from None
        if not isinstance(header, dict):
            raise CheckpointError(f"{self.path}: the header is a JSON {type(header).__name__}, not an object")
        header.pop("__metadata__", None)
        return header

    def _checked(self, header: dict[str, Any], data_start: int, size: int) -> dict[str, TensorInfo]:
        tensors = sorted((self._info(name, entry, data_start) for name, entry in header.items()),
                         key=lambda info: (info.start, info.end))  # fmt: skip
        position = data_start
        for info in tensors:
            if info.start != position:
                raise CheckpointError(
                    f"{self.path}: {shown(info.name)} starts at byte {info.start}, the data before it "
                    f"ends at {position}; the header is wrong, download it again"
                )
            position = info.end
        if position != size:
            raise CheckpointError(
                f"{self.path}: the header says {position} bytes, the file has {size}; download it again"
            )
        return {info.name: info for info in tensors}

    def _info(self, name: str, entry: Any, data_start: int) -> TensorInfo:
        def refuse(what: str) -> CheckpointError:
            return CheckpointError(f"{self.path}: {shown(name)}: {what}; download it again")

        if not isinstance(entry, dict):
            raise refuse("its header entry is not an object")
        dtype_name, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
            raise refuse(f"dtype {reprlib.repr(dtype_name)} is unknown")
        if not _is_counts(shape) or len(shape) > MAX_DIMENSIONS:
            raise refuse(f"shape {reprlib.repr(shape)} is not a list of sizes")
        if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise refuse(f"data_offsets {reprlib.repr(offsets)} are not two rising positions")
        # torch multiplies the extents around a zero too.
        if math.prod(max(extent, 1) for extent in shape) > MAX_COUNT:
            raise refuse(f"shape {shape} is larger than any memory")
        values = _VALUES.get(dtype_name, 1)
        if values > 1 and (not shape or shape[-1] % values):
            raise refuse(f"{dtype_name} {shape} has half a byte at its end")
        elements = (*shape[:-1], shape[-1] // values) if values > 1 else tuple(shape)
        needed = math.prod(elements) * DTYPES[dtype_name].itemsize
        if needed != offsets[1] - offsets[0]:
            raise refuse(
                f"{dtype_name} {shape} needs {needed} bytes, its offsets hold {offsets[1] - offsets[0]}"
            )
        return TensorInfo(name, dtype_name, elements, data_start + offsets[0], data_start + offsets[1])

    def read(self, name: str) -> Tensor:
        """A tensor in the stored dtype, on the CPU."""
        info = self.tensors[name]
        tensor = torch.empty(info.shape, dtype=info.dtype)
        self.read_into(name, tensor)
        return tensor

    def read_into(self, name: str, target: Tensor, offset: int = 0) -> None:
        """Fill `target` (CPU, contiguous, the stored dtype) with a tensor's bytes from `offset` on."""
        info = self.tensors[name]
        length = target.numel() * target.element_size()
        assert offset + length <= info.num_bytes
        assert target.is_contiguous() and target.dtype == info.dtype and target.device.type == "cpu"
        view = target.view(-1).view(torch.uint8).numpy().data.cast("B") if length else memoryview(b"")
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(info.start + offset)
                done = 0
                while done < length:
                    count = file.readinto(view[done:])
                    if not count:
                        raise CheckpointError(
                            f"{self.path}: ends inside {shown(name)} at byte {info.start + offset + done}; "
                            "download it again"
                        )
                    done += count
        except OSError as error:
            raise CheckpointError(f"{self.path}: {shown(name)} cannot be read ({error.strerror})") from None


def shown(name: str) -> str:
    """A name found in a file, fit for a one-line message: escaped or cut where it must be."""
    return name if name.isprintable() and len(name) <= 200 else ascii(name[:200])


def _is_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item <= MAX_COUNT for item in value
    )


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written: its header entry now, its values (whole, or in bands) when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    values: Callable[[], Tensor | Iterator[Tensor]]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, tensors: Iterable[PlannedTensor], *, alignment: int = 8) -> None:
    """Write a file holding one tensor's values in memory at a time. Not atomic by itself.

    The header is padded so that the data begins at a multiple of `alignment` bytes.
    """
    planned = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in planned:
        end = position + tensor.num_bytes
        dtype_name, shape = DTYPE_NAMES[tensor.dtype], list(tensor.shape)
        if dtype_name in _VALUES:
            shape[-1] *= _VALUES[dtype_name]
        header[tensor.name] = {
            "dtype": dtype_name,
            "shape": shape,
            "data_offsets": [position, end],
        }
        position = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-(8 + len(raw)) % alignment)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little"))
        file.write(raw)
        for tensor in planned:
            made = tensor.values()
            written = 0
            for values in [made] if isinstance(made, Tensor) else made:
                band = values.detach().to("cpu").contiguous()
                assert band.dtype == tensor.dtype and band.shape[1:] == tensor.shape[1:], tensor.name
                if band.numel():
                    file.write(band.view(-1).view(torch.uint8).numpy().data)
                written += band.numel() * band.element_size()
                del values, band  # before the next one is made
            assert written == tensor.num_bytes, tensor.name
            del made
        file.flush()
        os.fsync(file.fileno())
