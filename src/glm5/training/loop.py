"""The training loop: recipe in, checkpoints out. Ctrl-C saves; starting again goes on.

Everything random is a function of (seed, step) and the packer's state, so a resumed run repeats
the losses of one that never stopped (same machine, same number of threads).
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from glm5.disk.files import write_atomic
from glm5.disk.lock import locked
from glm5.errors import TrainingError
from glm5.layers.swap import swap_for_training
from glm5.model.transformer import GlmForCausalLM
from glm5.runtime.memory import keep_freed_memory
from glm5.text.bpe import train_bpe
from glm5.text.tokenizer import Tokenizer
from glm5.training import losses
from glm5.training.batches import batches_of
from glm5.training.corpus import Corpus
from glm5.training.heldout import bits_per_byte
from glm5.training.identity import check_identity, identity_of
from glm5.training.log import RunLog
from glm5.training.objective import Objective
from glm5.training.optimizers import build_optimizers, learning_rate
from glm5.training.progress import Report, StepBar
from glm5.training.recipe import Recipe
from glm5.training.shards import sample_texts
from glm5.training.snapshots import (
    STATE_FILE,
    list_snapshots,
    load_snapshot,
    prune,
    read_state,
    remove_unfinished,
    save_snapshot,
    set_aside,
)

LOG_FILE = "log.jsonl"


@dataclass(frozen=True)
class StepResult:
    """Losses of one step (means over its batch), the gradient's norm, expert balance."""

    loss: float
    mtp: float
    balance: float
    indexer: float | None
    grad_norm: float
    # Largest load of an expert over the mean load, worst layer.
    max_load: float


