"""A timeline of tokens that is kept between requests: a conversation, an evaluation's examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import index
from typing import Any

from glm5.errors import RequestError
from glm5.runtime.cache import Sequence as Timeline
from glm5.runtime.engine import Engine
from glm5.runtime.request import Request, Result
from glm5.runtime.sampling_params import SamplingParams
from glm5.runtime.streams import Stream


class Session:
    """Tokens, and the pages that hold what the model has read of them; they are not given up while it lives.

    `extend` adds tokens, `generate` and `stream` let the model go on, `fork` begins another timeline at any
    token and copies nothing. Use it as a context manager, or `close` it.
    """

    def __init__(self, engine: Engine, ids: Sequence[int] = ()) -> None:
        self.engine, self.ids = engine, _ids(ids)
        self._held: Timeline | None = None

    def extend(self, ids: Sequence[int]) -> None:
        """Add tokens behind what is there; they are read with the next request."""
        self.ids += _ids(ids)

    def stream(self, params: SamplingParams | None = None, **options: Any) -> Iterator[list[int]]:
        """Yield new ids as they come; what was taken from the generator becomes part of the session.

        options: as `Engine.submit`. Raises RequestError at once.
        """
        request = self.engine.submit(self.ids, params, keeps=True, **options)
        return Stream(self._stream(request), lambda: self.engine.cancel(request))

    def generate(self, params: SamplingParams | None = None, **options: Any) -> Result:
        """`stream` to the end."""
        request = self.engine.submit(self.ids, params, keeps=True, **options)
        for _ in self._stream(request):
            pass
        return request.result()

    def _stream(self, request: Request) -> Iterator[list[int]]:
        try:
            for new in self.engine.outputs(request):
                self.ids += new
                yield new
        finally:
            with self.engine.lock:  # where another thread's step ends the request, it keeps nothing any more
                request.keeps = False
                if request.kept is not None:
                    self._hold(request.kept)

    def fork(self, length: int | None = None) -> Session:
        """Another session that begins with the first `length` tokens of this one; None = all."""
        length = len(self.ids) if length is None else length
        if type(length) is not int:
            raise RequestError(f"a session is forked at a number of tokens, not at {length!r}")
        if not 0 <= length <= len(self.ids):
            raise RequestError(f"the session has {len(self.ids)} tokens; it cannot be forked at {length}")
        other = Session(self.engine, self.ids[:length])
        if self._held is not None:
            other._hold(self._held.fork(min(length, self._held.length)))
        return other

    def truncate(self, length: int) -> None:
        """Go back to the first `length` tokens."""
        if type(length) is not int:
            raise RequestError(f"a session goes back to a number of tokens, not to {length!r}")
        if not 0 <= length <= len(self.ids):
            raise RequestError(f"the session has {len(self.ids)} tokens; it cannot go back to {length}")
        self.ids = self.ids[:length]

    def close(self) -> None:
        """Hold no pages any more."""
        self._hold(None)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hold(self, timeline: Timeline | None) -> None:
        with self.engine.lock:
            if self._held is not None:
                self._held.release()
            self._held = timeline


def _ids(ids: Sequence[int]) -> list[int]:
    try:
        return [index(token) for token in ids]
    except TypeError:
        raise RequestError(f"a session takes token ids, not {str(ids)[:60]!r}") from None
