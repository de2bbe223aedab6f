"""A run end to end: it learns, stops and resumes as if it never had, and leaves whole checkpoints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from glm5.errors import CheckpointError, TrainingError
from glm5.layers.loading import load_model
from glm5.text.tokenizer import Tokenizer
from glm5.training.heldout import bits_per_byte, heldout_texts, xz_bits_per_byte
from glm5.training.loop import Trainer
from glm5.training.snapshots import list_snapshots
from tests.training.corpus_fixture import tiny_recipe


def losses_of(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_a_run_learns_and_its_checkpoint_loads(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, run__steps=40, run__save_every=40, run__eval_every=40, optimizer__lr=1e-2)
    snapshot = Trainer(recipe).train()
    losses = losses_of(recipe.output)
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    model, tokenizer = load_model(snapshot), Tokenizer.from_pretrained(snapshot)
    texts = heldout_texts(recipe.data.corpus)["en"]
    score = bits_per_byte(model, tokenizer, texts, recipe.data.sequence_length)
    untrained = load_model(snapshot)
    untrained.reset_parameters(torch.Generator().manual_seed(0))
    assert score < bits_per_byte(untrained, tokenizer, texts, recipe.data.sequence_length)
    assert 0 < xz_bits_per_byte(texts) < 8


@pytest.mark.parametrize("changes", [{}, {"loss__expert_dropout": 0.2, "data__attention": "prefix"},
                                     {"optimizer__kind": "adamw", "run__micro_batch_rows": 2}])  # fmt: skip
def test_resuming_gives_the_losses_of_never_stopping(tmp_path: Path, changes: dict[str, object]) -> None:
    whole = tiny_recipe(tmp_path, output=tmp_path / "whole", **changes)
    Trainer(whole).train()

    parts = tiny_recipe(tmp_path, output=tmp_path / "parts", **changes)
    first = Trainer(parts)
    while first.step < 3:
        first.train_step(1e-3 * 0)  # another run's steps must not matter: thrown away unsaved
        first.step += 1
    for stop in (3, 5, 8):
        trainer = Trainer(parts)
        _run_until(trainer, stop)
    assert losses_of(whole.output) == losses_of(parts.output)
    ends = [load_model(list_snapshots(r.output)[-1]).state_dict() for r in (whole, parts)]
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name


def _run_until(trainer: Trainer, stop: int) -> None:
    """Train as `train` does, and leave with Ctrl-C after step `stop`."""
    log = trainer._log

    def log_and_interrupt(*args: object) -> None:
        log(*args)  # type: ignore[arg-type]
        if trainer.step == stop:
            signal.raise_signal(signal.SIGINT)

    trainer._log = log_and_interrupt  # type: ignore[method-assign]
    trainer.train()
    assert trainer.step == stop


def test_killed_run_goes_on_from_its_last_snapshot(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, run__steps=400, run__save_every=3, run__eval_every=400)
    script = (
        "import sys; from pathlib import Path; from glm5.training.loop import Trainer\n"
        "from tests.training.corpus_fixture import tiny_recipe\n"
        "r = tiny_recipe(Path(sys.argv[1]), run__steps=400, run__save_every=3, run__eval_every=400)\n"
        "Trainer(r).train()\n"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(root)},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not list_snapshots(recipe.output) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.wait()
    trainer = Trainer(recipe)
    assert trainer.step > 0
    assert trainer.step % 3 == 0
    assert all(json.loads(line)["step"] <= trainer.step
               for line in (recipe.output / "log.jsonl").read_text().splitlines())  # fmt: skip
    trainer.train_step(1e-3)


def test_only_the_newest_snapshots_are_kept_and_none_is_half(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, run__save_every=2, run__keep=2)
    Trainer(recipe).train()
    assert [path.name for path in list_snapshots(recipe.output)] == ["step-0000006", "step-0000008"]
    assert not list(recipe.output.glob(".step-*"))


def test_published_shape_and_foreign_snapshot(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, run__steps=1)
    Trainer(recipe).train()
    wider = tiny_recipe(tmp_path, run__steps=2, model__moe_intermediate_size=24)
    with pytest.raises(CheckpointError, match=r"does not fit the recipe's \[model\]"):
        Trainer(wider)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    trainer = Trainer(tiny_recipe(tmp_path))
    with torch.no_grad():
        trainer.model.model.norm.weight.fill_(float("nan"))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(TrainingError, match="step 0: the loss is nan"):
        trainer.train_step(1e-3)
    assert all(torch.equal(t, before[n]) or "norm" in n for n, t in trainer.model.state_dict().items())
