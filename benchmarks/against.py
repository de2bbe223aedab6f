"""Is this version slower than another one? Pairs of the same work, in turn, on the embedded model.

    python benchmarks/against.py OTHER_PYTHON [--pairs 24] [--threads N] [--only decode]

OTHER_PYTHON: the interpreter of an environment that has the other version. Two workers live side by side
and take turns, so that a noisy machine treats both alike; each pair gives a ratio (other / this: above 1 is
faster here). Shown are medians, the median ratio and its 95% interval (bootstrap). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

WORKER = r"""
import json, pathlib, sys, tempfile, time, warnings
warnings.filterwarnings("ignore")
import torch
threads = int(sys.argv[1])
torch.set_num_threads(threads)
import glm5
CHECKPOINT = sys.argv[2]
WORK = {}

def timed(action):
    started = time.perf_counter()
    action()
    return time.perf_counter() - started

def add(name, path, dtype):
    model = glm5.load(path, dtype=dtype, device="cpu")
    prompt = torch.arange(100, 612).view(1, -1)
    ends = dict(do_sample=False, eos_token_id=[], use_mtp=False)

    def generate(ids, count):
        if hasattr(model, "engine"):
            model.engine.forget()
        return timed(lambda: model.generate(ids, max_new_tokens=count, **ends))

    WORK[f"{name} prefill 512"] = lambda: generate(prompt, 1)
    WORK[f"{name} decode 64"] = lambda: generate(prompt[:, :8], 65)
    WORK[f"{name} load"] = lambda: timed(lambda: glm5.load(path, dtype=dtype, device="cpu"))

add("int4", None, "float32")
add("fp32", CHECKPOINT, "float32")
add("bf16", CHECKPOINT, "bfloat16")

from glm5.training.loop import Trainer
from glm5.training.progress import Report
from glm5.training.recipe import read_recipe

class Quiet(Report):
    def say(self, message):
        pass

root = pathlib.Path(tempfile.mkdtemp())
(root / "corpus" / "heldout").mkdir(parents=True)
kind = {"source": "english", "language": "en", "licence": "CC0-1.0"}
texts = (f"The fox number {i} jumps over hill {i * 7} and runs home to a warm bed. " * 9 for i in range(400))
rows = "".join(json.dumps({"text": text, **kind}) + "\n" for text in texts)
for name in ("english.jsonl", "heldout/english.jsonl"):
    (root / "corpus" / name).write_text(rows)
recipe = read_recipe("nano", {
    "output": str(root / "run"), "data.corpus": str(root / "corpus"), "data.shards": str(root / "shards"),
    "data.stages": [{"mix": {"en": 1.0}}], "tokenizer.vocab_size": 400, "run.batch_rows": 4,
    "run.threads": threads,
})
trainer = Trainer(recipe, Quiet())

def step():
    trainer.train_step(1e-3)
    trainer.step += 1

WORK["training step"] = lambda: timed(step)
print(json.dumps(list(WORK)), flush=True)
for line in sys.stdin:
    print(json.dumps(WORK[json.loads(line)]()), flush=True)
"""


class Worker:
    def __init__(self, python: str, threads: int, checkpoint: Path) -> None:
        self.process = subprocess.Popen(
            [python, "-c", WORKER, str(threads), str(checkpoint)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.work: list[str] = self.read()

    def read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a worker ended; run its interpreter with `-c 'import glm5'` to see why")
        return json.loads(line)

    def time(self, work: str) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(work) + "\n")
        self.process.stdin.flush()
        return float(self.read())


def interval(ratios: list[float]) -> tuple[float, float]:
    """95% of the medians of resampled pairs."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return medians[50], medians[-51]


def main() -> None:
    parser = argparse.ArgumentParser(description="This version beside another one.")
    parser.add_argument("other", help="a Python that has the other version")
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="work whose name has this in it")
    options = parser.parse_args()
    checkpoint = Path(__file__).parents[1] / "checkpoints" / "nano"
    this, other = (Worker(python, options.threads, checkpoint) for python in (sys.executable, options.other))
    found = {}
    for work in (name for name in this.work if options.only in name):
        for worker in (this, other):
            worker.time(work)
        pairs = []
        for number in range(options.pairs):
            first, second = (this, other) if number % 2 else (other, this)
            times = {first: first.time(work), second: second.time(work)}
            pairs.append((times[this], times[other]))
        ratios = [theirs / ours for ours, theirs in pairs]
        low, high = interval(ratios)
        here, there = (statistics.median(column) * 1000 for column in zip(*pairs, strict=True))
        found[work] = {
            "ms": here,
            "other_ms": there,
            "ratio": statistics.median(ratios),
            "interval": [low, high],
        }
        print(f"{work:18} {here:9.2f} ms, other {there:9.2f} ms: ratio {found[work]['ratio']:.3f} "
              f"[{low:.3f}, {high:.3f}]", flush=True)  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
