"""How fast is the embedded model, beside `transformers` on the same weights and batch?

    python benchmarks/nano.py [--quick] [--model PATH] [--threads N]

Prefill, greedy decode and training steps, ours and theirs (experts_implementation="grouped_mm") in
turn, so that a noisy machine treats both alike; medians of the rounds. Training is forward, loss,
backward and AdamW, without MTP and balance losses, in fp32 and under bf16 autocast. The fp32 weights are
those of `checkpoints/nano`; the embedded model itself, which is int4, decodes and prefills beside them.
Ceilings first: matrix products and memory reads. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import glm5
from glm5.checkpoint import save_model
from glm5.config import ModelConfig
from glm5.model.masks import TokenPositions
from glm5.model.transformer import GlmForCausalLM
from glm5.runtime.language_model import LanguageModel
from glm5.runtime.memory import keep_freed_memory
from glm5.training.losses import linear_cross_entropy
from glm5.training.recipe import read_recipe

TRAINED = Path(__file__).parents[1] / "checkpoints" / "nano"
PREFILL_TOKENS = 512
DECODE_TOKENS = 96
TRAIN_ROWS, TRAIN_LENGTH = 8, 512


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    console = Console(highlight=False)
    seconds, rounds, steps = (0.5, 3, 1) if options.quick else (1.5, 7, 3)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        config = write_weights(options.model, directory)
        ceilings = measure_ceilings(seconds)
        # Each library in a process of its own, as its users run it.
        peers = [Peer(kind, directory, options.threads) for kind in ("glm5", "transformers")]
        embedded = Peer("glm5", None, options.threads)
        gap = float(np.abs(peers[0].ask("logits") - peers[1].ask("logits")).max())
        # Their latent norms have another eps (1e-6); with the same one, both agree to 1e-5.
        assert gap < 0.1, f"the two differ by {gap:.3f} of the logits' spread: not the same weights"
        results = {
            job: interleave(peers, job, steps if job.startswith("training") else rounds)
            for job in ("prefill", "decode", "training fp32", "training bf16")
        }
        int4 = {job: interleave([embedded, peers[0]], job, rounds) for job in ("prefill", "decode")}
        for peer in (*peers, embedded):
            peer.stop()
    show(console, config, ceilings, results, int4, options.threads)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds: under three minutes on two cores")
    parser.add_argument("--model", type=Path, help="a checkpoint directory (default: checkpoints/nano)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


# ---------------------------------------------------------------- the two libraries


def write_weights(path: Path | None, directory: Path) -> ModelConfig:
    """fp32 weights for both; without a trained model, random ones of the nano recipe."""
    if path is not None or TRAINED.is_dir():
        source: GlmForCausalLM = glm5.load(path or TRAINED, dtype="float32", device="cpu")
    else:
        recipe = read_recipe("nano")
        config = recipe.model_config_for(recipe.tokenizer.vocab_size, (0,), 0)
        source = GlmForCausalLM(config)
        source.reset_parameters(torch.Generator().manual_seed(0))
    save_model(source, directory, stored="fp32")
    return source.config


class Peer:
    """A process that holds one library's model and does jobs when asked."""

    def __init__(self, kind: str, directory: Path | None, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=serve, args=(kind, directory, threads, child), daemon=True)
        self._process.start()
        child.close()

    def ask(self, job: str) -> Any:
        """Logits as an array, or (tokens, seconds) of one piece of work."""
        self._pipe.send(job)
        return self._pipe.recv()

    def stop(self) -> None:
        self._pipe.send(None)
        self._process.join()


def serve(kind: str, directory: Path | None, threads: int, pipe: Connection) -> None:
    """Body of a peer's process; without a directory the model is the embedded one."""
    torch.set_num_threads(threads)
    jobs = jobs_of_theirs(directory) if kind == "transformers" else jobs_of_ours(directory)
    made: dict[str, Work] = {}
    while (job := pipe.recv()) is not None:
        if job == "logits":
            pipe.send(jobs["logits"]())
            continue
        if job not in made:
            made[job] = jobs[job]()
        work = made[job]
        started = time.perf_counter()
        tokens = work()
        pipe.send((tokens, time.perf_counter() - started))


def jobs_of_ours(directory: Path | None) -> dict[str, Callable[[], Any]]:
    logging.getLogger("glm5").setLevel(logging.ERROR)
    model = glm5.load(directory, dtype="float32", device="cpu")
    return {
        "logits": lambda: spread_logits(model, model.config),
        "prefill": lambda: prefill_ours(model),
        "decode": lambda: decode_ours(model),
        "training fp32": lambda: train_ours(model, "fp32"),
        "training bf16": lambda: train_ours(model, "bf16"),
    }


def jobs_of_theirs(directory: Path | None) -> dict[str, Callable[[], Any]]:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, experts_implementation="grouped_mm"
    )
    model.generation_config.eos_token_id = None
    return {
        "logits": lambda: spread_logits(model, model.config),
        "prefill": lambda: prefill_theirs(model),
        "decode": lambda: decode_theirs(model),
        "training fp32": lambda: train_theirs(model, "fp32"),
        "training bf16": lambda: train_theirs(model, "bf16"),
    }


def spread_logits(model: Any, config: Any) -> Any:
    """Logits of a short text in units of their standard deviation."""
    with torch.inference_mode():
        logits = model(random_ids(config, 1, 64)).logits
    return (logits / logits.std()).numpy()


