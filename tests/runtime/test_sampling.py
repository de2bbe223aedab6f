"""Sampling against `transformers`' processors, its draws against the distribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from glm5.errors import RequestError
from glm5.runtime.sampling import Sampler, SamplingParams, cut_off, likeliest

quick = settings(max_examples=100, deadline=None)
seeds = st.integers(0, 2**31)
sizes = st.integers(1, 300)
options = st.fixed_dictionaries(
    {
        "temperature": st.floats(0.05, 5),
        "top_k": st.integers(0, 320),
        "top_p": st.floats(0.01, 1),
        "min_p": st.floats(0, 0.9),
        "repetition_penalty": st.sampled_from([1.0, 0.5, 1.1, 2.0]),
    }
)


def random_logits(size: int, seed: int) -> Tensor:
    return 3 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def theirs(wanted: dict[str, Any]) -> LogitsProcessorList:
    """The processors of `transformers`, in the order in which `generate` applies them."""
    found = LogitsProcessorList()
    if wanted["repetition_penalty"] != 1:
        found.append(RepetitionPenaltyLogitsProcessor(wanted["repetition_penalty"]))
    found.append(TemperatureLogitsWarper(wanted["temperature"]))
    if wanted["top_k"]:
        found.append(TopKLogitsWarper(wanted["top_k"]))
    if wanted["top_p"] < 1:
        found.append(TopPLogitsWarper(wanted["top_p"]))
    if wanted["min_p"]:
        found.append(MinPLogitsWarper(wanted["min_p"]))
    return found


# --- what may be drawn -----------------------------------------------------------------------


@quick
@given(sizes, seeds, options)
def test_the_cut_offs_are_those_of_transformers(size: int, seed: int, wanted: dict[str, Any]) -> None:
    wanted |= {"temperature": 1.0, "repetition_penalty": 1.0}
    logits = random_logits(size, seed)
    expected = theirs(wanted)(torch.zeros(1, 0, dtype=torch.int64), logits.unsqueeze(0))[0]
    assert torch.equal(cut_off(logits, SamplingParams(**wanted)), expected)


@quick
@given(sizes, seeds, options, st.data())
def test_the_whole_chain_draws_what_transformers_would(
    size: int, seed: int, wanted: dict[str, Any], data: st.DataObject
) -> None:
    logits = random_logits(size, seed)
    prompt = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=12))
    sampler = Sampler(SamplingParams(seed=seed, **wanted), prompt)
    generator = torch.Generator().manual_seed(seed)
    seen = list(prompt)
    for step in range(3):
        scores = theirs(wanted)(torch.tensor([seen]), logits.unsqueeze(0).clone())[0]
        expected = int(torch.multinomial(scores.softmax(dim=-1), 1, generator=generator))
        assert sampler(logits) == expected, f"step {step}"
        seen.append(expected)


@quick
@given(sizes, seeds, st.sampled_from([0.5, 1.3, 2.0]))
def test_greedy_with_a_penalty_takes_the_best_penalized_token(size: int, seed: int, penalty: float) -> None:
    logits, seen = random_logits(size, seed), [0]
    sampler = Sampler(SamplingParams(repetition_penalty=penalty), seen)
    judge = RepetitionPenaltyLogitsProcessor(penalty)
    for _ in range(4):
        expected = int(judge(torch.tensor([seen]), logits.unsqueeze(0).clone()).argmax())
        assert sampler(logits) == expected
        seen.append(expected)


@quick
@given(sizes, seeds)
def test_greedy_is_the_largest_logit_and_the_lowest_id_of_equals(size: int, seed: int) -> None:
    logits = random_logits(size, seed).round()
    assert Sampler(SamplingParams(), [])(logits) == (logits == logits.max()).nonzero()[0].item()


@quick
@given(sizes, seeds, st.sampled_from([1e-3, 1e-10, 1e-45, 5e-324]))
def test_a_tiny_temperature_is_greedy(size: int, seed: int, temperature: float) -> None:
    logits = 30 * random_logits(size, seed)
    assert Sampler(SamplingParams(temperature=temperature, seed=seed), [])(logits) == int(logits.argmax())


def test_sixteen_bit_logits_are_drawn_in_fp32() -> None:
    logits = random_logits(50, 0).bfloat16()
    params = SamplingParams(temperature=0.7, top_p=0.9, seed=1)
    assert Sampler(params, [])(logits) == Sampler(params, [])(logits.float())


# --- draws -----------------------------------------------------------------------------------


def draws(params: SamplingParams, logits: Tensor, count: int) -> list[int]:
    sampler = Sampler(params, [])
    return [sampler(logits) for _ in range(count)]


def test_a_seed_reproduces_and_another_differs() -> None:
    logits = random_logits(100, 5)
    hot = SamplingParams(temperature=1.5, seed=9)
    assert draws(hot, logits, 30) == draws(hot, logits, 30)
    assert draws(hot, logits, 30) != draws(hot.with_changes(seed=10), logits, 30)
    free = hot.with_changes(seed=None)
    assert draws(free, logits, 30) != draws(free, logits, 30)


def test_a_seed_does_not_touch_torchs_own_generator() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = torch.rand(1)
    draws(SamplingParams(temperature=1.0, seed=4), random_logits(10, 0), 5)
    assert torch.equal(torch.cat((first, torch.rand(1))), expected)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    """Pearson's chi-square over 12 tokens; 31.3 is exceeded once in a thousand runs."""
    logits, count = random_logits(12, 11) / 3, 6000
    drawn = torch.tensor(draws(SamplingParams(temperature=temperature, seed=1), logits, count))
    expected = (logits / temperature).softmax(dim=0) * count
    observed = torch.bincount(drawn, minlength=12).float()
    assert ((observed - expected) ** 2 / expected).sum() < 31.3


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", -1), ("max_new_tokens", 2.0), ("max_new_tokens", True), ("max_new_tokens", None),
        ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")),
        ("temperature", "hot"), ("top_k", -1), ("top_k", 1.5), ("top_p", 0), ("top_p", 1.1), ("min_p", -0.1),
        ("min_p", 2), ("repetition_penalty", 0), ("repetition_penalty", 1e-320),
        ("repetition_penalty", float("inf")), ("seed", -1), ("seed", 2**63), ("seed", "x"), ("seed", 1.0),
        ("stop", ""), ("stop", ("a", "")), ("stop", None), ("stop", 5), ("stop", (1,)),
        ("stop_token_ids", 5), ("stop_token_ids", ("a",)), ("ignore_eos", 1),
    ],
)  # fmt: skip
def test_an_impossible_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{name} is ") as caught:
        SamplingParams(**{name: value})
    assert "\n" not in str(caught.value)


def test_an_unknown_parameter_is_refused_by_name() -> None:
    with pytest.raises(RequestError, match=r"'topp' is no generation parameter.*top_p"):
        SamplingParams().with_changes(topp=0.5)


def test_a_change_is_checked_too() -> None:
    with pytest.raises(RequestError, match="top_p is 3"):
        SamplingParams().with_changes(top_p=3)
    assert SamplingParams(stop="x").with_changes(seed=1).stop == ("x",)
    assert SamplingParams(stop=["a", "b"], stop_token_ids=[1]).stop_token_ids == (1,)  # type: ignore[arg-type]


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0, seed=0)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_mean_nothing_are_refused(params: SamplingParams, bad: float) -> None:
    logits = random_logits(20, 0)
    logits[7] = bad
    with pytest.raises(RequestError, match="logits are not finite"):
        Sampler(params, [])(logits)


def test_logits_of_minus_infinity_are_never_drawn() -> None:
    logits = torch.full((9,), float("-inf"))
    logits[4] = -3.0
    assert likeliest(logits) == 4
    assert draws(SamplingParams(temperature=2.0, seed=0), logits, 20) == [4] * 20
