"""From logits to tokens, for all rows of a step at once: bias, penalties, masks, cut-offs, a seeded draw.

Every operation goes along a row, and the random number of a row depends on its request's seed and on how
many tokens came before alone. So a row's token depends on nothing but its logits and its own request: not on
its neighbours, and not on whether it was reached by a draft.
Letters: M rows, V vocabulary.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from glm5.errors import Glm5Error, RequestError
from glm5.runtime.sampling_params import SamplingParams

# Smaller ones (greedy to every purpose) would be zero in fp32.
_LEAST_TEMPERATURE = 1e-30
_NUCLEUS = 256  # so many of the likeliest tokens mostly hold top_p
_WORD = (1 << 64) - 1


class Choice(NamedTuple):
    """A chosen token; with `logprobs` its log probability and the likeliest tokens with theirs."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """What the draws of one request depend on: its parameters, its seed, the tokens so far."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        self.params = params
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self.output_ids: list[int] = []
        self._prompt = frozenset(prompt_ids) if params.repetition_penalty != 1 else frozenset()
        self.has_history = (
            params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
        )
        self.changes_logits = (
            self.has_history or bool(params.logit_bias) or params.allowed_tokens_fn is not None
        )
        # The likeliest token is all that is asked for.
        self.is_plain = params.temperature == 0 and params.logprobs is None and not self.changes_logits
        self.counts: Counter[int] = Counter()

    def take(self, token: int) -> None:
        """Note that a token came."""
        self.output_ids.append(token)
        if self.has_history:
            self.counts[token] += 1

    def change(self, logits_V: Tensor, ahead: Sequence[int]) -> None:
        """Apply bias, penalties and mask in place, as if the tokens `ahead` had come too."""
        params, size = self.params, len(logits_V)
        if self.has_history:
            counts = self.counts + Counter(ahead) if ahead else self.counts
            if params.repetition_penalty != 1:
                seen = torch.tensor(sorted(self._prompt | counts.keys()))
                values, penalty = logits_V[seen], params.repetition_penalty
                logits_V[seen] = torch.where(values > 0, values / penalty, values * penalty)
            if counts and (params.presence_penalty or params.frequency_penalty):
                ids, times = torch.tensor(list(counts)), torch.tensor(list(counts.values()))
                logits_V[ids] -= params.presence_penalty + params.frequency_penalty * times
        if params.logit_bias:
            outside = next((token for token in params.logit_bias if token >= size), None)
            if outside is not None:
                raise RequestError(f"logit_bias has token {outside}; the vocabulary ends at {size - 1}")
            ids = torch.tensor(list(params.logit_bias))
            logits_V[ids] += torch.tensor(list(params.logit_bias.values()), dtype=logits_V.dtype)
        if params.allowed_tokens_fn is not None:
            allowed = params.allowed_tokens_fn([*self.output_ids, *ahead])
            if allowed is not None:
                logits_V.masked_fill_(~_as_mask(allowed, size), float("-inf"))


class Row(NamedTuple):
    """Whose turn a row of logits is, and the drafted tokens that stand before it."""

    sampler: Sampler
    ahead: tuple[int, ...] = ()


@torch.inference_mode()
def choose(logits_MV: Tensor, rows: Sequence[Row]) -> list[Choice | Glm5Error]:
    """The next token of each row; an error in place of one that has none."""
    logits = logits_MV.float().cpu()
    if all(row.sampler.is_plain for row in rows):
        tokens, heights = _likeliest(logits)
        if all(map(math.isfinite, heights)):
            return [Choice(token) for token in tokens]
    raw, failed = logits, {}
    if any(row.sampler.changes_logits for row in rows):
        logits = logits.clone()
        for number, row in enumerate(rows):
            if row.sampler.changes_logits:
                try:
                    row.sampler.change(logits[number], row.ahead)
                except Glm5Error as error:
                    failed[number] = error
                except Exception as error:  # the caller's function
                    name = type(error).__name__
                    failed[number] = RequestError(f"allowed_tokens_fn raised {name}: {error}")
    tokens, heights = _likeliest(logits)
    for number, height in enumerate(heights):
        if not math.isfinite(height) and number not in failed:
            failed[number] = _no_token(raw[number], height)
    drawn = [n for n, r in enumerate(rows) if r.sampler.params.temperature != 0 and n not in failed]
    groups: dict[tuple[int, float, float], list[int]] = {}
    for number in drawn:
        params = rows[number].sampler.params
        groups.setdefault((params.top_k, params.top_p, params.min_p), []).append(number)
    for (top_k, top_p, min_p), members in groups.items():
        heat = [max(rows[n].sampler.params.temperature, _LEAST_TEMPERATURE) for n in members]
        numbers = [
            uniform(r.sampler.seed, len(r.sampler.output_ids) + len(r.ahead))
            for r in (rows[n] for n in members)
        ]
        # Relative to the best, so that a tiny temperature drives the others to -inf, not all to NaN.
        tops = torch.tensor([heights[n] for n in members]).unsqueeze(1)
        scaled = (logits[members] - tops) / torch.tensor(heat).unsqueeze(1)
        if top_k or top_p < 1 or min_p:
            weights = probabilities(scaled, top_k=top_k, top_p=top_p, min_p=min_p).numpy()
        else:
            weights = np.exp(scaled.numpy())  # in proportion; the draw asks for no more
        found = draw(weights, numbers)
        for number, token in zip(members, found, strict=True):
            tokens[number] = token
    choices: list[Choice | Glm5Error] = []
    for number, row in enumerate(rows):
        if number in failed:
            choices.append(failed[number])
        elif row.sampler.params.logprobs is None:
            choices.append(Choice(tokens[number]))
        else:
            choices.append(_with_logprobs(raw[number], tokens[number], row.sampler.params.logprobs))
    return choices


