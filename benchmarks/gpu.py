"""How near the GPU kernels come to the GPU, on a random slice at GLM-5's width, beside transformers.

    python benchmarks/gpu.py [--quick] [--moe-layers N]

Ceilings first: reading memory, bf16 products. Then the experts of a layer for 1 and 512 tokens (the
limit is whichever ceiling binds) and a decode step at 2K of context, as
plain calls. `transformers` runs the same sizes in bf16 where they fit. Without a GPU: one line, and a
JSON of nulls. The last line is JSON: expert_share_1, expert_share_512, step_share, vs_transformers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from glm5_slice import GIGA, filled_cache, random_slice, slice_config, step_bytes
from torch import Tensor

from glm5.kernels import cuda
from glm5.layers.packed import PackedExperts
from glm5.model.transformer import GlmForCausalLM

CONTEXT = 2048
FIGURES = ("memory_read_gb_s", "bf16_tflop_s", "expert_share_1", "expert_share_512", "step_share",
           "tokens_per_second", "vs_transformers")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--moe-layers", type=int, default=1, help="5.2 GB each, 19 more for transformers")
    options = parser.parse_args()
    obstacle = missing()
    if obstacle is not None:
        print(f"{obstacle}: nothing was measured")
        print(json.dumps({"gpu": None, **dict.fromkeys(FIGURES)}))
        return
    repeats = 5 if options.quick else 20
    device = torch.device("cuda")
    with torch.inference_mode():
        read, products = read_rate(device, repeats), product_rate(device, repeats)
        model = random_slice(options.moe_layers, device=device)
        bank = next(module for module in model.modules() if isinstance(module, PackedExperts))
        experts = [Experts(bank, tokens, read, products, repeats) for tokens in (1, 512)]
        step = Step(model, read, repeats)
        del model, bank
        torch.cuda.empty_cache()
        theirs = transformers_rate(options.moe_layers, device, repeats)
    report(read, products, experts, step, theirs)


def missing() -> str | None:
    """What stands in the way of measuring."""
    if not torch.cuda.is_available():
        return "no GPU that this PyTorch can use"
    return None if cuda.available() else "Triton is not installed"


def device_seconds(works: list[Callable[[], object]], repeats: int) -> float:
    """Median seconds of one of `works`, recorded one after another in a graph: no time of Python's."""
    for work in works[:2]:
        work()  # compile, allocate
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    found = []
    for _ in range(repeats + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / 1e3 / len(works))
    return statistics.median(found[1:])


def read_rate(device: torch.device, repeats: int) -> float:
    """GB/s: the better of summing 4 GiB and of copying 2 (which reads and writes)."""
    values = torch.ones(1 << 30, device=device)
    half, size = len(values) // 2, values.numel() * values.element_size()
    summing = size / device_seconds([lambda: values.sum()], repeats)
    copying = size / device_seconds([lambda: values[:half].copy_(values[half:])], repeats)
    return max(summing, copying) / GIGA


def product_rate(device: torch.device, repeats: int) -> float:
    """TFLOP/s of bf16 products, 8192 x 8192 x 8192."""
    left, right = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / device_seconds([lambda: left @ right], repeats) / 1e12


