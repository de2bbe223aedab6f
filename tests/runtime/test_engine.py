"""The engine under random schedules: no request's text depends on the others, and no page is lost."""

from __future__ import annotations

import os
import random
import threading
from typing import Any

import pytest
import torch

from glm5.errors import RequestError
from glm5.formats.packed import Scheme
from glm5.model.transformer import GlmForCausalLM
from glm5.runtime.engine import Engine
from glm5.runtime.request import Request
from glm5.runtime.sampling_params import SamplingParams
from glm5.runtime.scheduler import Limits, QueueFullError
from tests.layers.layer_fixture import KINDS, config_of, native_model
from tests.runtime.fake_model import VOCAB, FakeModel, following

SOAK = int(os.environ.get("GLM5_SOAK", "1"))
SCHEDULES = 150 * SOAK


def engine_of(model: Any, tokens: int = 4096, page: int = 8, **limits: int) -> Engine:
    return Engine(model, cache_tokens=tokens, page_tokens=page, limits=Limits(**limits))


def continued(prompt: list[int], count: int) -> list[int]:
    """What the fake model writes after a prompt."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(following(tokens))
    return tokens[len(prompt) :]


def no_page_is_lost(engine: Engine) -> None:
    assert engine.scheduler.idle
    engine.forget()
    for pool in (engine.pool, engine.speculator.pool):
        if pool is not None:
            assert pool.free_pages == pool.num_pages, pool.references


# --- schedules -------------------------------------------------------------------------------


def run_schedule(seed: int) -> None:
    """Requests that come, are cancelled and fail at random times, in little memory; no clock is asked."""
    rng = random.Random(seed)
    model = FakeModel(attention_mask_type="prefix" if rng.random() < 0.2 else "causal")
    if rng.random() < 0.15:
        model.fails_at = {rng.randrange(1, 40)}
    page = rng.choice([1, 2, 4, 8])
    engine = engine_of(
        model, rng.choice([40, 64, 400]), page, max_sequences=rng.choice([1, 2, 5, 50]),
        step_tokens=rng.choice([1, 4, 16]), prefill_tokens=rng.choice([3, 8, 64]),
        max_queue=rng.choice([3, 99]),
    )  # fmt: skip
    stems = [[rng.randrange(VOCAB) for _ in range(rng.randrange(1, 25))] for _ in range(3)]
    made: list[tuple[Request, list[int], int]] = []
    refused = 0
    for _ in range(rng.randrange(1, 14)):
        stem = rng.choice(stems)
        prompt = stem[: rng.randrange(1, len(stem) + 1)] + [
            rng.randrange(VOCAB) for _ in range(rng.randrange(0, 6))
        ]
        new = rng.randrange(1, 14)
        params = SamplingParams(max_new_tokens=new)
        options = {"priority": rng.randrange(2), "owner": rng.choice([None, None, "other"])}
        try:
            if rng.random() < 0.2:
                found = engine.submit_all(prompt, params, rng.randrange(1, 4), **options)
            else:
                found = [engine.submit(prompt, params, **options)]
        except QueueFullError:
            refused += 1
            assert engine.scheduler.limits.max_queue == 3
            continue
        made += [(request, prompt, new) for request in found]
        for _ in range(rng.randrange(0, 4)):
            engine.step()
        if rng.random() < 0.15 and made:
            engine.cancel(rng.choice(made)[0])
    for _ in range(5000):
        if not engine.step():
            break
    failed = 0
    for request, prompt, new in made:
        assert request.finished, "starved"
        room = min(new, engine.cache_tokens - len(prompt))
        wanted = continued(prompt, room)
        if request.error is not None:
            failed += 1
            assert "on fire" in str(request.error)
        elif request.finish_reason == "cancelled":
            assert request.output_ids == wanted[: len(request.output_ids)]
        else:
            assert request.output_ids == wanted
        assert request.timeline is None
    assert not failed or model.fails_at
    no_page_is_lost(engine)


@pytest.mark.parametrize("part", range(10))
def test_random_schedules_lose_nothing_and_starve_nobody(part: int) -> None:
    for number in range(SCHEDULES // 10):
        seed = part * 1_000_000 + number
        try:
            run_schedule(seed)
        except BaseException:
            print(f"seed {seed}")
            raise


def test_a_seed_gives_the_same_steps_again() -> None:
    def steps() -> list[tuple[int, int]]:
        engine, seen = engine_of(FakeModel(), 64, 4, step_tokens=4, prefill_tokens=8), []
        for number in range(6):
            engine.submit([number, 1, 2, 3] * 3, SamplingParams(max_new_tokens=9))
        while engine.step():
            seen.append((engine.model.tokens, engine.pool.free_pages))  # type: ignore[attr-defined]
        return seen

    assert steps() == steps()


# --- fairness --------------------------------------------------------------------------------


def test_a_long_prompt_does_not_hold_up_an_answer() -> None:
    engine = engine_of(FakeModel(), step_tokens=8, prefill_tokens=64)
    running = engine.submit([1, 2], SamplingParams(max_new_tokens=60))
    engine.step()
    long = engine.submit(list(range(50)) * 6, SamplingParams(max_new_tokens=1))
    before = len(running.output_ids)
    steps = 0
    while not long.finished:
        engine.step()
        steps += 1
    assert len(running.output_ids) - before == steps  # one token each step
    assert steps > 30  # the prompt came in small pieces


def test_a_short_prompt_does_not_wait_behind_a_long_one_and_the_long_one_goes_on() -> None:
    engine = engine_of(FakeModel(), step_tokens=16, prefill_tokens=16)
    long = engine.submit(list(range(50)) * 4, SamplingParams(max_new_tokens=1))
    engine.step()
    held = long.held
    short = engine.submit([3, 4, 5], SamplingParams(max_new_tokens=1))
    engine.step()
    assert short.finished
    assert long.held - held >= 8  # half of the step at least


def test_priorities_come_first() -> None:
    engine = engine_of(FakeModel(), max_sequences=1)
    first = engine.submit([1], SamplingParams(max_new_tokens=2))
    low = engine.submit([2], SamplingParams(max_new_tokens=2))
    high = engine.submit([3], SamplingParams(max_new_tokens=2), priority=5)
    order: list[Request] = []
    while engine.step():
        order += [r for r in (first, low, high) if r.finished and r not in order]
    assert order == [high, first, low]


def test_when_pages_run_out_the_last_one_waits_and_still_says_the_same() -> None:
    engine = engine_of(FakeModel(), tokens=48, page=4)
    requests = [engine.submit([n] * 10, SamplingParams(max_new_tokens=25)) for n in range(4)]
    engine.run()
    assert [r.output_ids for r in requests] == [continued([n] * 10, 25) for n in range(4)]
    assert engine.scheduler.preemptions > 0
    assert requests[0].statistics.preemptions == 0
    no_page_is_lost(engine)


# --- prefixes --------------------------------------------------------------------------------


def test_what_was_read_is_not_read_again() -> None:
    model = FakeModel()
    engine = engine_of(model)
    history = [n % VOCAB for n in range(100)]
    first = engine.submit(history, SamplingParams(max_new_tokens=20))
    engine.run()
    before = model.tokens
    turn = [*history, *first.output_ids, 7, 8, 9]
    second = engine.submit(turn, SamplingParams(max_new_tokens=1))
    engine.run()
    assert second.statistics.cached_tokens == 119  # the answer's last token was never read
    assert model.tokens - before == 4
    assert second.output_ids == continued(turn, 1)


def test_owners_share_nothing() -> None:
    engine = engine_of(FakeModel())
    for owner, cached in (("a", 0), ("b", 0), ("a", 39), (None, 0)):
        request = engine.submit(list(range(40)), SamplingParams(max_new_tokens=1), owner=owner)
        engine.run()
        assert request.statistics.cached_tokens == cached


def test_several_answers_read_their_prompt_once() -> None:
    model = FakeModel()
    engine = engine_of(model)
    prompt = list(range(45))
    answers = engine.submit_all(prompt, SamplingParams(max_new_tokens=3, temperature=1.0, seed=4), 4)
    engine.run()
    assert model.tokens == 45 + 3 + 4 * 2  # three read the last token again
    alone = engine_of(FakeModel())
    for number, answer in enumerate(answers):
        again = alone.submit(prompt, SamplingParams(max_new_tokens=3, temperature=1.0, seed=4 + number))
        alone.run()
        assert answer.output_ids == again.output_ids


def test_changed_weights_make_old_pages_worthless() -> None:
    model = native_model(config_of("dsa"))
    engine = engine_of(model)
    prompt = list(range(30))
    first = engine.submit(prompt, SamplingParams(max_new_tokens=4))
    engine.run()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(-0.5)
    second = engine.submit(prompt, SamplingParams(max_new_tokens=4))
    engine.run()
    other = engine_of(model)
    fresh = other.submit(prompt, SamplingParams(max_new_tokens=4))
    other.run()
    assert second.statistics.cached_tokens == 0
    assert second.output_ids == fresh.output_ids != first.output_ids


def test_under_prefix_attention_only_the_same_prompt_shares() -> None:
    model = native_model(config_of("dsa", attention_mask_type="prefix", index_topk=9))
    engine = engine_of(model)
    prompt = list(range(30))
    found = []
    for asked in (prompt, prompt, prompt[:-1]):
        found.append(engine.submit(asked, SamplingParams(max_new_tokens=5)))
        engine.run()
    assert [r.statistics.cached_tokens for r in found] == [0, 29, 0]
    assert found[0].output_ids == found[1].output_ids


# --- a real network --------------------------------------------------------------------------

MATERIALS: dict[str, tuple[torch.dtype, Scheme | None]] = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "int4": (torch.float32, Scheme(4, 32)),
    "int4 in bf16": (torch.bfloat16, Scheme(4, 32)),
}


def model_of(kind: str, material: str, **changes: Any) -> GlmForCausalLM:
    dtype, scheme = MATERIALS[material]
    topk = {"index_topk": 9} if kind == "dsa" else {}
    return native_model(config_of(kind, num_nextn_predict_layers=1, **topk, **changes), scheme, dtype)


@pytest.mark.parametrize("material", MATERIALS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_request_says_what_it_says_alone(kind: str, material: str) -> None:
    """Greedy and drawn, with penalties, with guesses and without, in random schedules and little memory."""
    model = model_of(kind, material)
    for seed in range(6 * SOAK):
        rng = random.Random(seed)
        stem = [rng.randrange(256) for _ in range(20)]
        asked: list[tuple[list[int], SamplingParams]] = []
        for number in range(6):
            prompt = stem[: rng.randrange(1, 20)] + [rng.randrange(256) for _ in range(rng.randrange(8))]
            hot = {"temperature": 0.9, "top_p": 0.9, "seed": number} if number % 2 else {}
            more = {"repetition_penalty": 1.3, "frequency_penalty": 0.5} if number == 5 else {}
            asked.append((prompt, SamplingParams(max_new_tokens=rng.randrange(1, 20), **hot, **more)))
        alone = []
        for prompt, params in asked:
            engine = engine_of(model, page=16)
            request = engine.submit(prompt, params, num_draft_tokens=0)
            engine.run()
            alone.append(request.result().ids)
        engine = engine_of(
            model, 96, 8, step_tokens=rng.choice([2, 7, 64]), prefill_tokens=rng.choice([5, 64]),
            max_sequences=rng.choice([2, 6]),
        )  # fmt: skip
        together = []
        for prompt, params in asked:
            together.append(engine.submit(prompt, params, num_draft_tokens=rng.choice([None, 0, 1, 3])))
            for _ in range(rng.randrange(3)):
                engine.step()
        engine.run()
        for number, request in enumerate(together):
            assert request.result().ids == alone[number], f"seed {seed}, request {number}"
        no_page_is_lost(engine)


# --- callers ---------------------------------------------------------------------------------


def test_threads_share_one_batch() -> None:
    model = FakeModel()
    engine = engine_of(model)
    requests = [engine.submit([n, n + 1], SamplingParams(max_new_tokens=50)) for n in range(8)]
    found: list[list[int]] = [[] for _ in requests]

    def take(number: int) -> None:
        for new in engine.outputs(requests[number]):
            found[number] += new

    threads = [threading.Thread(target=take, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [continued([n, n + 1], 50) for n in range(8)]
    assert model.steps < 60  # not eight times fifty
    no_page_is_lost(engine)


def test_a_generator_closed_half_way_ends_its_request() -> None:
    engine = engine_of(FakeModel())
    request = engine.submit([1, 2], SamplingParams(max_new_tokens=50))
    steps = engine.outputs(request)
    next(steps)
    assert not torch.is_inference_mode_enabled()
    steps.close()  # type: ignore[attr-defined]
    assert request.finish_reason == "cancelled"
    assert not torch.is_inference_mode_enabled()
    no_page_is_lost(engine)


def test_a_request_can_be_cancelled_while_it_waits_reads_and_writes() -> None:
    engine = engine_of(FakeModel(), max_sequences=2, prefill_tokens=8, step_tokens=8)
    reading = engine.submit(list(range(50)), SamplingParams(max_new_tokens=9))
    writing = engine.submit([1], SamplingParams(max_new_tokens=9))
    waiting = engine.submit([2], SamplingParams(max_new_tokens=9))
    engine.step()
    assert (reading.held > 0, len(writing.output_ids), waiting.held) == (True, 1, 0)
    for request in (reading, writing, waiting):
        engine.cancel(request)
        assert request.finish_reason == "cancelled"
    assert not engine.step()
    no_page_is_lost(engine)


def test_a_step_that_fails_ends_its_own_requests_and_the_engine_lives() -> None:
    model = FakeModel()
    engine = engine_of(model, max_sequences=2)
    requests = [engine.submit([n], SamplingParams(max_new_tokens=4)) for n in range(4)]
    model.fails_at = {2}
    engine.run()
    errors = [str(r.error) for r in requests if r.error is not None]
    assert errors == ["the step failed: the machine is on fire"] * 2
    assert sum(r.finish_reason == "length" for r in requests) == 2
    with pytest.raises(RequestError, match="on fire"):
        requests[0].result()
    no_page_is_lost(engine)


def test_a_callback_that_fails_ends_its_own_request_only() -> None:
    engine = engine_of(FakeModel())

    def bad(ids: list[int]) -> list[int]:
        if len(ids) == 2:
            raise KeyError("x")
        return list(range(VOCAB))

    broken = engine.submit([1], SamplingParams(max_new_tokens=5, allowed_tokens_fn=bad))
    other = engine.submit([2], SamplingParams(max_new_tokens=5))
    engine.run()
    assert "allowed_tokens_fn raised KeyError" in str(broken.error)
    assert other.output_ids == continued([2], 5)
    no_page_is_lost(engine)


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ([1, VOCAB], f"the prompt has token id {VOCAB}; the vocabulary ends at {VOCAB - 1}"),
        ([-1], "the prompt has token id -1"),
        ([1] * 4096, "the prompt has 4096 tokens; the model holds at most 4096"),
        ([1] * 64, "the prompt has 64 tokens; the cache holds 64, new ones included"),
    ],
)
def test_a_bad_prompt_is_named_in_one_line(prompt: list[int], message: str) -> None:
    engine = engine_of(FakeModel(), 64)
    with pytest.raises(RequestError, match=message) as caught:
        engine.submit(prompt)
    assert "\n" not in str(caught.value)
    assert engine.scheduler.idle


def test_a_full_cache_or_context_ends_the_answer() -> None:
    for model, room in ((FakeModel(), 54), (FakeModel(max_position_embeddings=20), 10)):
        engine = engine_of(model, 64)
        request = engine.submit([1] * 10, SamplingParams(max_new_tokens=1000))
        engine.run()
        assert (len(request.output_ids), request.finish_reason) == (room, "length")


def test_a_full_queue_refuses() -> None:
    engine = engine_of(FakeModel(), max_queue=2)
    for _ in range(2):
        engine.submit([1])
    with pytest.raises(QueueFullError, match="2 requests wait already"):
        engine.submit([1])


@pytest.mark.parametrize("limits", [{"max_sequences": 0}, {"step_tokens": -1}, {"prefill_tokens": 1.5}])
def test_impossible_limits_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(limits))):
        Limits(**limits)
    with pytest.raises(RequestError, match="cache_tokens is 0"):
        Engine(FakeModel(), cache_tokens=0)  # type: ignore[arg-type]
