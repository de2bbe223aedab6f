"""The header of one GGUF file: metadata and tensor list, each number checked before it is believed.

Layout, little endian (GGUF specification, ggml/docs/gguf.md): "GGUF", u32 version, u64 number of
tensors, u64 number of keys; for each key its name, u32 value type, value; for each tensor its name,
u32 number of extents, u64 extents (innermost first), u32 block type, u64 offset into the data, which
begins at the next multiple of the alignment. A string is a u64 length and UTF-8.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np

from glm5.checkpoint.gguf.blocks import TYPES, BlockType
from glm5.disk.safetensors_file import shown
from glm5.errors import CheckpointError

Value: TypeAlias = "bool | int | float | str | list[Value]"

VERSIONS = (2, 3)
# Several times the largest published headers (vocabularies of 260,000 tokens: 20 MB, 1.3 million
# array members, 2,000 tensors), so that a lie costs little memory and time.
MAX_HEADER_BYTES = 64 << 20
MAX_MEMBERS = 1 << 22
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_NAME_BYTES = 1024
MAX_DIMENSIONS = 4
MAX_NESTING = 4
# torch counts elements in an int64.
MAX_COUNT = 1 << 62
DEFAULT_ALIGNMENT = 32

_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8",
            12: "<f8"}  # fmt: skip
_WIDTHS = {kind: np.dtype(code).itemsize for kind, code in _NUMBERS.items()} | {_BOOL: 1}
# The fewest bytes a member can take: a string's length, an array's type and count.
_LEAST = _WIDTHS | {_STRING: 8, _ARRAY: 12}


@dataclass(frozen=True)
class GgufTensor:
    """What the header says of a tensor, in torch's order: [out, in], [experts, out, in] for a bank.

    `start` and `end` are byte positions in `path`.
    """

    name: str
    shape: tuple[int, ...]
    type: BlockType
    path: Path
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start

    def cut(self, first: int, last: int) -> GgufTensor:
        """Entries `first` to `last` of the outermost dimension, a tensor of the same rank."""
        assert len(self.shape) > 1 and 0 <= first < last <= self.shape[0]
        each = self.num_bytes // self.shape[0]
        shape = (last - first, *self.shape[1:])
        start = self.start + first * each
        return GgufTensor(self.name, shape, self.type, self.path, start, start + (last - first) * each)

    def entry(self, index: int) -> GgufTensor:
        """Entry `index` of the outermost dimension, without it: one expert of a bank."""
        part = self.cut(index, index + 1)
        return GgufTensor(self.name, part.shape[1:], self.type, self.path, part.start, part.end)


@dataclass(frozen=True)
class Header:
    """One file's header; tensors are in the order of their data."""

    path: Path
    version: int
    alignment: int
    metadata: dict[str, Value]
    tensors: list[GgufTensor]


def read_header(path: Path) -> Header:
    """Read and check a file's header.

    Raises:
        CheckpointError: the file is missing, not GGUF, cut short, or its header contradicts itself
            or the file; the message names the file, the key or tensor and the byte.
    """
    try:
        with path.open("rb", buffering=1 << 18) as file:
            return _Parser(path, file, path.stat().st_size).header()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; download it again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


