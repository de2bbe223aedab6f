"""Guesses of the next tokens, checked exactly by the step that would have run anyway.

Two kinds guess: the model's own MTP layer (DeepSeek-V3 report, 2.2), and a look-up of what followed the same
three tokens before. The native kernels give a row the same bits in any step, and a draw depends on the
request's seed and the number of its token alone. So a guess is right exactly when the sampler would have
drawn that token; the text is the same as without guesses, greedy or drawn.

How many guesses are checked is decided by what was measured: the times of steps with so many rows, the time
of a guess, and how often guesses were right. Where they do not pay, none are made; now and then one step
tries again. `index_share_for_mtp_iteration` is not followed: every guess selects its tokens anew, which takes
time and changes no result.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from glm5.errors import Glm5Error
from glm5.kernels import cpu
from glm5.layers.draft import draft_calls
from glm5.model.rotary import Rotation
from glm5.model.step import Step
from glm5.model.transformer import GlmForCausalLM
from glm5.runtime.cache import Coming, PagePool
from glm5.runtime.cache import Sequence as Timeline
from glm5.runtime.request import Request
from glm5.runtime.sampling import Row, choose

MOST_GUESSES = 4
_WINDOW = 256  # the MTP layer reads so many of the tokens before an answer
_GRAM = 3
_LONG, _REPEATING = 8, 0.9  # so many tokens that came before in this order mostly go on as they did
_MARGIN = 1.02  # guesses must promise that much more
_PROBE_FIRST, _PROBE_MOST = 32, 512  # steps between two tries of what does not pay
_FEW = 8  # tokens that are read by prepared calls
_KEPT_POSITIONS = 4096
_WARM = 64  # steps that the MTP layer hears before a try
_LOOK = 8  # steps between two looks at whether guesses would pay now
_PRIOR = {"mtp": 0.6, "lookup": 0.5}
_COST_OF_A_ROW = 0.25  # of a step, until it is measured


@dataclass
class Rate:
    """How often guesses of one kind are right: a mean over the last few dozens."""

    value: float
    weight: float = 4.0

    def note(self, right: int, wrong: int) -> None:
        for outcome, times in ((1.0, right), (0.0, wrong)):
            for _ in range(times):
                self.weight = min(self.weight + 1, 32.0)
                self.value += (outcome - self.value) / self.weight


class Costs:
    """The least of the last few measured times, by what was done: a busy machine only adds to them."""

    def __init__(self) -> None:
        self._times: dict[tuple[str, int, int], deque[float]] = {}

    def note(self, what: str, sequences: int, rows: int, seconds: float) -> None:
        self._times.setdefault((what, sequences, rows), deque(maxlen=7)).append(seconds)

    def known(self, what: str, sequences: int, rows: int) -> float | None:
        found = self._times.get((what, sequences, rows))
        return min(found) if found else None

    def step(self, sequences: int, guesses: int) -> float:
        """Of a step in which each of so many sequences has so many guesses; 1.0 = unknown altogether."""
        base = self.known("step", sequences, 0) or 1.0
        return self.known("step", sequences, guesses) or base * (1 + _COST_OF_A_ROW * guesses)

    def guess(self, sequences: int) -> float:
        """Of one guess by the MTP layer for each."""
        return self.known("guess", sequences, 1) or self.step(sequences, 0) * _COST_OF_A_ROW


@dataclass
class Draft:
    """What guessing for one request needs: the MTP layer's own timeline, and what it has not read yet."""

    timeline: Timeline | None
    rates: dict[str, Rate]
    hidden: list[Tensor] = field(default_factory=list)  # [n, D] each, behind what the timeline holds
    first: int = 0  # the place of the first of them
    waiting: int = 0  # how many they are
    grams: dict[tuple[int, ...], int] = field(default_factory=dict)
    indexed: int = 0
    kind: str = "mtp"  # of the guesses being checked


