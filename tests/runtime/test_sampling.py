"""Sampling against `transformers`' processors, its draws against the distribution, a step's rows against each
other."""

from __future__ import annotations

from typing import Any

import numpy as np
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

from glm5.errors import Glm5Error, RequestError
from glm5.runtime.sampling import Choice, Row, Sampler, choose, draw, likeliest, probabilities, uniform
from glm5.runtime.sampling_params import SamplingParams

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


def next_of(sampler: Sampler, logits: Tensor) -> int:
    """What one request alone would say next, and has then said."""
    (choice,) = choose(logits.unsqueeze(0), [Row(sampler)])
    if isinstance(choice, Glm5Error):
        raise choice
    sampler.take(choice.token)
    return choice.token


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
    logits = random_logits(size, seed)
    cuts = {name: wanted[name] for name in ("top_k", "top_p", "min_p")}
    judge = theirs(wanted | {"temperature": 1.0, "repetition_penalty": 1.0})
    expected = judge(torch.zeros(1, 0, dtype=torch.int64), logits.unsqueeze(0))[0].softmax(dim=-1)
    found = probabilities(logits.unsqueeze(0), **cuts)[0]
    torch.testing.assert_close(found / found.sum(), expected, atol=1e-5, rtol=1e-3)
    differ = (found > 0) != (expected > 0)  # a sum that reaches top_p to the last bit, in another order
    assert float(logits.softmax(dim=-1)[differ].sum()) < 1e-5


@quick
@given(sizes, seeds, options, st.data())
def test_the_whole_chain_draws_from_what_transformers_leaves(
    size: int, seed: int, wanted: dict[str, Any], data: st.DataObject
) -> None:
    logits = random_logits(size, seed)
    prompt = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=12))
    sampler = Sampler(SamplingParams(seed=seed, **wanted), prompt)
    seen = list(prompt)
    for step in range(3):
        scores = theirs(wanted)(torch.tensor([seen]), logits.unsqueeze(0).clone())[0]
        sums = scores.softmax(dim=-1).double().cumsum(dim=-1)
        place = uniform(seed, step) * float(sums[-1])
        token = next_of(sampler, logits)
        # Their sums are rounded otherwise: the number lies within the token's part, or beside it.
        low, high = (float(sums[token - 1]) if token else 0.0), float(sums[token])
        assert low - 1e-5 <= place <= high + 1e-5, f"step {step}"
        assert scores[token] > float("-inf")
        seen.append(token)


@quick
@given(st.integers(300, 3000), seeds, st.floats(0.05, 0.999))
def test_a_wide_nucleus_is_the_fewest_likeliest_tokens(size: int, seed: int, top_p: float) -> None:
    """More than the 256 that are looked at first, many of them equal."""
    logits = random_logits(size, seed).mul(0.4).round(decimals=1)
    whole = logits.softmax(dim=-1)
    found = probabilities(logits.unsqueeze(0), top_k=0, top_p=top_p, min_p=0)[0]
    order = whole.sort(descending=True, stable=True)  # of equal ones the lowest ids first
    total = top_p * float(whole.double().sum())
    needed = int((order.values.double().cumsum(dim=-1) < total).sum()) + 1
    assert set((found > 0).nonzero().flatten().tolist()) == set(order.indices[:needed].tolist())


@quick
@given(sizes, seeds, st.sampled_from([0.5, 1.3, 2.0]))
def test_greedy_with_a_penalty_takes_the_best_penalized_token(size: int, seed: int, penalty: float) -> None:
    logits, seen = random_logits(size, seed), [0]
    sampler = Sampler(SamplingParams(repetition_penalty=penalty), seen)
    judge = RepetitionPenaltyLogitsProcessor(penalty)
    for _ in range(4):
        expected = int(judge(torch.tensor([seen]), logits.unsqueeze(0).clone()).argmax())
        assert next_of(sampler, logits) == expected
        seen.append(expected)


