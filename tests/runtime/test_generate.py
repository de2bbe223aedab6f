"""`generate`: ids in, ids out; and what generation_config.json says about it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import glm5
from glm5 import AutoModelForCausalLM, LanguageModel
from glm5.checkpoint import Checkpoint
from glm5.errors import ConfigError, RequestError
from glm5.runtime.generation_config import sampling_defaults
from glm5.runtime.request import Result
from glm5.runtime.sampling_params import SamplingParams
from tests.model_fixture import tiny_config
from tests.runtime.language_model_fixture import tiny_language_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    tiny_language_model().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LanguageModel:
    return glm5.load(checkpoint)


def test_padding_may_stand_on_either_side(model: LanguageModel) -> None:
    ids = torch.tensor([[7, 8, 9, 1, 1], [1, 1, 7, 8, 9]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    out = model.generate(ids, mask, max_new_tokens=5, eos_token_id=[])
    assert torch.equal(out[0, 5:], out[1, 5:])


def test_ended_rows_are_padded(model: LanguageModel) -> None:
    ids = torch.tensor([[5, 6], [90, 91]])
    free = model.generate(ids, max_new_tokens=9, eos_token_id=[])[:, 2:].tolist()
    end = next(token for token in free[0] if token not in free[1])
    at = free[0].index(end) + 1
    out = model.generate(ids, max_new_tokens=9, eos_token_id=end)
    assert out[0, 2:].tolist() == free[0][:at] + [model.config.pad_token_id] * (9 - at)
    assert out[1, 2:].tolist() == free[1]
    assert (model.generate(ids, max_new_tokens=9, eos_token_id=end, pad_token_id=3)[0, 2 + at :] == 3).all()


def test_seeded_rows_draw_and_repeat(model: LanguageModel) -> None:
    ids = torch.tensor([[5, 6], [5, 6]])
    hot: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": [], "do_sample": True, "temperature": 1.5}
    first = model.generate(ids, seed=3, **hot)
    assert torch.equal(first, model.generate(ids, seed=3, **hot))
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first[1], model.generate(ids[:1], seed=4, **hot)[0])


def test_no_new_token_gives_the_prompt(model: LanguageModel) -> None:
    ids = torch.tensor([[5, 6]])
    assert torch.equal(model.generate(ids, max_new_tokens=0), ids)


def test_speculation_gives_the_same_ids(model: LanguageModel) -> None:
    ids = torch.tensor([[5, 6, 7]])
    free = {"max_new_tokens": 10, "eos_token_id": []}
    drafted = model.generate(ids, use_mtp=True, num_draft_tokens=2, **free)  # type: ignore[arg-type]
    assert torch.equal(drafted, model.generate(ids, use_mtp=False, **free))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ([[5, 6]], {"attention_mask": torch.ones(1, 3)}, "attention_mask has shape"),
        ([[5, 6]], {"attention_mask": [[1, 1]]}, "attention_mask must be a tensor"),
        ([[5, 6]], {"attention_mask": torch.zeros(1, 2)}, "the prompt is empty"),
        ([5, 6], {}, "input_ids must be a tensor"),
        ([[0.5]], {}, "token ids are integers"),
        ([[5, 10**6]], {}, "token id 1000000"),
        ([[5]], {"temperature": -1}, "temperature is -1"),
        ([[5]], {"max_new_tokens": -1}, "max_new_tokens is -1"),
        ([[5]], {"do_sample": True, "temperature": 0}, "contradict"),
        ([[5], [10**6]], {}, "prompt 1 has token id 1000000"),
        ([[5]], {"num_return_sequences": 0}, "num_return_sequences is 0"),
        ([[5]], {"use_mtp": True, "num_draft_tokens": 0}, "num_draft_tokens is 0"),
        ([[5]], {"seed": -1}, "seed is -1"),
    ],
)
def test_an_impossible_request_is_refused(
    model: LanguageModel, inputs: list[Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        model.generate(torch.tensor(inputs), **options)


def test_an_empty_batch_is_refused(model: LanguageModel) -> None:
    with pytest.raises(RequestError, match="input_ids must be a tensor"):
        model.generate(torch.zeros(0, 3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("raw", "temperature"),
    [
        ({}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"temperature": 0.7}, 0.7),
        ({"do_sample": None, "temperature": 0.7}, 0.7),
        ({"do_sample": False, "temperature": 0.7}, 0.0),
    ],
)
def test_a_generation_config_says_whether_to_draw(
    tmp_path: Path, raw: dict[str, Any], temperature: float
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(raw))
    assert sampling_defaults(Checkpoint(tmp_path, tiny_config())).temperature == temperature


def test_the_end_tokens_of_the_generation_config_count(tmp_path: Path) -> None:
    tiny_language_model().save_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": 7}))
    assert glm5.load(tmp_path).config.eos_token_ids == (7,)
    for bad in ('{"eos_token_id": ["x"]}', '{"top_p": 7}', "[]", "{"):
        path.write_text(bad)
        with pytest.raises(ConfigError, match=r"generation_config\.json"):
            glm5.load(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_speculation_is_on_where_it_is_exact_and_changes_nothing(checkpoint: Path, dtype: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 0.9, "seed": 2, "ignore_eos": True}
    plain = model.complete("The quick", use_mtp=False, **options)
    found = model.complete("The quick", **options)
    asked = model.complete("The quick", use_mtp=True, num_draft_tokens=2, **options)
    assert plain.ids == found.ids == asked.ids
    assert (plain.statistics.drafted, asked.statistics.drafted > 20) == (0, True)


def test_several_answers_to_a_prompt_are_those_of_their_seeds(model: LanguageModel) -> None:
    ids = torch.tensor([[5, 6], [7, 8]])
    hot: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": [], "do_sample": True, "temperature": 1.5}
    found = model.generate(ids, seed=3, num_return_sequences=2, **hot)
    assert found.shape == (4, 10)
    for number, row in enumerate(found):
        one = ids[number // 2 : number // 2 + 1]
        assert torch.equal(model.generate(one, seed=3 + number, **hot)[0], row)


def test_a_second_turn_reads_only_what_is_new(model: LanguageModel) -> None:
    session = model.session([5, 6, 7] * 40)
    first = session.generate(SamplingParams(max_new_tokens=9, ignore_eos=True))
    session.extend([9, 10, 11])
    other = session.fork(30)
    second = session.generate(SamplingParams(max_new_tokens=2, ignore_eos=True))
    assert second.statistics.cached_tokens == 120 + 8
    assert session.ids[:129] == [5, 6, 7] * 40 + first.ids
    third = other.generate(SamplingParams(max_new_tokens=2, ignore_eos=True))
    assert third.statistics.cached_tokens == 29
    plain = model.generate(torch.tensor([other.ids[:30]]), max_new_tokens=2, eos_token_id=[])
    assert plain[0, 30:].tolist() == third.ids
    session.truncate(3)
    assert session.ids == [5, 6, 7]
    with pytest.raises(RequestError, match="cannot be forked at 99"):
        session.fork(99)
    for each in (session, other):
        each.close()
    model.engine.forget()
    assert model.engine.pool.free_pages == model.engine.pool.num_pages


def test_a_copy_of_a_model_gets_an_engine_of_its_own(model: LanguageModel) -> None:
    engine = model.engine
    copied = copy.deepcopy(model)
    assert model.engine is engine
    assert copied.engine.model is copied
    moved = copy.deepcopy(model).to(torch.bfloat16)
    assert moved.engine.dtype == torch.bfloat16


def test_a_stopped_stream_ends_its_request(model: LanguageModel) -> None:
    pieces = model.stream("The quick", max_new_tokens=50, ignore_eos=True)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert model.engine.scheduler.idle


def test_without_a_tokenizer_only_ids_work(tmp_path: Path) -> None:
    model = tiny_language_model()
    model.tokenizer = None
    model.save_pretrained(tmp_path)
    again = glm5.load(tmp_path)
    assert again.generate(torch.tensor([[1, 2]]), max_new_tokens=2, eos_token_id=[]).shape == (1, 4)
    with pytest.raises(RequestError, match="has no tokenizer"):
        again.stream("x")


def test_arguments_that_programs_for_transformers_state() -> None:
    model, ids = tiny_language_model(), torch.tensor([[5, 6, 7]])
    wanted = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=[])
    stated = model.generate(ids, max_length=7, do_sample=False, eos_token_id=[], num_beams=1,
                            num_return_sequences=1, use_cache=True, streamer=None)  # fmt: skip
    assert torch.equal(stated, wanted)

    class Streamer:
        heard: list[int] = []  # noqa: RUF012
        ended = False

        def put(self, ids: torch.Tensor) -> None:
            self.heard += ids.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    streamer = Streamer()
    model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=[], streamer=streamer)
    assert streamer.heard == wanted[0].tolist()
    assert streamer.ended


@pytest.mark.parametrize(
    "options", [{"num_beams": 2}, {"use_cache": False}, {"nonsense": 1}, {"prefill_chunk": 4}]
)
def test_what_generate_cannot_do_is_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(options))):
        tiny_language_model().generate(torch.tensor([[5]]), **options)


def test_a_stop_string_ends_its_row_and_no_other(model: LanguageModel) -> None:
    ids = torch.tensor([[5, 6], [90, 91]])
    free = model.generate(ids, max_new_tokens=12, eos_token_id=[])[:, 2:].tolist()
    assert model.tokenizer is not None
    words = [model.tokenizer.decode([token]) for token in free[0]]
    at = next(
        n for n in range(1, 12) if words[n].strip().isascii() and words[n] and words[n] not in words[:n]
    )
    stop = words[at]
    out = model.generate(
        ids, max_new_tokens=12, eos_token_id=[], stop_strings=stop, tokenizer=model.tokenizer
    )
    ended = next(n for n in range(1, 13) if stop in model.tokenizer.decode(free[0][:n]))
    assert out[0, 2:].tolist() == free[0][:ended] + [model.config.pad_token_id] * (out.shape[1] - 2 - ended)
    assert out[1, 2:].tolist() == free[1] or stop in model.tokenizer.decode(free[1])
    with pytest.raises(RequestError, match="stop is ''"):
        model.generate(ids, stop_strings="")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[1, -1, 3]]), "token id -1; the vocabulary ends at"),
        (torch.tensor([[1, 10**6]]), "token id 1000000"),
        (torch.tensor([1, 2]), r"must be a tensor \[batch, tokens\]"),
        ([[1, 2]], "must be a tensor"),
        (torch.ones(1, 2), "of integers"),
    ],
)
def test_ids_that_cannot_be_are_refused_by_the_pass_too(model: LanguageModel, ids: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        model(ids)


def test_complete_tells_its_caller_too() -> None:
    heard: list[Result] = []
    found = tiny_language_model().complete("fox", max_new_tokens=2, on_finish=heard.append)
    assert heard == [found]
