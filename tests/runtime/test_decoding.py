"""Cached decoding is the full forward pass, whatever the chunks, the padding and the neighbours."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm5.errors import RequestError
from glm5.model.transformer import GlmForCausalLM
from glm5.runtime.cache import Cache
from glm5.runtime.decoding import decode, make_rows, pad_left, prefill
from glm5.runtime.sampling import SamplingParams
from tests.model_fixture import random_ids, tiny_config, tiny_model

quick = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**31)
# index_topk is 8: most sequences here are longer, so that the selection is at work.
MODELS = {
    "glm_moe_dsa": tiny_model(tiny_config("glm_moe_dsa", index_n_heads=8), seed=1),
    "index-share": tiny_model(
        tiny_config(indexer_types=["full", "shared", "shared"], index_n_heads=8), seed=2
    ),
    "glm4_moe": tiny_model(tiny_config("glm4_moe"), seed=3),
    "glm4_moe_lite": tiny_model(tiny_config("glm4_moe_lite"), seed=4),
}
PREFIX = {
    name: tiny_model(model.config.with_changes(attention_mask_type="prefix"), seed=5)
    for name, model in MODELS.items()
}
kinds = pytest.mark.parametrize("kind", MODELS)
prompt_lengths = st.lists(st.integers(1, 20), min_size=1, max_size=4)


def prompts_of(lengths: list[int], seed: int) -> list[list[int]]:
    return [random_ids(1, n, seed=seed + i)[0].tolist() for i, n in enumerate(lengths)]


def chunk_sizes(data: st.DataObject, length: int) -> list[int]:
    bounds = data.draw(st.sets(st.integers(1, length), max_size=5)) | {0, length}
    return [end - start for start, end in pairwise(sorted(bounds))]


def generated(
    model: GlmForCausalLM, prompts: list[list[int]], params: list[SamplingParams], chunk: int = 2048
) -> list[list[int]]:
    rows = make_rows(model, prompts, params)
    for _ in decode(model, rows, prefill_chunk=chunk):
        pass
    return [row.output_ids for row in rows]


@torch.inference_mode()
def cached_logits(
    model: GlmForCausalLM, ids: Tensor, mask: Tensor | None, sizes: list[int], prefix: Tensor | None = None
) -> Tensor:
    cache = Cache(model.config, len(ids), ids.shape[1], dtype=model.dtype)
    outputs = []
    for at in torch.arange(ids.shape[1]).split(sizes):
        part = None if mask is None else mask[:, at]
        outputs.append(model(ids[:, at], part, prefix_lengths=prefix, cache=cache).logits)
    return torch.cat(outputs, dim=1)


@torch.inference_mode()
def assert_rows_are_as_alone(
    model: GlmForCausalLM, prompts: list[list[int]], logits: Tensor, prefixes: list[int] | None = None
) -> None:
    for number, prompt in enumerate(prompts):
        prefix = None if prefixes is None else torch.tensor([prefixes[number]])
        alone = model(torch.tensor([prompt]), prefix_lengths=prefix).logits[0]
        worst = (logits[number, -len(prompt) :] - alone).abs().max() / alone.std()
        assert worst < 2e-5, f"row {number}: {worst:.1e}"


# --- logits ----------------------------------------------------------------------------------


@kinds
@quick
@given(prompt_lengths, seeds, st.data())
def test_every_position_is_as_in_the_full_pass(
    kind: str, lengths: list[int], seed: int, data: st.DataObject
) -> None:
    model, prompts = MODELS[kind], prompts_of(lengths, seed)
    ids, mask = pad_left(prompts, 0)
    logits = cached_logits(model, ids, mask, chunk_sizes(data, ids.shape[1]))
    assert_rows_are_as_alone(model, prompts, logits)


@kinds
def test_one_token_at_a_time_is_the_full_pass(kind: str) -> None:
    model, prompts = MODELS[kind], prompts_of([24], seed=7)
    logits = cached_logits(model, torch.tensor(prompts), None, [1] * 24)
    assert_rows_are_as_alone(model, prompts, logits)


@kinds
@quick
@given(prompt_lengths, seeds, st.data())
def test_under_a_prefix_mask_tokens_after_the_prompt_are_as_in_the_full_pass(
    kind: str, lengths: list[int], seed: int, data: st.DataObject
) -> None:
    model, after = PREFIX[kind], data.draw(st.integers(1, 6))
    prompts = prompts_of([n + after for n in lengths], seed)
    ids, mask = pad_left(prompts, 0)
    sizes = [max(lengths), *chunk_sizes(data, after)]
    logits = cached_logits(model, ids, mask, sizes, torch.tensor(lengths))
    assert_rows_are_as_alone(model, prompts, logits, lengths)


@kinds
@torch.inference_mode()
def test_a_prefix_prompt_is_read_in_one_piece_whatever_the_chunk(kind: str) -> None:
    model, prompts = PREFIX[kind], prompts_of([13, 5], seed=3)
    passes: list[int] = []
    hook = model.model.register_forward_hook(lambda _, args, out: passes.append(out.shape[1]))
    cache = Cache(model.config, 2, 13, dtype=model.dtype)
    logits = prefill(model, prompts, cache, prefill_chunk=4)
    hook.remove()
    assert passes == [13]
    for number, prompt in enumerate(prompts):
        alone = model(torch.tensor([prompt]), prefix_lengths=torch.tensor([len(prompt)])).logits[0, -1]
        torch.testing.assert_close(logits[number], alone, atol=2e-5, rtol=1e-4)


def test_a_causal_prompt_is_read_in_chunks() -> None:
    model, passes = MODELS["glm_moe_dsa"], []
    hook = model.model.register_forward_hook(lambda _, args, out: passes.append(out.shape[1]))
    generated(model, prompts_of([11], 0), [SamplingParams(max_new_tokens=3)], chunk=4)
    hook.remove()
    assert passes == [4, 4, 3, 1, 1]


# --- rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*MODELS, "prefix"])
@settings(max_examples=6, deadline=None)
@given(st.lists(st.integers(1, 16), min_size=2, max_size=4), seeds, st.integers(1, 20), st.randoms())
def test_a_row_never_depends_on_the_rows_beside_it(
    kind: str, lengths: list[int], seed: int, chunk: int, order: object
) -> None:
    """Greedy and drawn rows with ends of their own, in any order, against each alone."""
    model = PREFIX["glm_moe_dsa"] if kind == "prefix" else MODELS[kind]
    prompts = prompts_of(lengths, seed)
    params = [
        SamplingParams(max_new_tokens=2 + 3 * i, temperature=0.8 * (i % 2), top_p=0.9, seed=seed + i)
        for i in range(len(lengths))
    ]
    alone = [generated(model, [p], [wanted])[0] for p, wanted in zip(prompts, params, strict=True)]
    places = list(range(len(prompts)))
    order.shuffle(places)  # type: ignore[attr-defined]
    together = generated(model, [prompts[i] for i in places], [params[i] for i in places], chunk)
    assert together == [alone[i] for i in places]
    assert [len(ids) for ids in alone] == [2 + 3 * i for i in range(len(lengths))]


def test_an_end_token_ends_its_row_and_no_other() -> None:
    model, prompts = MODELS["glm4_moe"], prompts_of([4, 9], seed=1)
    free = generated(model, prompts, [SamplingParams(max_new_tokens=12)] * 2)
    end = free[0][3]
    rows = make_rows(
        model,
        prompts,
        [SamplingParams(max_new_tokens=12, stop_token_ids=(end,)), SamplingParams(max_new_tokens=12)],
    )
    seen = [[row.finish_reason for row in step] for step in decode(model, rows)]
    assert rows[0].output_ids == free[0][: free[0].index(end) + 1]
    assert rows[0].finish_reason == "stop"
    assert (rows[1].output_ids, rows[1].finish_reason) == (free[1], "length")
    assert len(seen) == 12


def test_the_end_tokens_of_the_config_count_unless_ignored() -> None:
    prompts = prompts_of([5], seed=2)
    free = generated(MODELS["glm4_moe"], prompts, [SamplingParams(max_new_tokens=8)])[0]
    model = tiny_model(MODELS["glm4_moe"].config.with_changes(eos_token_id=free[2]), seed=3)
    stopped = generated(model, prompts, [SamplingParams(max_new_tokens=8)])[0]
    assert stopped == free[: free.index(free[2]) + 1]
    assert generated(model, prompts, [SamplingParams(max_new_tokens=8, ignore_eos=True)])[0] == free


def test_a_row_can_be_ended_from_outside() -> None:
    rows = make_rows(MODELS["glm4_moe"], prompts_of([3, 3], 0), [SamplingParams(max_new_tokens=9)] * 2)
    for step, _ in enumerate(decode(MODELS["glm4_moe"], rows)):
        if step == 1:
            rows[1].stop()
    assert [(len(row.output_ids), row.finish_reason) for row in rows] == [(9, "length"), (2, "stop")]


def test_no_new_token_runs_no_pass() -> None:
    rows = make_rows(MODELS["glm4_moe"], prompts_of([3], 0), [SamplingParams(max_new_tokens=0)])
    assert list(decode(MODELS["glm4_moe"], rows)) == []
    assert (rows[0].output_ids, rows[0].finish_reason) == ([], "length")


def test_an_unfinished_generator_leaves_the_caller_out_of_inference_mode() -> None:
    rows = make_rows(MODELS["glm4_moe"], prompts_of([3], 0), [SamplingParams(max_new_tokens=9)])
    steps = decode(MODELS["glm4_moe"], rows)
    next(steps)
    assert not torch.is_inference_mode_enabled()
    steps.close()  # type: ignore[attr-defined]
    assert not torch.is_inference_mode_enabled()
    assert torch.ones(1, requires_grad=True).mul(2).requires_grad


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[]], "the prompt is empty"),
        ([[1], []], "prompt 1 is empty"),
        ([[1, 256]], "the prompt has token id 256; the vocabulary ends at 255"),
        ([[1], [2], [-1]], "prompt 2 has token id -1"),
        ([[1], [1] * 4096], "prompt 1 has 4096 tokens; the model holds at most 4096"),
    ],
)
def test_a_bad_prompt_is_named_in_one_line(prompts: list[list[int]], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        make_rows(MODELS["glm_moe_dsa"], prompts, [SamplingParams()] * len(prompts))
    assert "\n" not in str(caught.value)


def test_a_full_context_ends_the_row() -> None:
    model = tiny_model(tiny_config("glm4_moe", max_position_embeddings=10))
    (row,) = make_rows(model, [[1] * 7], [SamplingParams(max_new_tokens=100)])
    assert row.params.max_new_tokens == 3
    assert len(generated(model, [[1] * 7], [SamplingParams(max_new_tokens=100)])[0]) == 3
    make_rows(model, [[1] * 10], [SamplingParams(max_new_tokens=0)])


@pytest.mark.parametrize("chunk", [0, -3, 2.5, True])
def test_an_impossible_chunk_is_refused_at_once(chunk: int) -> None:
    with pytest.raises(RequestError, match="prefill_chunk is"):
        decode(MODELS["glm4_moe"], [], prefill_chunk=chunk)
