"""Greedy decoding with the model's own MTP layer as draft: the same tokens in fewer passes.

A draft of `num_draft_tokens` is checked by one pass of the model over all of them. Products over
several rows round differently from products over one, so where the two best logits of a checked
position lie within that noise, the position is decided by a one-token pass, as plain decoding
would do it. In fp32 that gives plain decoding's tokens; in 16 bits rounding can also change which
experts run, which no margin of the logits covers, so that now and then the texts part.
`index_share_for_mtp_iteration` is not followed: every draft step selects its tokens anew, which
takes time and changes no result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from glm5.errors import RequestError
from glm5.model.transformer import GlmForCausalLM, token_positions
from glm5.runtime.cache import Cache
from glm5.runtime.decoding import PREFILL_CHUNK, Row, check_positive
from glm5.runtime.sampling import likeliest

# Two logits closer than this share of their size may change places by rounding.
_NOISE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass
class SpeculationStats:
    """passes: forward passes of the model after the prompt; tokens: tokens they produced."""

    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    tokens: int = 0

    @property
    def tokens_per_pass(self) -> float:
        return self.tokens / self.passes if self.passes else 0.0


class Draft:
    """The MTP layer with a cache of its own, which trails the model's by one token.

    Its token i joins the hidden state of token i and the embedding of token i + 1.
    """

    def __init__(self, model: GlmForCausalLM, capacity: int) -> None:
        self.model = model
        self.layer = model.mtp_layers()[0]
        layer = model.config.num_hidden_layers
        self.cache = Cache(
            model.config, 1, capacity, dtype=model.dtype, device=model.device, layers=range(layer, layer + 1)
        )

    def read(self, hidden_1TD: Tensor, following_1T: Tensor) -> Tensor:
        """Add known tokens; returns the hidden state [1, 1, D] that predicts the next draft."""
        step = self.model.step(token_positions(following_1T, cache=self.cache), self.cache)
        out = self.layer(hidden_1TD, self.model.model.embed_tokens(following_1T), step)
        self.cache.advance(following_1T.shape[1])
        return out[:, -1:]

    def propose(self, hidden_11D: Tensor, count: int) -> list[int]:
        """Draft `count` tokens; the guesses are forgotten by the cache afterwards."""
        known, tokens = self.cache.length, []
        for step in range(count):
            token = self.model.lm_head(hidden_11D)[0, -1].argmax()
            tokens.append(int(token))
            if step + 1 < count:
                hidden_11D = self.read(hidden_11D, token.view(1, 1))
        self.cache.truncate(known)
        return tokens


def speculation_obstacle(model: GlmForCausalLM, row: Row) -> str | None:
    """Why this row cannot be decoded speculatively; None when it can."""
    if not model.mtp:
        return "the checkpoint has no MTP layer; decode without speculation"
    if row.params.temperature != 0 or row.params.repetition_penalty != 1:
        return "speculation is for greedy decoding; set temperature 0 and repetition_penalty 1"
    if model.config.attention_mask_type == "prefix":
        return "speculation does not know prefix attention; decode without it"
    return None


def decode_speculatively(
    model: GlmForCausalLM,
    row: Row,
    *,
    num_draft_tokens: int = 1,
    prefill_chunk: int = PREFILL_CHUNK,
    stats: SpeculationStats | None = None,
) -> Iterator[list[Row]]:
    """`decode` for one greedy row; several tokens may come between two yields.

    Raises:
        RequestError: at once; the model has no MTP layer, the row is not greedy, or a number is
            not positive.
    """
    check_positive("num_draft_tokens", num_draft_tokens)
    check_positive("prefill_chunk", prefill_chunk)
    obstacle = speculation_obstacle(model, row)
    if obstacle is not None:
        raise RequestError(obstacle)
    stats = stats if stats is not None else SpeculationStats()
    return _decode_speculatively(model, row, num_draft_tokens, prefill_chunk, stats)


@torch.inference_mode()
def _decode_speculatively(
    model: GlmForCausalLM, row: Row, num_draft_tokens: int, prefill_chunk: int, stats: SpeculationStats
) -> Iterator[list[Row]]:
    if row.finish_reason is not None:
        return
    capacity = len(row.prompt_ids) + row.params.max_new_tokens + num_draft_tokens + 1
    cache = Cache(model.config, 1, capacity, dtype=model.dtype, device=model.device)
    draft = Draft(model, capacity)

    hidden, logits = _read_prompt(model, row.prompt_ids, cache, draft, prefill_chunk)
    row.take(likeliest(logits))
    yield [row]
    while row.finish_reason is None:
        last = row.output_ids[-1]
        draft_hidden = draft.read(hidden, _ids([*row.output_ids[-hidden.shape[1] :]], model))
        room = row.params.max_new_tokens - len(row.output_ids) - 1
        guesses = draft.propose(draft_hidden, min(num_draft_tokens, room)) if room > 0 else []
        known = cache.length
        out = model(_ids([last, *guesses], model), cache=cache)
        stats.passes += 1
        stats.drafted += len(guesses)
        if guesses and _is_close(out.logits[0, 0]):
            cache.truncate(known)
            out, guesses = model(_ids([last], model), cache=cache), []
            stats.passes += 1
        accepted = 0
        for place in range(len(guesses) + 1):
            logits = out.logits[0, place]
            if place > 0 and _is_close(logits):
                break  # this token is left to a pass of its own
            token = likeliest(logits)
            row.take(token)
            stats.tokens += 1
            accepted += 1
            if row.finish_reason is not None or place == len(guesses) or token != guesses[place]:
                break
        stats.accepted += accepted - 1
        hidden = out.hidden[:, :accepted]
        cache.truncate(known + accepted)
        yield [row]


def _read_prompt(
    model: GlmForCausalLM, prompt: list[int], cache: Cache, draft: Draft, prefill_chunk: int
) -> tuple[Tensor, Tensor]:
    """Fill both caches; returns the last hidden state [1, 1, D] and its logits [vocab]."""
    hidden = None
    for start in range(0, len(prompt), prefill_chunk):
        chunk = prompt[start : start + prefill_chunk]
        out = model(_ids(chunk, model), cache=cache, logits_to_keep=1)
        before = out.hidden if hidden is None else torch.cat((hidden, out.hidden), dim=1)
        if before.shape[1] > 1:
            following = chunk if hidden is not None else chunk[1:]
            draft.read(before[:, :-1], _ids(following, model))
        hidden = out.hidden[:, -1:]
    assert hidden is not None
    return hidden, out.logits[0, -1]


def _is_close(logits_V: Tensor) -> bool:
    first, second = logits_V.topk(2).values.float().tolist()
    return first - second <= _NOISE.get(logits_V.dtype, 1e-1) * max(1.0, abs(first))


def _ids(tokens: list[int], model: GlmForCausalLM) -> Tensor:
    return torch.tensor([tokens], device=model.device)
