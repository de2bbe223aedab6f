"""Where float weights come from: a checkpoint directory of any readable kind, or a GGUF file.

Both answer the same four questions, by Hugging Face names and a tensor (or a band of rows) at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from glm5.checkpoint.directory import Checkpoint
from glm5.checkpoint.gguf import GgufFile, GgufModel, tokenizer_files
from glm5.checkpoint.weights import check_leftovers
from glm5.config import ModelConfig
from glm5.disk.json_file import read_bytes
from glm5.errors import CheckpointError, TokenizerError
from glm5.model.transformer import GlmForCausalLM

# Rows of a tensor that is only copied are read in bands of about this size.
BAND_BYTES = 64 << 20
_SIDE_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "vocab.json", "merges.txt", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE",
    "glm5_chat.json",
)  # fmt: skip
_SIDE_BYTES = 256 << 20

logger = logging.getLogger(__name__)


class WeightSource(Protocol):
    config: ModelConfig
    path: Path

    def shape(self, name: str) -> tuple[int, ...]: ...
    def num_bytes(self, name: str) -> int: ...
    def dtype(self, name: str) -> torch.dtype:
        """What a copy of the tensor is written as: fp32, fp16 or bf16."""
        ...

    def read(self, name: str) -> Tensor:
        """The values to round, in a dtype that loses none of their bits."""
        ...

    def rows(self, name: str) -> Iterator[Tensor]:
        """The same in bands of rows, where that spares memory."""
        ...

    def bands(self, name: str) -> Iterator[Tensor]:
        """The rows to copy, in `dtype`."""
        ...

    def identity(self) -> list[object]:
        """What must be the same for a half-done job to go on."""
        ...

    def side_files(self) -> dict[str, bytes]: ...
    def check_leftovers(self, names: list[str]) -> None:
        """Raise CheckpointError when a stored tensor belongs to none of these weights."""
        ...


class DirectorySource:
    """bf16, fp16, fp32, FP8 and every form of `glm5.formats`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        checkpoint = Checkpoint(path)
        self.config, self._stored = checkpoint.config, checkpoint.weights

    def shape(self, name: str) -> tuple[int, ...]:
        self._parts(name)
        return self._stored.shape(name)

    def num_bytes(self, name: str) -> int:
        self._parts(name)
        return self._stored.num_bytes(name)

    def dtype(self, name: str) -> torch.dtype:
        self._parts(name)
        # What the result's config.json names; fp32 would take twice the space for bits that few readers use.
        return torch.bfloat16 if self._stored.is_decoded(name) else self._stored.dtype(name)

    def read(self, name: str) -> Tensor:
        self._parts(name)
        return self._stored.read(name)

    def rows(self, name: str) -> Iterator[Tensor]:
        if self._stored.dtype(name) == self.dtype(name):
            yield from self.bands(name)
        else:
            yield self.read(name)

    def bands(self, name: str) -> Iterator[Tensor]:
        index = self._stored.index
        plain = name in index and not self._stored.is_decoded(name) and index[name].dtype == self.dtype(name)
        if not plain or index[name].num_bytes <= BAND_BYTES:
            copy = torch.empty(self.shape(name), dtype=self.dtype(name))
            self._stored.fill(name, copy)
            yield copy
            return
        shape, dtype = index[name].shape, index[name].dtype
        row_bytes = index[name].num_bytes // shape[0]
        rows = max(1, BAND_BYTES // row_bytes)
        for first in range(0, shape[0], rows):
            band = torch.empty(min(rows, shape[0] - first), *shape[1:], dtype=dtype)
            index.file(name).read_into(name, band, first * row_bytes)
            yield band

    def identity(self) -> list[object]:
        files = sorted(self.path.glob("*.safetensors"))
        return [str(self.path.resolve()), [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]]

    def side_files(self) -> dict[str, bytes]:
        found = [self.path / name for name in _SIDE_FILES]
        return {path.name: self._side_file(path) for path in found if path.exists()}

    def _side_file(self, path: Path) -> bytes:
        """Its bytes. A link may lead to a file of the same name or to the blobs of a hub cache; another would
        carry a private file into what is given on.
        """
        place = path.resolve()
        if place.name != path.name and place.parent.name != "blobs":
            raise CheckpointError(f"{path}: is a link out of the checkpoint; put the file itself there")
        return read_bytes(path, limit=_SIDE_BYTES)

    def check_leftovers(self, names: list[str]) -> None:
        used = {part for name in names for part in self._parts(name)}
        check_leftovers(self._stored.index, used, self.config)

    def _parts(self, name: str) -> list[str]:
        return self._stored.parts(name)


def meta_model(config: ModelConfig) -> GlmForCausalLM:
    with torch.device("meta"):
        return GlmForCausalLM(config)


class GgufSource:
    """A GGUF of a GLM architecture; matrices are copied as bf16, vectors as fp32."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GgufFile(path)
        self._model = GgufModel(self._file)
        self.config = self._model.config

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._model.shape(name))

    def num_bytes(self, name: str) -> int:
        return self._model.num_bytes(name)

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16 if len(self.shape(name)) == 2 else torch.float32

    def read(self, name: str) -> Tensor:
        return self._model.read(name)

    def rows(self, name: str) -> Iterator[Tensor]:
        yield self.read(name)

    def bands(self, name: str) -> Iterator[Tensor]:
        yield self.read(name).to(self.dtype(name))

    def check_leftovers(self, names: list[str]) -> None:
        pass  # GgufModel leaves none over

    def identity(self) -> list[object]:
        stat = self.path.stat()
        return [str(self.path.resolve()), stat.st_size, stat.st_mtime_ns]

    def side_files(self) -> dict[str, bytes]:
        try:
            return tokenizer_files(self._file)
        except (CheckpointError, TokenizerError) as error:  # the weights are of use all the same
            logger.warning("no tokenizer is written: %s", error)
            return {}


def open_source(path: Path) -> WeightSource:
    """A directory, or a `.gguf` file (of split ones the first)."""
    if path.is_file() and path.suffix.lower() == ".gguf":
        return GgufSource(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory or .gguf file")
    return DirectorySource(path)
