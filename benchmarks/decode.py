"""How near decoding comes to the memory bus, on a random slice at GLM-5's width, beside llama.cpp.

    python benchmarks/decode.py [--quick] [--llama-bench PATH] [--moe-layers N] [--threads N]

Every figure stands beside the memory read rate measured between its own repetitions. Bytes are
counted from the experts that ran. `--llama-bench` names the program, which runs before and after, at 2K of
context and at none; without it `vs_llama_cpp` (both at 2K) is null. The last line is JSON: expert_share,
step_share, vs_llama_cpp, context_growth_2k_128k.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch
from glm5_slice import GIGA, benchmark_arguments, filled_cache, llama_rates, random_slice, step_bytes

from glm5.kernels import _cpu, cpu
from glm5.layers.packed import PackedExperts
from glm5.model.routing import Routing
from glm5.model.step import Probe
from glm5.model.transformer import GlmForCausalLM
from glm5.runtime.cache import Cache

CONTEXTS = (2048, 8192, 32768, 131072)
NEAR_NONE = 16
TOKENS = 4  # decoded one after the other before memory's rate is measured again


def main() -> None:
    arguments = benchmark_arguments(__doc__ or "", "fewer repetitions, contexts up to 32K")
    repeats = 8 if arguments.quick else 24
    torch.set_num_threads(1)  # PyTorch's own threads would wait, awake, on our cores
    cpu.set_threads(arguments.threads)

    def llama_now() -> list[list[float]]:
        if arguments.llama_bench is None:
            return []
        runs = [["-p", "0", "-n", "24", "-r", "2", "-d", depth] for depth in ("2048", "0")]
        return [llama_rates(arguments.llama_bench, arguments.moe_layers, arguments.threads, runs)]

    llama = llama_now()
    model = random_slice(arguments.moe_layers)
    with torch.inference_mode():
        read, expert = expert_product(model, repeats)
        step, short = whole_step(model, 2048, repeats), whole_step(model, NEAR_NONE, repeats)
        curve = context_curve(model, CONTEXTS[: 3 if arguments.quick else 4], repeats)
    del model
    llama += [] if arguments.quick else llama_now()
    deep, empty = (statistics.mean(rates) for rates in zip(*llama, strict=True)) if llama else (None, None)
    report(read, expert, step, short, curve, (deep, empty), arguments.threads)


def read_rate(model: GlmForCausalLM) -> float:
    """GB/s of reading 512 MiB of expert weights once, the better of one stream a thread and two."""
    weights = next(m for m in model.modules() if isinstance(m, PackedExperts)).bytes
    size = min(weights.numel(), 1 << 29)
    seconds = []
    for streams in (1, 2):
        offset = (torch.randint(0, weights.numel() - size + 1, ()).item() // 4096) * 4096
        started = time.perf_counter()
        _cpu.read_all(weights.data_ptr() + int(offset), size, streams)
        seconds.append(time.perf_counter() - started)
    return size / min(seconds) / GIGA


def expert_product(model: GlmForCausalLM, repeats: int) -> tuple[float, float]:
    """(read GB/s, GB/s of gate products over experts that are in no cache), medians, interleaved."""
    experts = next(m for m in model.modules() if isinstance(m, PackedExperts))
    x = torch.randn(1, experts.hidden)
    reads, rates = [], []
    for repeat in range(repeats):
        reads.append(read_rate(model))
        chosen = torch.randperm(experts.num_experts, generator=torch.Generator().manual_seed(repeat))[:24]
        matrices = [experts.matrices(int(e))[0] for e in chosen]
        started = time.perf_counter()
        for matrix in matrices:
            cpu.linear(x, matrix)
        spent = time.perf_counter() - started
        rates.append(sum(matrix.num_bytes for matrix in matrices) / spent / GIGA)
    return statistics.median(reads), statistics.median(rates)


class Step:
    """One decoded token at a context: median seconds, bytes, share of the read rate beside it."""

    def __init__(self, seconds: list[float], reads: list[float], size: float, distinct: float) -> None:
        self.seconds = statistics.median(seconds)
        self.read = statistics.median(reads)
        self.size, self.distinct = size, distinct

    @property
    def share(self) -> float:
        return self.size / self.seconds / GIGA / self.read


def whole_step(model: GlmForCausalLM, context: int, repeats: int) -> Step:
    """Decoding of TOKENS random tokens in a row, the mean of each run."""
    cache = filled_cache(model, context, TOKENS)
    seconds, reads, sizes, seen = [], [], [], set()
    for repeat in range(repeats + 2):
        random = torch.Generator().manual_seed(repeat)
        tokens = torch.randint(0, model.config.vocab_size, (TOKENS, 1, 1), generator=random)
        cache.truncate(context)
        reads.append(read_rate(model))
        started = time.perf_counter()
        for token in tokens:
            model(token, cache=cache, logits_to_keep=1)
        seconds.append((time.perf_counter() - started) / TOKENS)
        chosen = {}
        for index, ids in experts_of(model, tokens[0], cache, context).items():
            chosen[index] = len(set(ids))
            seen |= {(index, expert) for expert in ids}
        sizes.append(step_bytes(model, chosen, context))
    return Step(
        seconds[2:],
        reads[2:],
        statistics.median(sizes[2:]),
        len(seen) / max(1, model.config.num_sparse_layers),
    )


class Chosen(Probe):
    """Notes which experts each layer's router chooses."""

    def __init__(self) -> None:
        self.ids: dict[int, list[int]] = {}

    def routing(self, layer: int, routing: Routing) -> None:
        self.ids[layer] = routing.topk_ids_TK.flatten().tolist()


