"""An answer that comes piece by piece, and ends with the one who reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")


class Stream(Generic[T]):
    """A generator whose request ends with it, even if it was never begun."""

    def __init__(self, pieces: Iterator[T], cancel: Callable[[], None]) -> None:
        self._pieces, self._cancel = pieces, cancel

    def __iter__(self) -> Stream[T]:
        return self

    def __next__(self) -> T:
        return next(self._pieces)

    def close(self) -> None:
        """End the request, wherever it stands."""
        self._pieces.close()  # type: ignore[attr-defined]
        self._cancel()

    def __del__(self) -> None:
        with suppress(Exception):
            self._cancel()
