"""A run end to end: it learns, stops and resumes as if it never had, and leaves whole checkpoints."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from glm5.disk.lock import locked
from glm5.errors import CheckpointError, TrainingError
from glm5.layers.loading import load_model
from glm5.text.tokenizer import Tokenizer
from glm5.training.corpus import Corpus
from glm5.training.heldout import bits_per_byte, xz_bits_per_byte
from glm5.training.loop import StepResult, Trainer
from glm5.training.progress import Report
from glm5.training.snapshots import list_snapshots, remove_unfinished, save_snapshot
from tests.training.corpus_fixture import tiny_recipe


@pytest.fixture(autouse=True)
def hears_hangups() -> Iterator[None]:
    """Under nohup these tests would be told that nobody minds."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


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
    texts = Corpus(recipe.data.corpus).heldout()["en"]
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
    _run_until(trainer, trainer.step + 1)
    steps = [json.loads(line)["step"] for line in (recipe.output / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, trainer.step + 1))
    assert not list(recipe.output.glob(".step-*"))


def test_only_the_newest_snapshots_are_kept_and_none_is_half(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, run__save_every=2, run__keep=2)
    Trainer(recipe).train()
    assert [path.name for path in list_snapshots(recipe.output)] == ["step-0000006", "step-0000008"]
    assert not list(recipe.output.glob(".step-*"))


def test_published_shape_and_foreign_snapshot(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, run__steps=1)
    Trainer(recipe).train()
    wider = tiny_recipe(tmp_path, run__steps=2, model__moe_intermediate_size=24)
    with pytest.raises(TrainingError, match=r"has model.moe_intermediate_size = 16, the recipe 24"):
        Trainer(wider)
    snapshot = list_snapshots(recipe.output)[-1]  # and of a version that kept no more than the shapes
    state = json.loads((snapshot / "trainer.json").read_text())
    del state["identity"]
    (snapshot / "trainer.json").write_text(json.dumps(state))
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


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"data__sequence_length": 32}, "data.sequence_length"),
        ({"seed": 4}, "seed"),
        ({"name": "other"}, "name"),
        ({"model__num_experts_per_tok": 4}, "model.num_experts_per_tok"),
        ({"model__rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "model.rope_parameters"),
        ({"data__attention": "prefix"}, "data.attention"),
        ({"data__stages": [{"mix": {"en": 1.0}}]}, "data.stages"),
        ({"optimizer__kind": "adamw"}, "optimizer.kind"),
    ],
)
def test_a_run_that_is_another_run_is_refused(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    Trainer(tiny_recipe(tmp_path, run__steps=1)).train()
    with pytest.raises(TrainingError, match=rf"has {named} = .*new output directory"):
        Trainer(tiny_recipe(tmp_path, run__steps=2, **change))


def test_another_corpus_or_tokenizer_is_another_run(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, run__steps=1)
    Trainer(recipe).train()
    source = tmp_path / "corpus" / "english.jsonl"
    rows = source.read_text()
    source.write_text(rows + rows)
    with pytest.raises(TrainingError, match="source english has changed"):
        Trainer(recipe)
    source.write_text(rows.replace("fox", "old dog"))
    shutil.rmtree(tmp_path / "shards")
    with pytest.raises(TrainingError, match="another"):
        Trainer(recipe)


def test_what_may_change_between_two_starts(tmp_path: Path) -> None:
    Trainer(tiny_recipe(tmp_path, run__steps=1)).train()
    changes = {"run__steps": 2, "optimizer__lr": 1e-4, "loss__mtp": 0.1, "run__batch_rows": 2}
    trainer = Trainer(tiny_recipe(tmp_path, **changes))
    assert trainer.step == 1
    trainer.train()


@pytest.mark.parametrize(
    "tail", [b'{"step": 5, "tok', b"\0" * 64, b"\n", b'{"note": 1}\n', b"\xff\n", b"[]\n"]
)
def test_a_torn_log_does_not_stop_a_run(tmp_path: Path, tail: bytes) -> None:
    recipe = tiny_recipe(tmp_path, run__steps=2)
    Trainer(recipe).train()
    log = recipe.output / "log.jsonl"
    log.write_bytes(log.read_bytes() + tail)
    Trainer(tiny_recipe(tmp_path, run__steps=3)).train()
    assert [row["step"] for row in map(json.loads, log.read_text().splitlines())] == [1, 2, 3]


def test_a_second_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    first, second = Trainer(recipe), Trainer(recipe)
    with locked(recipe.output, TrainingError), pytest.raises(TrainingError, match="another process writes"):
        first.train()
    first.train()
    assert second.step == 0
    second.train()  # takes up what the first has done
    assert second.step == recipe.run.steps
    assert len(losses_of(recipe.output)) == recipe.run.steps


def test_a_snapshot_that_leads_nowhere_is_set_aside(tmp_path: Path) -> None:
    hot = {"optimizer__lr": 1e20, "optimizer__warmup": 0, "run__save_every": 1, "run__keep": 1}
    with pytest.raises(TrainingError, match=r"lower optimizer\.lr"):
        Trainer(tiny_recipe(tmp_path, **hot)).train()
    run = tmp_path / "run"
    assert not list_snapshots(run)
    assert "NaN" not in (run / "log.jsonl").read_text()
    Trainer(tiny_recipe(tmp_path)).train()  # as advised
    assert len(losses_of(run)) == 8


def test_a_good_snapshot_is_kept_until_the_next_is_proven(tmp_path: Path) -> None:
    trainer = Trainer(tiny_recipe(tmp_path, run__save_every=2, run__keep=1))
    step = trainer.train_step

    def fails_after_four(rate: float) -> StepResult:
        if trainer.step == 4:
            raise TrainingError("step 4: the loss is nan")
        return step(rate)

    trainer.train_step = fails_after_four  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"step-0000004 leads there and is now .*step-0000004.unusable"):
        trainer.train()
    assert [path.name for path in list_snapshots(tmp_path / "run")] == ["step-0000002"]


