"""What once broke the engine for everybody: callbacks that cancel, interrupts, full caches, lost streams."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import glm5
from glm5.errors import RequestError
from glm5.runtime.engine import Engine
from glm5.runtime.sampling_params import SamplingParams
from glm5.runtime.scheduler import Limits, QueueFullError
from glm5.runtime.session import Session
from tests.layers.layer_fixture import config_of, native_model
from tests.runtime.fake_model import VOCAB, FakeModel
from tests.runtime.language_model_fixture import tiny_language_model
from tests.runtime.test_engine import continued, engine_of, no_page_is_lost


def test_a_cancel_inside_of_a_step_waits_for_its_end() -> None:
    """By a callback, or by the garbage collector that finds an abandoned stream."""
    engine, box = engine_of(FakeModel()), []

    def cancels(ids: list[int]) -> None:
        if len(ids) == 2:
            engine.cancel(box[0])

    box.append(engine.submit([1, 2], SamplingParams(max_new_tokens=9, allowed_tokens_fn=cancels)))
    other = engine.submit([3, 4], SamplingParams(max_new_tokens=9))
    engine.run()
    assert box[0].finish_reason == "cancelled"
    assert other.output_ids == continued([3, 4], 9)
    no_page_is_lost(engine)


def test_streams_that_are_abandoned_in_cycles_change_no_text() -> None:
    model = tiny_language_model()
    alone = model.complete("The quick", max_new_tokens=12, ignore_eos=True).ids
    for _ in range(30):
        cycle: list[Any] = []
        cycle.append((model.stream("brown fox", max_new_tokens=30, ignore_eos=True), cycle))
        next(cycle[0][0])
        del cycle
        assert model.complete("The quick", max_new_tokens=12, ignore_eos=True).ids == alone
    gc.collect()
    no_page_is_lost(model.engine)


def test_a_step_inside_of_a_step_is_refused() -> None:
    engine = engine_of(FakeModel())

    def steps(ids: list[int]) -> None:
        engine.step()

    request = engine.submit([1], SamplingParams(max_new_tokens=2, allowed_tokens_fn=steps))
    engine.run()
    assert "a step cannot run inside of a step" in str(request.error)
    no_page_is_lost(engine)


def test_the_first_call_may_be_in_inference_mode() -> None:
    model = tiny_language_model()
    with torch.inference_mode():
        first = model.complete("The quick brown fox", max_new_tokens=5)
    assert model.complete("The quick brown fox", max_new_tokens=5).ids == first.ids


@pytest.mark.parametrize(
    "options",
    [
        {"priority": "high"}, {"priority": None}, {"owner": ["a"]}, {"num_draft_tokens": "3"},
        {"num_draft_tokens": 2.5}, {"num_draft_tokens": -1},
    ],
)  # fmt: skip
def test_a_bad_option_is_refused_before_it_is_queued(options: dict[str, Any]) -> None:
    engine = engine_of(FakeModel())
    with pytest.raises(RequestError, match=next(iter(options))):
        engine.submit([1], SamplingParams(), **options)
    assert engine.scheduler.idle


@pytest.mark.parametrize("prompt", [None, 5, "abc", b"ab", [None], [1.5], ["1"]])
def test_a_prompt_of_no_ids_is_refused(prompt: Any) -> None:
    engine = engine_of(FakeModel())
    with pytest.raises(RequestError, match="must be a list of token ids"):
        engine.submit(prompt)
    with pytest.raises(RequestError, match="params is"):
        engine.submit([1], {"max_new_tokens": 3})  # type: ignore[arg-type]


def test_a_prompt_that_nearly_fills_the_cache_can_be_asked_twice() -> None:
    engine = engine_of(FakeModel(), 64, 16)
    prompt = [n % VOCAB for n in range(57)]
    for _ in range(3):
        request = engine.submit(prompt, SamplingParams(max_new_tokens=3))
        engine.run()
        assert request.output_ids == continued(prompt, 3)
    no_page_is_lost(engine)


def test_sessions_that_hold_everything_are_told_and_others_live() -> None:
    engine = engine_of(FakeModel(), 64, 8)
    session = Session(engine, [1] * 45)
    session.generate(SamplingParams(max_new_tokens=2))
    big = engine.submit([2] * 40, SamplingParams(max_new_tokens=2))
    small = engine.submit([3] * 4, SamplingParams(max_new_tokens=2))
    engine.run()
    assert "has no room for the request; close sessions" in str(big.error)
    assert small.output_ids == continued([3] * 4, 2)
    session.close()
    again = engine.submit([2] * 40, SamplingParams(max_new_tokens=2))
    engine.run()
    assert again.output_ids == continued([2] * 40, 2)
    no_page_is_lost(engine)


def test_a_stream_that_nobody_reads_leaves_the_queue() -> None:
    model = tiny_language_model()
    model.start_engine(cache_tokens=1024, limits=Limits(max_queue=4))
    for _ in range(10):
        model.stream("The quick", max_new_tokens=5)
    session = model.session([5, 6, 7])
    for _ in range(10):
        session.stream(SamplingParams(max_new_tokens=3))
    assert model.engine.scheduler.idle or model.engine.step()
    assert len(model.complete("The quick", max_new_tokens=5, ignore_eos=True).ids) == 5


def test_more_answers_than_the_queue_holds() -> None:
    engine = engine_of(FakeModel(), max_queue=3)
    with pytest.raises(QueueFullError):
        engine.submit_all([1], SamplingParams(max_new_tokens=2), 5)
    engine.run()
    no_page_is_lost(engine)
    model = tiny_language_model()
    model.start_engine(cache_tokens=2048, limits=Limits(max_queue=2, max_sequences=2))
    ids = torch.tensor([[5, 6], [7, 8], [9, 10]])
    wide = model.generate(ids, max_new_tokens=3, num_return_sequences=3, eos_token_id=[])
    assert wide.shape == (9, 5)


def test_an_interrupt_in_a_step_hurts_no_neighbour() -> None:
    engine = engine_of(FakeModel())

    def interrupts(ids: list[int]) -> None:
        if len(ids) == 3:
            raise KeyboardInterrupt

    first = engine.submit([1, 2], SamplingParams(max_new_tokens=9, allowed_tokens_fn=interrupts))
    other = engine.submit([3, 4], SamplingParams(max_new_tokens=9))
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    engine.cancel(first)
    engine.run()
    assert other.output_ids == continued([3, 4], 9)
    no_page_is_lost(engine)


def test_a_session_closed_while_another_thread_steps_keeps_nothing() -> None:
    engine = engine_of(FakeModel(), 1024)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            engine.submit([9], SamplingParams(max_new_tokens=20))
            engine.run()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for number in range(40):
            with Session(engine, [number % VOCAB] * 20) as session:
                pieces = session.stream(SamplingParams(max_new_tokens=40))
                next(pieces)
                pieces.close()  # type: ignore[attr-defined]
    finally:
        stop.set()
        thread.join()
    engine.run()
    no_page_is_lost(engine)


def test_weights_that_change_while_a_request_runs_are_not_shared() -> None:
    model = native_model(config_of("dsa"))
    engine = engine_of(model)
    prompt = list(range(40))
    old = engine.submit(prompt, SamplingParams(max_new_tokens=20))
    engine.step()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(-0.5)
    engine.submit([1], SamplingParams(max_new_tokens=1))
    engine.run()
    assert old.finished
    new = engine.submit(prompt, SamplingParams(max_new_tokens=5))
    engine.run()
    fresh_engine = engine_of(model)
    fresh = fresh_engine.submit(prompt, SamplingParams(max_new_tokens=5))
    fresh_engine.run()
    assert new.statistics.cached_tokens == 0
    assert new.output_ids == fresh.output_ids


def test_changed_weights_get_no_cache_folder(tmp_path: Path) -> None:
    tiny_language_model().save_pretrained(tmp_path / "model")
    model = glm5.load(tmp_path / "model")
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.7)
    with pytest.raises(RequestError, match="not changed or moved since"):
        model.start_engine(cache_dir=tmp_path / "cache")


def test_what_has_not_finished_has_no_result() -> None:
    engine = engine_of(FakeModel())
    request = engine.submit([1])
    with pytest.raises(RequestError, match="has not finished"):
        request.result()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_tokens": 10**15}, "cannot be had"),
        ({"limits": {"max_queue": 3}}, "limits is"),
        ({"page_tokens": 3}, "page_tokens is 3"),
    ],
)
def test_an_engine_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Engine(FakeModel(), **{"cache_tokens": 64, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", ["x", 2.5, None])
def test_a_session_takes_whole_numbers(bad: Any) -> None:
    session = Session(engine_of(FakeModel()), [1, 2, 3])
    for action in (session.truncate, lambda n: session.fork("x" if n is None else n)):
        with pytest.raises(RequestError, match="a number of tokens"):
            action(bad)
    with pytest.raises(RequestError, match="a session takes token ids"):
        session.extend(bad)
