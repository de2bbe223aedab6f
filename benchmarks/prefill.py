"""How near reading a prompt comes to the int8 units, on a random slice at GLM-5's width, beside llama.cpp.

    python benchmarks/prefill.py [--quick] [--llama-bench PATH] [--moe-layers N] [--threads N]

Two ceilings of int8 products: the best of oneDNN (`torch._int_mm`, 2048 x 4096 x 4096), which is what a
good library reaches and what `share` is of, and the registers' own peak, which it is of where oneDNN has
no int8 product for the machine (without VNNI it takes a thousand times as long). Prompts of 512 and 4096
tokens, attention included. The last line is JSON: share (of the binding ceiling, the worse prompt),
vs_llama_cpp (of 512 tokens; null without `--llama-bench`).
"""

from __future__ import annotations

import json
import statistics
import time
from functools import partial

import torch
from glm5_slice import GIGA, benchmark_arguments, llama_rates, random_slice

from glm5.kernels import _cpu, cpu
from glm5.layers.packed import PackedExperts, PackedLinear
from glm5.model.transformer import GlmForCausalLM
from glm5.runtime.cache import Cache

SLOW = 20.0  # GOP/s: no product of int8 units


def main() -> None:
    arguments = benchmark_arguments(__doc__ or "", "512 tokens only")
    cpu.set_threads(arguments.threads)
    torch.set_num_threads(arguments.threads)
    lengths = (512,) if arguments.quick else (512, 4096)
    llama = {}
    if arguments.llama_bench is not None:
        runs = [["-p", str(length), "-n", "0", "-r", "1"] for length in lengths]
        rates = llama_rates(arguments.llama_bench, arguments.moe_layers, arguments.threads, runs)
        llama = dict(zip(lengths, rates, strict=True))
    model = random_slice(arguments.moe_layers)
    results = []
    with torch.inference_mode():
        for length in lengths:
            results.append(measure(model, length, 3 if arguments.quick else 4))
    report(results, llama)


def ceilings(model: GlmForCausalLM) -> tuple[float, float, float]:
    """(oneDNN int8 GOP/s, register peak GOP/s, memory read GB/s), now."""
    left = torch.randint(-100, 100, (2048, 4096), dtype=torch.int8)
    right = torch.randint(-100, 100, (4096, 4096), dtype=torch.int8)
    few = left[:32, :512].contiguous(), right[:512, :512].contiguous()
    library = 2 * 32 * 512 * 512 / _seconds(lambda: torch._int_mm(*few)) / GIGA
    if library > SLOW:
        best = min(_seconds(lambda: torch._int_mm(left, right)) for _ in range(4))
        library = 2 * 2048 * 4096 * 4096 / best / GIGA
    started = time.perf_counter()
    products = _cpu.spin_products(200_000)
    peak = 2 * products / (time.perf_counter() - started) / GIGA
    weights = next(m for m in model.modules() if isinstance(m, PackedExperts)).bytes
    size = 1 << 29
    times = [_seconds(partial(_cpu.read_all, weights.data_ptr(), size, stride)) for stride in (1, 2)]
    seconds = min(times)
    return library, peak, size / seconds / GIGA


def operations(model: GlmForCausalLM, tokens: int) -> float:
    """Multiply-adds times two of every packed product for this many tokens."""
    config, weights = model.config, 0
    for module in model.modules():
        if isinstance(module, PackedLinear):
            weights += module.in_features * module.out_features
        elif isinstance(module, PackedExperts):
            weights += config.num_experts_per_tok * 3 * module.hidden * module.width
    return 2.0 * weights * tokens


def bytes_read(model: GlmForCausalLM) -> float:
    """Every packed byte once: with hundreds of tokens all experts run."""
    total = 0
    for module in model.modules():
        if isinstance(module, PackedLinear):
            total += module.words.numel() * 4 + module.scales.numel() * 2
        elif isinstance(module, PackedExperts):
            total += module.num_experts * module.bytes_per_expert
    return float(total)


def measure(model: GlmForCausalLM, length: int, repeats: int) -> dict[str, float]:
    seconds, limits = [], []
    for repeat in range(repeats):
        limits.append(ceilings(model))
        ids = torch.randint(
            0, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(repeat)
        )
        cache = Cache(model.config, 1, length, dtype=torch.bfloat16)

        def run(ids: torch.Tensor = ids, cache: Cache = cache) -> None:
            for first in range(0, ids.shape[1], 2048):
                model(ids[:, first : first + 2048], cache=cache, logits_to_keep=1)

        seconds.append(_seconds(run))
    spent = statistics.median(seconds)
    library, peak, read = (statistics.median(column) for column in zip(*limits, strict=True))
    by_arithmetic = operations(model, length) / ((library if library > SLOW else peak) * GIGA)
    by_memory = bytes_read(model) / (read * GIGA)
    return {
        "tokens": length, "seconds": spent, "tokens_per_second": length / spent, "int8_gop_s": library,
        "register_peak_gop_s": peak, "memory_read_gb_s": read,
        "achieved_gop_s": operations(model, length) / spent / GIGA,
        "share": max(by_arithmetic, by_memory) / spent, "bound": float(by_memory > by_arithmetic),
    }  # fmt: skip


def report(results: list[dict[str, float]], llama: dict[int, float]) -> None:
    print("tokens   tok/s   GOP/s   of oneDNN int8   of registers   bound by   llama.cpp")
    for row in results:
        peer = llama.get(int(row["tokens"]))
        beside = "-" if peer is None else f"{peer:.1f} tok/s ({row['tokens_per_second'] / peer:.1f}x)"
        bound = "memory" if row["bound"] else "int8"
        print(
            f"{row['tokens']:6.0f} {row['tokens_per_second']:7.1f} {row['achieved_gop_s']:7.0f} "
            f"{row['achieved_gop_s'] / row['int8_gop_s']:10.0%} "
            f"{row['achieved_gop_s'] / row['register_peak_gop_s']:14.0%} {bound:>14}   {beside}"
        )
    first = results[0]
    peer = llama.get(int(first["tokens"]))
    print(json.dumps({
        "share": round(min(row["share"] for row in results), 3),
        "vs_llama_cpp": None if peer is None else round(first["tokens_per_second"] / peer, 2),
        "prompts": [{key: round(value, 3) for key, value in row.items()} for row in results],
    }))  # fmt: skip


def _seconds(work: object) -> float:
    assert callable(work)
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
