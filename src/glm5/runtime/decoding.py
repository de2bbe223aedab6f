"""Prefill and decode of a batch of prompts with different lengths.

Rows are padded on the left and masked, so that each gives what it would give alone. The prompt is
read in chunks; under prefix attention in one piece, since every prefix token sees them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from glm5.errors import RequestError
from glm5.model.transformer import GlmForCausalLM
from glm5.runtime.cache import Cache
from glm5.runtime.sampling import Sampler, SamplingParams

PREFILL_CHUNK = 2048


@dataclass
class Row:
    """One request: its prompt, what it has produced, and why it ended (`stop` or `length`)."""

    prompt_ids: list[int]
    params: SamplingParams
    eos_ids: frozenset[int]
    output_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.params, self.prompt_ids)
        if self.params.max_new_tokens == 0:
            self.finish_reason = "length"

    def take(self, token: int) -> None:
        """Add a token and see whether it ends the row."""
        self.output_ids.append(token)
        if token in self.eos_ids:
            self.finish_reason = "stop"
        elif len(self.output_ids) >= self.params.max_new_tokens:
            self.finish_reason = "length"

    def stop(self) -> None:
        """End the row from outside (a stop string, a client that left)."""
        self.finish_reason = self.finish_reason or "stop"


def make_rows(
    model: GlmForCausalLM, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
) -> list[Row]:
    """Check prompts against the model and pair them with their parameters.

    Raises RequestError naming the row: an empty prompt, an id out of range, too long a request.
    """
    rows = []
    for number, (prompt, wanted) in enumerate(zip(prompts, params, strict=True)):
        ids = [int(token) for token in prompt]
        where = f"prompt {number}" if len(prompts) > 1 else "the prompt"
        if not ids:
            raise RequestError(f"{where} is empty; give at least one token")
        wrong = next((token for token in ids if not 0 <= token < model.config.vocab_size), None)
        if wrong is not None:
            raise RequestError(
                f"{where} has token id {wrong}; the vocabulary ends at {model.config.vocab_size - 1}"
            )
        limit = model.config.max_position_embeddings
        if len(ids) + min(wanted.max_new_tokens, 1) > limit:
            raise RequestError(
                f"{where} has {len(ids)} tokens; the model holds at most {limit}, new ones included"
            )
        if len(ids) + wanted.max_new_tokens > limit:
            wanted = wanted.with_changes(max_new_tokens=limit - len(ids))
        eos = frozenset() if wanted.ignore_eos else frozenset(model.config.eos_token_ids)
        rows.append(Row(ids, wanted, eos | frozenset(wanted.stop_token_ids)))
    return rows


def decode(
    model: GlmForCausalLM, rows: list[Row], *, prefill_chunk: int = PREFILL_CHUNK
) -> Iterator[list[Row]]:
    """Generate until every row has a finish reason; yields `rows` after each step.

    A row may be ended from outside between two steps with `Row.stop`.

    Raises:
        RequestError: at once, when `prefill_chunk` is not a positive integer.
    """
    check_positive("prefill_chunk", prefill_chunk)
    return _decode(model, rows, prefill_chunk)


def check_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RequestError(f"{name} is {value!r}; it must be an integer from 1")


@torch.inference_mode()
def _decode(model: GlmForCausalLM, rows: list[Row], prefill_chunk: int) -> Iterator[list[Row]]:
    active = [row for row in rows if row.finish_reason is None]
    if not active:
        return
    capacity = max(len(row.prompt_ids) for row in active) + max(row.params.max_new_tokens for row in active)
    cache = Cache(model.config, len(active), capacity, dtype=model.dtype, device=model.device)
    logits = prefill(model, [row.prompt_ids for row in active], cache, prefill_chunk=prefill_chunk)
    while True:
        for place, row in enumerate(active):
            if row.finish_reason is None:
                row.take(row.sampler(logits[place]))
        yield rows
        if all(row.finish_reason is not None for row in active):
            return
        # Ended rows go on with their last token; nobody reads what they say.
        tokens = torch.tensor([[row.output_ids[-1]] for row in active], device=model.device)
        logits = model(tokens, cache=cache, logits_to_keep=1).logits[:, -1]


def prefill(
    model: GlmForCausalLM,
    prompts: Sequence[Sequence[int]],
    cache: Cache,
    *,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Tensor:
    """Read prompts into an empty cache; returns the logits after their last tokens, [B, vocab]."""
    ids, mask = pad_left(prompts, 0)  # masked: any id of the vocabulary will do
    ids, mask = ids.to(model.device), None if mask is None else mask.to(model.device)
    prefix = prefix_lengths(model, prompts)
    length = ids.shape[1]
    step = length if prefix is not None else prefill_chunk
    logits = None
    for start in range(0, length, step):
        chunk = slice(start, min(length, start + step))
        logits = model(
            ids[:, chunk],
            # A chunk's own part of the mask: which tokens came before is in the cache.
            attention_mask=None if mask is None else mask[:, chunk],
            prefix_lengths=prefix,
            cache=cache,
            logits_to_keep=1,
        ).logits
    assert logits is not None
    return logits[:, -1]


def prefix_lengths(model: GlmForCausalLM, prompts: Sequence[Sequence[int]]) -> Tensor | None:
    """Under prefix attention the whole prompt is the prefix."""
    if model.config.attention_mask_type != "prefix":
        return None
    return torch.tensor([len(prompt) for prompt in prompts], device=model.device)


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor | None]:
    """ids int64 [B, T] and mask bool [B, T]; the mask is None where nothing is padded."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    if all(len(prompt) == longest for prompt in prompts):
        return ids, None
    mask = torch.tensor([[False] * (longest - len(prompt)) + [True] * len(prompt) for prompt in prompts])
    return ids, mask