class Trainer:
    """One run. `train()` goes from the newest snapshot of `recipe.output` to the last step."""

    def __init__(self, recipe: Recipe, report: Report | None = None) -> None:
        self.recipe = recipe
        self.report = report or Report()
        if recipe.run.threads:
            torch.set_num_threads(recipe.run.threads)
        keep_freed_memory(of_any_size=True)
        recipe.check_model()  # what is missing or impossible is said before any work is done
        self.corpus = Corpus(recipe.data.corpus)
        self.heldout = self.corpus.heldout()
        with locked(recipe.shard_dir, TrainingError, wait=True):  # runs of one name share it
            self.tokenizer = self._tokenizer()
            rows, say = recipe.run.batch_rows, self.report.say
            self.batches = batches_of(recipe, self.corpus, self.tokenizer, rows, say)
        config = recipe.model_config_for(
            self.tokenizer.vocab_size, self.tokenizer.eos_token_ids, self.tokenizer.pad_token_id
        )
        self.model = GlmForCausalLM(config)
        self.model.reset_parameters(torch.Generator().manual_seed(recipe.seed))
        swap_for_training(self.model)
        for layer in self.model.moe_layers():
            layer.gate.expert_dropout = recipe.loss.expert_dropout
        self.objective = Objective(self.model, recipe.loss, bf16=recipe.run.precision == "bf16")
        self.optimizers = build_optimizers(self.model, recipe.optimizer)
        self.identity = identity_of(recipe, self.tokenizer, self.batches.shards.values())
        self.log = RunLog(recipe.output / LOG_FILE)
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        self._came_from: Path | None = None  # the snapshot the weights are those of, until the next step
        self._saved_here = False  # by this process, with this recipe
        self._resume()

    # ---------------------------------------------------------------- the run

    def train(self) -> Path:
        """Run to the end, or to Ctrl-C; returns the directory of the last snapshot.

        Raises TrainingError when another process trains in the output directory now, and for a step that
        is not finite. When that step came right after a save, the snapshot is set aside as well.
        """
        recipe, run = self.recipe, self.recipe.run
        with locked(recipe.output, TrainingError):
            remove_unfinished(recipe.output)
            newest = list_snapshots(recipe.output)[-1:]
            if newest and newest[0] != self._came_from:
                self._resume()  # another process was here between the start of this one and now
            if self.step >= run.steps and newest:
                self.report.say(f"all {run.steps} steps are done")
                return newest[0]
            if lost := self.log.cut(self.step):
                self.report.say(f"{self.log.path}: left out {lost} damaged line(s)")
            with _interruptible() as interrupt, self.report.running(self.step, run.steps) as progress:
                while self.step < run.steps and not interrupt.asked:
                    self._one_step(progress)
                last = self._came_from or self.save()
                if self.step == run.steps:  # it was evaluated
                    prune(recipe.output, run.keep)
            return last

    def _one_step(self, progress: StepBar) -> None:
        recipe, run = self.recipe, self.recipe.run
        started = time.perf_counter()
        rate = learning_rate(recipe.optimizer, self.step, run.steps)
        try:
            result = self.train_step(rate)
        except TrainingError as error:
            if self._came_from is None:
                raise
            if not self._saved_here:  # what the recipe says now may be at fault
                raise TrainingError(
                    f"{error}; if it fails so again, {self._came_from} leads there: move it away"
                ) from None
            aside = set_aside(self._came_from)
            raise TrainingError(f"{error}; {self._came_from.name} leads there and is now {aside}") from None
        if self._came_from is not None:  # it was seen to be good: older ones may go
            prune(recipe.output, run.keep)
            self._came_from = None
        self.step += 1
        self.tokens += run.batch_rows * recipe.data.sequence_length
        self.seconds += time.perf_counter() - started
        evaluates = self.step % run.eval_every == 0 or self.step == run.steps
        self._log(result, rate, self._evaluate() if evaluates else None)
        progress.advance(self.step, self.tokens, result.loss)
        if self.step % run.save_every == 0 and self.step < run.steps:
            self.save()

    def train_step(self, rate: float) -> StepResult:
        """One optimizer step on the next batch.

        Raises TrainingError, with weights and optimizers as they were, when a loss or the gradient is not
        finite.
        """
        recipe, loss = self.recipe, self.recipe.loss
        self.model.train()
        torch.manual_seed(recipe.seed * 1_000_003 + self.step)
        self.batches.enter_stage(self._stage())
        batch = self.batches.next()
        wants_indexer = (
            self.model.config.uses_dsa and loss.indexer > 0 and self.step % loss.indexer_every == 0
        )
        wants_mtp = loss.mtp > 0 and self.step % loss.mtp_every == 0
        micro = recipe.run.micro_batch_rows or recipe.run.batch_rows
        found = self.objective.backward(batch, micro, mtp=wants_mtp, indexer=wants_indexer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.optimizer.grad_clip)
        if not (found.is_finite and bool(torch.isfinite(norm))):  # before it reaches the weights
            self.model.zero_grad(set_to_none=True)
            raise TrainingError(
                f"step {self.step}: the loss is {float(found.lm):.4g}, the norm of the gradient "
                f"{float(norm):.4g}; lower optimizer.lr and go on from the last snapshot"
            )
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for layer in self.model.moe_layers():
            if layer.layer in found.loads:
                load = found.loads[layer.layer]
                losses.update_router_bias(layer.gate.e_score_correction_bias, load, loss.bias_update)
        worst = max((float(load.max() / load.mean()) for load in found.loads.values()), default=0.0)
        indexer = float(found.indexer) if wants_indexer else None
        return StepResult(
            float(found.lm), float(found.mtp), float(found.balance), indexer, float(norm), worst
        )

    # ---------------------------------------------------------------- state

    def save(self) -> Path:
        """Write a snapshot of this step."""
        state = {
            "recipe": self.recipe.name,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "batches": self.batches.state(),
            "identity": self.identity,
        }
        path = save_snapshot(
            self.recipe.output, self.step, self.model, self.optimizers, self.tokenizer, state
        )
        self._came_from, self._saved_here = path, True
        self.report.say(f"saved {path}")
        return path

    def _resume(self) -> None:
        snapshots = list_snapshots(self.recipe.output)
        if not snapshots:
            return
        newest = snapshots[-1]
        state = read_state(newest)
        check_identity(self.identity, state.get("identity"), newest)
        load_snapshot(newest, self.model, self.optimizers)
        try:
            self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
            self.batches.restore(state["batches"])
        except (KeyError, TypeError, ValueError) as error:
            raise TrainingError(
                f"{newest / STATE_FILE}: cannot be used ({error!r}); delete {newest}"
            ) from None
        self._came_from, self._saved_here = newest, False
        self.report.say(f"going on from {newest}")

    def _stage(self) -> int:
        share = self.step / self.recipe.run.steps
        ends = [stage.until for stage in self.recipe.data.stages]
        return next(i for i, end in enumerate(ends) if share < end)

    def _tokenizer(self) -> Tokenizer:
        settings, where = self.recipe.tokenizer, self.recipe.shard_dir
        if settings.path is not None:
            return Tokenizer.from_pretrained(settings.path)
        made_of = where / "tokenizer-corpus.txt"
        source = f"{settings.sample_mb} MB of {self.corpus.fingerprint}"
        if (where / "tokenizer.json").exists() and made_of.exists():
            known = Tokenizer.from_pretrained(where)
            if known.vocab_size == settings.vocab_size and made_of.read_text("utf-8") == source:
                return known
        self.report.say(f"training a tokenizer of {settings.vocab_size} entries")
        tokenizer = train_bpe(sample_texts(self.corpus, settings.sample_mb), settings.vocab_size)
        made_of.unlink(missing_ok=True)
        tokenizer.save_pretrained(where)
        write_atomic(made_of, source)
        return tokenizer

    # ---------------------------------------------------------------- records

    def _evaluate(self) -> dict[str, float]:
        """Held-out bits per byte by language. Raises TrainingError when one is not finite."""
        self.model.eval()
        recipe = self.recipe
        scores = {}
        for language, texts in self.heldout.items():
            scores[language] = bits_per_byte(
                self.model, self.tokenizer, texts, recipe.data.sequence_length, recipe.run.eval_rows
            )
        if not all(math.isfinite(score) for score in scores.values()):
            raise TrainingError(
                f"step {self.step}: the held-out loss is not finite; lower optimizer.lr and go on from an "
                "earlier snapshot"
            )
        shown = "  ".join(f"{language} {score:.3f}" for language, score in scores.items())
        self.report.say(f"step {self.step}: held-out bits per byte  {shown}")
        return scores

    def _log(self, result: StepResult, rate: float, scores: dict[str, float] | None) -> None:
        row: dict[str, Any] = {"step": self.step, "tokens": self.tokens, "lr": rate}
        row |= {key: value for key, value in vars(result).items() if value is not None}
        row["seconds"] = round(self.seconds, 3)
        if scores is not None:
            row["bits_per_byte"] = scores
        self.log.append(row)


class _Interrupt:
    asked = False


@contextmanager
def _interruptible() -> Iterator[_Interrupt]:
    """Turn Ctrl-C, SIGTERM and a lost terminal into a wish to stop after this step; a second Ctrl-C insists.

    What the process was told to ignore (nohup) stays ignored.
    """
    interrupt = _Interrupt()

    def ask(signum: int, frame: FrameType | None) -> None:
        if interrupt.asked and signum == signal.SIGINT:
            raise KeyboardInterrupt
        interrupt.asked = True

    kinds = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP"):
        kinds.append(signal.SIGHUP)
    try:
        heard = [kind for kind in kinds if signal.getsignal(kind) is not signal.SIG_IGN]
        before = {kind: signal.signal(kind, ask) for kind in heard}
    except ValueError:  # not the main thread: nobody sends signals here
        before = {}
    try:
        yield interrupt
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