def test_a_snapshot_of_another_process_stays_when_the_next_step_fails(tmp_path: Path) -> None:
    Trainer(tiny_recipe(tmp_path, run__steps=2)).train()
    with pytest.raises(TrainingError, match=r"if it fails so again, .*step-0000002 leads there"):
        Trainer(tiny_recipe(tmp_path, run__steps=4, loss__mtp=1e38)).train()
    assert [path.name for path in list_snapshots(tmp_path / "run")] == ["step-0000002"]
    Trainer(tiny_recipe(tmp_path, run__steps=4)).train()
    assert len(losses_of(tmp_path / "run")) == 4


@pytest.mark.parametrize("kind", ["SIGHUP", "SIGTERM"])
def test_a_repeated_hangup_still_saves(tmp_path: Path, kind: str) -> None:
    trainer = Trainer(tiny_recipe(tmp_path))
    log = trainer._log

    def hang_up(*args: object) -> None:
        log(*args)  # type: ignore[arg-type]
        for _ in range(3):
            signal.raise_signal(getattr(signal, kind))

    trainer._log = hang_up  # type: ignore[method-assign]
    assert trainer.train().name == "step-0000001"


def test_what_is_ignored_stays_ignored(tmp_path: Path) -> None:
    trainer = Trainer(tiny_recipe(tmp_path, run__steps=2))
    log = trainer._log

    def hang_up(*args: object) -> None:
        log(*args)  # type: ignore[arg-type]
        signal.raise_signal(signal.SIGHUP)

    trainer._log = hang_up  # type: ignore[method-assign]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert trainer.train().name == "step-0000002"
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_is_gone_ends_no_run(tmp_path: Path) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

        def isatty(self) -> bool:
            return True

    report = Report(Console(file=Gone(), force_terminal=True))
    assert Trainer(tiny_recipe(tmp_path), report).train().name == "step-0000008"


def test_a_snapshot_is_not_written_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []

    def counts(run: Path, step: int, *rest: Any) -> Path:
        saved.append(step)
        return save_snapshot(run, step, *rest)

    monkeypatch.setattr("glm5.training.loop.save_snapshot", counts)
    _run_until(Trainer(tiny_recipe(tmp_path, run__save_every=2)), 4)
    assert saved == [2, 4]


def test_a_snapshot_that_was_being_replaced_comes_back(tmp_path: Path) -> None:
    trainer = Trainer(tiny_recipe(tmp_path, run__steps=2))
    trainer.train()
    snapshot = list_snapshots(tmp_path / "run")[0]
    snapshot.rename(snapshot.with_name(f"{snapshot.name}.replaced"))
    remove_unfinished(tmp_path / "run")
    assert list_snapshots(tmp_path / "run") == [snapshot]


def test_how_documents_are_held_out_is_part_of_a_run(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, run__steps=1)
    Trainer(recipe).train()
    shutil.rmtree(tmp_path / "corpus" / "heldout")
    with pytest.raises(TrainingError, match="another corpus"):
        Trainer(recipe)


def test_the_last_step_is_evaluated(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, run__steps=3, run__eval_every=2)
    Trainer(recipe).train()
    rows = map(json.loads, (recipe.output / "log.jsonl").read_text().splitlines())
    assert [row["step"] for row in rows if "bits_per_byte" in row] == [2, 3]


def test_a_lost_terminal_saves(tmp_path: Path) -> None:
    trainer = Trainer(tiny_recipe(tmp_path))
    log = trainer._log

    def hang_up(*args: object) -> None:
        log(*args)  # type: ignore[arg-type]
        signal.raise_signal(signal.SIGHUP)

    trainer._log = hang_up  # type: ignore[method-assign]
    trainer.train()
    assert [path.name for path in list_snapshots(tmp_path / "run")] == ["step-0000001"]


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    trainer = Trainer(tiny_recipe(tmp_path))
    with torch.no_grad():
        trainer.model.model.norm.weight[0] = float("inf")
    with pytest.raises(TrainingError, match=r"model\.norm\.weight is not finite"):
        trainer.save()
    assert not (tmp_path / "run").exists()