@quick
@given(sizes, seeds)
def test_greedy_is_the_largest_logit_and_the_lowest_id_of_equals(size: int, seed: int) -> None:
    logits = random_logits(size, seed).round()
    assert next_of(Sampler(SamplingParams(), []), logits) == (logits == logits.max()).nonzero()[0].item()


@quick
@given(sizes, seeds, st.sampled_from([1e-3, 1e-10, 1e-45, 5e-324]))
def test_a_tiny_temperature_is_greedy(size: int, seed: int, temperature: float) -> None:
    logits = 30 * random_logits(size, seed)
    assert next_of(Sampler(SamplingParams(temperature=temperature, seed=seed), []), logits) == int(
        logits.argmax()
    )


def test_sixteen_bit_logits_are_drawn_in_fp32() -> None:
    logits = random_logits(50, 0).bfloat16()
    params = SamplingParams(temperature=0.7, top_p=0.9, seed=1)
    assert next_of(Sampler(params, []), logits) == next_of(Sampler(params, []), logits.float())


# --- draws -----------------------------------------------------------------------------------


def draws(params: SamplingParams, logits: Tensor, count: int) -> list[int]:
    sampler = Sampler(params, [])
    return [next_of(sampler, logits) for _ in range(count)]


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


def test_numbers_are_even_and_differ_by_seed_and_place() -> None:
    numbers = torch.tensor([uniform(seed, place) for seed in range(40) for place in range(500)])
    counts = torch.histc(numbers, bins=50, min=0, max=1)
    assert ((counts - 400) ** 2 / 400).sum() < 95  # chi-square, 49 degrees: once in ten thousand
    assert len(numbers.unique()) > 19_900
    assert 0 <= float(numbers.min()) <= float(numbers.max()) < 1


@pytest.mark.parametrize(
    ("number", "token"), [(0.0, 1), (0.4999, 1), (0.5, 3), (0.9999999999999999, 3), (1.0, 3)]
)
def test_a_number_falls_on_the_token_whose_part_it_is(number: float, token: int) -> None:
    assert draw(np.array([[0.0, 0.5, 0.0, 0.5, 0.0]], dtype=np.float32), [number]) == [token]


# --- a step's rows ---------------------------------------------------------------------------

params_of_rows = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.7, 1.5]),
        "top_k": st.sampled_from([0, 5, 40]),
        "top_p": st.sampled_from([1.0, 0.9, 0.3]),
        "min_p": st.sampled_from([0.0, 0.05]),
        "repetition_penalty": st.sampled_from([1.0, 1.2]),
        "presence_penalty": st.sampled_from([0.0, 1.0]),
        "frequency_penalty": st.sampled_from([0.0, -0.5]),
        "logit_bias": st.sampled_from([{}, {3: 5.0, 7: -100.0}]),
        "logprobs": st.sampled_from([None, 0, 4]),
    }
)


