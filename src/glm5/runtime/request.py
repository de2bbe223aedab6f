"""One request to the engine and what comes of it."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any

from glm5.config import ModelConfig
from glm5.errors import Glm5Error, RequestError
from glm5.runtime.cache import Sequence as Timeline
from glm5.runtime.sampling import Choice, Sampler
from glm5.runtime.sampling_params import SamplingParams


@dataclass
class Statistics:
    """Of one request. Times in seconds.

    cached_tokens: of the prompt, not read again since another request had read them. steps: of the model, in
    which this request wrote. drafted, accepted: guesses that were checked, and those that were right.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    preemptions: int = 0
    queued: float = 0.0
    time_to_first_token: float = 0.0
    decode_seconds: float = 0.0
    output_tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens behind the first."""
        return (self.output_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0

    @property
    def tokens_per_step(self) -> float:
        return self.output_tokens / self.steps if self.steps else 0.0


@dataclass(frozen=True)
class Result:
    """A finished answer: its ids without the prompt, and why it ended (`stop`, `length` or `cancelled`).

    text: None where only ids were asked for. choices: with `logprobs`, one for each id.
    """

    ids: list[int]
    finish_reason: str
    statistics: Statistics = field(compare=False)
    text: str | None = None
    choices: list[Choice] = field(default_factory=list)

    @property
    def prompt_tokens(self) -> int:
        return self.statistics.prompt_tokens


class Request:
    """A place in the engine. Made by `Engine.submit`; read `output_ids` and `finish_reason` as they grow.

    error: what ended it, where something failed.
    """

    def __init__(
        self,
        number: int,
        prompt_ids: list[int],
        params: SamplingParams,
        eos_ids: frozenset[int],
        *,
        priority: int = 0,
        salt: Hashable = None,
        prefix: int = 0,
        num_draft_tokens: int | None = None,
    ) -> None:
        self.number, self.priority, self.salt, self.prefix = number, priority, salt, prefix
        self.prompt_ids, self.params, self.eos_ids = prompt_ids, params, eos_ids
        self.num_draft_tokens = num_draft_tokens  # None = as many as pay, 0 = none
        self.tokens = list(prompt_ids)
        self.sampler = Sampler(params, prompt_ids)
        self.choices: list[Choice] = []
        self.finish_reason: str | None = None
        self.error: Glm5Error | None = None
        self.statistics = Statistics(prompt_tokens=len(prompt_ids))
        self.leader: Request | None = None  # whose prompt this one waits for
        self.timeline: Timeline | None = None
        self.keeps = False
        self.kept: Timeline | None = None  # for a session: the timeline at the end
        self.guesses: list[int] = []
        self.draft: Any = None  # the drafter's own memory
        self.cancelled = False
        self._born = time.monotonic()
        self._first = 0.0

    # ---------------------------------------------------------------- as the scheduler sees it

    @property
    def held(self) -> int:
        return 0 if self.timeline is None else self.timeline.length

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.held

    @property
    def is_decoding(self) -> bool:
        timeline = self.timeline  # asked of every request in every step
        return timeline is not None and len(self.tokens) - timeline.length == 1

    @property
    def drafts(self) -> int:
        return len(self.guesses)

    @property
    def whole(self) -> int:
        """Under prefix attention a prompt is read in one step."""
        return max(0, self.prefix - self.held) if self.prefix else 0

    @property
    def may_start(self) -> bool:
        return self.leader is None or self.leader.finished or len(self.leader.output_ids) > 0

    # ---------------------------------------------------------------- as it grows

    @property
    def output_ids(self) -> list[int]:
        return self.sampler.output_ids

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    def started(self) -> None:
        """It comes out of the queue."""
        if not self.output_ids:
            self.statistics.queued = time.monotonic() - self._born

    def take(self, choice: Choice, now: float) -> None:
        """Add a token and see whether it ends the request. now: `time.monotonic()` of the step."""
        statistics = self.statistics
        if not self.output_ids:
            self._first, statistics.time_to_first_token = now, now - self._born
        statistics.decode_seconds = now - self._first
        self.sampler.take(choice.token)
        self.tokens.append(choice.token)
        statistics.output_tokens += 1
        if self.params.logprobs is not None:
            self.choices.append(choice)
        if choice.token in self.eos_ids:
            self.finish_reason = "stop"
        elif len(self.output_ids) >= self.params.max_new_tokens:
            self.finish_reason = "length"

    def result(self, text: str | None = None) -> Result:
        """What came of it. Raises what ended it where something failed."""
        if self.error is not None:
            raise self.error
        if self.finish_reason is None:
            raise RequestError("the request has not finished; run the engine, or read its outputs to the end")
        return Result(list(self.output_ids), self.finish_reason, self.statistics, text, list(self.choices))


def checked(
    config: ModelConfig, prompt_ids: Sequence[int], params: SamplingParams, where: str = "the prompt"
) -> tuple[list[int], SamplingParams]:
    """The ids of a prompt that the model can read, and parameters that fit behind it.

    Raises RequestError with the numbers: an empty prompt, an id out of range, too long a request.
    """
    if not isinstance(params, SamplingParams):
        raise RequestError(f"params is {params!r}; it must be SamplingParams(...)")
    try:
        ids = [index(token) for token in prompt_ids] if not isinstance(prompt_ids, str | bytes) else None
    except TypeError:
        ids = None
    if ids is None:
        raise RequestError(f"{where} is {str(prompt_ids)[:60]!r}; it must be a list of token ids")
    if not ids:
        raise RequestError(f"{where} is empty; give at least one token")
    wrong = next((token for token in ids if not 0 <= token < config.vocab_size), None)
    if wrong is not None:
        raise RequestError(f"{where} has token id {wrong}; the vocabulary ends at {config.vocab_size - 1}")
    limit = config.max_position_embeddings
    if len(ids) + min(params.max_new_tokens, 1) > limit:
        raise RequestError(
            f"{where} has {len(ids)} tokens; the model holds at most {limit}, new ones included"
        )
    if len(ids) + params.max_new_tokens > limit:
        params = params.with_changes(max_new_tokens=limit - len(ids))
    outside = next((t for t in params.logit_bias if t >= config.vocab_size), None)
    if outside is not None:
        raise RequestError(f"logit_bias has token {outside}; the vocabulary ends at {config.vocab_size - 1}")
    return ids, params
