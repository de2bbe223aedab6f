"""A conversation with a model, on a terminal or through a pipe."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, TextIO

from glm5.cli import streams
from glm5.cli.streams import printable, shown
from glm5.errors import Glm5Error, TemplateError
from glm5.runtime.language_model import LanguageModel
from glm5.runtime.request import Result
from glm5.text.chat.reasoning import ReasoningSplit, begins_inside

EXIT_WORDS = ("/exit", "/quit")
_FORGOTTEN = "the conversation outgrew the model: its oldest turns are forgotten"
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
        self.last: Result | None = None
        self.forgotten = 0

    def reset(self) -> None:
        self._turns = []

    def answer(self, text: str) -> Iterator[tuple[str, bool]]:
        """Yield (piece, is_reasoning). The turn is remembered once it is complete or stopped.

        Where a conversation outgrows the model, the oldest turns are forgotten (`forgotten` counts them).
        Raises RequestError at once when the message does not fit by itself.
        """
        asked = {"role": "user", "content": text}
        ids = self._fit(asked)
        pieces: list[str] = []
        failed = False
        tokenizer = self.model.tokenizer
        split = ReasoningSplit(begins_inside(ids, tokenizer.control_ids if tokenizer else {}))
        stream = self.model.stream(
            [*self._system, *self._turns, asked],
            enable_thinking=self.enable_thinking,
            on_finish=self._finished,
            **self.params,
        )
        try:
            for piece, is_reasoning in split.parts(stream):
                if not is_reasoning:
                    pieces.append(piece)
                yield piece, is_reasoning
        except Glm5Error:
            failed = True
            raise
        finally:
            if self.remembers and not failed:
                self._turns += [asked, {"role": "assistant", "content": "".join(pieces)}]

    def _fit(self, asked: dict[str, str]) -> list[int]:
        """The ids of the prompt, after the oldest turns were forgotten where it leaves no room to answer."""
        limit = self.model.config.max_position_embeddings
        room = min(int(self.params.get("max_new_tokens", 0)), limit // 4)
        ids: list[int] = []
        for first in range(0, len(self._turns) + 1, 2):
            messages = [*self._system, *self._turns[first:], asked]
            alone = first == len(self._turns)
            try:
                ids = self.model.prompt_ids(messages, enable_thinking=self.enable_thinking)
            except TemplateError:  # an answer may spell what an unknown template must not hold
                if alone:
                    raise
                continue
            if len(ids) + room <= limit or (alone and len(ids) < limit):
                self._turns, self.forgotten = self._turns[first:], self.forgotten + first // 2
                break
        return ids  # if nothing helped, the model says how long the whole is

    def _finished(self, completion: Result) -> None:
        self.last = completion


def run_piped(session: ChatSession, source: TextIO, out: TextIO, notes: TextIO) -> bool:
    """One line in, one answer out; ends at /exit or the end of input. Reasoning is not printed.

    A line that cannot be answered gets an empty one, and a line on `notes`. Returns whether all were
    answered.
    """
    answered_all = True
    for line in source:
        text = line.strip()
        if text in EXIT_WORDS:
            break
        if not text:
            continue
        if text == "/reset":
            session.reset()
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
                notes.write("the reasoning was cut at --max-new-tokens, before the answer\n")
        if session.forgotten > before:
            notes.write(f"{_FORGOTTEN}\n")
        out.write("\n")
        out.flush()
    return answered_all


def run_terminal(session: ChatSession, name: str) -> None:
    """The interactive loop; an answer's reasoning is dim, its speed stands below it."""
    import readline  # noqa: F401  # gives input() history and editing

    from rich.markup import escape

    console = streams.console()
    console.print(f"Talking to [bold]{escape(name)}[/]. {_HELP}.")
    if not session.remembers:
        console.print("[dim]This model takes each message alone; it does not remember earlier ones.[/]")
    leaving = False
    while True:
        try:
            text = input("\n> ").strip()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            if leaving:
                console.print()
                return
            leaving = True
            console.print("\nCtrl-C once more, or /exit, ends the conversation")
            continue
        leaving = False
        if text in EXIT_WORDS:
            return
        if text == "/reset":
            session.reset()
        elif text in ("/help", "/?"):
            console.print(_HELP)
        elif text.startswith("/") and " " not in text and text.isascii():
            console.print(f"{text} is no command. {_HELP}.", markup=False)
        elif text:
            _answer_on(console, session, text)


def _answer_on(console: Any, session: ChatSession, text: str) -> None:
    started = time.monotonic()
    first: float | None = None
    session.last, session.forgotten = None, 0
    try:
        for piece, is_reasoning in session.answer(text):
            first = first if first is not None else time.monotonic()
            style = "dim" if is_reasoning else None
            console.print(printable(piece), end="", markup=False, style=style, soft_wrap=True)
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
    if session.forgotten:
        console.print(f"[dim]{_FORGOTTEN}[/]")
