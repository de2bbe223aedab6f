"""Guesses change nothing but the number of steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm5.config import MODEL_TYPES
from glm5.errors import RequestError
from glm5.layers.exact import rows_are_exact
from glm5.model.transformer import GlmForCausalLM, token_positions
from glm5.runtime.engine import Engine
from glm5.runtime.request import Request
from glm5.runtime.sampling_params import SamplingParams
from glm5.runtime.speculation import Costs, Rate
from tests.layers.layer_fixture import config_of, native_model
from tests.model_fixture import random_ids, tiny_config, tiny_model
from tests.runtime.language_model_fixture import tiny_language_model

VOCAB = 256
draft_lengths = st.integers(1, 4)
types = pytest.mark.parametrize("model_type", MODEL_TYPES)


def said(model: GlmForCausalLM, prompt: list[int], params: SamplingParams, drafts: int | None) -> Request:
    engine = Engine(model, cache_tokens=2048)
    request = engine.submit(prompt, params, num_draft_tokens=drafts)
    engine.run()
    assert request.error is None
    return request


@torch.no_grad()
def counting_model(model_type: str = "glm_moe_dsa", strength: float = 0.0, seed: int = 0) -> GlmForCausalLM:
    """A model that says t + 1 after t, and an MTP layer that knows it.

    `strength` lets attention and experts disturb both, so that guesses are right now and then.
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


def counted(start: int, count: int) -> list[int]:
    return [(start + step) % VOCAB for step in range(1, count + 1)]


# --- the same tokens -------------------------------------------------------------------------


@types
@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 12), draft_lengths, st.data())
def test_guesses_that_are_right_now_and_then_change_nothing(
    model_type: str, seed: int, length: int, drafts: int, data: st.DataObject
) -> None:
    model, prompt = DISTURBED[model_type], random_ids(1, length, seed=seed)[0].tolist()
    hot = {"temperature": 1.2, "seed": seed} if data.draw(st.booleans()) else {}
    free = said(model, prompt, SamplingParams(max_new_tokens=16, **hot), 0).output_ids
    ends = (free[data.draw(st.integers(0, 15))],) if data.draw(st.booleans()) else ()
    params = SamplingParams(max_new_tokens=data.draw(st.integers(1, 16)), stop_token_ids=ends, **hot)
    plain, guessed = said(model, prompt, params, 0), said(model, prompt, params, drafts)
    assert (guessed.output_ids, guessed.finish_reason) == (plain.output_ids, plain.finish_reason)
    assert guessed.statistics.accepted <= guessed.statistics.drafted
    assert guessed.statistics.steps + guessed.statistics.accepted >= len(plain.output_ids)


@types
def test_disturbed_guesses_are_both_taken_and_refused(model_type: str) -> None:
    found = said(DISTURBED[model_type], [5, 9], SamplingParams(max_new_tokens=40), 3).statistics
    assert 0 < found.accepted < found.drafted


@types
@torch.inference_mode()
def test_the_draft_layer_reads_what_it_reads_in_training(model_type: str) -> None:
    """Its cached outputs are those of one uncached pass over the prompt and the answer."""
    model, prompt, read = DISTURBED[model_type], [9, 200, 31, 5, 77, 4, 18], []
    hook = model.mtp[0].shared_head.register_forward_hook(lambda _, args, out: read.append(out))
    request = said(model, prompt, SamplingParams(max_new_tokens=14), 1)
    hook.remove()
    whole = torch.tensor([request.tokens])
    step = model.step(token_positions(whole[:, 1:]))
    expected = model.mtp[0](model(whole).hidden[:, :-1], model.model.embed_tokens(whole[:, 1:]), step)
    found = torch.cat(read, dim=1)
    assert found.shape[1] >= whole.shape[1] - 3
    torch.testing.assert_close(found, expected[:, : found.shape[1]], atol=2e-5, rtol=1e-4)
    assert request.statistics.accepted > 0


def test_text_that_repeats_is_looked_up_without_an_mtp_layer() -> None:
    model = native_model(config_of("gqa"))
    with torch.no_grad():  # says t + 1 after t, and begins again after 9
        model.lm_head.weight.copy_(model.model.embed_tokens.weight.roll(1, dims=0))
        model.lm_head.weight[0] = 1.5 * model.model.embed_tokens.weight[9]
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
                weight.zero_()
    params = SamplingParams(max_new_tokens=60)
    plain, guessed = said(model, [0, 1], params, 0), said(model, [0, 1], params, 4)
    assert guessed.output_ids == plain.output_ids
    assert guessed.statistics.accepted > 20


