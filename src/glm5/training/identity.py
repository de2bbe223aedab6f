"""What makes a run this run: a snapshot is gone on from only where all of it is the same.

The steps, learning rates, losses and cadences of a recipe may change between two starts. Its name, seed,
network, data order and optimizer may not, nor may the tokenizer and the corpus.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from glm5.errors import TrainingError
from glm5.text.tokenizer import Tokenizer
from glm5.training.recipe import Recipe
from glm5.training.shards import Shard, tokenizer_digest


def identity_of(recipe: Recipe, tokenizer: Tokenizer, shards: Iterable[Shard]) -> dict[str, Any]:
    """Flat and JSON-able: the recipe's keys by their dotted names, digests of the rest."""
    data = recipe.data.model_dump(mode="json", include={"sequence_length", "attention", "stages"})
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        **{f"model.{key}": value for key, value in recipe.model.items()},
        **{f"data.{key}": value for key, value in data.items()},
        "optimizer.kind": recipe.optimizer.kind,
        **{f"source {shard.info.source}": shard.info.digest for shard in shards},
        "tokenizer": tokenizer_digest(tokenizer),
    }


def check_identity(now: Mapping[str, Any], then: Any, snapshot: Path) -> None:
    """Raises TrainingError naming the first thing in which a run differs from its snapshot."""
    if not isinstance(then, Mapping):
        return  # of a version that did not keep it; the shapes are compared all the same
    for key in [*then, *(key for key in now if key not in then)]:
        before, after = then.get(key), now.get(key)
        if before == after:
            continue
        if key == "tokenizer":
            difference = "was trained with another tokenizer"
        elif key.startswith("source "):
            happened = "is new" if before is None else "is gone" if after is None else "has changed"
            difference = f"was trained on another corpus: {key} {happened}"
        else:
            difference = f"has {key} = {before!r:.60}, the recipe {after!r:.60}"
        raise TrainingError(f"{snapshot}: {difference}; set it back, or start a new output directory")
