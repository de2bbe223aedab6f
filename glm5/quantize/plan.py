"""What becomes of every weight of a source, known from headers alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from glm5.checkpoint import names
from glm5.errors import CheckpointError
from glm5.kernels.modules import Scheme
from glm5.kernels.packing import words_per_row
from glm5.quantize.recipe import Recipe
from glm5.quantize.sources import WeightSource, meta_model


@dataclass(frozen=True)
class Item:
    """A weight of the source and what becomes of it; `scheme` None = it is copied."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read_bytes: int
    scheme: Scheme | None
    is_expert: bool

    @property
    def written_bytes(self) -> int:
        if self.scheme is None:
            return math.prod(self.shape) * self.dtype.itemsize
        rows, columns = self.shape
        return rows * (words_per_row(columns, self.scheme.bits) * 4 + columns // self.scheme.group * 2) + 16


def plan(source: WeightSource, recipe: Recipe) -> list[Item]:
    """Every weight in model order. Reads headers only.

    Raises CheckpointError for what `load_model` would refuse, and for groups that fill no width.
    """
    model = meta_model(source.config)
    shapes = {name: tensor.shape for name, tensor in names.state_tensors(model).items()}
    linear = {
        names.disk_name(f"{path}.", source.config).removesuffix(".")
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    items = []
    for piece in names.pieces(model):
        module, shape = piece.name.removesuffix(".weight"), source.shape(piece.name)
        wanted = tuple(piece.of(torch.empty(shapes[piece.parameter], device="meta")).shape)
        if shape != wanted:
            raise CheckpointError(
                f"{source.path}: {piece.name} has shape {list(shape)}, config.json asks for {list(wanted)}"
            )
        expert = bool(piece.part)
        scheme = recipe.scheme_of(module) if expert or module in linear else None
        if scheme is not None and shape[1] % scheme.group:
            fitting = next((group for group in (128, 64, 32) if shape[1] % group == 0), None)
            advice = f"use --group {fitting}" if fitting else f"leave it out: --keep '{module}'"
            raise CheckpointError(
                f"{source.path}: {piece.name} is {shape[1]} wide, no whole groups of {scheme.group}; {advice}"
            )
        items.append(
            Item(piece.name, shape, source.dtype(piece.name), source.num_bytes(piece.name), scheme, expert)
        )
    source.check_leftovers([item.name for item in items])
    _refuse_parted_experts(items)
    return items


def _refuse_parted_experts(items: list[Item]) -> None:
    schemes: dict[str, Scheme | None] = {}
    for item in items:
        if item.is_expert:
            bank = item.name.rsplit(".", 3)[0]
            if schemes.setdefault(bank, item.scheme) != item.scheme:
                raise CheckpointError(
                    f"{item.name}: the recipe gives the experts of this layer different bits; "
                    "make its pattern fit all or none of them"
                )
