"""A chat on a terminal or through a pipe."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, TextIO

from glm5.cli import streams
from glm5.cli.commands import EXIT_WORDS, is_command, run_command
from glm5.cli.conversation import ChatSession
from glm5.cli.streams import printable, shown
from glm5.errors import Glm5Error

_FORGOTTEN = "the conversation outgrew the model: its oldest turns are forgotten"
_CUT = "the reasoning was cut at --max-new-tokens, before the answer"
_BLOCK = '"""'
_REASONING_LINES = 3  # of a running thought that are shown


def run_piped(session: ChatSession, source: TextIO, out: TextIO, notes: TextIO) -> bool:
    """One line in, one answer out; ends at /exit or the end of input. Reasoning is not printed.

    A line that cannot be answered gets an empty one, and a line on `notes`; so does a command. Returns
    whether all were answered.
    """
    answered_all = True
    for line in source:
        text = line.strip()
        if text in EXIT_WORDS:
            break
        if not text:
            continue
        if is_command(text):
            said = run_command(session, text)
            if said is None:
                break
            answered_all &= not said.startswith("error: ")
            notes.write(f"{said}\n")
            continue
        before, silent = session.forgotten, True
        try:
            for piece, is_reasoning in session.answer(text):
                if not is_reasoning:
                    out.write(shown(piece, out))
                    out.flush()
                    silent = False
        except Glm5Error as error:
            answered_all = False
            notes.write(f"error: {error}\n")
        else:
            if silent and session.last is not None and session.last.finish_reason == "length":
                notes.write(f"{_CUT}\n")
        if session.forgotten > before:
            notes.write(f"{_FORGOTTEN}\n")
        out.write("\n")
        out.flush()
    return answered_all


def run_terminal(session: ChatSession, name: str) -> None:
    """The interactive loop: history, editing of several lines, commands, a status line."""
    console = streams.console()
    _greet(console, session, name)
    ask = _asker(session)
    while True:
        try:
            text = ask().strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            console.print("Ctrl-D or /exit ends the conversation", style="dim")
            continue
        if text.startswith(_BLOCK):
            text = text.removeprefix(_BLOCK).removesuffix(_BLOCK).strip()
        if not text:
            continue
        if is_command(text):
            said = run_command(session, text)
            if said is None:
                return
            console.print(printable(said), markup=False, style="dim")
        else:
            answer_on(console, session, text)


def _greet(console: Any, session: ChatSession, name: str) -> None:
    from rich.markup import escape

    config = session.model.config
    about = f"{config.model_type}, {config.max_position_embeddings:,} tokens of context"
    console.print(f"Talking to [bold]{escape(printable(name))}[/] [dim]({about})[/]", soft_wrap=True)
    console.print("[dim]/help lists the commands, Ctrl-C stops an answer, /exit ends.[/]")
    if not session.remembers:
        console.print("[dim]This model takes each message alone; it does not remember earlier ones.[/]")


def _asker(session: ChatSession) -> Any:
    """Reads a message. Enter sends; after a backslash, in an open \"\"\" or with Alt it begins a new line."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.application import get_app
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.key_binding import KeyBindings

    from glm5.cli.commands import NAMES

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: Any) -> None:
        buffer = event.current_buffer
        text = buffer.document.text
        open_block = text.lstrip().startswith(_BLOCK) and not text.rstrip().endswith(_BLOCK)
        if text.lstrip() == _BLOCK or (open_block and text.strip() != _BLOCK):
            buffer.insert_text("\n")
        elif text.endswith("\\") and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def _(event: Any) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            get_app().exit(exception=KeyboardInterrupt)

    prompt: PromptSession[str] = PromptSession(
        history=_history(), key_bindings=keys, multiline=True, prompt_continuation="  ",
        completer=WordCompleter(sorted(set(NAMES)), sentence=True), complete_while_typing=False,
        bottom_toolbar=lambda: status_line(session), enable_open_in_editor=True, reserve_space_for_menu=0,
    )  # fmt: skip
    return lambda: prompt.prompt("> ")


def _history() -> Any:
    """Earlier messages, in the user's state folder; in memory where that cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    path = Path(state).expanduser() / "glm5" / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))


def status_line(session: ChatSession) -> str:
    """What stands below the prompt: context used, speed of the last answer, settings."""
    limit = session.model.config.max_position_embeddings
    parts = [f"context {session.context_tokens:,} of {limit:,}"]
    if session.last is not None:
        statistics = session.last.statistics
        parts.append(f"{statistics.tokens_per_second:.0f} tokens/s")
        if statistics.drafted:
            parts.append(f"guesses {statistics.accepted} of {statistics.drafted} right")
    temperature = session.params.get("temperature", session.model.defaults.temperature)
    parts.append(f"temperature {temperature:g}")
    parts.append(f"thinking {'on' if session.enable_thinking else 'off'}")
    return " " + " | ".join(parts)


def answer_on(console: Any, session: ChatSession, text: str) -> None:
    """Print an answer as it comes. Its reasoning is dim, and folds into a line when the answer begins."""
    started = time.monotonic()
    session.forgotten = 0
    thought, silent = _Thought(console), True
    try:
        for piece, is_reasoning in session.answer(text):
            if is_reasoning:
                thought.add(piece)
            else:
                thought.fold()
                silent = False
                console.print(printable(piece), end="", markup=False, soft_wrap=True)
        thought.fold()
    except KeyboardInterrupt:
        thought.fold()
        console.print("\n[dim]stopped; what was said is kept[/]")
        return
    except Glm5Error as error:
        thought.fold()
        console.print(f"error: {error}", markup=False, soft_wrap=True)
        return
    console.print("[dim](no answer)[/]" if silent else "")
    if session.last is not None:
        statistics, count = session.last.statistics, len(session.last.ids)
        first = f"first after {statistics.time_to_first_token:.2f} s"
        rate = f", {statistics.tokens_per_second:.0f} tokens/s" if count > 1 else ""
        cut = " (cut at --max-new-tokens)" if session.last.finish_reason == "length" else ""
        console.print(f"[dim]{count} tokens, {first}{rate}, {time.monotonic() - started:.1f} s{cut}[/]")
    if session.forgotten:
        console.print(f"[dim]{_FORGOTTEN}[/]")


class _Thought:
    """Reasoning as it runs: its last lines, dim, in a place that is cleared when the answer begins."""

    def __init__(self, console: Any) -> None:
        self._console, self._text = console, ""
        self._live: Any = None
        self._started = time.monotonic()

    def add(self, piece: str) -> None:
        from rich.live import Live
        from rich.text import Text

        self._text += printable(piece)
        if not self._console.is_terminal or self._console.is_dumb_terminal:
            return
        if self._live is None:
            self._live = Live(console=self._console, transient=True, refresh_per_second=8)
            self._live.start()
        lines = self._text.strip().splitlines()[-_REASONING_LINES:]
        width = max(20, self._console.width - 1)
        self._live.update(Text("\n".join(line[-width:] for line in lines), style="dim"))

    def fold(self) -> None:
        """Leave one line of it; again and again is once."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._text.strip():
            words, seconds = len(self._text.split()), time.monotonic() - self._started
            self._console.print(f"[dim]thought for {seconds:.1f} s, {words} words; /reasoning shows them[/]")
        self._text = ""
