"""The calibration tokens on their way through the layers: hidden states, and what the next layer needs.

Windows are read one by one; letters: N tokens of all windows together, T of one, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from glm5.config import ModelConfig
from glm5.disk.files import atomic_path
from glm5.formats.packed import Scheme
from glm5.formats.packing import dequantize
from glm5.layers.loading import round_finite
from glm5.model.indexer import Selection
from glm5.model.masks import Visibility
from glm5.model.rotary import rotation
from glm5.model.step import Step
from glm5.quantize.results import read_tensors, write_tensors
from glm5.quantize.sources import WeightSource


@dataclass
class Hidden:
    """x: fp32 [N, D]. lengths: tokens of each window. selections: by window, for layers that share one."""

    x_ND: Tensor
    lengths: list[int]
    selections: dict[int, Selection] = field(default_factory=dict)

    def windows(self) -> Iterator[tuple[int, slice]]:
        at = 0
        for number, length in enumerate(self.lengths):
            yield number, slice(at, at + length)
            at += length

    def save(self, path: Path) -> None:
        tensors = {"x": self.x_ND, "lengths": torch.tensor(self.lengths)}
        tensors |= {f"selection.{n}": found.mask_BTS for n, found in self.selections.items()}
        with atomic_path(path) as temporary:
            write_tensors(temporary, tensors)

    @classmethod
    def load(cls, path: Path, config: ModelConfig) -> Hidden:
        tensors = read_tensors(path)
        hidden = cls(tensors.pop("x"), tensors.pop("lengths").tolist())
        for name, mask in tensors.items():
            hidden.selections[int(name.removeprefix("selection."))] = Selection(mask, config.index_topk or 0)
        return hidden


def step_of(length: int, config: ModelConfig) -> Step:
    """A pass over a window [1, T] by itself, under the causal rule."""
    angles = rotation(torch.arange(length).unsqueeze(0), config.rotary_dim, config.rope_theta)
    return Step(angles, Visibility(length, is_causal=True))


def embedded(source: WeightSource, ids: Tensor, scheme: Scheme | None) -> Tensor:
    """fp32 [N, D]: the rows of the embedding as the result will have them; it is never held whole."""
    name = "model.embed_tokens.weight"
    out = torch.empty(len(ids), source.config.hidden_size)
    first = 0
    for band in source.rows(name):
        here = (ids >= first) & (ids < first + len(band))
        out[here] = band[ids[here] - first].float()
        first += len(band)
    if scheme is None:
        return out
    rounded = round_finite(out, scheme, name, source.path)
    return dequantize(rounded.words, rounded.scales, scheme.bits, out.shape[1])
