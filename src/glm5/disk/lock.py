"""One writer a folder: a lock that ends with its process, however that ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from glm5.errors import Glm5Error

try:
    import fcntl
except ImportError:  # not POSIX: two writers are not noticed there
    fcntl = None  # type: ignore[assignment]


@contextmanager
def locked(directory: Path, error: type[Glm5Error], *, wait: bool = False) -> Iterator[None]:
    """Hold the folder's lock; the folder is made if it is missing, no file is.

    wait: for whoever holds it, instead of refusing. On file systems without locks nobody is noticed.

    Raises:
        error: another process writes there now, or the folder cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory, os.O_RDONLY) if fcntl is not None else None
    except OSError as problem:
        raise error(f"{directory}: cannot be written ({problem.strerror}); name another folder") from None
    if handle is None:
        yield
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise error(
                f"{directory}: another process writes there now; wait for it or name another folder"
            ) from None
        except OSError:
            pass  # no locks here, as on some network file systems
        yield
    finally:
        os.close(handle)
