"""A conversation with a model, on a terminal or through a pipe."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, TextIO

from glm5.errors import Glm5Error
from glm5.runtime.language_model import Completion, LanguageModel
from glm5.text.control_tokens import THINK_CLOSE

EXIT_WORDS = ("/exit", "/quit")
_HELP = "/exit ends, /reset forgets the conversation, Ctrl-C stops an answer"


class ChatSession:
    """Holds the messages; `answer` streams the reply to one more user message."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        system: str | None = None,
        enable_thinking: bool | None = None,
        **params: Any,
    ) -> None:
        self.model = model
        self.params = params
        defaults = model.chat_defaults
        self.enable_thinking = defaults.enable_thinking if enable_thinking is None else enable_thinking
        self.remembers = defaults.remembers_turns
        self._system = [{"role": "system", "content": system}] if system else []
        self._turns: list[dict[str, str]] = []
        self.last: Completion | None = None

    def reset(self) -> None:
        self._turns = []

    def answer(self, text: str) -> Iterator[tuple[str, bool]]:
        """Yield (piece, is_reasoning). The turn is remembered once it is complete or stopped."""
        asked = {"role": "user", "content": text}
        pieces: list[str] = []
        reasoning = self.enable_thinking
        stream = self.model.stream(
            [*self._system, *self._turns, asked],
            enable_thinking=self.enable_thinking,
            on_finish=self._finished,
            **self.params,
        )
        try:
            for piece in stream:
                if reasoning and THINK_CLOSE in piece:
                    before, _, piece = piece.partition(THINK_CLOSE)
                    reasoning = False
                    yield before, True
                if not reasoning:
                    pieces.append(piece)
                yield piece, reasoning
        finally:
            if self.remembers:
                self._turns += [asked, {"role": "assistant", "content": "".join(pieces)}]

    def _finished(self, completion: Completion) -> None:
        self.last = completion


def run_piped(session: ChatSession, source: TextIO, out: TextIO) -> None:
    """One line in, one answer out; ends at /exit or the end of input. Reasoning is not printed."""
    for line in source:
        text = line.strip()
        if text in EXIT_WORDS:
            return
        if not text:
            continue
        if text == "/reset":
            session.reset()
            continue
        for piece, is_reasoning in session.answer(text):
            if not is_reasoning:
                out.write(piece)
                out.flush()
        out.write("\n")
        out.flush()


def run_terminal(session: ChatSession, name: str) -> None:
    """The interactive loop; an answer's reasoning is dim, its speed stands below it."""
    import readline  # noqa: F401  # gives input() history and editing

    from rich.console import Console

    console = Console(highlight=False)
    console.print(f"Talking to [bold]{name}[/]. {_HELP}.")
    if not session.remembers:
        console.print("[dim]This model takes each message alone; it does not remember earlier ones.[/]")
    while True:
        try:
            text = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if text in EXIT_WORDS:
            return
        if text == "/reset":
            session.reset()
        elif text in ("/help", "/?"):
            console.print(_HELP)
        elif text:
            _answer_on(console, session, text)


def _answer_on(console: Any, session: ChatSession, text: str) -> None:
    started = time.monotonic()
    first: float | None = None
    session.last = None
    try:
        for piece, is_reasoning in session.answer(text):
            first = first if first is not None else time.monotonic()
            console.print(piece, end="", markup=False, style="dim" if is_reasoning else None, soft_wrap=True)
    except KeyboardInterrupt:
        console.print("\n[dim]stopped[/]")
        return
    except Glm5Error as error:
        console.print(f"error: {error}", markup=False)
        return
    console.print()
    if session.last is not None and first is not None:
        tokens, seconds = len(session.last.ids), time.monotonic() - first
        rate = f", {(tokens - 1) / seconds:.0f} tokens/s" if tokens > 1 and seconds > 0 else ""
        cut = " (cut at --max-new-tokens)" if session.last.finish_reason == "length" else ""
        console.print(f"[dim]{tokens} tokens, first after {first - started:.2f} s{rate}{cut}[/]")
