"""Streamed text: whole characters, all of the text, and nothing of a stop string."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from glm5.text.stream import TextStream
from tests.text.tokenizer_fixture import hostile_text, small_tokenizer

quick = settings(max_examples=200, deadline=None)
tokenizer = small_tokenizer()
token_ids = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30)
text_ids = hostile_text.map(lambda text: tokenizer.encode(text, allow_special=True))
short_stops = st.lists(st.text("ab \n", min_size=1, max_size=4), max_size=3)


def cut(text: str, stops: list[str]) -> str:
    """The text before the stop string that is complete first, found a character at a time."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - max(map(len, ended))]
    return text


def streamed(ids: list[int], stops: list[str]) -> tuple[list[str], bool]:
    stream = TextStream(tokenizer, tuple(stops))
    pieces = [stream.push(token) for token in ids]
    return [*pieces, stream.flush()], stream.stopped


def check(ids: list[int], stops: list[str]) -> None:
    whole = tokenizer.decode(ids)
    pieces, stopped = streamed(ids, stops)
    expected = cut(whole, stops)
    assert "".join(pieces) == expected
    assert stopped == any(stop in whole for stop in stops)
    # All of it is final: no piece is ever taken back, and none holds half a character.
    assert sum(piece.count("\ufffd") for piece in pieces) == expected.count("\ufffd")
    assert not any(stop in expected for stop in stops)


@quick
@given(token_ids | text_ids, st.data())
def test_the_pieces_are_the_text_up_to_the_first_stop_string(ids: list[int], data: st.DataObject) -> None:
    whole = tokenizer.decode(ids)
    stops = data.draw(short_stops)
    if whole:  # a piece of the text itself, which may begin and end within tokens
        start = data.draw(st.integers(0, len(whole) - 1))
        stops.append(whole[start : start + data.draw(st.integers(1, 6))])
    check(ids, stops)


@quick
@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=5), max_size=4), st.data())
@example("abc", ["abc", "b"], None)
@example("aab", ["ab"], None)
@example("abab", ["aba", "bab"], None)
def test_how_the_text_is_cut_into_tokens_changes_nothing(
    text: str, stops: list[str], data: st.DataObject | None
) -> None:
    check(tokenizer.encode(text), stops)
    check([token for character in text for token in tokenizer.encode(character)], stops)


@given(token_ids)
@quick
def test_without_stop_strings_all_text_comes(ids: list[int]) -> None:
    pieces, stopped = streamed(ids, [])
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not stopped


def test_a_character_of_several_tokens_comes_whole() -> None:
    ids = [tokenizer.token_to_id(token) for token in ("ð", "Ł", "ĺ", "Ģ")]  # the bytes of U+1F600
    assert None not in ids
    pieces, _ = streamed([i for i in ids if i is not None], [])
    assert pieces == ["", "", "", "\U0001f600", ""]


def test_a_character_that_is_never_finished_is_marked_at_the_end() -> None:
    first = tokenizer.token_to_id("ð")
    assert first is not None
    assert streamed([first], []) == (["", "\ufffd"], False)


def test_what_may_begin_a_stop_string_waits_and_is_given_back() -> None:
    stream = TextStream(tokenizer, ("STOP",))
    (s, t, o, x) = (tokenizer.encode(c)[0] for c in "STOx")
    assert [stream.push(s), stream.push(t), stream.push(o)] == ["", "", ""]
    assert stream.push(x) == "STOx"
    assert [stream.push(s), stream.flush()] == ["", "S"]


def test_nothing_comes_after_a_stop_string() -> None:
    stream = TextStream(tokenizer, ("b",))
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    assert [stream.push(a), stream.push(b), stream.push(a), stream.flush()] == ["a", "", "", ""]
    assert stream.stopped


@pytest.mark.parametrize("stop", ["\ufffd", "x\ufffd"])
def test_a_stop_string_in_the_last_flush_counts(stop: str) -> None:
    first, x = tokenizer.token_to_id("ð"), tokenizer.encode("x")[0]
    assert first is not None
    stream = TextStream(tokenizer, (stop,))
    text = stream.push(x) + stream.push(first) + stream.flush()
    assert text == "x\ufffd"[: -len(stop)]
    assert stream.stopped
