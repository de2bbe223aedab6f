"""Compiles every program for a GPU that need not be there; run as `python compile_all.py 90`.

Triton's compiler and assembler need no device: a driver that only names one is put in, and a launch
becomes a compilation with the arguments it would have had. Prints one JSON object a program.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from glm5.kernels.cpu import Slots
from glm5.kernels.cuda.index import index_order
from glm5.kernels.cuda.mixture import Bank, experts
from glm5.kernels.cuda.mla import attend
from glm5.kernels.cuda.products import linear

HIDDEN, WIDTH, EXPERTS = 6144, 2048, 16  # GLM-5's widths


class NamedOnly:
    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def compile_only(program: JITFunction, grid: Any) -> Any:
    def call(*arguments: Any, **options: Any) -> None:
        made = program.run(*arguments, grid=grid, warmup=True, **options)
        ptx, layouts = made.asm["ptx"], dict(re.findall(r"^(#\w+) = (.*)$", made.asm["ttgir"], re.M))
        sums = re.findall(r'"tt\.reduce"\(.*?\}\) : \(tensor<([^>]*), (#\w+)>', made.asm["ttgir"], re.S)
        print(json.dumps({
            "program": program.__name__, "shared": made.metadata.shared, "cubin": len(made.asm["cubin"]),
            "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32|cp\.async\.c[ag]\S* .*0x10", ptx)),
            "tensor_core": len(re.findall(r"mma\.sync|wgmma\.mma_async", ptx)),
            "sum_layouts": sorted({f"{shape} {layouts.get(name, name)}" for shape, name in sums}),
            "together": options.get("together"),
        }))  # fmt: skip

    return call


def main() -> None:
    driver.set_active(NamedOnly(int(sys.argv[1])))
    JITFunction.__getitem__ = compile_only
    half, whole = torch.bfloat16, torch.float32
    words, scales = (
        torch.zeros(576, HIDDEN // 8, dtype=torch.int32),
        torch.zeros(576, HIDDEN // 64, dtype=half),
    )
    for tokens, dtype in ((1, half), (2, half), (4, half), (16, half), (512, half), (1, whole), (16, whole)):
        linear(torch.zeros(tokens, HIDDEN, dtype=dtype), words, scales, bits=4, group=64)
    codes, run = HIDDEN * WIDTH // 2, HIDDEN * WIDTH // 2 + HIDDEN * WIDTH // 64 * 2
    starts = ((0, codes), (run, run + codes), (2 * run, 2 * run + codes))
    bank = Bank(torch.zeros(EXPERTS, 3 * run, dtype=torch.uint8), starts, HIDDEN, WIDTH, 4, 64, half)
    for tokens, dtype in ((1, half), (16, half), (256, half), (400, half), (16, whole)):
        ids, weights = torch.zeros(tokens, 2, dtype=torch.int64), torch.zeros(tokens, 2)
        experts(torch.zeros(tokens, HIDDEN, dtype=dtype), ids, weights, bank)
    rows = torch.zeros(1, dtype=torch.int32)
    for dtype in (half, whole):
        q, cache = torch.zeros(1, 64, 576, dtype=dtype), torch.zeros(1, 4096, 576, dtype=dtype)
        mask = torch.zeros(1, 4096, dtype=torch.bool)
        attend(q, cache, rows, Slots(torch.zeros(1, 2048, dtype=torch.int32), rows), latent=512, scale=0.1)
        attend(q, cache, rows, Slots(None, rows), latent=512, scale=0.1, visible_NS=mask)
        index_order(
            torch.zeros(1, 32, 128, dtype=dtype),
            torch.zeros(1, 32),
            torch.zeros(1, 4096, 128, dtype=dtype),
            rows,
        )


if __name__ == "__main__":
    main()
