"""Tokens to text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from glm5.text.tokenizer import Tokenizer


class TextStream:
    """Gives out the text of one row. Characters that may begin a stop string wait until it is
    clear; the stop string itself is never given out.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> None:
        self._decoder = tokenizer.stream_decoder()
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that is certain after this token; sets `stopped` at a stop string."""
        return self._release(self._decoder.push(token_id), last=False)

    def flush(self) -> str:
        """What was held back, at the end of the row."""
        return "" if self.stopped else self._release(self._decoder.flush(), last=True)

    def _release(self, text: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        held = self._held + text
        # The stop string that ends first counts, so that it does not matter how text is cut in tokens.
        found = [(held.find(stop) + len(stop), held.find(stop)) for stop in self._stop if stop in held]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)[1]]
        keep = 0 if last else self._may_begin_stop(held)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def _may_begin_stop(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string starts with."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
