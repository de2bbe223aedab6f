"""What the GPU kernels' tests share: where they run, random packed weights, distances."""

from __future__ import annotations

import torch
from torch import Tensor

from glm5.formats.packed import PROJECTIONS, Scheme
from glm5.formats.packing import pack
from glm5.layers.packed import PackedExperts

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The largest difference over the largest value. The interpreter cuts bf16 off where a GPU rounds.
CLOSE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(dtype).to(DEVICE)


def packed_codes(rows: int, columns: int, bits: int, group: int, seed: int) -> tuple[Tensor, Tensor]:
    """Words and bf16 scales; every code occurs, scales differ in size and sign."""
    half = 1 << (bits - 1)
    random = generator(seed)
    codes = torch.randint(-half, half, (rows, columns), generator=random, dtype=torch.int8)
    size = 0.1 ** torch.rand(rows, columns // group, generator=random) / half
    sign = 1.0 - 2.0 * (torch.rand(size.shape, generator=random) < 0.2)
    return pack(codes, bits).to(DEVICE), (size * sign).bfloat16().to(DEVICE)


def packed_experts(experts: int, hidden: int, width: int, bits: int, group: int, seed: int) -> PackedExperts:
    bank = PackedExperts(experts, hidden, width, Scheme(bits, group))
    bank.reserve(DEVICE)
    for expert in range(experts):
        for place, projection in enumerate(PROJECTIONS):
            target = bank.packed(expert, projection)
            words, scales = packed_codes(*bank.shape(projection), bits, group, seed + 3 * expert + place)
            target.words.copy_(words)
            target.scales.copy_(scales)
    return bank


def distance(found: Tensor, wanted: Tensor) -> float:
    """The largest difference as a share of the largest value."""
    return ((found.double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()
