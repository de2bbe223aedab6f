"""The standard streams as they may be: closed, full, of another encoding, gone in the middle."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console


def prepare() -> None:
    """Make the streams usable, before anything opens a file: it would get the number of a closed one.

    Characters that the output cannot show become `?`. Ctrl-C ends the program at once until
    `interruptible` is called: some of what is imported would swallow it.
    """
    missing = [stream is None for stream in (sys.stdin, sys.stdout, sys.stderr)]
    if any(missing):
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(number)
        if missing[0]:
            sys.stdin = io.StringIO()
        if missing[2]:
            sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  for the whole run
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def interruptible() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def finish() -> None:
    """Write what is buffered. Raises OSError where a full disk or a closed pipe would pass unseen."""
    if sys.stdout is not None:
        sys.stdout.flush()


def give_up_output() -> None:
    """Throw away what cannot be written, so that the interpreter's own end does not try again."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 1)


def console() -> Console:
    """A console for tables and chats that ends quietly when its reader leaves, as `head` does."""
    from rich.console import Console

    class Quiet(Console):
        def on_broken_pipe(self) -> None:
            give_up_output()
            raise SystemExit(0)

    return Quiet(highlight=False)


def is_gone(error: OSError) -> bool:
    """Did the reader of our output leave?"""
    return error.errno == errno.EPIPE


def printable(text: str) -> str:
    """A model's text without the control characters that a terminal obeys; lines and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def shown(text: str, out: TextIO) -> str:
    """`printable` on a terminal; as it is for a file or a program."""
    return printable(text) if out.isatty() else text
