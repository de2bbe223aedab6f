"""A conversation: reasoning apart, old turns forgotten in time, one bad line does not end it."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest

from glm5.cli.chat import ChatSession, _answer_on, run_piped, run_terminal
from glm5.cli.streams import console, printable
from glm5.errors import RequestError
from glm5.runtime.language_model import LanguageModel
from tests.runtime.language_model_fixture import tiny_language_model


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_language_model(max_position_embeddings=96)


def test_the_oldest_turns_are_forgotten_when_a_conversation_outgrows_the_model(model: LanguageModel) -> None:
    session = ChatSession(model, enable_thinking=False, max_new_tokens=3, temperature=0.0)
    for number in range(12):
        list(session.answer(f"hello number {number}"))
    assert session.forgotten > 0
    kept = [turn["content"] for turn in session._turns if turn["role"] == "user"]
    assert kept[-1] == "hello number 11"
    assert len(kept) == 12 - session.forgotten


def test_a_line_that_cannot_be_answered_does_not_end_the_pipe(model: LanguageModel) -> None:
    session = ChatSession(model, enable_thinking=False, max_new_tokens=3, temperature=0.0)
    out, notes = io.StringIO(), io.StringIO()
    assert not run_piped(session, io.StringIO("hi\n" + "狐" * 500 + "\nhi\n"), out, notes)
    lines = out.getvalue().split("\n")
    assert lines[1] == ""
    assert notes.getvalue().startswith("error: the prompt has ")
    with pytest.raises(RequestError):
        list(session.answer("狐" * 500))
    assert all("狐" not in turn["content"] for turn in session._turns)


def test_a_message_that_does_not_fit_alone_keeps_the_conversation(model: LanguageModel) -> None:
    session = ChatSession(model, enable_thinking=False, max_new_tokens=3, temperature=0.0)
    list(session.answer("hi"))
    with pytest.raises(RequestError, match="the model holds at most 96"):
        list(session.answer("狐" * 500))
    assert [turn["content"] for turn in session._turns[:1]] == ["hi"]


def test_a_message_that_fits_only_alone_is_answered(model: LanguageModel) -> None:
    session = ChatSession(model, enable_thinking=False, max_new_tokens=20, temperature=0.0)
    list(session.answer("hi"))
    alone = len(model.prompt_ids([{"role": "user", "content": "x"}], enable_thinking=False)) - 1
    list(session.answer("x " * ((96 - alone - 4) // 2)))
    assert session.forgotten == 1


def test_a_failed_answer_is_not_remembered(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    session = ChatSession(model, enable_thinking=False, max_new_tokens=3, temperature=0.0)

    def fails(*_: object, **__: object) -> Iterator[str]:
        yield "half"
        raise RequestError("the logits are not finite")

    monkeypatch.setattr(session.model, "stream", fails)
    with pytest.raises(RequestError):
        list(session.answer("q"))
    assert session._turns == []


class _Hostile:
    last = None
    forgotten = 0

    def answer(self, text: str) -> object:
        yield "\x1b]52;c;b3duZWQ=\x07ok\n", False


def test_an_answer_cannot_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = console()
    screen.file = io.StringIO()
    _answer_on(screen, _Hostile(), "hi")  # type: ignore[arg-type]
    assert "\x1b]52" not in screen.file.getvalue()
    assert "ok" in screen.file.getvalue()
    assert printable("a\tb\nc\x1b[2J\x9b") == "a\tb\nc\ufffd[2J\ufffd"


def test_the_prompt_says_how_to_leave_and_names_unknown_commands(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter([KeyboardInterrupt, "/exti", KeyboardInterrupt, KeyboardInterrupt])

    def ask(prompt: str) -> str:
        given = next(typed)
        if isinstance(given, str):
            return given
        raise given

    monkeypatch.setattr("builtins.input", ask)
    run_terminal(ChatSession(model), "a[/]b")
    out = capsys.readouterr().out
    assert "a[/]b" in out
    assert "/exti is no command" in out
    assert out.count("Ctrl-C once more") == 2
    assert next(typed, None) is None