class _Parser:
    """Walks through a header; knows where it is and what it is reading, for messages."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size
        self.position = 0
        self.members = 0
        self.where = "the header"

    def header(self) -> Header:
        version = self._version()
        num_tensors, num_keys = self.u64(), self.u64()
        self.check_count(num_tensors, 24, MAX_TENSORS, "tensors")
        self.check_count(num_keys, 13, MAX_KEYS, "keys")
        metadata = self._metadata(num_keys)
        alignment = self._alignment(metadata)
        described = self._tensors(num_tensors, alignment)
        data_start = -(-self.position // alignment) * alignment
        return Header(self.path, version, alignment, metadata, self._placed(described, data_start))

    # --- parts, in the order of the file ------------------------------------------------------

    def _version(self) -> int:
        magic = self.take(4)
        if magic != b"GGUF":
            raise CheckpointError(
                f"{self.path}: begins with {ascii(magic)[1:]}, not with 'GGUF'; it is another format"
            )
        raw = self.take(4)
        version = int.from_bytes(raw, "little")
        if version in VERSIONS:
            return version
        if int.from_bytes(raw, "big") in VERSIONS:
            raise CheckpointError(f"{self.path}: is a big-endian GGUF file; convert it to little endian")
        raise CheckpointError(
            f"{self.path}: is GGUF version {version}, glm5 reads 2 and 3; "
            + ("convert the model again" if version == 1 else "it needs a newer glm5, or is damaged")
        )

    def _metadata(self, count: int) -> dict[str, Value]:
        metadata: dict[str, Value] = {}
        for index in range(count):
            self.where = f"key {index + 1} of {count}"
            key = self.text(MAX_NAME_BYTES)
            self.where = f"key {shown(key)}"
            if key in metadata:
                raise self.refuse("stands twice in the header")
            metadata[key] = self.value(self.u32())
        return metadata

    def _alignment(self, metadata: dict[str, Value]) -> int:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment < 1 << 32 or alignment & (alignment - 1):
            self.where = "key general.alignment"
            raise self.refuse("is not a power of two")
        return alignment

    def _tensors(self, count: int, alignment: int) -> list[tuple[str, tuple[int, ...], BlockType, int]]:
        """Name, shape, type and offset of each tensor; offsets are not yet checked against the file."""
        found: dict[str, tuple[str, tuple[int, ...], BlockType, int]] = {}
        for index in range(count):
            self.where = f"tensor {index + 1} of {count}"
            name = self.text(MAX_NAME_BYTES)
            self.where = shown(name)
            if name in found:
                raise self.refuse("stands twice in the header")
            shape = self._shape()
            number = self.u32()
            if number not in TYPES:
                raise CheckpointError(
                    f"{self.path}: {self.where} has the unknown type {number}; use a copy in another type"
                )
            kind = TYPES[number]
            row = shape[-1] if shape else 1
            if row % kind.elements:
                raise self.refuse(f"{kind.name} has {kind.elements} weights a block, its rows have {row}")
            offset = self.u64()
            if offset % alignment:
                raise self.refuse(f"offset {offset} is not a multiple of the alignment {alignment}")
            found[name] = name, shape, kind, offset
        return list(found.values())

    def _shape(self) -> tuple[int, ...]:
        dimensions = self.u32()
        if dimensions > MAX_DIMENSIONS:
            raise self.refuse(f"{dimensions} dimensions, the format has at most {MAX_DIMENSIONS}")
        shape = tuple(reversed([self.u64() for _ in range(dimensions)]))
        if 0 in shape:
            raise self.refuse(f"shape {list(shape)} is empty")
        if math.prod(shape) > MAX_COUNT:
            raise self.refuse(f"shape {list(shape)} is larger than any memory")
        return shape

    def _placed(
        self, described: list[tuple[str, tuple[int, ...], BlockType, int]], data_start: int
    ) -> list[GgufTensor]:
        tensors: list[GgufTensor] = []
        end_of_last = 0
        for name, shape, kind, offset in sorted(described, key=lambda entry: entry[3]):
            start = data_start + offset
            end = start + math.prod(shape) // kind.elements * kind.bytes
            if end > self.size:
                raise CheckpointError(
                    f"{self.path}: {shown(name)} ends at byte {end}, the file has {self.size}; "
                    "download it again"
                )
            if start < end_of_last:
                raise CheckpointError(
                    f"{self.path}: {shown(name)} starts at byte {start}, inside "
                    f"{shown(tensors[-1].name)}; download it again"
                )
            tensors.append(GgufTensor(name, shape, kind, self.path, start, end))
            end_of_last = end
        return tensors

    # --- values -------------------------------------------------------------------------------

    def value(self, kind: int, nesting: int = 0) -> Value:
        if kind == _STRING:
            return self.text(MAX_HEADER_BYTES)
        if kind == _ARRAY:
            return self._array(nesting)
        if kind not in _WIDTHS:
            raise self.refuse(f"value type {kind} is unknown")
        return self._numbers(kind, 1)[0]

    def _array(self, nesting: int) -> list[Value]:
        if nesting == MAX_NESTING:
            raise self.refuse(f"has arrays nested more than {MAX_NESTING} deep")
        kind, count = self.u32(), self.u64()
        if kind not in _LEAST:
            raise self.refuse(f"value type {kind} is unknown")
        self.check_count(count, _LEAST[kind], MAX_MEMBERS - self.members, "array members")
        self.members += count
        if kind in _WIDTHS:
            return self._numbers(kind, count)
        return [self.value(kind, nesting + 1) for _ in range(count)]

    def _numbers(self, kind: int, count: int) -> list[Value]:
        raw = self.take(count * _WIDTHS[kind])
        if kind != _BOOL:
            found: list[Value] = np.frombuffer(raw, dtype=_NUMBERS[kind]).tolist()
            return found
        if raw.strip(b"\0\1"):
            raise self.refuse("a bool is neither 0 nor 1")
        return [byte == 1 for byte in raw]

    def text(self, limit: int) -> str:
        length = self.u64()
        self.check_count(length, 1, limit, "bytes of text")
        raw = self.take(length)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.refuse(f"text is not UTF-8 at its byte {error.start}") from None

    def u32(self) -> int:
        return int(struct.unpack("<I", self.take(4))[0])

    def u64(self) -> int:
        return int(struct.unpack("<Q", self.take(8))[0])

    # --- bytes --------------------------------------------------------------------------------

    def check_count(self, count: int, each: int, limit: int, what: str) -> None:
        """Refuse a count that the limit or the rest of the file forbids, before acting on it."""
        if count > limit:
            raise self.refuse(f"says {count} {what}, at most {limit} are possible here")
        if count * each > self.size - self.position:
            raise self.refuse(f"says {count} {what}, the file ends after {self.size - self.position} bytes")

    def take(self, count: int) -> bytes:
        if self.position + count > MAX_HEADER_BYTES:
            raise self.refuse(f"the header is longer than {MAX_HEADER_BYTES >> 20} MiB")
        raw = self.file.read(count)
        if len(raw) < count:
            raise self.refuse("the file ends here")
        self.position += count
        return raw

    def refuse(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: byte {self.position}: {self.where}: {what}; download it again")