def random_ids(config: Any, rows: int, length: int) -> Tensor:
    """Spread over the vocabulary, so that many different experts are chosen."""
    return torch.randint(0, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- what is timed


Work = Callable[[], int]  # does it once and returns the tokens it handled


def prefill_ours(model: LanguageModel) -> Work:
    ids = random_ids(model.config, 1, PREFILL_TOKENS)

    def work() -> int:
        with torch.inference_mode():
            model(ids, logits_to_keep=1)
        return ids.numel()

    return work


def prefill_theirs(model: Any) -> Work:
    ids = random_ids(model.config, 1, PREFILL_TOKENS)

    def work() -> int:
        with torch.inference_mode():
            model(ids, logits_to_keep=1, use_cache=False)
        return ids.numel()

    return work


def decode_ours(model: LanguageModel) -> Work:
    ids = random_ids(model.config, 1, 16)

    def work() -> int:
        out = model.generate(ids, max_new_tokens=DECODE_TOKENS, do_sample=False, eos_token_id=[])
        return out.shape[1] - ids.shape[1]

    return work


def decode_theirs(model: Any) -> Work:
    ids = random_ids(model.config, 1, 16)

    def work() -> int:
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=DECODE_TOKENS, do_sample=False
            )
        return int(out.shape[1] - ids.shape[1])

    return work


def train_ours(model: GlmForCausalLM, precision: str) -> Work:
    keep_freed_memory(of_any_size=True)  # as the trainer does
    ids = random_ids(model.config, TRAIN_ROWS, TRAIN_LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    targets = torch.cat((ids[:, 1:], torch.full_like(ids[:, :1], -100)), dim=1)
    step = model.step(TokenPositions(torch.arange(TRAIN_LENGTH).expand_as(ids)))

    def work() -> int:
        model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            hidden = model.model(ids, step)
            loss = linear_cross_entropy(hidden, model.lm_head.weight, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return ids.numel()

    return work


def train_theirs(model: Any, precision: str) -> Work:
    ids = random_ids(model.config, TRAIN_ROWS, TRAIN_LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def work() -> int:
        model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return ids.numel()

    return work


# ---------------------------------------------------------------- timing


def interleave(peers: list[Peer], job: str, rounds: int) -> tuple[float, float]:
    """Median tokens/s of each, measured in turn after one warm-up."""
    rates: list[list[float]] = [[] for _ in peers]
    for index in range(rounds + 1):
        for peer, kept in zip(peers, rates, strict=True):
            tokens, seconds = peer.ask(job)
            if index:
                kept.append(tokens / seconds)
    return statistics.median(rates[0]), statistics.median(rates[1])


def measure_ceilings(seconds: float) -> dict[str, float]:
    """GFLOP/s of large products in fp32 and bf16; GB/s of reading 1 GB."""
    found = {}
    # oneDNN's fp32 is twice MKL's on some CPUs; the ceiling is the better of the two.
    onednn = torch.ops.mkldnn._linear_pointwise
    for name, dtype in (("fp32 GFLOP/s", torch.float32), ("bf16 GFLOP/s", torch.bfloat16)):
        a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
        best = best_time(lambda a=a, b=b: a @ b, seconds)
        with torch.inference_mode():
            best = min(best, best_time(lambda a=a, b=b: onednn(a, b, None, "none", [], ""), seconds))
        found[name] = 2 * 2048**3 / 1e9 / best
    buffer = torch.ones(1 << 27, dtype=torch.int64)
    found["memory read GB/s"] = buffer.nbytes / 1e9 / best_time(buffer.sum, seconds)
    return found


def best_time(work: Callable[[], Any], seconds: float) -> float:
    best, end = float("inf"), time.perf_counter() + seconds
    work()
    while time.perf_counter() < end:
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


def show(
    console: Console,
    config: ModelConfig,
    ceilings: dict[str, float],
    results: dict[str, tuple[float, float]],
    int4: dict[str, tuple[float, float]],
    threads: int,
) -> None:
    active = config.active_params()
    console.print(
        f"{config.total_params() / 1e6:.1f}M parameters, {active / 1e6:.1f}M active, {threads} threads"
    )
    console.print("ceilings: " + ", ".join(f"{value:.0f} {name}" for name, value in ceilings.items()))
    table = Table(box=None, padding=(0, 2))
    for column in ("tokens/s", "glm5", "transformers", "ratio", "share of ceiling"):
        table.add_column(column, justify="left" if column == "tokens/s" else "right")
    shares = {}
    for name, (ours, theirs) in results.items():
        if name == "decode":
            # Every token reads its active weights once, in fp32.
            shares[name] = ours * active * 4 / 1e9 / ceilings["memory read GB/s"]
        else:
            factor = 2 if name == "prefill" else 6
            peak = ceilings["bf16 GFLOP/s" if name.endswith("bf16") else "fp32 GFLOP/s"]
            shares[name] = ours * active * factor / 1e9 / peak
        table.add_row(name, f"{ours:,.0f}", f"{theirs:,.0f}", f"{ours / theirs:.2f}x", f"{shares[name]:.0%}")
    console.print(table)
    for name, (packed, floats) in int4.items():
        console.print(f"int4 {name}: {packed:,.0f} tokens/s, {packed / floats:.2f} times fp32")
    ratio = {name: round(ours / theirs, 3) for name, (ours, theirs) in results.items()}
    figures = {
        "decode_int4_vs_fp32": round(int4["decode"][0] / int4["decode"][1], 3),
        "decode_vs_transformers": ratio["decode"],
        "prefill_vs_transformers": ratio["prefill"],
        "training_vs_transformers": ratio["training bf16"],
        "training_fp32_vs_transformers": ratio["training fp32"],
        "tokens_per_second": {name: [round(a, 1), round(b, 1)] for name, (a, b) in results.items()},
        "share_of_ceiling": {name: round(share, 3) for name, share in shares.items()},
        "ceilings": {name: round(value, 1) for name, value in ceilings.items()},
        "threads": threads,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