@quick
@given(st.lists(params_of_rows, min_size=1, max_size=6), seeds, st.integers(20, 400), st.data())
def test_a_row_is_chosen_as_it_would_be_alone(
    wanted: list[dict[str, Any]], seed: int, size: int, data: st.DataObject
) -> None:
    logits = torch.stack([random_logits(size, seed + i) for i in range(len(wanted))])
    rows = []
    for number, each in enumerate(wanted):
        sampler = Sampler(SamplingParams(seed=seed + number, **each), [1, 2, 3])
        for token in data.draw(st.lists(st.integers(0, size - 1), max_size=4)):
            sampler.take(token)
        rows.append(Row(sampler, tuple(data.draw(st.lists(st.integers(0, size - 1), max_size=3)))))
    before = logits.clone()
    together = choose(logits, rows)
    assert torch.equal(logits, before)
    assert together == [choose(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    for number, row in enumerate(rows):  # tokens that stand before a row count as if they had come
        taken = Sampler(row.sampler.params, [1, 2, 3])
        for token in [*row.sampler.output_ids, *row.ahead]:
            taken.take(token)
        assert choose(logits[number : number + 1], [Row(taken)])[0] == together[number]


def test_penalties_are_those_of_the_formula() -> None:
    logits, params = torch.zeros(6), SamplingParams(presence_penalty=1.0, frequency_penalty=0.5)
    sampler = Sampler(params, [5])
    for token in (2, 2, 4):
        sampler.take(token)
    changed = logits.clone()
    sampler.change(changed, (4,))
    assert changed.tolist() == [0, 0, -2.0, 0, -2.0, 0]  # the prompt's token 5 is not counted


def test_logprobs_are_those_of_the_model_whatever_is_drawn() -> None:
    logits = random_logits(30, 4)
    expected = logits.log_softmax(dim=0)
    params = SamplingParams(temperature=2.0, seed=1, logit_bias={9: 100.0}, logprobs=3)
    (choice,) = choose(logits.unsqueeze(0), [Row(Sampler(params, []))])
    assert isinstance(choice, Choice)
    assert choice.token == 9
    assert choice.logprob == pytest.approx(float(expected[9]))
    best = expected.topk(3)
    assert [token for token, _ in choice.top] == best.indices.tolist()
    assert [value for _, value in choice.top] == pytest.approx(best.values.tolist())


@pytest.mark.parametrize("as_mask", [True, False])
def test_only_what_is_allowed_comes(as_mask: bool) -> None:
    def even(ids: list[int]) -> Any:
        mask = torch.arange(20) % 2 == len(ids) % 2
        return mask if as_mask else mask.nonzero().flatten().tolist()

    params = SamplingParams(temperature=1.5, seed=3, allowed_tokens_fn=even)
    sampler = Sampler(params, [])
    assert [next_of(sampler, random_logits(20, i)) % 2 for i in range(12)] == [0, 1] * 6


@pytest.mark.parametrize(
    ("allowed", "message"),
    [
        ([], "leaves no token"),
        ([20], "outside of the vocabulary of 20"),
        (torch.ones(19, dtype=torch.bool), r"gave a mask \[19\]; the vocabulary has 20"),
    ],
)
def test_a_mask_that_cannot_be_is_told(allowed: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        next_of(Sampler(SamplingParams(allowed_tokens_fn=lambda ids: allowed), []), random_logits(20, 0))


def test_a_row_without_a_token_does_not_stop_the_others() -> None:
    logits = torch.stack([random_logits(20, i) for i in range(3)])
    logits[1, 4] = float("nan")
    found = choose(logits, [Row(Sampler(SamplingParams(), [])) for _ in range(3)])
    assert isinstance(found[1], RequestError)
    assert [found[0], found[2]] == [Choice(likeliest(logits[0])), Choice(likeliest(logits[2]))]


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
        ("presence_penalty", 2.1), ("frequency_penalty", -3), ("logprobs", -1), ("logprobs", 65),
        ("logprobs", True), ("logit_bias", 5), ("allowed_tokens_fn", 5),
    ],
)  # fmt: skip
def test_an_impossible_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{name} is ") as caught:
        SamplingParams(**{name: value})
    assert "\n" not in str(caught.value)


def test_an_unknown_parameter_is_refused_by_name() -> None:
    with pytest.raises(RequestError, match=r"'topp' is no generation parameter.*top_p"):
        SamplingParams().with_changes(topp=0.5)


@pytest.mark.parametrize("bias", [{"a": 1}, {-1: 1}, {5: 101}, {5: float("nan")}, {5: "x"}])
def test_a_bias_that_cannot_be_is_named(bias: Any) -> None:
    with pytest.raises(RequestError, match=r"^logit_bias has "):
        SamplingParams(logit_bias=bias)


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
        next_of(Sampler(params, []), logits)


def test_logits_of_minus_infinity_are_never_drawn() -> None:
    logits = torch.full((9,), float("-inf"))
    logits[4] = -3.0
    assert likeliest(logits) == 4
    assert draws(SamplingParams(temperature=2.0, seed=0), logits, 20) == [4] * 20
