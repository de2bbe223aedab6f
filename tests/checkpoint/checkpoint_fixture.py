"""What the checkpoint tests share: stored directories to damage, and how a refusal must look."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glm5.checkpoint import save_model
from glm5.disk.safetensors_file import PlannedTensor, SafetensorsFile, write_safetensors
from glm5.errors import Glm5Error
from glm5.model.transformer import GlmForCausalLM
from tests.model_fixture import tiny_model

Tensors = dict[str, Tensor]
SHARD = 150_000  # bytes: five shards of the tiny model in bf16
FIRST = "model-00001-of-00005.safetensors"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model in one bf16 file, in bf16 shards and in FP8."""
    places = {name: tmp_path_factory.mktemp(name) for name in ("bf16", "shards", "fp8")}
    save_model(tiny_model(), places["bf16"], stored="bf16")
    save_model(tiny_model(), places["shards"], stored="bf16", shard_bytes=SHARD)
    save_model(tiny_model(), places["fp8"], stored="fp8")
    return places


@pytest.fixture
def copy_of(stored: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(stored[name], tmp_path / name))


@contextmanager
def refused(error: type[Glm5Error], *words: object) -> Iterator[None]:
    """The block raises exactly `error`, in one printable line that holds every word."""
    with pytest.raises(Glm5Error) as caught:
        yield
    message = str(caught.value)
    assert caught.type is error, message
    assert message.isprintable() and len(message) < 2000, message  # a newline is not printable
    for word in words:
        assert str(word) in message


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor; NaNs compare equal in them."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def assert_same_bits(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype), name
        assert torch.equal(bits(found[name]), bits(tensor)), name


def write(path: Path, tensors: Tensors) -> None:
    write_safetensors(
        path, [PlannedTensor(name, t.dtype, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()]
    )


def read(path: Path) -> Tensors:
    file = SafetensorsFile(path)
    return {name: file.read(name) for name in file.tensors}


def with_tensors(directory: Path, change: Callable[[Tensors], None]) -> None:
    """Rewrite `model.safetensors` with `change` made to its tensors."""
    path = directory / "model.safetensors"
    tensors = read(path)
    change(tensors)
    write(path, tensors)


def with_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite a JSON file with `change` made to it."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def weights(model: GlmForCausalLM) -> Tensors:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
