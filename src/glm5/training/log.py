"""`log.jsonl` of a run: a JSON object a line, with the step it tells of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm5.disk.files import write_atomic


class RunLog:
    """Appends rows; survives what a kill, a full disk or a power cut leaves of its last line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as log:
            log.write(json.dumps(row, allow_nan=False) + "\n")

    def cut(self, step: int) -> int:
        """Forget rows past `step`: they are about to be made again. Lines that are no row go too.

        Returns how many lines were no row.
        """
        if not self.path.exists():
            return 0
        lines = self.path.read_bytes().splitlines()
        steps = [_step_of(line) for line in lines]
        kept = [line for line, of in zip(lines, steps, strict=True) if of is not None and of <= step]
        write_atomic(self.path, b"".join(line + b"\n" for line in kept))
        return sum(of is None for of in steps)


def _step_of(line: bytes) -> int | None:
    try:
        step = json.loads(line.decode("utf-8"))["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if isinstance(step, int) else None
