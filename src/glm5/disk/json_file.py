"""JSON from a directory of somebody else's: of a bounded size, an object, errors with the file's name."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from glm5.errors import CheckpointError, Glm5Error

MAX_BYTES = 8 << 20  # a larger config is none: the largest published one is about 30 KB


def read_json(
    path: Path, *, limit: int = MAX_BYTES, error: type[Glm5Error] = CheckpointError
) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        error: no such file, not a regular file, larger than `limit` bytes, not UTF-8, not JSON, no object.
    """
    text = read_text(path, limit=limit, error=error)
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as problem:  # ValueError: bad JSON, an endless number
        raise error(f"{path}: not valid JSON ({problem}); download it again") from None
    if not isinstance(raw, dict):
        raise error(f"{path}: holds a JSON {type(raw).__name__}, expected an object")
    return raw


def read_text(path: Path, *, limit: int = MAX_BYTES, error: type[Glm5Error] = CheckpointError) -> str:
    """The text of a regular file of at most `limit` bytes; raises `error` as `read_json` does."""
    try:
        return read_bytes(path, limit=limit, error=error).decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{path}: not UTF-8 at byte {problem.start}; not valid JSON or text") from None


def read_bytes(path: Path, *, limit: int = MAX_BYTES, error: type[Glm5Error] = CheckpointError) -> bytes:
    """The bytes of a regular file of at most `limit` bytes; raises `error` as `read_json` does."""
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):  # a pipe or a device could be read for ever
            raise error(f"{path}: is not a regular file")
        if info.st_size > limit:
            raise error(
                f"{path}: {info.st_size / 2**20:.0f} MiB, more than the {limit >> 20} MiB it can have"
            )
        with path.open("rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:  # it grew
            raise error(f"{path}: more than the {limit >> 20} MiB it can have")
        return data
    except FileNotFoundError:
        raise error(f"{path}: no such file; a checkpoint directory needs one") from None
    except (OSError, ValueError) as problem:  # ValueError: a name with a NUL
        raise error(f"{path}: cannot be read ({getattr(problem, 'strerror', problem)})") from None