def experts_of(
    model: GlmForCausalLM, token: torch.Tensor, cache: Cache, context: int
) -> dict[int, list[int]]:
    """Which experts each layer's router chooses for this token (a second, untimed pass)."""
    cache.truncate(context)
    chosen = Chosen()
    model(token, cache=cache, probe=chosen, logits_to_keep=1)
    return chosen.ids


def context_curve(
    model: GlmForCausalLM, contexts: tuple[int, ...], repeats: int
) -> list[tuple[int, float, float]]:
    """(context, seconds of a step, seconds of it in the indexers' own scan and choice), contexts in turn."""
    caches = {context: filled_cache(model, context) for context in contexts}
    token = torch.tensor([[1]])
    times: dict[int, list[float]] = {context: [] for context in contexts}
    scans: dict[int, list[float]] = {context: [] for context in contexts}
    for _ in range(max(5, repeats // 2)):
        for context, cache in caches.items():
            cache.truncate(context)
            times[context].append(timed(lambda cache=cache: model(token, cache=cache, logits_to_keep=1)))
            scans[context].append(timed(lambda cache=cache: scan(model, cache)))
    return [(c, statistics.median(times[c]), statistics.median(scans[c])) for c in contexts]


def scan(model: GlmForCausalLM, cache: Cache) -> None:
    config = model.config
    query = torch.randn(1, config.index_n_heads, config.index_head_dim).to(torch.bfloat16)
    turns = torch.ones(1, config.qk_rope_head_dim // 2, dtype=torch.complex64)
    weights, rows = torch.rand(1, config.index_n_heads), torch.zeros(1, dtype=torch.int32)
    for layer in cache.pool.layers.values():
        assert layer._index_keys is not None and config.index_topk is not None
        cpu.select(
            query,
            turns,
            weights,
            layer.index_keys.flatten(0, 1)[None, : cache.length],
            rows,
            config.index_topk,
        )


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def report(
    read: float,
    expert: float,
    step: Step,
    short: Step,
    curve: list[tuple[int, float, float]],
    llama: tuple[float | None, float | None],
    threads: int,
) -> None:
    ours = 1 / step.seconds
    print(f"{threads} threads, {cpu.instruction_sets()[0]}; memory read {read:.1f} GB/s")
    print(f"one expert product      {expert:6.1f} GB/s   {expert / read:5.0%} of it")
    ratios = []
    for name, found, peer in (("at 2K", step, llama[0]), ("at no context", short, llama[1])):
        rate = 1 / found.seconds
        ratios.append(None if peer is None else round(rate / peer, 2))
        beside = "" if peer is None else f"; llama.cpp Q4_0 {peer:.1f}: {rate / peer:.2f} times it"
        print(
            f"step {name:18s} {found.size * rate / GIGA:6.1f} GB/s   {found.share:5.0%}   "
            f"{rate:.1f} tokens/s, {found.size / 1e6:.0f} MB each{beside}"
        )
    print(f"{step.distinct:.0f} experts a layer seen")
    print("context     step   index scan   the rest")
    for context, seconds, scanned in curve:
        rest = seconds - scanned
        print(f"{context:7d} {seconds * 1e3:7.1f} ms {scanned * 1e3:9.2f} ms {rest * 1e3:9.1f} ms")
    first, last = curve[0], curve[-1]
    growth = (last[1] - last[2]) / (first[1] - first[2]) - 1
    print(json.dumps({
        "memory_read_gb_s": round(read, 2), "expert_share": round(expert / read, 3),
        "step_share": round(step.share, 3), "tokens_per_second": round(ours, 2),
        "vs_llama_cpp": ratios[0], "vs_llama_cpp_no_context": ratios[1],
        "context_growth_2k_128k": round(growth, 3) if last[0] == CONTEXTS[-1] else None,
        "curve_ms": {str(c): [round(s * 1e3, 2), round(i * 1e3, 2)] for c, s, i in curve},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
