"""What of an answer is reasoning: told from its tags, not from what was asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from glm5.text.control_tokens import THINK_CLOSE, THINK_OPEN


def begins_inside(prompt_ids: Sequence[int], control_ids: Mapping[str, int]) -> bool:
    """Does the prompt leave the model inside a thought: is its last think tag an open one?"""
    opened, closed = control_ids.get(THINK_OPEN), control_ids.get(THINK_CLOSE)
    last = next((token for token in reversed(prompt_ids) if token in (opened, closed)), None)
    return last is not None and last == opened


class ReasoningSplit:
    """Parts an answer that comes piece by piece. The tags themselves are given to neither part.

    Reasoning is what a prompt leaves open, or a thought that the answer begins with. A tag may be cut over
    pieces; what may be the beginning of one is held back.
    """

    def __init__(self, inside: bool) -> None:
        self._inside, self._answers = inside, False
        self._repeats = inside  # the model may write the tag that its prompt has opened already
        self._held = ""

    def push(self, piece: str) -> Iterator[tuple[str, bool]]:
        """(text, is it reasoning) of what is certain now."""
        self._held += piece
        if self._repeats:
            start = self._held.lstrip()
            if start.startswith(THINK_OPEN):
                self._held = start.removeprefix(THINK_OPEN)
            elif THINK_OPEN.startswith(start):
                return
            self._repeats = False
        while self._held:
            tag = THINK_CLOSE if self._inside else None if self._answers else THINK_OPEN
            if tag is None:
                yield self._take(len(self._held)), False
            elif (at := self._held.find(tag)) >= 0 and (self._inside or not self._held[:at].strip()):
                before = self._take(at)
                if self._inside and before:
                    yield before, True
                self._take(len(tag))
                self._answers, self._inside = self._inside, not self._inside
            elif self._inside:
                sure = len(self._held) - _may_begin(tag, self._held)
                if sure:
                    yield self._take(sure), True
                return
            elif tag.startswith(self._held.lstrip()):
                return
            else:
                self._answers = True

    def parts(self, pieces: Iterable[str]) -> Iterator[tuple[str, bool]]:
        """All parts of an answer, as its pieces come."""
        for piece in pieces:
            yield from self.push(piece)
        yield from self.flush()

    def flush(self) -> Iterator[tuple[str, bool]]:
        """What was held back, at the end."""
        if self._held:
            yield self._take(len(self._held)), self._inside

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        return taken


def _may_begin(tag: str, text: str) -> int:
    """How long the end of `text` is that a tag may begin with."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)