# --- fewer steps -----------------------------------------------------------------------------


@types
@pytest.mark.parametrize("drafts", [1, 2, 3, 4])
def test_agreeing_guesses_are_accepted(model_type: str, drafts: int) -> None:
    new = 1 + 4 * (drafts + 1)
    found = said(COUNTING[model_type], [7, 250], SamplingParams(max_new_tokens=new), drafts)
    assert (found.output_ids, found.finish_reason) == (counted(250, new), "length")
    statistics = found.statistics
    assert statistics.accepted == statistics.drafted == 4 * drafts
    assert statistics.steps == 1 + 4


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 255), st.integers(1, 12), draft_lengths)
def test_the_length_may_end_within_a_draft(start: int, new: int, drafts: int) -> None:
    found = said(COUNTING["glm_moe_dsa"], [start], SamplingParams(max_new_tokens=new), drafts)
    assert (found.output_ids, found.finish_reason) == (counted(start, new), "length")
    assert found.statistics.accepted == found.statistics.drafted  # nothing is guessed past the end


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 255), st.integers(1, 12), draft_lengths)
def test_an_end_token_may_lie_within_accepted_guesses(start: int, at: int, drafts: int) -> None:
    params = SamplingParams(max_new_tokens=20, stop_token_ids=((start + at) % VOCAB,))
    found = said(COUNTING["glm_moe_dsa"], [start], params, drafts)
    assert (found.output_ids, found.finish_reason) == (counted(start, at), "stop")


# --- when it pays ----------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "pays"), [(0.05, True), (0.9, False)])
def test_guesses_are_made_where_they_pay(row: float, pays: bool) -> None:
    """Rows that cost next to nothing, and rows that cost a step each."""
    model = native_model(config_of("dsa", num_nextn_predict_layers=1))
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight.roll(1, dims=0))
        width = model.config.hidden_size
        model.mtp[0].eh_proj.weight.copy_(torch.eye(width, 2 * width))
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
                weight.zero_()
    assert rows_are_exact(model)
    engine = Engine(model, cache_tokens=2048)
    costs = engine.speculator.costs
    real = costs.note
    costs.note = lambda what, sequences, rows, seconds: real(  # type: ignore[method-assign]
        what, sequences, rows, row if what == "guess" else 1 + row * rows
    )
    request = engine.submit([7], SamplingParams(max_new_tokens=200))
    engine.run()
    assert request.output_ids == counted(7, 200)
    steps, drafted = request.statistics.steps, request.statistics.drafted
    assert (steps < 100) if pays else (drafted <= 0.05 * 200), (steps, drafted)


def test_costs_are_the_least_of_late_and_guessed_until_known() -> None:
    costs = Costs()
    assert costs.step(1, 2) > costs.step(1, 0)
    for seconds in (1.0, 1.1, 50.0):
        costs.note("step", 1, 2, seconds)
    assert costs.step(1, 2) == 1.0
    rate = Rate(0.5)
    for _ in range(60):
        rate.note(1, 0)
    assert rate.value > 0.95


# --- when it is on ---------------------------------------------------------------------------


def test_where_rows_are_not_exact_guesses_are_made_only_when_asked() -> None:
    model = DISTURBED["glm_moe_dsa"]
    assert not rows_are_exact(model)
    assert said(model, [5, 9], SamplingParams(max_new_tokens=40), None).statistics.drafted == 0
    assert rows_are_exact(native_model(config_of("dsa", num_nextn_predict_layers=1), dtype=torch.bfloat16))
    assert not rows_are_exact(native_model(config_of("dsa"), dtype=torch.float16))


@pytest.mark.parametrize(
    ("changes", "drafts", "message"),
    [
        ({"num_nextn_predict_layers": 0}, 1, "no MTP layer"),
        ({"attention_mask_type": "prefix"}, 1, "prefix attention"),
        ({}, 0, "num_draft_tokens is 0"),
        ({}, 1.5, "num_draft_tokens is 1.5"),
    ],
)
def test_what_cannot_be_speculated_is_refused_at_once(
    changes: dict[str, object], drafts: int, message: str
) -> None:
    model = tiny_language_model(**changes)
    with pytest.raises(RequestError, match=message):
        model.stream("fox", use_mtp=True, num_draft_tokens=drafts)
