"""Where float weights come from: a checkpoint directory of any readable kind, or a GGUF file.

Both answer the same four questions, by Hugging Face names and a tensor (or a band of rows) at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from glm5.checkpoint.gguf import GgufFile, GgufModel, tokenizer_files
from glm5.checkpoint.names import Piece, fused_name, pieces
from glm5.checkpoint.reading import check_leftovers, stored_weights
from glm5.config import ModelConfig
from glm5.errors import CheckpointError, TokenizerError
from glm5.model.transformer import GlmForCausalLM

# Rows of a tensor that is only copied are read in bands of about this size.
BAND_BYTES = 64 << 20
_PLAIN = (torch.float32, torch.float16, torch.bfloat16)
_SIDE_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "vocab.json", "merges.txt", "LICENSE", "glm5_chat.json",
)  # fmt: skip


class WeightSource(Protocol):
    config: ModelConfig
    path: Path

    def shape(self, name: str) -> tuple[int, ...]: ...
    def num_bytes(self, name: str) -> int: ...
    def dtype(self, name: str) -> torch.dtype:
        """What the tensor has or decodes to: fp32, fp16 or bf16."""
        ...

    def read(self, name: str) -> Tensor: ...
    def bands(self, name: str) -> Iterator[Tensor]: ...
    def identity(self) -> list[object]:
        """What must be the same for a half-done job to go on."""
        ...

    def side_files(self) -> dict[str, bytes]: ...
    def check_leftovers(self, names: list[str]) -> None:
        """Raise CheckpointError when a stored tensor belongs to none of these weights."""
        ...


class DirectorySource:
    """bf16, fp16, fp32, FP8 and every form of `glm5.checkpoint.formats`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self._stored = stored_weights(path)
        # Experts of a layer that are stored as one bank, as `transformers` holds them in memory.
        self._banks: dict[str, tuple[str, Piece]] = {}
        for piece in pieces(meta_model(self.config)):
            bank = fused_name(piece, self.config)
            if bank is not None and bank in self._stored.index and self._stored.names(piece.name) is None:
                self._banks[piece.name] = (bank, piece)

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._banks:
            bank, piece = self._banks[name]
            return tuple(piece.of(torch.empty(self._stored.shape(bank), device="meta")).shape)
        self._parts(name)
        return self._stored.shape(name)

    def num_bytes(self, name: str) -> int:
        if name in self._banks:
            return math.prod(self.shape(name)) * self._stored.index[self._banks[name][0]].dtype.itemsize
        return sum(self._stored.index[part].num_bytes for part in self._parts(name))

    def dtype(self, name: str) -> torch.dtype:
        part = self._banks[name][0] if name in self._banks else self._parts(name)[0]
        if self._stored.is_formed(name):
            return torch.bfloat16
        dtype = self._stored.index[part].dtype
        return dtype if dtype in _PLAIN else torch.float32 if dtype == torch.float64 else torch.bfloat16

    def read(self, name: str) -> Tensor:
        if name in self._banks:
            return self._from_bank(*self._banks[name]).to(self.dtype(name))
        values = torch.empty(self.shape(name), dtype=self.dtype(name))
        self._stored.fill(name, values)
        return values

    def bands(self, name: str) -> Iterator[Tensor]:
        index = self._stored.index
        plain = name in index and not self._stored.is_formed(name) and index[name].dtype == self.dtype(name)
        if not plain or index[name].num_bytes <= BAND_BYTES:
            yield self.read(name)
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
        return {path.name: path.read_bytes() for path in found if path.is_file()}

    def check_leftovers(self, names: list[str]) -> None:
        used = {bank for bank, _ in self._banks.values()}
        for name in names:
            used.update([] if name in self._banks else self._parts(name))
        check_leftovers(self._stored.index, used, self.config)

    def _from_bank(self, bank: str, piece: Piece) -> Tensor:
        """An expert's part of a bank: one run of bytes."""
        info = self._stored.index[bank]
        expert, rows = piece.part[0], piece.part[1] if len(piece.part) > 1 else slice(0, info.shape[1])
        assert isinstance(expert, int) and isinstance(rows, slice)
        row_bytes = info.shape[2] * info.dtype.itemsize
        values = torch.empty(rows.stop - rows.start, info.shape[2], dtype=info.dtype)
        offset = (expert * info.shape[1] + rows.start) * row_bytes
        self._stored.index.file(bank).read_into(bank, values, offset)
        return values

    def _parts(self, name: str) -> list[str]:
        parts = self._stored.names(name)
        if parts is None:
            raise CheckpointError(f"{self.path}: {name} is missing; config.json asks for it")
        return parts


def meta_model(config: ModelConfig) -> GlmForCausalLM:
    with torch.device("meta"):
        return GlmForCausalLM(config)


class GgufSource:
    """A GGUF of a GLM architecture; its blocks are decoded to bf16 (vectors to fp32)."""

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
        return self._model.read(name).to(self.dtype(name))

    def bands(self, name: str) -> Iterator[Tensor]:
        yield self.read(name)

    def check_leftovers(self, names: list[str]) -> None:
        pass  # GgufModel leaves none over

    def identity(self) -> list[object]:
        stat = self.path.stat()
        return [str(self.path.resolve()), stat.st_size, stat.st_mtime_ns]

    def side_files(self) -> dict[str, bytes]:
        try:
            return tokenizer_files(self._file)
        except (CheckpointError, TokenizerError):
            return {}  # a vocabulary that is no byte-level BPE: the weights are of use all the same


def open_source(path: Path) -> WeightSource:
    """A directory, or a `.gguf` file (of split ones the first)."""
    if path.is_file() and path.suffix == ".gguf":
        return GgufSource(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory or .gguf file")
    return DirectorySource(path)
