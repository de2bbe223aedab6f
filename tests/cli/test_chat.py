"""A conversation: reasoning apart, old turns forgotten in time, one bad line does not end it."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from glm5.cli.chat import answer_on, run_piped, run_terminal, status_line
from glm5.cli.commands import is_command, run_command
from glm5.cli.conversation import ChatSession
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

    monkeypatch.setattr(session.model, "stream_chat", fails)
    with pytest.raises(RequestError):
        list(session.answer("q"))
    assert session._turns == []


class _Hostile:
    last = None
    forgotten = 0
    last_reasoning = ""

    def answer(self, text: str) -> object:
        yield "\x1b]52;c;b3duZWQ=\x07ok\n", False


def test_an_answer_cannot_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = console()
    screen.file = io.StringIO()
    answer_on(screen, _Hostile(), "hi")  # type: ignore[arg-type]
    assert "\x1b]52" not in screen.file.getvalue()
    assert "ok" in screen.file.getvalue()
    assert printable("a\tb\nc\x1b[2J\x9b") == "a\tb\nc\ufffd[2J\ufffd"


# --- the terminal ------------------------------------------------------------------------------


def typed(session: ChatSession, keys: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a terminal chat prints when these keys are pressed."""
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        pipe.send_text(keys)
        run_terminal(session, "a[/]b\x1b[2J")
    return capsys.readouterr().out


@pytest.fixture
def session(model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ChatSession:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return ChatSession(model, enable_thinking=False, max_new_tokens=3, temperature=0.0)


def test_messages_commands_and_the_way_out(
    session: ChatSession, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = typed(session, "hi\r/exti\r/set temperature 0.3\r/exit\r", capsys)
    assert "a[/]b\ufffd[2J" in out
    assert "/exti is no command; did you mean /exit?" in out
    assert session.params["temperature"] == 0.3
    assert [turn["content"] for turn in session._turns[:1]] == ["hi"]
    assert "tokens/s" in status_line(session)
    history = (tmp_path / "state" / "glm5" / "chat_history").read_text("utf-8")
    assert "+hi" in history
    assert "+/exti" in history


def test_ctrl_c_clears_a_line_and_tells_how_to_leave(
    session: ChatSession, capsys: pytest.CaptureFixture[str]
) -> None:
    out = typed(session, "half\x03\x03/exit\r", capsys)
    assert out.count("Ctrl-D or /exit ends the conversation") == 1
    assert session._turns == []
    assert typed(session, "\x04", capsys)  # Ctrl-D


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("\x1b[200~one\ntwo 狐狸\x1b[201~\r", "one\ntwo 狐狸"),  # pasted
        ("one\x1b\rtwo\r", "one\ntwo"),  # Alt-Enter
        ("one\\\rtwo\r", "one\ntwo"),  # a backslash at the end
        ('"""one\rtwo"""\r', "one\ntwo"),
        ("狐\x7f狸\r", "狸"),  # wide characters are deleted whole
    ],
)
def test_several_lines_are_one_message(
    session: ChatSession, capsys: pytest.CaptureFixture[str], keys: str, message: str
) -> None:
    typed(session, keys + "/exit\r", capsys)
    assert [turn["content"] for turn in session._turns if turn["role"] == "user"] == [message]


