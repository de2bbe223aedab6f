"""From logits to a token: penalties, temperature, cut-offs, a seeded draw. One row at a time, so
that a row's tokens never depend on the batch around it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from glm5.errors import RequestError

# Smaller ones (greedy to every purpose) would be zero in fp32.
_LEAST_TEMPERATURE = 1e-30


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. Names and meanings as in `transformers` and vLLM.

    temperature: 0 = greedy. top_k: 0 = off. top_p, min_p: probabilities. repetition_penalty: 1 =
    off; divides positive and multiplies negative logits of tokens seen (CTRL, section 4.1).
    seed: 0 to 2^63 - 1, None = another result every time. stop: strings that end the text and are
    not part of it. stop_token_ids: tokens that end the row, beside the model's own.
    ignore_eos: go on past the model's end tokens.

    Raises:
        RequestError: a value is impossible; the message names it.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_new_tokens", 0, math.inf),
            ("temperature", 0, 100),
            ("top_k", 0, math.inf),
            ("top_p", 0, 1),
            ("min_p", 0, 1),
            ("repetition_penalty", 0.01, 100),  # beyond, logits leave the range of floats
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

    def with_changes(self, **changes: Any) -> SamplingParams:
        """A copy with other values; an unknown name is a RequestError."""
        known = {f.name for f in fields(self)}
        unknown = next((name for name in changes if name not in known), None)
        if unknown is not None:
            raise RequestError(f"{unknown!r} is no generation parameter; known: {', '.join(sorted(known))}")
        return replace(self, **changes)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class Sampler:
    """Draws the tokens of one row; owns its random generator and the tokens it has seen."""

    def __init__(self, params: SamplingParams, prompt_ids: list[int]) -> None:
        self.params = params
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)
        self._seen = set(prompt_ids)

    def __call__(self, logits_V: Tensor) -> int:
        """The next token from the row's logits [vocab]."""
        if self.params.temperature == 0 and self.params.repetition_penalty == 1:
            token = likeliest(logits_V)
        else:
            token = self._draw(logits_V.float().cpu())
        self._seen.add(token)
        return token

    def _draw(self, logits: Tensor) -> int:
        params = self.params
        if params.repetition_penalty != 1:
            seen = torch.tensor(sorted(self._seen))
            values = logits[seen]
            penalized = torch.where(
                values > 0, values / params.repetition_penalty, values * params.repetition_penalty
            )
            logits = logits.scatter(0, seen, penalized)
        best = likeliest(logits)
        if params.temperature == 0:
            return best
        # Relative to the best, so that a tiny temperature drives the others to -inf, not all to NaN.
        scaled = (logits - logits[best]) / max(params.temperature, _LEAST_TEMPERATURE)
        probabilities = cut_off(scaled, params).softmax(dim=-1)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def likeliest(logits_V: Tensor) -> int:
    """The lowest id of the largest logit.

    Raises:
        RequestError: a logit is NaN or the largest infinite, so that no answer would mean anything.
    """
    token = int(logits_V.argmax())  # the place of a NaN, where there is one
    if not math.isfinite(float(logits_V[token])):
        raise RequestError(
            "the logits are not finite: the checkpoint is damaged, or float16 too narrow for it; use bfloat16"
        )
    return token


def cut_off(logits: Tensor, params: SamplingParams) -> Tensor:
    """Set to -inf what top-k, then top-p, then min-p exclude (the order of `transformers`)."""
    size = logits.shape[-1]
    if 0 < params.top_k < size:
        least = logits.topk(params.top_k).values[-1]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if params.top_p < 1:
        # From the least likely up: small probabilities are summed before they can be rounded away.
        ordered, order = logits.sort(stable=True)
        at_most = ordered.softmax(dim=-1).cumsum(dim=-1)
        dropped = order[:-1][at_most[:-1] <= 1 - params.top_p]  # the likeliest is always kept
        logits = logits.index_fill(0, dropped, float("-inf"))
    if params.min_p > 0:
        probabilities = logits.softmax(dim=-1)
        logits = logits.masked_fill(probabilities < params.min_p * probabilities.max(), float("-inf"))
    return logits
