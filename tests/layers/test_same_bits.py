"""A token's logits are the same bits, whatever stands beside it and however its prompt is cut.

Each case draws a model (MLA with and without DSA, GQA; fp32, bf16, int4, int8; odd widths), sequences of
different lengths, steps that take any number of tokens of any of them, in pages that lie anywhere, a number
of threads and an instruction set, and compares with each sequence alone, read at once on one thread without a
cache. `make soak` runs many more (GLM5_SOAK).
"""

from __future__ import annotations

import os
from functools import cache as kept
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from glm5.errors import RequestError
from glm5.formats.packed import Scheme
from glm5.kernels import cpu
from glm5.model.transformer import GlmForCausalLM
from glm5.runtime.cache import Cache, Coming, PagePool, Sequence
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
    steps: list[
        list[tuple[int, int]]
    ]  # (row, tokens) of each step; none = padded on the left, without a cache
    page_tokens: int
    threads: int
    instruction_set: str

    @classmethod
    def draw(cls, random: torch.Generator) -> Case:
        def number(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=random))

        lengths = [number(1, 70) for _ in range(number(1, 4))]
        rows = [torch.randint(256, (length,), generator=random) for length in lengths]
        steps: list[list[tuple[int, int]]] = []
        left = list(lengths)
        most = [1, 3, 17, 70][number(0, 3)]
        while number(0, 5) > 0 or steps:
            if not any(left):
                break
            joining = [row for row, count in enumerate(left) if count and number(0, 3) > 0]
            steps.append([(row, number(1, min(most, left[row]))) for row in joining])
            for row, count in steps[-1]:
                left[row] -= count
        names = cpu.instruction_sets()
        return cls(rows, steps, [4, 16, 64][number(0, 2)], number(1, 2), names[number(0, len(names) - 1)])


def together(model: GlmForCausalLM, case: Case) -> list[Tensor]:
    """The logits of every row, a step at a time."""
    if not case.steps:
        longest = max(map(len, case.rows))
        ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in case.rows])
        mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in case.rows])
        logits = model(ids, attention_mask=mask).logits
        return [row[longest - len(ids) :] for row, ids in zip(logits, case.rows, strict=True)]
    pages = sum(-(-len(row) // case.page_tokens) for row in case.rows)
    pool = PagePool(model.config, pages, dtype=model.dtype, page_tokens=case.page_tokens)
    sequences = [Sequence(pool) for _ in case.rows]
    found: list[list[Tensor]] = [[] for _ in case.rows]
    for step in case.steps:
        if not step:
            continue
        held = [(row, sequences[row].length, count) for row, count in step]
        ids = torch.cat([case.rows[row][at : at + count] for row, at, count in held])
        coming = Coming(pool, [sequences[row] for row, _ in step], [count for _, count in step])
        logits = model.lm_head(model.extend(ids, coming).unsqueeze(0))[0]
        for (row, _), own in zip(step, logits.split([count for _, count in step]), strict=True):
            found[row].append(own)
    return [torch.cat(parts) for parts in found]


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
    """Bidirectional prompts are one step; the tokens behind them come in any cut, and beside other rows."""
    model = native_model(config_of("dsa", attention_mask_type="prefix", index_topk=9))
    random = torch.Generator().manual_seed(3)
    rows = [torch.randint(256, (length,), generator=random) for length in (30, 17)]
    new = torch.randint(256, (2, 6), generator=random)
    with torch.inference_mode():
        wanted = []
        for row, more in zip(rows, new, strict=True):
            cache = Cache(model.config, 1, 40, dtype=model.dtype)
            whole = model(row[None], prefix_lengths=torch.tensor([len(row)]), cache=cache)
            alone = model(row[None], prefix_lengths=torch.tensor([len(row)]))
            assert torch.equal(whole.hidden, alone.hidden)
            wanted.append((whole.hidden[0], model(more[None], cache=cache).hidden[0]))
        cache = Cache(model.config, 2, 40, dtype=model.dtype)
        prompt = model.extend(torch.cat(rows), cache.coming([30, 17], [30, 17])).split([30, 17])
        behind = torch.cat([model(new[:, i : i + 2], cache=cache).hidden for i in (0, 2, 4)], dim=1)
        # A prompt that is known but for its last token: that token alone, which sees all of them.
        last = Cache(model.config, 1, 40, dtype=model.dtype)
        model.extend(rows[0], last.coming([30], [30]))
        last.truncate(29)
        again = model.extend(rows[0][29:], last.coming([1], [30]))
    for row, (whole, more) in enumerate(wanted):
        assert torch.equal(prompt[row], whole)
        assert torch.equal(behind[row], more)
    assert torch.equal(again[0], wanted[0][0][29])
    with pytest.raises(
        RequestError, match="prompt of 30 tokens that see each other cannot be read in pieces"
    ):
        Cache(model.config, 1, 40, dtype=model.dtype).coming([7], [30])
