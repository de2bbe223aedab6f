"""`python -m recipes.nano.release SNAPSHOT OUT [INT4]`: from a run's snapshot to models people download.

Writes weights (OUT in FP8; INT4 in int4, small enough to be embedded), tokenizer, generation defaults
and a card whose every figure is measured here on the released weights: held-out bits per byte beside
`xz -9e`, answers to the taught questions.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from glm5.errors import Glm5Error, RecipeError
from glm5.quantize import Calibration, Recipe, quantize
from glm5.quantize.directory import RECEIPT_FILE
from glm5.runtime.language_model import LanguageModel
from glm5.text.tokenizer import Tokenizer
from glm5.training.batches import batches_of
from glm5.training.corpus import Corpus
from glm5.training.recipe import Recipe as TrainingRecipe
from glm5.training.recipe import read_recipe
from glm5.training.snapshots import STATE_FILE
from recipes.nano.card import write_card

FP8 = "the official FP8 layout (e4m3, 128x128 blocks); embeddings, router and norms in bf16"
# Experts of 32 columns, and an embedding that is a fifth of the model.
PACKED = Recipe(4, 32, (("*.embed_tokens", 8, 256), ("*.eh_proj", 8, 256)))
INT4 = "int4 (compressed-tensors, groups of 32, GPTQ on training text); embedding and MTP projection in int8"
CALIBRATION_ROWS = 128


def release(
    recipe: TrainingRecipe,
    snapshot: Path,
    out: Path,
    packed: Path | None,
    note: str = "",
    packing: Recipe = PACKED,
) -> None:
    """Write the released directories and measure them; `note` goes into the cards.

    out: the FP8 model. packed: the one in integers, by `packing`; None = none.
    """
    model = LanguageModel.load(snapshot, dtype=torch.float32)
    chat = {"enable_thinking": False, "remembers_turns": False}
    model.config = replace(model.config, extra={**model.config.extra, "glm5_chat": chat})
    model.save_pretrained(out, stored="fp8")
    state = json.loads((snapshot / STATE_FILE).read_text("utf-8"))
    write_card(out, recipe, state, FP8, note)
    if packed is not None:
        text = training_text(recipe, Tokenizer.from_pretrained(out))
        quantize(out, packed, packing, calibration=text)
        (packed / RECEIPT_FILE).unlink()  # of its 2000 matrices: 230 KB
        write_card(packed, recipe, state, INT4, note)


def training_text(recipe: TrainingRecipe, tokenizer: Tokenizer) -> Calibration:
    """Rows of the last stage's mix, each piece a window: what it was taught is what rounding must keep."""
    batches = batches_of(recipe, Corpus(recipe.data.corpus), tokenizer, CALIBRATION_ROWS, lambda line: None)
    batches.enter_stage(len(recipe.data.stages) - 1)
    batch = batches.next()
    windows = []
    for ids, documents in zip(batch.ids, batch.documents, strict=True):
        windows += [tuple(ids[documents == piece].tolist()) for piece in documents.unique() if piece >= 0]
    return Calibration(tuple(windows))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.nano.release", description="Turn a snapshot into a released model."
    )
    parser.add_argument("snapshot", type=Path, help="a run's step-... directory")
    parser.add_argument("out", type=Path, help="directory to write, in FP8")
    parser.add_argument("int4", type=Path, nargs="?", help="a second one, in int4")
    parser.add_argument("--note", default="", help="a sentence for the card on how it was trained")
    parser.add_argument("--recipe", default="nano", help="the recipe it was trained with")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    try:
        if not (options.snapshot / STATE_FILE).exists():
            raise RecipeError(f"{options.snapshot}: is no snapshot of a run (no {STATE_FILE})")
        release(read_recipe(options.recipe), options.snapshot, options.out, options.int4, options.note)
    except Glm5Error as error:
        console.print(f"error: {error}", markup=False)
        return 2
    for directory in filter(None, (options.out, options.int4)):
        console.print(f"{directory}: written; its README.md has the scores", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
