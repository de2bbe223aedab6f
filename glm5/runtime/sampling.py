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


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. Names and meanings as in `transformers` and vLLM.

    temperature: 0 = greedy. top_k: 0 = off. top_p, min_p: probabilities. repetition_penalty: 1 =
    off; divides positive and multiplies negative logits of tokens seen (CTRL, section 4.1).
    seed: None = another result every time. stop: strings that end the text and are not part of it.
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
            ("repetition_penalty", 0, math.inf),
        ):
            value = getattr(self, name)
            whole = name in ("max_new_tokens", "top_k")
            wrong_kind = isinstance(value, bool) or not isinstance(value, int if whole else (int, float))
            if (
                wrong_kind
                or not low <= value <= high
                or (value == 0 and name in ("top_p", "repetition_penalty"))
            ):
                raise RequestError(f"{name} is {value!r}; it must be {'an integer ' if whole else ''}"
                                   f"{'above' if name in ('top_p', 'repetition_penalty') else 'from'} {low}"
                                   f"{'' if high == math.inf else f' to {high}'}")  # fmt: skip
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if not all(isinstance(text, str) and text for text in self.stop):
            raise RequestError("stop must be strings that are not empty")
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))

    def with_changes(self, **changes: Any) -> SamplingParams:
        """A copy with other values; an unknown name is a RequestError."""
        known = {f.name for f in fields(self)}
        unknown = next((name for name in changes if name not in known), None)
        if unknown is not None:
            raise RequestError(f"{unknown!r} is no generation parameter; known: {', '.join(sorted(known))}")
        return replace(self, **changes)


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
            token = int(logits_V.argmax())
        else:
            token = self._draw(logits_V.float().cpu())
        self._seen.add(token)
        return token

    def _draw(self, logits: Tensor) -> int:
        params = self.params
        if params.repetition_penalty != 1:
            seen = torch.tensor(sorted(self._seen))
            values = logits[seen]
            penalised = torch.where(
                values > 0, values / params.repetition_penalty, values * params.repetition_penalty
            )
            logits = logits.scatter(0, seen, penalised)
        if params.temperature == 0:
            return int(logits.argmax())
        probabilities = cut_off(logits / params.temperature, params).softmax(dim=-1)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def cut_off(logits: Tensor, params: SamplingParams) -> Tensor:
    """Set to -inf what top-k, then top-p, then min-p exclude (the order of `transformers`)."""
    size = logits.shape[-1]
    if 0 < params.top_k < size:
        least = logits.topk(params.top_k).values[-1]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if params.top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
        dropped = order[before >= params.top_p]  # the first is always kept: before is 0 there
        logits = logits.index_fill(0, dropped, float("-inf"))
    if params.min_p > 0:
        probabilities = logits.softmax(dim=-1)
        logits = logits.masked_fill(probabilities < params.min_p * probabilities.max(), float("-inf"))
    return logits