def _likeliest(logits_MV: Tensor) -> tuple[list[int], list[float]]:
    """Each row's lowest id of the largest logit, and that logit; a NaN, where there is one.

    numpy looks at a vocabulary ten times as fast as torch.
    """
    values = logits_MV.numpy()
    best = values.argmax(axis=-1)
    return best.tolist(), values[range(len(best)), best].tolist()


def likeliest(logits_V: Tensor) -> int:
    """The lowest id of the largest logit.

    Raises:
        RequestError: a logit is NaN or the largest infinite, so that no answer would mean anything.
    """
    token = int(logits_V.argmax())
    height = float(logits_V[token])
    if not math.isfinite(height):
        raise _no_token(logits_V, height)
    return token


def probabilities(scaled_MV: Tensor, *, top_k: int, top_p: float, min_p: float) -> Tensor:
    """What top-k, then top-p, then min-p leave (the order of `transformers`), in proportion, fp32 [M, V]."""
    size = scaled_MV.shape[-1]
    if 0 < top_k < size:
        least = scaled_MV.topk(top_k, dim=-1).values[:, -1:]
        scaled_MV = scaled_MV.masked_fill(scaled_MV < least, float("-inf"))
    found = scaled_MV.softmax(dim=-1)
    if top_p < 1:
        found = _nucleus(found, top_p)
    if min_p > 0:
        found = found.masked_fill(found < min_p * found.amax(dim=-1, keepdim=True), 0.0)
    return found


def _nucleus(probabilities_MV: Tensor, top_p: float) -> Tensor:
    """The fewest likeliest tokens that hold `top_p` together; of equal ones the lowest ids."""
    size = probabilities_MV.shape[-1]
    ordered = probabilities_MV.topk(min(_NUCLEUS, size), dim=-1).values
    sums = ordered.double().cumsum(dim=-1)
    # Of the sum as it is: fp32 probabilities add up to almost one.
    wanted = top_p * probabilities_MV.double().sum(dim=-1, keepdim=True)
    if bool((sums[:, -1:] < wanted).any()) and ordered.shape[-1] < size:
        ordered = probabilities_MV.sort(dim=-1, descending=True).values
        sums = ordered.double().cumsum(dim=-1)
    needed = (sums < wanted).sum(dim=-1, keepdim=True).clamp(max=ordered.shape[-1] - 1)  # of them, less one
    least = ordered.gather(1, needed)
    above = probabilities_MV > least
    level = probabilities_MV == least
    room = needed + 1 - above.sum(dim=-1, keepdim=True)
    kept = above | (level & (level.cumsum(dim=-1) <= room))
    return probabilities_MV.masked_fill(~kept, 0.0)


def draw(weights_MV: np.ndarray, numbers: Sequence[float]) -> list[int]:
    """The token at which the sum of a row passes its number from [0, 1), as a share of the whole sum."""
    sums = weights_MV.cumsum(axis=-1, dtype=np.float64)
    found = []
    for row, number in zip(sums, numbers, strict=True):
        token = int(row.searchsorted(number * row[-1], side="right"))
        # A number so near to 1 that the product is the whole sum means the last token that has any.
        found.append(token if token < len(row) else int(row.searchsorted(row[-1], side="left")))
    return found


def uniform(seed: int, number: int) -> float:
    """A number from [0, 1) for draw `number` of a request: 53 bits of splitmix64 (Steele et al., 2014)."""
    return (_mixed(_mixed(seed) + number) >> 11) * 2.0**-53


def _mixed(word: int) -> int:
    word = (word + 0x9E3779B97F4A7C15) & _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def _as_mask(allowed: Tensor | Sequence[int], size: int) -> Tensor:
    given = allowed if isinstance(allowed, Tensor) else torch.tensor(list(allowed), dtype=torch.int64)
    if given.dtype == torch.bool:
        if tuple(given.shape) != (size,):
            raise RequestError(
                f"allowed_tokens_fn gave a mask {list(given.shape)}; the vocabulary has {size}"
            )
        return given.cpu()
    if given.numel() and not 0 <= int(given.min()) <= int(given.max()) < size:
        raise RequestError(f"allowed_tokens_fn gave a token outside of the vocabulary of {size}")
    mask = torch.zeros(size, dtype=torch.bool)
    mask[given.cpu().long()] = True
    return mask


def _no_token(raw_V: Tensor, height: float) -> RequestError:
    if height == float("-inf") and bool(raw_V.isfinite().any()):
        return RequestError("allowed_tokens_fn leaves no token that could come next")
    return RequestError(
        "the logits are not finite: the checkpoint is damaged, or float16 too narrow for it; use bfloat16"
    )


def _with_logprobs(raw_V: Tensor, token: int, count: int) -> Choice:
    logs = raw_V.log_softmax(dim=-1)
    best = logs.topk(min(count, len(logs)))
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Choice(token, float(logs[token]), top)