def test_ctrl_c_stops_an_answer_and_keeps_it(
    session: ChatSession, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> Iterator[str]:
        yield "half an answer"
        raise KeyboardInterrupt

    monkeypatch.setattr(session.model, "stream_chat", interrupted)
    out = typed(session, "hi\r/exit\r", capsys)
    assert "stopped; what was said is kept" in out
    assert session._turns[1]["content"] == "half an answer"


def test_reasoning_folds_and_can_be_shown(
    session: ChatSession, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def thinks(*_: object, **__: object) -> Iterator[str]:
        yield "<think>first this, "
        yield "then that</think>so it is"

    monkeypatch.setattr(session.model, "stream_chat", thinks)
    out = typed(session, "hi\r/reasoning\r/exit\r", capsys)
    assert "first this" not in out.split("so it is")[0]
    assert "4 words; /reasoning shows them" in out
    assert "first this, then that" in out.split("so it is")[1]
    assert session._turns[1]["content"] == "so it is"


# --- commands --------------------------------------------------------------------------------


def test_what_a_command_is() -> None:
    assert all(map(is_command, ("/help", "/set temperature 1", "/?", "/foo bar")))
    assert not any(map(is_command, ("", "hi", "/", "//", "/home/me", "/你好", "/etc/passwd what is it?")))


def test_settings_are_checked_and_go_back(session: ChatSession) -> None:
    assert "temperature 0.7" in (run_command(session, "/set temperature=0.7") or "")
    assert run_command(session, "/set temperature hot") == (
        "error: temperature is 'hot'; it must be a number, or default"
    )
    assert "top_p is 7" in (run_command(session, "/set top_p 7") or "")
    assert "'foo' cannot be set; known: temperature" in (run_command(session, "/set foo 1") or "")
    assert session.params["temperature"] == 0.7
    run_command(session, "/set temperature default")
    assert "temperature" not in session.params
    assert run_command(session, "/think") == "thinking is on"
    assert run_command(session, "/think off") == "thinking is off"
    assert run_command(session, "/system Be brief.") == "the system message is: Be brief."
    assert session._messages()[0] == {"role": "system", "content": "Be brief."}
    assert run_command(session, "/system off") == "no system message"
    assert run_command(session, "/bye") is None


def test_a_conversation_is_saved_and_loaded(
    session: ChatSession, model: LanguageModel, tmp_path: Path
) -> None:
    list(session.answer("hi"))
    session.system = "Be brief."
    session.set("top_p", "0.5")
    path = tmp_path / "talk.json"
    assert run_command(session, f"/save {path}") == f"written: {path}"
    other = ChatSession(model, enable_thinking=True)
    said = run_command(other, f"/load {path}")
    assert said == "1 questions and answers are back; the next message goes on from there"
    assert other._messages() == session._messages()
    assert (other.params["top_p"], other.enable_thinking) == (0.5, False)
    run_command(other, "/clear")
    assert other._turns == []
    (tmp_path / "link").symlink_to(path)
    run_command(other, f"/save {tmp_path / 'link'}")
    assert (tmp_path / "link").is_symlink()
    assert '"messages": []' in path.read_text("utf-8")
    os.mkfifo(tmp_path / "fifo")
    assert (
        run_command(other, f"/save {tmp_path / 'fifo'}") == f"error: {tmp_path / 'fifo'}: is no regular file"
    )


@pytest.mark.parametrize(
    "content",
    [
        "{", "[]", "{}", '{"messages": 5}', '{"messages": [5]}', '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}]}',
        '{"messages": [], "system": 5}', '{"messages": [], "params": {"foo": 1}}',
        '{"messages": [], "params": {"top_p": 7}}', '{"messages": [], "enable_thinking": "x"}',
        '{"messages": [{"content": "a"}, {"role": "user", "content": "b"}]}',
        '{"messages": [], "system": "\\ud800"}',
    ],
)  # fmt: skip
def test_a_damaged_conversation_is_refused_and_changes_nothing(
    session: ChatSession, tmp_path: Path, content: str
) -> None:
    list(session.answer("hi"))
    before = (list(session._turns), session.system, dict(session.params))
    (tmp_path / "talk.json").write_text(content)
    said = run_command(session, f"/load {tmp_path / 'talk.json'}") or ""
    assert said.startswith("error: ")
    assert "\n" not in said
    assert (session._turns, session.system, session.params) == before
    for words in (
        "/save /dev/null/x",
        f"/save {tmp_path}",
        "/load /nowhere",
        "/load",
        "/save",
        "/save ~nosuchuser/x",
    ):
        assert (run_command(session, words) or "").startswith("error: "), words


def test_commands_work_in_a_pipe(session: ChatSession) -> None:
    out, notes = io.StringIO(), io.StringIO()
    assert run_piped(session, io.StringIO("/set top_p 0.5\nhi\n/hlep\n/bye\nnever\n"), out, notes)
    answered = [turn["content"] for turn in session._turns if turn["role"] == "assistant"]
    assert [f"{text}\n" for text in answered] == [out.getvalue()]
    assert session.params["top_p"] == 0.5
    assert "/hlep is no command; did you mean /help?" in notes.getvalue()
    assert not run_piped(session, io.StringIO("/set foo 1\n"), out, notes)


def test_a_second_turn_reads_only_what_is_new(session: ChatSession) -> None:
    session.model.engine.forget()
    list(session.answer("hello there, this is a long message of many words"))
    assert session.last is not None
    first = session.last.prompt_tokens
    list(session.answer("and again"))
    # Up to where an answer begins, which an earlier turn spells otherwise.
    assert session.last.statistics.cached_tokens >= first - 3