class Experts:
    """The experts of a layer for some tokens: median seconds, and the share of what binds them."""

    def __init__(
        self, bank: PackedExperts, tokens: int, read: float, products: float, repeats: int, topk: int = 8
    ) -> None:
        self.tokens = tokens
        calls = []
        distinct = []
        for seed in range(8):  # other experts each time: what was read before is in no cache
            random = torch.Generator().manual_seed(seed)
            ids = torch.rand(tokens, bank.num_experts, generator=random).topk(topk, dim=1).indices
            distinct.append(len(ids.unique()))
            calls.append((torch.randn(tokens, bank.hidden, generator=random).bfloat16(), ids))
        device = bank.bytes.device
        weights = torch.full((tokens, topk), 1 / topk, device=device)
        works = [self._work(bank, x.to(device), ids.to(device), weights) for x, ids in calls]
        self.seconds = device_seconds(works, repeats)
        self.bytes = statistics.mean(distinct) * bank.bytes_per_expert
        self.operations = 2 * tokens * topk * 3 * bank.hidden * bank.width
        by_memory, by_products = self.bytes / (read * GIGA), self.operations / (products * 1e12)
        self.bound = "memory" if by_memory > by_products else "bf16 products"
        self.share = max(by_memory, by_products) / self.seconds

    @staticmethod
    def _work(bank: PackedExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Callable[[], object]:
        return lambda: cuda.experts(x, ids, weights, bank.runs)


class Step:
    """One decoded token at 2K of context: seconds, share of the reads."""

    def __init__(self, model: GlmForCausalLM, read: float, repeats: int) -> None:
        config = model.config
        cache = filled_cache(model, CONTEXT, room=64)
        token = torch.ones(1, 1, dtype=torch.int64, device=model.device)

        def plain() -> None:
            cache.truncate(CONTEXT)
            model(token, cache=cache, logits_to_keep=1)

        self.seconds = seconds_of(plain, repeats)
        chosen = dict.fromkeys(range(config.num_hidden_layers), config.num_experts_per_tok)
        self.bytes = step_bytes(model, chosen, CONTEXT)
        self.share = self.bytes / self.seconds / GIGA / read


def seconds_of(work: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call and the wait for it: what a user of one row waits for a token."""
    found = []
    for _ in range(repeats + 2):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return statistics.median(found[2:])


def transformers_rate(moe_layers: int, device: torch.device, repeats: int) -> float | None:
    """Tokens/s of transformers with the same sizes in bf16; None where it is absent or does not fit."""
    try:
        import transformers
    except ImportError:
        return None
    config = slice_config(moe_layers)
    needed = 2 * config.total_params() * 1.15
    if torch.cuda.mem_get_info(device)[0] < needed:
        print(f"transformers needs {needed / GIGA:.0f} GB, which are not free: left out")
        return None
    with device:
        peer = transformers_model(transformers, config.to_dict())
    ids = torch.randint(0, config.vocab_size, (1, CONTEXT), device=device)
    cache = peer(ids, use_cache=True, logits_to_keep=1).past_key_values
    return 1 / seconds_of(lambda: peer(ids[:, :1], past_key_values=cache, use_cache=True), repeats)


def transformers_model(transformers: Any, sizes: dict[str, Any]) -> Any:
    config = transformers.AutoConfig.for_model(**sizes)
    peer = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16, experts_implementation="grouped_mm"
    )
    return peer.eval()


def report(read: float, products: float, experts: list[Experts], step: Step, theirs: float | None) -> None:
    name, ours = torch.cuda.get_device_name(), 1 / step.seconds
    print(f"{name}; memory read {read:.0f} GB/s, bf16 products {products:.0f} TFLOP/s")
    for row in experts:
        print(
            f"experts, {row.tokens:3d} tokens {row.seconds * 1e6:8.0f} us "
            f"{row.bytes / row.seconds / GIGA:7.0f} GB/s {row.operations / row.seconds / 1e12:6.1f} TFLOP/s "
            f"{row.share:5.0%} of {row.bound}"
        )
    print(
        f"decode step at 2K   {step.seconds * 1e6:8.0f} us {step.bytes / step.seconds / GIGA:7.0f} GB/s "
        f"{step.share:5.0%} of memory; {ours:.0f} tokens/s"
    )
    if theirs is not None:
        print(f"transformers, bf16  {theirs:.0f} tokens/s: ours is {ours / theirs:.2f} times it")
    values = (
        round(read, 1), round(products, 1), round(experts[0].share, 3), round(experts[1].share, 3),
        round(step.share, 3), round(ours, 1),
        None if theirs is None else round(ours / theirs, 2),
    )  # fmt: skip
    print(json.dumps({"gpu": name, **dict(zip(FIGURES, values, strict=True))}))


if __name__ == "__main__":
    main()
