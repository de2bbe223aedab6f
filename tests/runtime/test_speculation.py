"""Speculation gives the tokens of plain greedy decoding, in fewer passes where drafts agree."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm5.config import MODEL_TYPES
from glm5.errors import RequestError
from glm5.model.transformer import GlmForCausalLM, token_positions
from glm5.runtime.decoding import decode, make_rows
from glm5.runtime.sampling import SamplingParams
from glm5.runtime.speculation import SpeculationStats, decode_speculatively
from tests.model_fixture import random_ids, tiny_config, tiny_model

VOCAB = 256
draft_lengths = st.integers(1, 4)
chunks = st.sampled_from([1, 3, 2048])


def plain(model: GlmForCausalLM, prompt: list[int], params: SamplingParams) -> tuple[list[int], str | None]:
    (row,) = make_rows(model, [prompt], [params])
    for _ in decode(model, [row]):
        pass
    return row.output_ids, row.finish_reason


def speculated(
    model: GlmForCausalLM, prompt: list[int], params: SamplingParams, drafts: int, chunk: int = 2048
) -> tuple[list[int], str | None, SpeculationStats]:
    (row,) = make_rows(model, [prompt], [params])
    stats = SpeculationStats()
    for _ in decode_speculatively(model, row, num_draft_tokens=drafts, prefill_chunk=chunk, stats=stats):
        pass
    return row.output_ids, row.finish_reason, stats


@torch.no_grad()
def counting_model(model_type: str = "glm_moe_dsa", strength: float = 0.0, seed: int = 0) -> GlmForCausalLM:
    """A model that says t + 1 after t, and an MTP layer that knows it.

    `strength` lets attention and experts disturb both, so that drafts are right now and then.
    """
    model = tiny_model(tiny_config(model_type, index_n_heads=8), seed)
    embedding = model.model.embed_tokens.weight
    model.lm_head.weight.copy_(embedding.roll(1, dims=0))
    width = model.config.hidden_size
    model.mtp[0].eh_proj.weight.copy_(torch.eye(width, 2 * width))
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
            weight.mul_(strength)
    return model


COUNTING = {model_type: counting_model(model_type) for model_type in MODEL_TYPES}
DISTURBED = {model_type: counting_model(model_type, 0.3, seed=1) for model_type in MODEL_TYPES}
types = pytest.mark.parametrize("model_type", MODEL_TYPES)


def counted(start: int, count: int) -> list[int]:
    return [(start + step) % VOCAB for step in range(1, count + 1)]


# --- the same tokens -------------------------------------------------------------------------


@types
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 14), st.integers(1, 16), draft_lengths, chunks)
def test_a_random_model_says_what_it_says_without_drafts(
    model_type: str, seed: int, length: int, new: int, drafts: int, chunk: int
) -> None:
    model = tiny_model(tiny_config(model_type, index_n_heads=8), seed)
    prompt, params = random_ids(1, length, seed=seed)[0].tolist(), SamplingParams(max_new_tokens=new)
    *found, _ = speculated(model, prompt, params, drafts, chunk)
    assert tuple(found) == plain(model, prompt, params)


@types
@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 12), draft_lengths, chunks, st.data())
def test_drafts_that_are_right_now_and_then_change_nothing(
    model_type: str, seed: int, length: int, drafts: int, chunk: int, data: st.DataObject
) -> None:
    model, prompt = DISTURBED[model_type], random_ids(1, length, seed=seed)[0].tolist()
    free, _ = plain(model, prompt, SamplingParams(max_new_tokens=16))
    ends = (free[data.draw(st.integers(0, 15))],) if data.draw(st.booleans()) else ()
    params = SamplingParams(max_new_tokens=data.draw(st.integers(1, 16)), stop_token_ids=ends)
    *found, stats = speculated(model, prompt, params, drafts, chunk)
    assert tuple(found) == plain(model, prompt, params)
    assert stats.accepted <= stats.drafted
    assert stats.tokens == len(found[0]) - 1


@types
def test_disturbed_drafts_are_both_taken_and_refused(model_type: str) -> None:
    *_, stats = speculated(DISTURBED[model_type], [5, 9], SamplingParams(max_new_tokens=40), 3)
    assert 0 < stats.accepted < stats.drafted


@types
@pytest.mark.parametrize("chunk", [1, 3, 2048])
@torch.inference_mode()
def test_the_draft_layer_reads_what_it_reads_in_training(model_type: str, chunk: int) -> None:
    """Its cached outputs are those of one uncached pass over the prompt and the answer."""
    model, prompt, read = DISTURBED[model_type], [9, 200, 31, 5, 77, 4, 18], []
    hook = model.mtp[0].shared_head.register_forward_hook(lambda _, args, out: read.append(out))
    ids, _, stats = speculated(model, prompt, SamplingParams(max_new_tokens=14), 1, chunk)
    hook.remove()
    whole = torch.tensor([[*prompt, *ids]])
    step = model.step(token_positions(whole[:, 1:]))
    expected = model.mtp[0](model(whole).hidden[:, :-1], model.model.embed_tokens(whole[:, 1:]), step)
    found = torch.cat(read, dim=1)
    assert found.shape[1] >= whole.shape[1] - 3
    torch.testing.assert_close(found, expected[:, : found.shape[1]], atol=2e-5, rtol=1e-4)
    assert stats.accepted > 0


# --- fewer passes ----------------------------------------------------------------------------


@types
@pytest.mark.parametrize("drafts", [1, 2, 3, 4])
def test_agreeing_drafts_are_accepted(model_type: str, drafts: int) -> None:
    new = 1 + 4 * (drafts + 1)
    ids, reason, stats = speculated(
        COUNTING[model_type], [7, 250], SamplingParams(max_new_tokens=new), drafts
    )
    assert (ids, reason) == (counted(250, new), "length")
    assert stats.accepted == stats.drafted == 4 * drafts
    assert stats.tokens_per_pass == drafts + 1


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 255), st.integers(1, 12), draft_lengths)
def test_the_length_may_end_within_a_draft(start: int, new: int, drafts: int) -> None:
    ids, reason, stats = speculated(
        COUNTING["glm_moe_dsa"], [start], SamplingParams(max_new_tokens=new), drafts
    )
    assert (ids, reason) == (counted(start, new), "length")
    assert stats.tokens == new - 1
    assert stats.accepted == stats.drafted  # nothing is drafted past the end


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 255), st.integers(1, 12), draft_lengths)
def test_an_end_token_may_lie_within_an_accepted_draft(start: int, at: int, drafts: int) -> None:
    params = SamplingParams(max_new_tokens=20, stop_token_ids=((start + at) % VOCAB,))
    ids, reason, _ = speculated(COUNTING["glm_moe_dsa"], [start], params, drafts)
    assert (ids, reason) == (counted(start, at), "stop")


def test_equal_logits_are_decided_as_plain_decoding_does() -> None:
    model = counting_model()
    with torch.no_grad():  # tokens 40 and 140 are equally likely after 39, and so after 139
        model.lm_head.weight[140] = model.lm_head.weight[40]
    params = SamplingParams(max_new_tokens=40, stop_token_ids=(46,))
    widths: list[int] = []
    hook = model.model.register_forward_hook(lambda _, args, out: widths.append(out.shape[1]))
    *found, stats = speculated(model, [35, 36], params, 4)
    hook.remove()
    assert tuple(found) == plain(model, [35, 36], params) == (counted(36, 10), "stop")
    assert stats.accepted > 0
    assert 1 in widths[1:]  # the pass that decides


def test_a_row_ended_from_outside_ends() -> None:
    (row,) = make_rows(COUNTING["glm4_moe"], [[1]], [SamplingParams(max_new_tokens=50)])
    for _ in decode_speculatively(COUNTING["glm4_moe"], row, num_draft_tokens=2):
        row.stop()
    assert (row.output_ids, row.finish_reason) == ([2], "stop")


def test_an_unfinished_generator_leaves_the_caller_out_of_inference_mode() -> None:
    (row,) = make_rows(COUNTING["glm4_moe"], [[1]], [SamplingParams(max_new_tokens=50)])
    steps = decode_speculatively(COUNTING["glm4_moe"], row)
    next(steps)
    assert not torch.is_inference_mode_enabled()
    del steps
    assert not torch.is_inference_mode_enabled()


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "params", "drafts", "message"),
    [
        ({"num_nextn_predict_layers": 0}, {}, 1, "no MTP layer"),
        ({}, {"temperature": 0.5}, 1, "greedy decoding"),
        ({}, {"repetition_penalty": 1.1}, 1, "greedy decoding"),
        ({"attention_mask_type": "prefix"}, {}, 1, "prefix attention"),
        ({}, {}, 0, "num_draft_tokens is 0"),
        ({}, {}, 1.5, "num_draft_tokens is 1.5"),
    ],
)
def test_what_cannot_be_speculated_is_refused_at_once(
    changes: dict[str, object], params: dict[str, float], drafts: int, message: str
) -> None:
    model = tiny_model(tiny_config(**changes))
    (row,) = make_rows(model, [[1, 2]], [SamplingParams(**params)])
    with pytest.raises(RequestError, match=message):
        decode_speculatively(model, row, num_draft_tokens=drafts)
