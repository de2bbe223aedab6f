"""What a person sees of a run: a bar with loss, tokens a second and time left."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class StepBar:
    """Shows one step after the other."""

    def __init__(self, bar: Progress | None, console: Console, first_step: int, steps: int) -> None:
        self._bar, self._console, self._steps = bar, console, steps
        self._task = bar.add_task("", total=steps, completed=first_step) if bar else None
        self._shown = time.monotonic()
        self._tokens_then: int | None = None
        self._rate = 0.0

    def advance(self, step: int, tokens: int, loss: float) -> None:
        """`tokens`: seen in all, up to this step."""
        now = time.monotonic()
        if self._tokens_then is None:
            self._tokens_then, self._shown = tokens, now
        elif now - self._shown >= (2.0 if self._bar else 30.0) or step == self._steps:
            self._rate = (tokens - self._tokens_then) / max(now - self._shown, 1e-9)
            self._tokens_then, self._shown = tokens, now
            if self._bar is None:
                self._console.print(f"step {step}/{self._steps}  loss {loss:.3f}  {self._rate:,.0f} tok/s")
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task, completed=step, description=f"loss {loss:.3f}  {self._rate:,.0f} tok/s"
            )


class _Forgiving(io.TextIOBase):
    """A terminal that may go away in the middle: no run ends for want of one who looks on."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._file.flush()

    def isatty(self) -> bool:
        return self._file.isatty()

    def fileno(self) -> int:
        return self._file.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._file, "encoding", None) or "utf-8"


class Report:
    """Prints to stderr: a live bar on a terminal, a line every half minute elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.console.file = cast(IO[str], _Forgiving(self.console.file))

    def say(self, message: str) -> None:
        self.console.print(message, markup=False, soft_wrap=True)

    @contextmanager
    def running(self, first_step: int, steps: int) -> Iterator[StepBar]:
        if not self.console.is_terminal:
            yield StepBar(None, self.console, first_step, steps)
            return
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=self.console) as bar:
            yield StepBar(bar, self.console, first_step, steps)
