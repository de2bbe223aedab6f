"""How to choose tokens and when to stop: the parameters of one request."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor

from glm5.errors import RequestError

MAX_TOP_LOGPROBS = 64
# Given the row's new tokens: which ids may come next, as a bool mask [vocab] or as ids; None = all.
AllowedTokens = Callable[[list[int]], Tensor | Sequence[int] | None]


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. Names and meanings as in `transformers` and vLLM.

    temperature: 0 = greedy. top_k: 0 = off. top_p, min_p: probabilities. repetition_penalty: 1 =
    off; divides positive and multiplies negative logits of tokens seen (CTRL, section 4.1).
    presence_penalty, frequency_penalty: from -2 to 2, taken off the logit of each new token that came
    before, once and each time it came. logit_bias: token id -> what is added to its logit, -100 to 100.
    logprobs: None = none; n = the log probability of each token, and of the n likeliest.
    seed: 0 to 2^63 - 1, None = another result every time. stop: strings that end the text and are
    not part of it. stop_token_ids: tokens that end the row, beside the model's own.
    ignore_eos: go on past the model's end tokens. allowed_tokens_fn: called before each token with the new
    ids so far; what it leaves out cannot come next.

    Raises:
        RequestError: a value is impossible; the message names it.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    allowed_tokens_fn: AllowedTokens | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_new_tokens", 0, math.inf),
            ("temperature", 0, 100),
            ("top_k", 0, math.inf),
            ("top_p", 0, 1),
            ("min_p", 0, 1),
            ("repetition_penalty", 0.01, 100),  # beyond, logits leave the range of floats
            ("presence_penalty", -2, 2),
            ("frequency_penalty", -2, 2),
        ):
            value = getattr(self, name)
            whole = name in ("max_new_tokens", "top_k")
            wrong_kind = isinstance(value, bool) or not isinstance(value, int if whole else (int, float))
            if (
                wrong_kind
                or not low <= value <= high
                or value == math.inf
                or (value == 0 and name == "top_p")
            ):
                raise RequestError(f"{name} is {value!r}; it must be {'an integer ' if whole else ''}"
                                   f"{'above' if name == 'top_p' else 'from'} {low}"
                                   f"{'' if high == math.inf else f' to {high}'}")  # fmt: skip
        self._check_ends()
        self._check_bias()
        if self.logprobs is not None and not (
            _is_whole(self.logprobs) and 0 <= self.logprobs <= MAX_TOP_LOGPROBS
        ):
            raise RequestError(
                f"logprobs is {self.logprobs!r}; it must be None or an integer from 0 to {MAX_TOP_LOGPROBS}"
            )
        if self.allowed_tokens_fn is not None and not callable(self.allowed_tokens_fn):
            raise RequestError(f"allowed_tokens_fn is {self.allowed_tokens_fn!r}; it must be a function")

    def _check_ends(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, (list, tuple)) or not all(isinstance(s, str) and s for s in stop):
            raise RequestError(f"stop is {self.stop!r}; it must be strings that are not empty")
        ids = self.stop_token_ids
        if not isinstance(ids, (list, tuple, set, frozenset)) or not all(map(_is_whole, ids)):
            raise RequestError(f"stop_token_ids is {ids!r}; it must be a list of token ids")
        if self.seed is not None and not (_is_whole(self.seed) and 0 <= self.seed < 2**63):
            raise RequestError(f"seed is {self.seed!r}; it must be None or an integer from 0 to 2^63 - 1")
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos is {self.ignore_eos!r}; it must be true or false")
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "stop_token_ids", tuple(ids))

    def _check_bias(self) -> None:
        bias = {} if self.logit_bias is None else self.logit_bias
        if not isinstance(bias, Mapping):
            raise RequestError(f"logit_bias is {bias!r}; it must be a mapping of token ids to numbers")
        for token, value in bias.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (_is_whole(token) and token >= 0 and number and -100 <= value <= 100):
                raise RequestError(
                    f"logit_bias has {token!r}: {value!r}; it must be a token id and a number of -100 to 100"
                )
        object.__setattr__(self, "logit_bias", dict(bias))

    def with_changes(self, **changes: Any) -> SamplingParams:
        """A copy with other values; an unknown name is a RequestError."""
        known = {f.name for f in fields(self)}
        unknown = next((name for name in changes if name not in known), None)
        if unknown is not None:
            raise RequestError(f"{unknown!r} is no generation parameter; known: {', '.join(sorted(known))}")
        return replace(self, **changes)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
