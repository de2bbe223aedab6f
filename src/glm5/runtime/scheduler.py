"""Who runs in the next step, and with how many tokens. A plain object: no clock, no threads, no model.

Its rules, in this order:
1. Every answer that is being written gets its token in every step (decode is never starved by prompts).
2. What a step has room for beyond that reads prompts: half of it at least for the one that waits longest, the
   rest for the shortest, so that short prompts do not wait behind long ones.
3. Waiting requests come in by priority, then by age, when there is memory for their whole prompt.
4. When memory runs out, the last request of the least priority lets go of its own, and waits again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from glm5.errors import RequestError


class QueueFullError(RequestError):
    """So many requests wait already that another is refused."""


class Task(Protocol):
    """A request, as far as the scheduler knows it."""

    number: int  # in the order of arrival
    priority: int  # larger ones first

    @property
    def pending(self) -> int:
        """Known tokens that the model has not read yet; 1 while an answer is being written."""
        ...

    @property
    def is_decoding(self) -> bool:
        """One more token of it gives its next."""
        ...

    @property
    def drafts(self) -> int:
        """Guesses that it would have checked in the same step."""
        ...

    @property
    def whole(self) -> int:
        """So many of its pending tokens must come in one step."""
        ...

    @property
    def may_start(self) -> bool:
        """False while it waits for another request's prompt."""
        ...


class Memory(Protocol):
    """The pages of the cache, as far as the scheduler knows them."""

    def start(self, task: Task) -> None:
        """The task comes in: give it what is known of its beginning."""
        ...

    def fits(self, task: Task, tokens: int) -> bool:
        """Could so many more tokens be held beside what runs, if all that is not in use were given up?"""
        ...

    def reserve(self, task: Task, tokens: int) -> bool:
        """Have room for so many more tokens, giving up what is not in use; False if there is none."""
        ...

    def let_go(self, task: Task) -> None:
        """The task holds nothing any more; its tokens will be read again."""
        ...


@dataclass(frozen=True)
class Limits:
    """max_sequences: requests that run at once. step_tokens: of a step in which answers are written.
    prefill_tokens: tokens of a step that only reads prompts. max_queue: requests that may wait.
    """

    max_sequences: int = 64
    step_tokens: int = 512
    prefill_tokens: int = 2048
    max_queue: int = 1024

    def __post_init__(self) -> None:
        for name in ("max_sequences", "step_tokens", "prefill_tokens", "max_queue"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise RequestError(f"{name} is {value!r}; it must be an integer from 1")


@dataclass
class Plan:
    """A step: each task with its number of known tokens, and of guesses checked behind them."""

    work: list[tuple[Task, int, int]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(count + drafts for _, count, drafts in self.work)


class Scheduler:
    """Holds what waits and what runs."""

    def __init__(self, limits: Limits, memory: Memory) -> None:
        self.limits, self._memory = limits, memory
        self.waiting: list[Task] = []
        self.running: list[Task] = []  # by priority, then by age
        self.preemptions = 0

    def submit(self, task: Task) -> None:
        """Raises QueueFullError."""
        if self.is_full:
            raise QueueFullError(f"{len(self.waiting)} requests wait already; try again later")
        self.waiting.append(task)

    def remove(self, task: Task) -> None:
        """The task is finished or cancelled; its memory is the caller's matter."""
        for line in (self.waiting, self.running):
            if task in line:
                line.remove(task)

    @property
    def is_full(self) -> bool:
        """Would another request be refused?"""
        return len(self.waiting) >= self.limits.max_queue

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def plan(self) -> Plan:
        """The next step. Empty only when nothing can run."""
        plan, before = Plan(), self.preemptions
        self._decode(plan)
        if self.preemptions == before or not self.running:  # what has just let go does not come back at once
            self._admit(plan)
        if len(plan.work) < len(self.running):
            room = self.limits.step_tokens if plan.work else self.limits.prefill_tokens
            reading = [task for task in self.running if not task.is_decoding]
            self._prefill(plan, reading, max(room - plan.tokens, 0))
        if not plan.work and self.running:  # nobody fits beside the others: the first alone
            self._make_room(plan)
        return plan

    def _decode(self, plan: Plan) -> None:
        reserve, work = self._memory.reserve, plan.work
        before = self.preemptions
        for task in [t for t in self.running if t.is_decoding]:
            if self.preemptions > before and task not in self.running:
                continue  # it let go for one before it
            drafts = task.drafts
            if drafts and not reserve(task, 1 + drafts):
                drafts = 0
            while not reserve(task, 1 + drafts):
                last = self.running[-1]
                self._preempt(last)
                if last is task:
                    break
            else:
                work.append((task, 1, drafts))

    def _prefill(self, plan: Plan, tasks: list[Task], room: int) -> int:
        """Share out `room` tokens; returns how many were used."""
        if not tasks or room <= 0:
            return 0
        oldest, *others = _in_order(tasks)
        others.sort(key=lambda t: (-t.priority, t.pending, t.number))
        wanted = sum(task.pending for task in others)
        shares = [(oldest, max(room - wanted, -(-room // 2)))] + [(task, room) for task in others]
        used = 0
        for task, share in shares:
            count = min(task.pending, share, room - used)
            count = max(count, task.whole if used == 0 or task.whole <= room - used else 0)
            if count < task.whole:
                continue  # it cannot be cut, and waits for a step of its own
            count = self._what_fits(task, count)
            if count >= max(task.whole, 1):
                plan.work.append((task, count, 0))
                used += count
        return used

    def _what_fits(self, task: Task, count: int) -> int:
        while count > 0 and not self._memory.reserve(task, count):
            if task.whole:
                return 0
            count //= 2
        return count

    def _admit(self, plan: Plan) -> None:
        if not self.waiting:
            return
        for task in _in_order(self.waiting):
            if len(self.running) >= self.limits.max_sequences:
                return
            if not task.may_start:
                continue
            if self.running and not self._memory.fits(task, task.pending + 1):
                return  # nobody behind it overtakes, or it might wait for ever
            self._memory.start(task)
            self.waiting.remove(task)
            self.running.append(task)
            self.running.sort(key=_place)
            if task.is_decoding and self._memory.reserve(task, 1):
                plan.work.append((task, 1, 0))

    def _make_room(self, plan: Plan) -> None:
        """Nothing that runs could be given a token: let go of the last ones until the first can go on."""
        first = self.running[0]
        while len(self.running) > 1:
            self._preempt(self.running[-1])
            if self._prefill(plan, [first], self.limits.prefill_tokens):
                return
        self._prefill(plan, [first], self.limits.prefill_tokens)

    def _preempt(self, task: Task) -> None:
        self._memory.let_go(task)
        self.running.remove(task)
        self.waiting.append(task)
        self.preemptions += 1


def _place(task: Task) -> tuple[int, int]:
    return -task.priority, task.number


def _in_order(tasks: Iterable[Task]) -> list[Task]:
    return sorted(tasks, key=_place)
