"""A token's logits are the same bits, whatever stands beside it and however its prompt is cut.

Each case draws a model (MLA with and without DSA, GQA; fp32, bf16, int4, int8; odd widths), rows of different
lengths, a cut of them into calls, a number of threads and an instruction set, and compares with each row
alone, read at once on one thread. `make soak` runs many more (GLM5_SOAK).
"""

from __future__ import annotations

import os
from functools import cache as kept
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from glm5.formats.packed import Scheme
from glm5.kernels import cpu
from glm5.model.transformer import GlmForCausalLM
from glm5.runtime.cache import Cache
from tests.kernels.kernel_fixture import on_threads, using
from tests.layers.layer_fixture import KINDS, config_of, native_model

CASES = int(os.environ.get("GLM5_SOAK", "1")) * 64  # of each kind and material
MATERIALS: dict[str, tuple[torch.dtype, Scheme | None, bool]] = {
    "fp32": (torch.float32, None, False),
    "fp32, odd": (torch.float32, None, True),
    "bf16": (torch.bfloat16, None, False),
    "bf16, odd": (torch.bfloat16, None, True),
    "int4": (torch.float32, Scheme(4, 32), False),
    "int4 in bf16": (torch.bfloat16, Scheme(4, 32), False),
    "int8": (torch.float32, Scheme(8, 32), False),
}


@kept
def model_of(kind: str, material: str) -> GlmForCausalLM:
    dtype, scheme, odd = MATERIALS[material]
    changes = {"num_nextn_predict_layers": 0}
    if kind == "dsa":
        changes["index_topk"] = 9
    return native_model(config_of(kind, odd=odd, **changes), scheme, dtype)


class Case(NamedTuple):
    rows: list[Tensor]  # ids, of different lengths
    chunks: list[int]  # tokens of each call; they add up to the longest row
    threads: int
    instruction_set: str
    cached: bool

    @classmethod
    def draw(cls, random: torch.Generator) -> Case:
        def number(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=random))

        longest = number(1, 70)
        lengths = [longest] + [number(1, longest) for _ in range(number(0, 3))]
        rows = [torch.randint(256, (length,), generator=random) for length in lengths]
        cached = number(0, 5) > 0
        chunks: list[int] = []
        most = [1, 3, 17, longest][number(0, 3)]
        while cached and sum(chunks) < longest:
            chunks.append(min(number(1, most), longest - sum(chunks)))
        names = cpu.instruction_sets()
        return cls(rows, chunks or [longest], number(1, 2), names[number(0, len(names) - 1)], cached)


def together(model: GlmForCausalLM, case: Case) -> list[Tensor]:
    """The logits of every row, padded on the left, a chunk at a time."""
    longest = len(case.rows[0])
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in case.rows])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in case.rows])
    cache = Cache(model.config, len(ids), longest + 2, dtype=model.dtype) if case.cached else None
    found, at = [], 0
    for count in case.chunks:
        part = slice(at, at + count)
        found.append(model(ids[:, part], attention_mask=mask[:, part], cache=cache).logits)
        at += count
    logits = torch.cat(found, dim=1)
    return [row[longest - len(ids) :] for row, ids in zip(logits, case.rows, strict=True)]


@pytest.mark.parametrize("material", MATERIALS)
@pytest.mark.parametrize("kind", KINDS)
def test_bits_depend_on_the_model_and_the_tokens_before_alone(kind: str, material: str) -> None:
    model = model_of(kind, material)
    seed = (KINDS.index(kind) * 100 + list(MATERIALS).index(material)) * 10_000
    with torch.inference_mode():
        for number in range(CASES):
            case = Case.draw(torch.Generator().manual_seed(seed + number))
            with using(case.instruction_set):
                with on_threads(1):
                    wanted = [model(row.unsqueeze(0)).logits[0] for row in case.rows]
                with on_threads(case.threads):
                    found = together(model, case)
            for row, (one, other) in enumerate(zip(found, wanted, strict=True)):
                differ = (one != other).any(dim=1).nonzero().flatten().tolist()
                assert not differ, f"seed {seed + number}, row {row}: tokens {differ[:5]} differ; {case[1:]}"


def test_a_prefix_that_sees_ahead_is_read_whole() -> None:
    """Bidirectional prompts are one call; the tokens behind them come in any cut, and beside other rows."""
    model = native_model(config_of("dsa", attention_mask_type="prefix", index_topk=9))
    random = torch.Generator().manual_seed(3)
    rows = [torch.randint(256, (length,), generator=random) for length in (30, 17)]
    mask = torch.stack([torch.arange(30) >= 30 - len(row) for row in rows])
    ids = torch.stack([torch.nn.functional.pad(row, (30 - len(row), 0)) for row in rows])
    new = torch.randint(256, (2, 6), generator=random)
    with torch.inference_mode():
        wanted = []
        for row, more in zip(rows, new, strict=True):
            cache = Cache(model.config, 1, 40, dtype=model.dtype)
            whole = model(row[None], prefix_lengths=torch.tensor([len(row)]), cache=cache).logits
            wanted.append((whole, model(more[None], cache=cache).logits))
        cache = Cache(model.config, 2, 40, dtype=model.dtype)
        lengths = torch.tensor([len(row) for row in rows])
        prompt = model(ids, attention_mask=mask, prefix_lengths=lengths, cache=cache).logits
        behind = torch.cat([model(new[:, i : i + 2], cache=cache).logits for i in (0, 2, 4)], dim=1)
    for row, (whole, more) in enumerate(wanted):
        assert torch.equal(prompt[row, 30 - len(rows[row]) :], whole[0])
        assert torch.equal(behind[row], more[0])
