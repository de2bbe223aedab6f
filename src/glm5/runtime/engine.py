"""The engine: a model, a cache in pages, a scheduler. Everything that generates is a caller of it.

Each step reads any mix of prompt chunks and new tokens of different requests, without padding. Whoever waits
for a request drives the steps, so that several threads share one batch and nothing runs when nobody waits.
"""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import chain

import psutil
import torch

from glm5.errors import Glm5Error, RequestError
from glm5.layers.exact import rows_are_exact
from glm5.model.transformer import GlmForCausalLM
from glm5.planner.bytes import cache_bytes_per_token
from glm5.runtime.cache import PAGE_TOKENS, Coming, PagePool
from glm5.runtime.cache import Sequence as Timeline
from glm5.runtime.pages import PageMemory
from glm5.runtime.request import Request, checked
from glm5.runtime.sampling import Row, choose
from glm5.runtime.sampling_params import SamplingParams
from glm5.runtime.scheduler import Limits, Plan, Scheduler, Task
from glm5.runtime.speculation import Speculator
from glm5.runtime.store import PageStore

# Without being told, the cache takes a quarter of what is free, and no more than so many whole contexts.
_CONTEXTS, _SHARE = 4, 0.25
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


class Engine:
    """Runs requests on one model.

    cache_tokens: how many tokens of all requests together the cache holds; None = by the memory that is free.
    limits: of the scheduler. store: where whole pages are kept beyond the process (on the CPU). clock:
    seconds, for measuring steps.

    Raises:
        RequestError: a size is impossible.
    """

    def __init__(
        self,
        model: GlmForCausalLM,
        *,
        cache_tokens: int | None = None,
        limits: Limits | None = None,
        page_tokens: int = PAGE_TOKENS,
        store: PageStore | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model, self.config = model, model.config
        self.device, self.dtype = model.device, model.dtype
        if cache_tokens is None:
            cache_tokens = default_cache_tokens(model)
        elif type(cache_tokens) is not int or cache_tokens < 2:
            raise RequestError(f"cache_tokens is {cache_tokens!r}; it must be an integer from 2")
        if limits is not None and not isinstance(limits, Limits):
            raise RequestError(f"limits is {limits!r}; it must be Limits(...)")
        if page_tokens < 1 or page_tokens & (page_tokens - 1):
            raise RequestError(f"page_tokens is {page_tokens}; it must be a power of two")
        pages = -(-cache_tokens // page_tokens)
        options = {"dtype": self.dtype, "device": self.device, "page_tokens": page_tokens}
        if store is not None and self.device.type != "cpu":
            raise RequestError("a cache folder is for models on the CPU")
        # Not tensors of inference mode, whoever makes the first call: they are written outside of it too.
        with torch.inference_mode(False):
            try:
                self.memory = PageMemory(PagePool(self.config, pages, **options), store)  # type: ignore[arg-type]
                draft_pool = None
                if len(model.mtp) > 0 and self.config.attention_mask_type != "prefix":
                    first = self.config.num_hidden_layers
                    layers = range(first, first + 1)
                    draft_pool = PagePool(self.config, pages, layers=layers, **options)  # type: ignore[arg-type]
            except (OSError, OverflowError, MemoryError, RuntimeError) as error:
                raise RequestError(f"a cache of {cache_tokens:,} tokens cannot be had: {error}") from None
        self.scheduler = Scheduler(limits or Limits(), self)
        self.speculator = Speculator(model, draft_pool)
        self.speculates = rows_are_exact(model)
        self.steps = 0
        self._stepping = False
        self._generation = 0  # of the weights: what was read with others is not shared
        self._last: tuple[list[Timeline], Coming] | None = None
        self._clock = clock
        self._count = 0
        self.lock = threading.RLock()
        self._weights = weights_version(model)
        _engines.add(self)

    @property
    def pool(self) -> PagePool:
        return self.memory.pool

    @property
    def cache_tokens(self) -> int:
        """Tokens of all requests together that the cache holds."""
        return self.pool.num_pages * self.pool.page_tokens

    # ---------------------------------------------------------------- requests

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        owner: Hashable = None,
        num_draft_tokens: int | None = None,
        leader: Request | None = None,
        keeps: bool = False,
        waits: bool = False,
        where: str = "the prompt",
    ) -> Request:
        """Put a request in the queue; it runs while somebody waits for any.

        priority: larger ones come first. owner: prompts of different owners share no pages. num_draft_tokens:
        guesses a step; 0 = none, None = as many as pay, where they cannot change the text. leader: a request
        with the same prompt, whose reading this one waits for. keeps: what it read is held for the caller
        (`Request.kept`), who releases it. waits: run steps while the queue is full.

        Raises:
            RequestError: with the numbers, the prompt is empty, too long or out of the vocabulary.
            QueueFullError: too many wait.
        """
        _check_options(priority, owner, num_draft_tokens)
        ids, params = checked(self.config, prompt_ids, SamplingParams() if params is None else params, where)
        if len(ids) + min(params.max_new_tokens, 1) > self.cache_tokens:
            raise RequestError(
                f"{where} has {len(ids)} tokens; the cache holds {self.cache_tokens}, new ones included; "
                "give the engine more cache_tokens, or memory"
            )
        if len(ids) + params.max_new_tokens > self.cache_tokens:
            params = params.with_changes(max_new_tokens=self.cache_tokens - len(ids))
        if num_draft_tokens is None and not self.speculates:
            num_draft_tokens = 0
        eos = frozenset() if params.ignore_eos else frozenset(self.config.eos_token_ids)
        prefix = len(ids) if self.config.attention_mask_type == "prefix" else 0
        if prefix:  # what a token is depends on the whole prompt
            num_draft_tokens = 0
        with self.lock:
            self._forget_changed_weights()
            salt = (self._generation, owner, tuple(ids) if prefix else None)
            request = Request(
                self._count, ids, params, eos | frozenset(params.stop_token_ids), priority=priority,
                salt=salt, prefix=prefix, num_draft_tokens=num_draft_tokens,
            )  # fmt: skip
            request.leader, request.keeps = leader, keeps
            if params.max_new_tokens == 0:
                request.finish_reason = "length"
                return request
            while waits and self.scheduler.is_full and self.step():
                pass
            self.scheduler.submit(request)
            self._count += 1
        return request

    def submit_all(
        self, prompt_ids: Sequence[int], params: SamplingParams, count: int, **options: object
    ) -> list[Request]:
        """`count` answers to one prompt, which is read once; answer i draws with seed + i."""
        if type(count) is not int or count < 1:
            raise RequestError(f"the number of answers is {count!r}; it must be an integer from 1")
        found: list[Request] = []
        try:
            for number in range(count):
                seed = None if params.seed is None else (params.seed + number) % 2**63
                leader = found[0] if found else None
                found.append(
                    self.submit(prompt_ids, params.with_changes(seed=seed), leader=leader, **options)  # type: ignore[arg-type]
                )
        except BaseException:
            for request in found:
                self.cancel(request)
            raise
        return found

    def cancel(self, request: Request) -> None:
        """End a request wherever it is: now, or where a step runs, when that is done."""
        request.cancelled = True
        if self.lock.acquire(blocking=False):
            try:
                if not self._stepping:  # a callback, or the garbage collector, in the middle of a step
                    self._drop_cancelled()
            finally:
                self.lock.release()

    def outputs(self, request: Request) -> Iterator[list[int]]:
        """Run steps and yield the new ids of a request as they come, until it is finished.

        Closing the generator cancels the request. Raises what ended the request where something failed.
        """
        given = 0
        try:
            while True:
                new = request.output_ids[given:]
                given += len(new)
                if new:
                    yield new
                if request.finished and given == len(request.output_ids):
                    break
                self.advance(request, given)
        finally:
            if not request.finished:
                self.cancel(request)
        if request.error is not None:
            raise request.error

    def advance(self, request: Request, given: int) -> None:
        """Run steps until the request has more than `given` new ids, or is finished."""
        while len(request.output_ids) <= given and not request.finished:
            with self.lock:
                waits = len(request.output_ids) <= given and not request.finished
                if waits and not self.step() and not request.finished:
                    self._end_with(request, RequestError("the request is of another engine"))

    def run(self) -> None:
        """Run steps until nothing is left to do."""
        while self.step():
            pass

    # ---------------------------------------------------------------- a step

    def step(self) -> bool:
        """One pass of the model over what the scheduler chose; False when there is nothing to do."""
        with self.lock:
            if self._stepping:
                raise RequestError("a step cannot run inside of a step")
            self._stepping = True
            # What a step makes is gone at its end. To look through all that torch holds in its middle takes
            # 90 ms, as long as 300 tokens of a small model.
            collects = gc.isenabled()
            gc.disable()
            try:
                with torch.inference_mode():
                    return self._step()
            finally:
                self._stepping = False
                if collects:
                    gc.enable()

    def _step(self) -> bool:
        self._drop_cancelled()
        try:
            plan = self.scheduler.plan()
        except Exception:
            for task in [*self.scheduler.running, *self.scheduler.waiting]:
                self._end_with(task, RequestError("the engine failed while it chose what to run"))
            raise
        if not plan.work:
            return self._unblock()
        try:
            self._run(plan)
        except Exception as error:
            self._fail(plan, error)
        except BaseException:  # Ctrl-C in the middle: what was not finished is done again
            self._put_back(plan)
            raise
        finally:
            self._drop_cancelled()
        self.steps += 1
        return True

    def _unblock(self) -> bool:
        """Nothing can run: where something waits, sessions hold the memory that it needs."""
        waiting = [*self.scheduler.running, *(t for t in self.scheduler.waiting if t.may_start)]
        if not waiting:
            return False
        self._end_with(
            waiting[0],
            RequestError(
                f"the cache of {self.cache_tokens:,} tokens has no room for the request; close sessions, or "
                "give the engine more cache_tokens"
            ),
        )
        return True

    def _put_back(self, plan: Plan) -> None:
        """Requests of a step that was broken off can go on: a token that was not taken is read again."""
        self._last = None
        for task, _, _ in plan.work:
            request: Request = task  # type: ignore[assignment]
            request.guesses = []
            if request.finished:
                self._end(request)
            elif request.timeline is None:
                self._end_with(request, RequestError("the request was broken off"))
            else:
                request.timeline.length = min(request.timeline.length, len(request.tokens) - 1)
                self.speculator.end(request)
                self.speculator.begin(request)

    def _run(self, plan: Plan) -> None:
        started = self._clock()
        work: list[tuple[Request, int, int]] = plan.work  # type: ignore[assignment]
        ids: list[int] = []
        counts, lines, last, gives = [], [], [], []
        for request, count, drafts in work:
            request.guesses = request.guesses[:drafts]
            held = request.held
            ids += request.tokens[held : held + count] + request.guesses
            counts.append(count + drafts)
            gives.append(held + count == len(request.tokens))
            if gives[-1]:
                last += [len(ids) - 1 - back for back in range(drafts, -1, -1)]
                lines += [Row(request.sampler, tuple(request.guesses[:n])) for n in range(drafts + 1)]
        timelines = [request.timeline for request, _, _ in work if request.timeline is not None]
        prefixes = [request.prefix for request, _, _ in work]
        coming = self._coming(timelines, counts, prefixes if any(prefixes) else None)
        hidden = self.model.extend(torch.tensor(ids, device=self.device), coming)
        choices = []
        if lines:
            rows = hidden if len(last) == len(hidden) else hidden[torch.tensor(last, device=self.device)]
            choices = choose(self.model.lm_head(rows.unsqueeze(0))[0], lines)
        begin, at, now = 0, 0, time.monotonic()
        for (request, count, drafts), size, wants in zip(work, counts, gives, strict=True):
            first, known = request.held - size, request.held - drafts
            accepted = 0
            if wants:
                accepted = self._take(request, choices[at : at + drafts + 1], now)
                at += drafts + 1
                request.statistics.steps += 1
                request.timeline.length = known + accepted  # type: ignore[union-attr]
            if not request.finished:
                count += accepted
                self.speculator.hear(
                    request, first, hidden if count == len(hidden) else hidden[begin : begin + count]
                )
            begin += size
        self._settle(work)
        if all(count == 1 for _, count, _ in work) and len({d for _, _, d in work}) == 1:
            self.speculator.costs.note("step", len(work), work[0][2], self._clock() - started)
        guessing = [r for r, _, _ in work if r.is_decoding and not r.finished and r.num_draft_tokens != 0]
        asked = any(r.num_draft_tokens for r in guessing)
        if guessing and (asked or not self.speculator.rests()):
            self.speculator.guess(guessing)

    def _coming(self, timelines: list[Timeline], counts: list[int], prefixes: list[int] | None) -> Coming:
        """The step's places; those of the step before moved on by one, where that is all that changes."""
        last = self._last
        single = prefixes is None and max(counts) == 1
        if last is not None and single and last[0] == timelines and last[1].again():
            return last[1]
        coming = Coming(self.pool, timelines, counts, prefix_lengths=prefixes)
        self._last = (timelines, coming) if single else None
        return coming

    def _take(self, request: Request, choices: Sequence[object], now: float) -> int:
        """Accept tokens up to the first guess that was wrong; returns how many guesses were right."""
        accepted = 0
        for place, choice in enumerate(choices):
            if isinstance(choice, Glm5Error):
                request.error = choice
                break
            request.take(choice, now)  # type: ignore[arg-type]
            guesses = request.guesses
            if request.finished or place == len(guesses) or request.output_ids[-1] != guesses[place]:
                break
            accepted += 1
        if request.guesses:
            request.statistics.drafted += len(request.guesses)
            request.statistics.accepted += accepted
            self.speculator.note(request, accepted)
        request.guesses = []
        return accepted

    def _settle(self, work: Sequence[tuple[Request, int, int]]) -> None:
        """Share whole pages, and let go of what is finished."""
        waiting: list[Request] = self.scheduler.waiting  # type: ignore[assignment]
        waited_for = {id(r.leader) for r in waiting if r.leader is not None} if waiting else set()
        for request, count, drafts in work:
            if request.finished:
                self._end(request)
                continue
            timeline = request.timeline
            assert timeline is not None
            size = self.pool.page_tokens
            before, now = timeline.length - count - drafts, timeline.length
            if id(request) in waited_for and len(request.output_ids) == 1:
                self.memory.know(request, now)
            elif before // size != now // size:
                self.memory.know(request, now // size * size)

    def _end(self, request: Request) -> None:
        self.scheduler.remove(request)
        if request.keeps and request.timeline is not None:
            request.kept = request.timeline.fork()
        self.let_go(request)

    def _fail(self, plan: Plan, error: Exception) -> None:
        """A step that raised ends its own requests and no others."""
        known = error if isinstance(error, Glm5Error) else None
        if known is None and not isinstance(error, (RuntimeError, MemoryError)):
            for task, _, _ in plan.work:
                self._end_with(task, RequestError(f"the engine failed: {type(error).__name__}: {error}"))
            raise error
        for task, _, _ in plan.work:
            self._end_with(task, known or RequestError(f"the step failed: {error}"))

    def _end_with(self, task: Task, error: Glm5Error) -> None:
        request: Request = task  # type: ignore[assignment]
        request.error = error
        self.scheduler.remove(request)
        if request.timeline is not None:  # what a failed step wrote is not to be shared
            request.timeline.release()
            request.timeline = None
        self.speculator.end(request)

    def _drop_cancelled(self) -> None:
        for task in [*self.scheduler.running, *self.scheduler.waiting]:
            request: Request = task  # type: ignore[assignment]
            if request.cancelled and not request.finished:
                request.finish_reason = "cancelled"
                self._end(request)

    # ---------------------------------------------------------------- memory, for the scheduler

    def start(self, task: Task) -> None:
        request: Request = task  # type: ignore[assignment]
        self.memory.start(request)
        request.started()
        self.speculator.begin(request)

    def fits(self, task: Task, tokens: int) -> bool:
        return self.memory.fits(self.scheduler.running, tokens)  # type: ignore[arg-type]

    def reserve(self, task: Task, tokens: int) -> bool:
        return self.memory.reserve(task, tokens)  # type: ignore[arg-type]

    def let_go(self, task: Task) -> None:
        request: Request = task  # type: ignore[assignment]
        self.memory.let_go(request)
        self.speculator.end(request)

    def forget(self) -> None:
        """Give up every page that no running request holds."""
        with self.lock:
            self.memory.forget()

    def _forget_changed_weights(self) -> None:
        version = weights_version(self.model)
        if version != self._weights:
            self._weights = version
            self._generation += 1  # what running requests read is of the old ones
            self.memory.forget()
            self.memory.store = None  # its pages are of the weights that were loaded

    def _after_fork(self) -> None:
        """In a child process: nobody holds the lock, and the parent's requests are the parent's."""
        self.lock = threading.RLock()
        self._stepping, self._last = False, None
        for task in [*self.scheduler.running, *self.scheduler.waiting]:
            self._end_with(task, RequestError("the request belongs to the parent process"))


def weights_version(model: GlmForCausalLM) -> int:
    """Another number once a weight was assigned or changed in place."""
    weights = chain(model.parameters(), model.buffers())
    return hash(tuple((id(w), 0 if w.is_inference() else w._version) for w in weights))


def _check_options(priority: object, owner: object, num_draft_tokens: object) -> None:
    if type(priority) is not int:
        raise RequestError(f"priority is {priority!r}; it must be an integer")
    try:
        hash(owner)
    except TypeError:
        raise RequestError(f"owner is {owner!r}; it must be a name or a number") from None
    if num_draft_tokens is not None and (type(num_draft_tokens) is not int or num_draft_tokens < 0):
        raise RequestError(f"num_draft_tokens is {num_draft_tokens!r}; it must be an integer from 0, or None")


def default_cache_tokens(model: GlmForCausalLM) -> int:
    """A quarter of what is free, and no more than four whole contexts; one context at least where it fits."""
    config = model.config
    layers = range(config.num_hidden_layers + len(model.mtp))
    each = cache_bytes_per_token(config, model.dtype, layers)
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
    else:
        free = psutil.virtual_memory().available
    limit = config.max_position_embeddings
    tokens = int(free * _SHARE) // max(each, 1)
    return max(2 * PAGE_TOKENS, min(tokens, _CONTEXTS * limit))


def _renew() -> None:
    for engine in list(_engines):
        engine._after_fork()


os.register_at_fork(after_in_child=_renew)
