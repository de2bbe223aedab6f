"""What the engine costs and gains: beside the bare step, with many sequences, on a second turn, with guesses.

    python benchmarks/engine.py [--quick] [--threads N] [--no-slice]

On the embedded model (int4):
- `cpu_us`: microseconds of processor time that a token of one sequence takes beyond the bare step.
- `throughput_8`, `throughput_32`: new tokens a second of so many requests at once, over one at a time.
Distinct
  prompts of 64 to 256 tokens, 64 new tokens each, prompts read in the same time.
- `second_turn`: time to read a conversation's second message over the time to read its first, of nearly the
  model's whole context.
- `speculation`: time of a token without guesses over with them, on answers that the model was taught;
  `speculation_least`: the least of these ratios over the kinds of text tried.
On a slice of GLM-5's width (6 GB): `overhead`, the engine's step over the bare one, less one.

Everything is measured in turn with what it is compared with; medians. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import glm5
from glm5.model.transformer import GlmForCausalLM
from glm5.runtime.cache import Coming, PagePool, Sequence
from glm5.runtime.engine import Engine
from glm5.runtime.sampling_params import SamplingParams

NEW, SHORTEST, LONGEST = 64, 64, 256
TAUGHT = [
    "Hello", "Who are you?", "谢谢", "你好", "你是谁？", "背诵《静夜思》", "背诵《春晓》", "背诵《相思》",
    "What is dog in Chinese?", "猫是什么意思？",
]  # fmt: skip


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    rounds = 3 if options.quick else 9
    model = glm5.load()
    found: dict[str, Any] = {}
    random = torch.Generator().manual_seed(0)
    found |= throughput(model, rounds, random)
    found |= second_turn(model, rounds, random)
    found |= speculation(model, 2 * rounds, random)
    found["cpu_us"] = cpu_of_a_token(model, rounds)
    if not options.no_slice:
        found["overhead"] = overhead_on_slice(rounds)
    report(found)
    print(json.dumps({**found, **where(options.threads)}))


# --- many sequences ------------------------------------------------------------------------------


def throughput(model: Any, rounds: int, random: torch.Generator) -> dict[str, float]:
    """Tokens a second of 8 and 32 at once over those of one at a time."""
    lengths = torch.randint(SHORTEST, LONGEST + 1, (32,), generator=random).tolist()
    prompts = [ids_of(model, length, random) for length in lengths]
    rates: dict[int, list[tuple[float, float]]] = {1: [], 8: [], 32: []}
    for number in range(rounds + 1):
        for at_once in rates:
            measured = rate(model, prompts if at_once > 1 else prompts[:8], at_once)
            if number:  # the first is for warming up
                rates[at_once].append(measured)
    found = {"tokens_per_second": statistics.median(writing for writing, _ in rates[1])}
    for at_once in (8, 32):
        pairs = list(zip(rates[1], rates[at_once], strict=True))
        found[f"throughput_{at_once}"] = statistics.median(many[0] / one[0] for one, many in pairs)
        found[f"with_prompts_{at_once}"] = statistics.median(many[1] / one[1] for one, many in pairs)
    return found


def rate(model: Any, prompts: list[list[int]], at_once: int) -> tuple[float, float]:
    """New tokens a second once the prompts are read, and with the time of reading them."""
    params, engine = SamplingParams(max_new_tokens=NEW, ignore_eos=True), model.engine
    engine.forget()
    seconds = {"reading": 0.0, "writing": 0.0}
    for first in range(0, len(prompts), at_once):
        some = prompts[first : first + at_once]
        started = time.perf_counter()
        for prompt in some:  # what is read here is shared by the requests that follow
            engine.submit(prompt, SamplingParams(max_new_tokens=1, ignore_eos=True))
        engine.run()
        requests = [engine.submit(prompt, params, num_draft_tokens=0) for prompt in some]
        engine.step()
        middle = time.perf_counter()
        engine.run()
        assert all(request.statistics.output_tokens == NEW for request in requests)
        seconds["reading"] += middle - started
        seconds["writing"] += time.perf_counter() - middle
    count = len(prompts) * NEW
    return count / seconds["writing"], count / (seconds["reading"] + seconds["writing"])


# --- a conversation ------------------------------------------------------------------------------


def second_turn(model: Any, rounds: int, random: torch.Generator) -> dict[str, float]:
    """Reading a second message of 32 tokens, behind a first of nearly the whole context."""
    ratios = []
    length = model.config.max_position_embeddings - 64
    for _ in range(rounds):
        model.engine.forget()
        history = ids_of(model, length, random)
        first = first_token(model, history)
        second = first_token(model, [*history, *ids_of(model, 32, random)])
        ratios.append(second / first)
    return {"history_tokens": float(length), "second_turn": statistics.median(ratios)}


def first_token(model: Any, prompt: list[int]) -> float:
    started = time.perf_counter()
    model.engine.submit(prompt, SamplingParams(max_new_tokens=1, ignore_eos=True))
    model.engine.run()
    return time.perf_counter() - started


# --- guesses -------------------------------------------------------------------------------------


def speculation(model: Any, rounds: int, random: torch.Generator) -> dict[str, float]:
    """With guesses as the engine chooses them over without, on three kinds of text."""
    ends = tuple(model.tokenizer.eos_token_ids)
    taught = [model.prompt_ids([{"role": "user", "content": text}]) for text in TAUGHT]
    text = [ids_of(model, 64, random) for _ in range(3)]
    kinds = {
        "taught": (taught, SamplingParams(max_new_tokens=100, stop_token_ids=ends)),
        "free": (text, SamplingParams(max_new_tokens=150, ignore_eos=True)),
        "drawn": (text, SamplingParams(max_new_tokens=150, ignore_eos=True, temperature=1.0, seed=1)),
    }
    found: dict[str, float] = {}
    for name, (prompts, params) in kinds.items():
        ratios = []
        for number in range(rounds + 2):
            order = (0, None) if number % 2 else (None, 0)
            times = {drafts: answering(model, prompts, params, drafts) for drafts in order}
            if number > 1:
                ratios.append(times[0] / times[None])
        found[f"speculation_{name}"] = statistics.median(ratios)
    found["speculation"] = found["speculation_taught"]
    found["speculation_least"] = min(found[f"speculation_{name}"] for name in kinds)
    return found


def answering(model: Any, prompts: list[list[int]], params: SamplingParams, drafts: int | None) -> float:
    """Seconds that the answers take behind their first tokens."""
    total = 0.0
    for prompt in prompts:
        model.engine.forget()
        request = model.engine.submit(prompt, params, num_draft_tokens=drafts)
        model.engine.run()
        total += request.statistics.decode_seconds
    return total


# --- what the engine costs -----------------------------------------------------------------------


def cpu_of_a_token(model: Any, rounds: int) -> float:
    """Processor time of a token by the engine less that of the bare step, in microseconds."""
    differences = []
    for _ in range(rounds):
        engine, bare = one_sequence(model, 128, 200, time.process_time)
        differences.append((engine - bare) * 1e6)
    return statistics.median(differences)


def overhead_on_slice(rounds: int) -> float:
    from glm5_slice import random_slice

    model = random_slice(1)
    pairs = [one_sequence(model, 256, 24, time.perf_counter) for _ in range(rounds)]
    return statistics.median([engine / bare for engine, bare in pairs]) - 1


def one_sequence(
    model: GlmForCausalLM, context: int, tokens: int, clock: Callable[[], float]
) -> tuple[float, float]:
    """Seconds of a token by the engine, and of the bare step: pass, head, largest logit; in turn."""
    prompt = list(range(1, context + 1))
    engine = Engine(model, cache_tokens=4 * context)
    request = engine.submit(
        prompt, SamplingParams(max_new_tokens=tokens + 1, ignore_eos=True), num_draft_tokens=0
    )
    engine.step()
    pool = PagePool(model.config, 4 * context // 64, dtype=model.dtype)
    sequence = Sequence(pool)
    sequence.reserve(context + tokens + 1)
    times = [0.0, 0.0]
    with torch.inference_mode():
        model.extend(torch.tensor(prompt), Coming(pool, [sequence], [context]))
        token = request.output_ids[-1]
        coming: Coming | None = None
        for _ in range(tokens):
            started = clock()
            engine.step()
            middle = clock()
            if coming is None or not coming.again():
                coming = Coming(pool, [sequence], [1])
            hidden = model.extend(torch.tensor([token]), coming)
            token = int(model.lm_head(hidden.unsqueeze(0)).argmax())
            times[0] += middle - started
            times[1] += clock() - middle
    return times[0] / tokens, times[1] / tokens


# --- around --------------------------------------------------------------------------------------


def ids_of(model: Any, count: int, random: torch.Generator) -> list[int]:
    return torch.randint(10, model.config.vocab_size - 10, (count,), generator=random).tolist()


def where(threads: int) -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    ).stdout.strip()
    return {
        "machine": platform.processor() or platform.machine(),
        "threads": threads,
        "commit": commit,
        "glm5": glm5.__version__,
        "torch": version("torch"),
    }


def report(found: dict[str, Any]) -> None:
    table = Table("figure", "found", "wanted")
    wanted = {
        "overhead": "<= 0.05", "throughput_8": ">= 3", "throughput_32": ">= 6", "second_turn": "<= 0.1",
        "speculation": ">= 1.25", "speculation_least": ">= 0.98",
    }  # fmt: skip
    for name, value in found.items():
        table.add_row(name, f"{value:,.3f}", wanted.get(name, ""))
    Console(highlight=False).print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The engine's costs and gains.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: three minutes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-slice", action="store_true", help="the embedded model alone")
    return parser.parse_args()


if __name__ == "__main__":
    main()
