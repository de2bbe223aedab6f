"""A progress bar for reading weights, shown only when it takes long enough to matter."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from glm5.cli import streams

_AFTER_SECONDS = 1.0


@contextmanager
def loading_bar(verb: str = "loading") -> Iterator[Callable[[int, int], None]]:
    """Yield a progress callback (bytes done, bytes in all); draws on stderr if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn(verb), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(verb, total=None)
    started = time.monotonic()
    running = False

    def progress(done: int, total: int) -> None:
        nonlocal running
        if not running and time.monotonic() - started > _AFTER_SECONDS:
            streams.interruptible()  # killed at once, the bar would leave the cursor hidden
            bar.start()
            running = True
        bar.update(task, completed=done, total=total)

    try:
        yield progress
    finally:
        if running:
            bar.stop()
