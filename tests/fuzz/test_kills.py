"""kill -9 in the middle of a save, a quantization, a run: the old, the new or a refusal, never a mixture.

A few kills here; `make soak` makes 500 of each (GLM5_SOAK). The work is done in forked children, so that a
kill costs milliseconds.
"""

from __future__ import annotations

import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import glm5
from glm5.errors import Glm5Error
from glm5.quantize import Recipe, quantize
from glm5.runtime.language_model import LanguageModel
from glm5.training.loop import Trainer
from glm5.training.progress import Report
from tests.runtime.language_model_fixture import tiny_language_model
from tests.training.corpus_fixture import tiny_recipe, write_corpus

KILLS = 5 * int(os.environ.get("GLM5_SOAK", "1"))
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")


def in_a_child(action: Callable[[], object], *, kill_after: float | None = None) -> int:
    """Run it in a child; returns its exit code, or -9."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def seconds_of(action: Callable[[], object]) -> float:
    """How long it takes when nobody kills it."""
    started = time.monotonic()
    assert in_a_child(action) == 0
    return time.monotonic() - started


def delays(seconds: float, seed: int) -> list[float]:
    rng = random.Random(seed)
    return [rng.uniform(0, 1.1 * seconds) for _ in range(KILLS)]


def is_model(found: LanguageModel, wanted: LanguageModel) -> bool:
    theirs = wanted.state_dict()
    same = all(torch.equal(value, theirs[name]) for name, value in found.state_dict().items())
    assert same == (found.config.routed_scaling_factor == wanted.config.routed_scaling_factor), (
        "weights of one, config of another"
    )
    return same


def test_a_save_that_is_killed(tmp_path: Path) -> None:
    models = [tiny_language_model(routed_scaling_factor=factor) for factor in (1.0, 2.0)]
    models[1].reset_parameters(torch.Generator().manual_seed(9))
    place = tmp_path / "model"
    whole = []
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / f"whole-{number}")
        whole.append(glm5.load(tmp_path / f"whole-{number}", dtype="float32", device="cpu"))
    models[0].save_pretrained(place)
    seconds = seconds_of(lambda: models[1].save_pretrained(tmp_path / "other"))
    seen = set()
    for number, delay in enumerate(delays(seconds, 1)):
        in_a_child(lambda n=number: models[n % 2].save_pretrained(place), kill_after=delay)
        try:
            found = glm5.load(place, dtype="float32", device="cpu")
        except Glm5Error as error:
            seen.add(str(error))
            models[0].save_pretrained(place)
            continue
        assert found.tokenizer is not None
        which = [is_model(found, model) for model in whole]
        assert any(which), "neither the old model nor the new one"
        seen.add(which.index(True))
    models[0].save_pretrained(place)
    assert is_model(glm5.load(place, dtype="float32", device="cpu"), whole[0])
    left = [path.name for path in place.iterdir() if path.name.startswith(".")]
    assert not left, "a kill leaves something for ever"
    assert seen and not any("\n" in str(what) for what in seen)


def test_a_quantization_that_is_killed(tmp_path: Path) -> None:
    model = tiny_language_model(**{"moe_intermediate_size": 64, "q_lora_rank": 64, "v_head_dim": 24})
    model.save_pretrained(tmp_path / "source")
    recipe = Recipe(4, 32)
    seconds = seconds_of(lambda: quantize(tmp_path / "source", tmp_path / "whole", recipe))
    wanted = glm5.load(tmp_path / "whole").state_dict()
    target = tmp_path / "int4"
    told: set[str] = set()
    for delay in delays(seconds, 2):
        in_a_child(lambda: quantize(tmp_path / "source", target, recipe), kill_after=delay)
        try:
            found = glm5.load(target).state_dict()
        except Glm5Error as error:
            told.add(str(error))
        else:
            assert all(torch.equal(value, wanted[name]) for name, value in found.items())
            for path in sorted(target.rglob("*"), reverse=True):  # and again
                path.unlink() if path.is_file() else path.rmdir()
    assert not any("\n" in line for line in told)
    assert in_a_child(lambda: quantize(tmp_path / "source", target, recipe)) == 0
    assert all(torch.equal(value, wanted[name]) for name, value in glm5.load(target).state_dict().items())


class Quiet(Report):
    def say(self, message: str) -> None:
        pass


def test_a_training_run_that_is_killed(tmp_path: Path) -> None:
    """After every kill the same command goes on; at the end stands what an unbroken run gives."""
    write_corpus(tmp_path / "corpus")
    changes = {"run__steps": 12, "run__save_every": 2, "run__eval_every": 100}

    def train(output: str, steps: int) -> None:
        recipe = tiny_recipe(tmp_path, **{**changes, "run__steps": steps})
        Trainer(recipe.model_copy(update={"output": tmp_path / output}), Quiet()).train()

    seconds = seconds_of(lambda: train("whole", 12))
    # A killed run begins where its last snapshot stands: a share of the whole is time enough for one.
    for number, delay in enumerate(delays(seconds / 2, 3)):
        in_a_child(lambda: train("run", 12), kill_after=delay)
        if (tmp_path / "run" / "step-0000012").exists() and number % 3 == 2:
            check(tmp_path)
            for path in sorted((tmp_path / "run").rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
    assert in_a_child(lambda: train("run", 12)) == 0
    check(tmp_path)


def check(tmp_path: Path) -> None:
    wanted = glm5.load(tmp_path / "whole" / "step-0000012", dtype="float32").state_dict()
    found = glm5.load(tmp_path / "run" / "step-0000012", dtype="float32").state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    names = [path.name for path in (tmp_path / "run").iterdir()]
    assert not [name for name in names if name.endswith((".tmp", ".unusable"))], names