class Speculator:
    """Makes the guesses of an engine's requests."""

    def __init__(self, model: GlmForCausalLM, pool: PagePool | None) -> None:
        self.model, self.pool = model, pool
        self.costs = Costs()
        self._quiet = 0  # steps since guesses were last checked
        self._patience = _PROBE_FIRST
        self._idle = False  # guesses did not pay when that was last asked
        self._probing = False
        self._turns: Tensor | None = None
        self.rates = {kind: Rate(prior) for kind, prior in _PRIOR.items()}

    def begin(self, request: Request) -> None:
        """The request starts to be read."""
        timeline = Timeline(self.pool) if self.pool is not None else None
        rates = {kind: Rate(rate.value) for kind, rate in self.rates.items()}
        request.draft = Draft(timeline, rates)

    def end(self, request: Request) -> None:
        if request.draft is not None and request.draft.timeline is not None:
            request.draft.timeline.release()
        request.draft, request.guesses = None, []

    def hear(self, request: Request, first: int, hidden_ND: Tensor) -> None:
        """The model read tokens from place `first` on; what follows each is known by now."""
        draft: Draft = request.draft
        if draft.timeline is None or request.num_draft_tokens == 0:
            return
        if self._idle and request.num_draft_tokens is None and self._patience - self._quiet > _WARM:
            if draft.waiting or draft.timeline.length:  # the next try is far: it will begin anew
                draft.timeline.release()
                draft.hidden, draft.waiting = [], 0
            return
        skipped = max(0, len(request.prompt_ids) - _WINDOW - first)  # of a long prompt the end will do
        if skipped >= len(hidden_ND):
            return
        if len(hidden_ND) > 1:
            first, hidden_ND = first + skipped, hidden_ND[skipped:].clone()  # not a view of the whole step
        if not draft.hidden:
            draft.first = first
        draft.hidden.append(hidden_ND)
        draft.waiting += len(hidden_ND)
        if draft.waiting > 2 * _WINDOW:  # nobody guessed for long: begin anew with the last ones
            draft.timeline.release()
            draft.first += draft.waiting - _WINDOW
            draft.hidden, draft.waiting = [torch.cat(draft.hidden)[-_WINDOW:]], _WINDOW

    def rests(self) -> bool:
        """Guesses do not pay, as was seen a few steps ago: nothing is to be done in this step."""
        self._quiet += 1
        return self._idle and self._quiet % _LOOK > 0 and self._quiet < self._patience

    def note(self, request: Request, accepted: int) -> None:
        """So many of the request's guesses were right."""
        draft: Draft = request.draft
        checked = len(request.guesses)
        wrong = int(accepted < checked)
        draft.rates[draft.kind].note(accepted, wrong)
        self.rates[draft.kind].note(accepted, wrong)
        if self._probing:
            self._patience = min(2 * self._patience, _PROBE_MOST)

    def guess(self, requests: Sequence[Request]) -> None:
        """Set the guesses of each request for the next step."""
        count = len(requests)
        by_mtp: list[tuple[Request, int]] = []
        for request in requests:
            request.guesses = []
            room = request.params.max_new_tokens - len(request.output_ids) - 1
            limit = min(MOST_GUESSES if request.num_draft_tokens is None else request.num_draft_tokens, room)
            if limit < 1:
                continue
            kind, wanted = self._decide(request, count, limit)
            if wanted == 0:
                continue
            request.draft.kind = kind
            if kind == "lookup":
                request.guesses = self._look_up(request, wanted)
            else:
                by_mtp.append((request, wanted))
        if by_mtp:
            self._guess_by_mtp(by_mtp)

    def _decide(self, request: Request, sequences: int, limit: int) -> tuple[str, int]:
        """(kind, how many guesses): what promises most tokens a second."""
        draft: Draft = request.draft
        if request.num_draft_tokens is not None and draft.timeline is not None:
            return "mtp", limit
        found = len(self._look_up(request, limit))
        if request.num_draft_tokens is not None:
            return "lookup", found
        base, best = self.costs.step(sequences, 0), ("mtp", 0)
        most = _MARGIN / base
        for kind, longest, each in (("mtp", limit, self.costs.guess(sequences)), ("lookup", found, 0.0)):
            if kind == "mtp" and draft.timeline is None:
                continue
            rate, tokens = draft.rates[kind].value, 1.0
            if kind == "lookup" and self._repeats(request):
                rate = max(rate, _REPEATING)
            for guesses in range(1, longest + 1):
                tokens += rate**guesses
                speed = tokens / (self.costs.step(sequences, guesses) + guesses * each)
                if speed > most:
                    most, best = speed, (kind, guesses)
        self._idle, self._probing = not best[1], False
        if best[1]:
            if best[0] == "mtp":
                self._quiet, self._patience = 0, _PROBE_FIRST
            # Steps without guesses are what the others are measured by.
            stale = self.costs.known("step", sequences, 0) is None or len(request.output_ids) % 64 == 63
            return ("mtp", 0) if stale else best
        if self._quiet >= self._patience:
            self._quiet, self._probing = 0, True
            return "mtp", 1 if draft.timeline is not None else 0
        return best

    def _look_up(self, request: Request, count: int) -> list[int]:
        """What followed the last three tokens when they last came."""
        draft, tokens = request.draft, request.tokens
        for end in range(max(draft.indexed, _GRAM), len(tokens)):
            draft.grams[tuple(tokens[end - _GRAM : end])] = end
        draft.indexed = max(draft.indexed, len(tokens))
        at = draft.grams.get(tuple(tokens[-_GRAM:])) if len(tokens) > _GRAM else None
        return [] if at is None else tokens[at : at + count]

    def _repeats(self, request: Request) -> bool:
        """Is not only the last look-up's three tokens, but a longer stretch, the same as before?"""
        tokens = request.tokens
        at = request.draft.grams.get(tuple(tokens[-_GRAM:]), 0)
        return at >= _LONG and tokens[at - _LONG : at] == tokens[-_LONG:]

    def _guess_by_mtp(self, wanted: list[tuple[Request, int]]) -> None:
        """All requests together, one guess after the other; the timelines forget the guesses again."""
        assert self.pool is not None
        started = time.perf_counter()
        fitting, free = [], self.pool.free_pages
        for request, count in wanted:
            timeline = request.draft.timeline
            missing = timeline.pages_missing(timeline.length + request.draft.waiting + count)
            if request.draft.waiting and missing <= free:
                fitting.append((request, count))
                free -= missing
        if not fitting:
            return
        if len(fitting) == 1 and (calls := self._calls(fitting[0][0])) is not None:
            self._guess_alone(calls, *fitting[0])
            return
        requests = [request for request, _ in fitting]
        drafts: list[Draft] = [request.draft for request in requests]
        hidden = torch.cat([h for draft in drafts for h in draft.hidden])
        counts = [draft.waiting for draft in drafts]
        following = [
            token
            for request, draft in zip(requests, drafts, strict=True)
            for token in request.tokens[draft.first + 1 : draft.first + 1 + draft.waiting]
        ]
        known = [draft.timeline.length + n for draft, n in zip(drafts, counts, strict=True) if draft.timeline]
        for draft in drafts:
            draft.hidden, draft.waiting = [], 0
        out = self._read(drafts, counts, following, hidden)
        out = out[torch.tensor(counts).cumsum(0) - 1]
        wanted_of = {id(request): count for request, count in fitting}
        for _ in range(max(wanted_of.values())):
            rows = [Row(request.sampler, tuple(request.guesses)) for request in requests]
            chosen = choose(self.model.lm_head(out.unsqueeze(0))[0], rows)
            going = []
            for place, (request, choice) in enumerate(zip(requests, chosen, strict=True)):
                if isinstance(choice, Glm5Error):
                    continue  # the checked step will say so
                request.guesses.append(choice.token)
                if len(request.guesses) < wanted_of[id(request)]:
                    going.append(place)
            if not going:
                break
            requests = [requests[place] for place in going]
            drafts = [request.draft for request in requests]
            out = self._read(drafts, [1] * len(going), [r.guesses[-1] for r in requests], out[going])
        for (request, _), length in zip(fitting, known, strict=True):
            request.draft.timeline.truncate(length)
        most = max(len(request.guesses) for request, _ in fitting)
        if len(following) <= (MOST_GUESSES + 1) * len(fitting) and most:
            self.costs.note("guess", len(fitting), 1, (time.perf_counter() - started) / most)

    def _calls(self, request: Request) -> cpu.DraftCalls | None:
        """The prepared way, for few tokens of one request."""
        return draft_calls(self.model, _FEW) if request.draft.waiting <= _FEW else None

    def _guess_alone(self, calls: cpu.DraftCalls, request: Request, count: int) -> None:
        """The same for one request, whose time is mostly that of the calls themselves."""
        assert self.pool is not None
        draft: Draft = request.draft
        timeline = draft.timeline
        assert timeline is not None
        started, begin = time.perf_counter(), draft.first + 1
        hidden = draft.hidden[0] if len(draft.hidden) == 1 else torch.cat(draft.hidden)
        ids = request.tokens[begin : begin + draft.waiting]
        known = timeline.length + draft.waiting
        draft.hidden, draft.waiting = [], 0
        layer = self.model.mtp_layers()[0].layer
        coming: Coming | None = None
        for _ in range(count):
            if coming is None or not coming.again():
                coming = Coming(self.pool, [timeline], [len(ids)])
            step = Step(self._angles(coming.positions), cache=coming, shared=coming.shared)
            x, _ = layer(calls.read(ids, hidden), step, None)
            coming.advance()
            hidden, logits = calls.judge(x[0, -1:])
            if request.sampler.is_plain:
                token = int(logits.numpy().argmax())
            else:
                (choice,) = choose(logits, [Row(request.sampler, tuple(request.guesses))])
                if isinstance(choice, Glm5Error):
                    break  # the checked step will say so
                token = choice.token
            request.guesses.append(token)
            ids = [token]
        timeline.truncate(known)
        if request.guesses:
            self.costs.note("guess", 1, 1, (time.perf_counter() - started) / len(request.guesses))

    def _angles(self, positions_1N: Tensor) -> Rotation:
        """Rotations of the first positions are kept: they take longer to make than to use."""
        first, count = int(positions_1N[0, 0]), positions_1N.shape[1]
        if first + count > _KEPT_POSITIONS:
            return self.model.angles(positions_1N)
        if self._turns is None:
            self._turns = self.model.angles(torch.arange(_KEPT_POSITIONS).unsqueeze(0)).turns
        return Rotation(self._turns[:, first : first + count])

    def _read(
        self, drafts: list[Draft], counts: list[int], following: list[int], hidden_ND: Tensor
    ) -> Tensor:
        """Let the MTP layer read (hidden state, next token) pairs; its own hidden states [N, D]."""
        assert self.pool is not None
        timelines = [draft.timeline for draft in drafts if draft.timeline is not None]
        coming = Coming(self.pool, timelines, counts)
        ids = torch.tensor([following], device=self.pool.device)
        embedded = self.model.model.embed_tokens(ids)
        step = Step(self.model.angles(coming.positions), cache=coming)
        out = self.model.mtp_layers()[0](hidden_ND.unsqueeze(0), embedded, step)
        coming.advance()
        return out[0]
