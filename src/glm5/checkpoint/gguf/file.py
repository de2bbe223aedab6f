"""A GGUF file, or a set of split ones, open for reading: metadata, tensors, fp32 values.

Only the bytes that are asked for are read, a few megabytes at a time, so that memory holds the
result and little else. The header's layout is known to `header`, the blocks' to `blocks`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from torch import Tensor

from glm5.checkpoint.gguf.blocks import DECODED
from glm5.checkpoint.gguf.header import GgufTensor, Header, Value, read_header
from glm5.disk.safetensors_file import shown
from glm5.errors import CheckpointError

# Weights decoded at a time: the intermediate values stay in the processor's cache.
_CHUNK = 1 << 18
_SPLIT_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


class GgufFile:
    """Metadata and tensors of a GGUF file; of all parts when it is the first of a split model.

    metadata: of the (first) file. Numbers are int or float, arrays are lists.
    tensors: every tensor by name, in file order.

    Raises:
        CheckpointError: a file is missing, cut short, not GGUF, or contradicts itself or the other
            parts; the message names the file, the key or tensor and the byte.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        headers = _parts(read_header(self.path))
        self.version = headers[0].version
        self.alignment = headers[0].alignment
        self.metadata: dict[str, Value] = headers[0].metadata
        self.tensors: dict[str, GgufTensor] = {}
        for header in headers:
            for tensor in header.tensors:
                if tensor.name in self.tensors:
                    raise CheckpointError(
                        f"{header.path}: {shown(tensor.name)} stands in "
                        f"{self.tensors[tensor.name].path.name} too; download both again"
                    )
                self.tensors[tensor.name] = tensor

    @property
    def architecture(self) -> str:
        """What llama.cpp calls the network: `glm-dsa`, `glm4moe`, `llama`, ..."""
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str):
            raise CheckpointError(f"{self.path}: has no key general.architecture; convert the model again")
        return name

    def tensor(self, name: str) -> GgufTensor:
        """What the header says of a tensor; CheckpointError when there is none of that name."""
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: has no tensor {shown(name)}") from None

    def read(self, name: str, rows: slice | None = None, *, expert: int | None = None) -> Tensor:
        """A tensor's values, fp32 on the CPU, in torch's order [out, in].

        expert: one matrix of a bank [experts, out, in].
        rows: of a matrix, with a slice's usual meaning; steps are not supported.
        """
        tensor = self.tensor(name)
        if expert is not None:
            if len(tensor.shape) != 3 or not 0 <= expert < tensor.shape[0]:
                raise CheckpointError(
                    f"{tensor.path}: {shown(name)} has shape {list(tensor.shape)}, no expert {expert}"
                )
            tensor = tensor.entry(expert)
        if rows is not None:
            if len(tensor.shape) != 2:
                raise CheckpointError(
                    f"{tensor.path}: {shown(name)} has shape {list(tensor.shape)}; rows are of matrices"
                )
            first, last, step = rows.indices(tensor.shape[0])
            if step != 1:
                raise ValueError(f"rows must be a slice without a step, not {rows}")
            if last <= first:
                return torch.empty(0, tensor.shape[1])
            tensor = tensor.cut(first, last)
        return read_tensor(tensor)


def read_tensor(tensor: GgufTensor) -> Tensor:
    """The values of a tensor or a part of one, fp32 on the CPU.

    Raises:
        CheckpointError: the type has no decoder, the file ends early, or a scale is NaN or infinite.
    """
    kind = tensor.type
    require_decoder(tensor)
    values = torch.empty(tensor.shape)
    flat = values.view(-1, kind.elements)
    blocks_at_once = max(1, _CHUNK // kind.elements)
    buffer = torch.empty(min(len(flat), blocks_at_once) * kind.bytes, dtype=torch.uint8)
    try:
        with tensor.path.open("rb", buffering=0) as file:
            file.seek(tensor.start)
            for target in flat.split(blocks_at_once):
                raw = buffer[: len(target) * kind.bytes]
                view = raw.numpy().data.cast("B")
                done = 0
                while done < len(view):
                    count = file.readinto(view[done:])
                    if not count:
                        raise CheckpointError(
                            f"{tensor.path}: ends inside {shown(tensor.name)} at byte {file.tell()}; "
                            "download it again"
                        )
                    done += count
                target.copy_(kind.decode(raw.view(len(target), kind.bytes)))
                if kind.has_scales and not bool(torch.isfinite(target).all()):
                    raise CheckpointError(
                        f"{tensor.path}: {shown(tensor.name)} holds a NaN or infinite scale before byte "
                        f"{file.tell()}; download it again"
                    )
    except OSError as error:
        raise CheckpointError(
            f"{tensor.path}: {shown(tensor.name)} cannot be read ({error.strerror})"
        ) from None
    return values


def require_decoder(tensor: GgufTensor) -> None:
    """Raise CheckpointError naming tensor and type when its values cannot be read."""
    if not tensor.type.is_decoded:
        raise CheckpointError(
            f"{tensor.path}: {shown(tensor.name)} is stored as {tensor.type.name}, which glm5 does not "
            f"read; use a copy in {', '.join(DECODED)}"
        )


# --- split models -----------------------------------------------------------------------------------


def _parts(first: Header) -> list[Header]:
    """The headers of a split model, given its first; of one file, when it is whole."""
    count = _split_value(first, "split.count", 1)
    if count <= 1:
        return [first]
    name = _SPLIT_NAME.fullmatch(first.path.name)
    if name is None or int(name[3]) != count:
        raise CheckpointError(
            f"{first.path}: is part of a model in {count} files; "
            f"give it back its name, which ends in -00001-of-{count:05d}.gguf"
        )
    if _split_value(first, "split.no", 0) != 0 or int(name[2]) != 1:
        raise CheckpointError(
            f"{first.path}: is not the first part; open {name[1]}-00001-of-{count:05d}.gguf"
        )
    headers = [first]
    for number in range(1, count):
        header = read_header(first.path.with_name(f"{name[1]}-{number + 1:05d}-of-{count:05d}.gguf"))
        if (_split_value(header, "split.count", 1), _split_value(header, "split.no", 0)) != (count, number):
            raise CheckpointError(
                f"{header.path}: does not say it is part {number + 1} of {count}; download it again"
            )
        headers.append(header)
    found = sum(len(header.tensors) for header in headers)
    if _split_value(first, "split.tensors.count", found) != found:
        raise CheckpointError(
            f"{first.path}: says {first.metadata['split.tensors.count']} tensors in {count} files, "
            f"they hold {found}; download them again"
        )
    return headers


def _split_value(header: Header, key: str, default: int) -> int:
    value = header.metadata.get(key, default)
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise CheckpointError(f"{header.path}: key {key} is not a count; download it again")
    return value
