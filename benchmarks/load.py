"""How fast a large model is quantized and loaded, beside what the disk gives.

    python benchmarks/load.py [--quick] [--moe-layers N] [--folder DIR]

Weights of GLM-5's width (random, made when they are asked for) are quantized into a directory by a
process whose peak memory is noted. Then, each time with the files out of the page cache: the rate of
plain reads (O_DIRECT, 8 MiB, one and two in flight, the better), and a new process that loads the
model and makes one token. The last line is JSON: load_ratio (seconds to the first token over seconds to
read the resident bytes at the disk's rate), with and without starting Python and PyTorch, and
quantize_peak_mib.
"""

from __future__ import annotations

import argparse
import json
import math
import mmap
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from glm5_slice import GIGA, slice_config
from torch import Tensor

from glm5.checkpoint.names import pieces
from glm5.config import ModelConfig
from glm5.quantize import Recipe, quantize
from glm5.quantize.sources import meta_model

BLOCK = 8 << 20
FIRST_TOKEN = """
import sys, time
started = time.perf_counter()
import torch, glm5
imported = time.perf_counter()
model = glm5.load(sys.argv[1])
model.generate(torch.tensor([[1, 2, 3, 4]]), max_new_tokens=1, eos_token_id=[])
ended = time.perf_counter()
print(imported - started, ended - imported)
"""


class RandomSource:
    """bf16 weights of a config, from no file: each a stretch of the same normal numbers."""

    path = Path("random weights")

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        model = meta_model(config)
        state = model.state_dict(keep_vars=True)
        self._shapes = {piece.name: tuple(piece.of(state[piece.parameter]).shape) for piece in pieces(model)}
        self._numbers = (torch.randn(30_000_001) * 0.02).bfloat16()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def num_bytes(self, name: str) -> int:
        return 2 * math.prod(self.shape(name))

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def read(self, name: str) -> Tensor:
        size, start = math.prod(self.shape(name)), sum(name.encode()) * 7919 % 1_000_000
        values = self._numbers[start:].repeat(-(-size // (len(self._numbers) - start)))[:size]
        return values.view(self.shape(name))

    def bands(self, name: str) -> Iterator[Tensor]:
        yield self.read(name)

    rows = bands

    def identity(self) -> list[object]:
        return ["random"]

    def side_files(self) -> dict[str, bytes]:
        return {}

    def check_leftovers(self, names: list[str]) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="64 of 256 experts, two loads")
    parser.add_argument("--moe-layers", type=int, default=1, help="5.2 GB each")
    parser.add_argument("--folder", type=Path, help="where to write; default: the temporary folder")
    parser.add_argument("--only-quantize", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    config = slice_config(arguments.moe_layers)
    if arguments.quick:
        config = config.with_changes(n_routed_experts=64)
    if arguments.only_quantize is not None:
        quantize_here(config, arguments.only_quantize)
        return
    folder = Path(tempfile.mkdtemp(prefix="glm5-load-", dir=arguments.folder))
    try:
        measure(folder / "model", 2 if arguments.quick else 5)
    finally:
        shutil.rmtree(folder)


def quantize_here(config: ModelConfig, target: Path) -> None:
    """Quantize and tell seconds, source bytes and the growth of this process's peak memory."""
    source = RandomSource(config)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    receipt = quantize(source, target, Recipe())
    spent = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": spent, "bytes": receipt["source_bytes"], "peak": peak, "base": base}))


def measure(target: Path, rounds: int) -> None:
    command = [sys.executable, __file__, *sys.argv[1:], "--only-quantize", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr.strip().splitlines()[-1])
    made = json.loads(done.stdout.splitlines()[-1])
    peak = made["peak"] / 1024
    print(f"quantized {made['bytes'] / GIGA:.1f} GB in {made['seconds']:.0f} s, "
          f"{made['bytes'] / made['seconds'] / GIGA:.2f} GB/s; peak {peak:.0f} MiB, "
          f"{(made['peak'] - made['base']) / 1024:.0f} of them for the job")  # fmt: skip
    files = sorted(target.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    rates, imports, loads = [], [], []
    for _ in range(rounds):
        rates.append(max(disk_rate(files, streams) for streams in (1, 2)))
        forget(files)
        done = subprocess.run(
            [sys.executable, "-c", FIRST_TOKEN, str(target)], capture_output=True, text=True, check=True
        )
        imported, loaded = map(float, done.stdout.split())
        imports.append(imported)
        loads.append(loaded)
    rate, imported, loaded = map(statistics.median, (rates, imports, loads))
    needed = size / rate / GIGA
    print(f"disk {rate:.2f} GB/s: {size / GIGA:.2f} GB in {needed:.1f} s")
    whole = imported + loaded
    print(f"first token after {loaded:.1f} s ({loaded / needed:.2f} times that), "
          f"with Python and PyTorch {whole:.1f} s ({whole / needed:.2f})")  # fmt: skip
    print(json.dumps({
        "load_ratio": round(loaded / needed, 2), "load_ratio_with_imports": round(whole / needed, 2),
        "disk_gb_s": round(rate, 2), "resident_gb": round(size / GIGA, 2), "quantize_peak_mib": round(peak),
        "quantize_gb_s": round(made["bytes"] / made["seconds"] / GIGA, 2),
    }))  # fmt: skip


def forget(files: list[Path]) -> None:
    """Out of the page cache."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_rate(files: list[Path], streams: int) -> float:
    """GB/s of reading the files past the page cache, `streams` blocks in flight."""
    blocks = [(file, at) for file in files for at in range(0, file.stat().st_size - BLOCK, BLOCK)]
    blocks = blocks[: (2 << 30) // BLOCK]

    def work(share: list[tuple[Path, int]]) -> None:
        buffer = mmap.mmap(-1, BLOCK)
        opened = {file: os.open(file, os.O_RDONLY | os.O_DIRECT) for file in files}
        for file, at in share:
            os.preadv(opened[file], [buffer], at)
        for descriptor in opened.values():
            os.close(descriptor)

    workers = [threading.Thread(target=work, args=(blocks[n::streams],)) for n in range(streams)]
    started = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return len(blocks) * BLOCK / (time.perf_counter() - started) / GIGA


if __name__ == "__main__":
    main()
