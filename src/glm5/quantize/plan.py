"""What becomes of every weight of a source, known from headers alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import nn

from glm5.checkpoint import names
from glm5.errors import CheckpointError, RecipeError
from glm5.formats.packed import Scheme
from glm5.quantize.recipe import Recipe, fits, names_embedding, never_rounded
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
        return self.scheme.num_bytes(rows, columns) + 16  # two integers say the shape


def plan(source: WeightSource, recipe: Recipe) -> list[Item]:
    """Every weight in model order. Reads headers only.

    Raises:
        CheckpointError: `load_model` would refuse the source, or a group fills no width.
        RecipeError: a rule fits no module that can be quantized.
    """
    model = meta_model(source.config)
    shapes = {name: tensor.shape for name, tensor in names.state_tensors(model).items()}
    linear = {
        names.disk_name(f"{path}.", source.config).removesuffix(".")
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding))
    }
    linear = {module for module in linear if not never_rounded(module)}
    pieces = {piece.name.removesuffix(".weight"): piece for piece in names.pieces(model)}
    roundable = [module for module, piece in pieces.items() if piece.part or module in linear]
    # A tied head is a linear layer without a weight of its own.
    _refuse_idle_patterns(source.path, recipe, roundable, sorted({*pieces, *linear} - {*roundable}))
    items = []
    for module, piece in pieces.items():
        shape = source.shape(piece.name)
        wanted = tuple(piece.of(torch.empty(shapes[piece.parameter], device="meta")).shape)
        if shape != wanted:
            raise CheckpointError(
                f"{source.path}: {piece.name} has shape {list(shape)}, config.json asks for {list(wanted)}"
            )
        expert = bool(piece.part)
        scheme = recipe.scheme_of(module) if expert or module in linear else None
        if scheme is not None and shape[1] % scheme.group:
            fitting = next((group for group in (128, 64, 32) if shape[1] % group == 0), None)
            option = "--group " if scheme.group == recipe.group else "a pattern that ends in :"
            siblings = ".".join(module.split(".")[-2:])  # of the other layers, as wide
            pattern = "*.mlp.experts.*" if expert else f"*.{siblings}"
            advice = f"use {option}{fitting}" if fitting else f"leave such out: --keep '{pattern}'"
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


def _refuse_idle_patterns(path: Path, recipe: Recipe, roundable: list[str], others: list[str]) -> None:
    """Every rule must fit a module that can be quantized; a mistyped one would leave its modules alone."""
    for pattern, *_ in recipe.rules:
        if _fits(pattern, roundable):
            continue
        idle = next((module for module in others if fits(pattern, module)), None)
        if idle is not None:
            raise RecipeError(
                f"pattern {pattern!r} fits only modules that are never quantized, such as {idle}, in {path}; "
                "leave it out"
            )
        near = next((text for text in _neighbours(pattern, roundable) if _fits(text, roundable)), None)
        usual = next((module for module in roundable if not names_embedding(module)), roundable[0])
        advice = f"did you mean {near!r}?" if near else f"they are named like {usual}"
        raise RecipeError(f"pattern {pattern!r} fits no module of {path}; {advice}")


def _fits(pattern: str, modules: list[str]) -> bool:
    return any(fits(pattern, module) for module in modules)


def _neighbours(pattern: str, modules: list[str]) -> Iterator[str]:
    """What may have been meant: parts of names spelt right, and the stars that a whole name needs."""
    words = {part for module in modules for part in module.split(".") if not part.isdigit()}
    parts = [
        part if _fits(part, [*words, "0"]) else next(iter(get_close_matches(part.lower(), words, n=1)), part)
        for part in pattern.removesuffix(".weight").split(".")
    ]
    spelt = ".".join(parts)
    yield from (spelt, f"{spelt}.*", f"*.{spelt}", f"*.{spelt}.*")
