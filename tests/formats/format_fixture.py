"""What the format tests share: a stored weight, and what reading it must answer."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glm5.disk.shards import ShardIndex
from glm5.formats import Format, decoding, format_of
from tests.checkpoint.checkpoint_fixture import bits, write

MODULE = "model.layers.3.mlp.experts.7.gate_proj"
NAME = f"{MODULE}.weight"
CONFIG = Path("somewhere/config.json")


@contextmanager
def stored(tensors: Mapping[str, Tensor]) -> Iterator[ShardIndex]:
    """A directory that holds these tensors, by what stands after the module's name."""
    with tempfile.TemporaryDirectory() as place:
        named = {f"{MODULE}.{suffix}": tensor.clone(memory_format=torch.contiguous_format)
                 for suffix, tensor in tensors.items()}  # fmt: skip
        write(Path(place) / "model.safetensors", named)
        yield ShardIndex(Path(place))


def form(**settings: Any) -> Format:
    return format_of(settings, CONFIG)


def read_back(format: Format, tensors: Mapping[str, Tensor], unused: tuple[str, ...] = ()) -> Tensor:
    """The weight that `format` makes of these tensors, all of which it must know."""
    others = {suffix: torch.ones(1) for suffix in unused}
    with stored({**tensors, **others}) as index:
        names = format.stored_names(NAME, index)
        assert names is not None and sorted(names) == sorted(index.names)
        weight = format.read(NAME, index)
        assert weight.dtype == torch.float32 and format.shape(NAME, index) == tuple(weight.shape)
        check_parts(format, index, weight)
    return weight


def check_parts(format: Format, index: ShardIndex, weight: Tensor) -> None:
    """Rows read by themselves, and in small bands, are those of the whole."""
    rows, dice = weight.shape[0], random.Random(weight.numel())
    slices = [slice(dice.randint(-rows, rows), dice.randint(-rows, rows)) for _ in range(3)]
    for band in (1, 2 * weight.shape[1] + 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoding, "BAND", band)
            for part in (slice(None), slice(rows // 2, None), slice(0, 0), *slices):
                found = format.read(NAME, index, part)
                assert found.shape == weight[part].shape
                assert torch.equal(bits(found), bits(weight[part]))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pack(codes: list[int], width: int) -> list[int]:
    """One string of bits, the first code lowest, cut into signed words of 32 bits."""
    string = sum(code << width * place for place, code in enumerate(codes))
    count = -(-len(codes) * width // 32)
    return [signed(string >> 32 * word & 0xFFFFFFFF) for word in range(count)]


def signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
