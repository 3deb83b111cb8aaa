"""A simulated engine: continuous batching, with every run of equal steps taken in one leap.

Between two events (somebody enters, has read its prompt, or ends) all steps have the same
batch, and their times are an arithmetic series. So the cost of a simulated request does not
depend on how many tokens it writes.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush
from math import ceil, sqrt
from typing import Protocol

from llmos.drivers.protocols import QueuedRequest, QueuePolicy
from llmos.kernel.simulation.cache import Prefixes
from llmos.kernel.simulation.jobs import Call, Machine


class Run:
    """A request in the batch, or waiting for it."""

    __slots__ = (
        "call", "entered_s", "from_step", "held", "key", "number", "request", "unread", "untold",
        "written",
    )  # fmt: skip

    def __init__(self, request: QueuedRequest, call: Call) -> None:
        self.key, self.request, self.call = request.key, request, call
        self.entered_s = -1.0
        """First entry."""
        self.unread = 0
        """Prompt tokens still to be read."""
        self.untold = 0
        """Prompt tokens read that the policy was not told of."""
        self.number = -1
        """Of its entry among the ends."""
        self.written = 0
        """Up to its last entry, or its end."""
        self.from_step = -1
        """The engine's count of decoding steps that the policy was told of; -1: reads."""
        self.held = 0
        """Places in the KV cache."""


class Watcher(Protocol):
    """Who is told what happens in an engine."""

    def entered(self, run: Run) -> None:
        """It was let in; ``entered_s`` is below 0 the first time."""
        ...

    def put_back(self, run: Run) -> None:
        """It gave way and waits again."""
        ...

    def charged(self, request: QueuedRequest, read: int, written: int) -> None:
        """Tokens were served; told when the policy is told."""
        ...

    def ended(self, run: Run) -> None:
        """It is done."""
        ...


class Leap:
    """Equal steps under way."""

    __slots__ = ("context", "decoding", "prompt", "start_s", "steps")

    def __init__(self, start_s: float, steps: int, decoding: int, context: int, prompt: int):
        self.start_s, self.steps = start_s, steps
        self.decoding, self.context, self.prompt = decoding, context, prompt
        """Sequences that decode, their context before the first step, prompt tokens a step."""


class Engine:
    """One replica of a model."""

    def __init__(
        self,
        name: str,
        machine: Machine,
        policy: QueuePolicy,
        watcher: Watcher,
    ) -> None:
        self.name, self.machine, self.policy = name, machine, policy
        self._watcher = watcher
        self.prefixes = Prefixes()
        self.waiting: dict[str, Run] = {}
        self.running: dict[str, Run] = {}
        self.held_tokens = 0
        self.preempted = 0
        self.steps = 0
        """All steps."""
        self._decoded = 0
        """Steps, as the sequences that decode count them."""
        self._decoding = 0
        self._context = 0
        self._ends: list[tuple[int, int, str]] = []
        """Heap of (count of steps at which it ends, number, key)."""
        self._number = 0
        self._reading: deque[Run] = deque()
        self.leap: Leap | None = None

    # ------------------------------------------------------------ the world outside

    def submit(self, run: Run, now_s: float) -> None:
        """A request comes."""
        self.waiting[run.key] = run
        self.policy.add(run.request, now_s)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.running or self.waiting)

    @property
    def open_seat(self) -> bool:
        """Whether one more could enter."""
        return len(self.running) < self.machine.seats and (
            self.held_tokens < self.machine.kv_tokens
        )

    def begin(self, now_s: float) -> float | None:
        """Let in who may enter and take the next leap; its end, or None: nothing to do."""
        self._admit(now_s)
        if not self.running:
            return None
        self.leap = self._plan(now_s)
        return now_s + self.seconds(self.leap, self.leap.steps)

    def cut(self, now_s: float) -> float | None:
        """Somebody came: end the leap with the step that runs now; None: it ends so anyway."""
        leap = self.leap
        if leap is None or leap.steps <= 1:
            return None
        steps = self._steps_until(leap, now_s - leap.start_s)
        if steps >= leap.steps:
            return None
        leap.steps = max(1, steps)
        return leap.start_s + self.seconds(leap, leap.steps)

    def finish(self, now_s: float) -> None:
        """The leap is over: advance everybody."""
        leap = self.leap
        assert leap is not None
        self.leap = None
        self.steps += leap.steps
        if self._decoding:
            self._context += self._decoding * leap.steps
        self._decoded += leap.steps
        if self._reading:
            self._read(leap)
        while self._ends and self._ends[0][0] <= self._decoded:
            run = self._ending(heappop(self._ends))
            if run is not None:
                self._end(run, now_s)

    def _ending(self, entry: tuple[int, int, str]) -> Run | None:
        """Whose end an entry tells; None: it was put back meanwhile."""
        run = self.running.get(entry[2])
        return run if run is not None and run.number == entry[1] else None

    # ------------------------------------------------------------ entering

    def _admit(self, now_s: float) -> None:
        if not self.waiting:
            return
        machine, policy = self.machine, self.policy
        told = False
        while len(self.running) < machine.seats:
            if not told and self.running:
                self._tell(now_s)
            told = True
            key = policy.first(now_s)
            if key is None:
                return
            run = self.waiting[key]
            need = run.call.prompt_tokens + run.call.max_new_tokens
            if self.held_tokens + need > machine.kv_tokens and self.running:
                victim = policy.victim([self._now(r) for r in self.running.values()], now_s)
                if victim is None:
                    return
                self._put_back(self.running[victim], now_s)
                continue
            policy.remove(key, now_s)
            del self.waiting[key]
            self._enter(run, need, now_s)

    def _enter(self, run: Run, need: int, now_s: float) -> None:
        self._watcher.entered(run)
        if run.entered_s < 0:
            run.entered_s = now_s
        tokens = run.call.prompt_tokens + run.written
        cached = 0
        if self.machine.share_prefixes and run.call.blocks:
            tenant = run.request.tenant
            cached = min(self.prefixes.hit(tenant, run.call.blocks), tokens - 1)
            self.prefixes.asked_tokens += tokens
            self.prefixes.hit_tokens += cached
            self.prefixes.use(tenant, run.call.blocks)
        run.unread = tokens - cached
        run.held = need
        run.from_step = -1
        self.held_tokens += need
        self.running[run.key] = run
        self._reading.append(run)
        self.prefixes.shrink(self.machine.kv_tokens - self.held_tokens)

    def _now(self, run: Run) -> QueuedRequest:
        """A running request as a policy sees it."""
        written = run.written + (self._decoded - run.from_step if run.from_step >= 0 else 0)
        r = run.request
        return QueuedRequest(
            r.key, r.tenant, r.agent, r.prompt_tokens, r.max_new_tokens, r.priority, r.deadline_s,
            r.submitted_s, written, r.turn,
        )  # fmt: skip

    def _put_back(self, run: Run, now_s: float) -> None:
        self._leave(run, now_s)
        self.preempted += 1
        run.request = self._now(run)
        self.waiting[run.key] = run
        self.policy.add(run.request, now_s)
        self._watcher.put_back(run)

    # ------------------------------------------------------------ stepping

    def _plan(self, now_s: float) -> Leap:
        while self._ends and self._ending(self._ends[0]) is None:
            heappop(self._ends)
        steps = self._ends[0][0] - self._decoded if self._ends else 1 << 30
        prompt = 0
        if self._reading:
            room = max(1, self.machine.max_batch_tokens - self._decoding)
            head = self._reading[0].unread
            if head > room:
                prompt, steps = room, min(steps, (head - 1) // room)
            else:
                prompt, steps = min(room, sum(r.unread for r in self._reading)), 1
        return Leap(now_s, steps, self._decoding, self._context, prompt)

    def seconds(self, leap: Leap, steps: int) -> float:
        """How long the first steps of a leap take."""
        step = self.machine.step
        one = (
            step.base_s
            + step.batch_s * leap.decoding
            + step.context_s * leap.context
            + step.prompt_s * leap.prompt
        )
        return steps * one + step.context_s * leap.decoding * steps * (steps - 1) / 2

    def _steps_until(self, leap: Leap, seconds: float) -> int:
        """The fewest steps that last at least so long."""
        one = self.seconds(leap, 1)
        grow = self.machine.step.context_s * leap.decoding / 2
        linear = one - grow
        if grow <= 0:
            steps = ceil(seconds / one)
        else:
            steps = ceil((sqrt(linear * linear + 4 * grow * max(seconds, 0.0)) - linear) / 2 / grow)
        return max(1, steps)

    def _read(self, leap: Leap) -> None:
        budget = leap.prompt * leap.steps
        while budget and self._reading:
            run = self._reading[0]
            part = min(budget, run.unread)
            run.unread -= part
            run.untold += part
            budget -= part
            if run.unread:
                break
            self._reading.popleft()
            # The step that reads the last of the prompt writes the first token.
            run.from_step = self._decoded - 1
            self._number += 1
            run.number = self._number
            end = run.from_step + run.call.new_tokens - run.written
            heappush(self._ends, (end, self._number, run.key))
            self._decoding += 1
            self._context += run.call.prompt_tokens + run.written + 1

    # ------------------------------------------------------------ leaving

    def _end(self, run: Run, now_s: float) -> None:
        self._leave(run, now_s)
        if self.machine.share_prefixes and run.call.keeps is not None:
            self.prefixes.use(run.request.tenant, (run.call.keeps,))
            self.prefixes.shrink(self.machine.kv_tokens - self.held_tokens)
        self._watcher.ended(run)

    def _leave(self, run: Run, now_s: float) -> None:
        self._tell_of(run, now_s)
        if run.from_step >= 0:
            self._decoding -= 1
            self._context -= run.call.prompt_tokens + run.written
            run.from_step = run.number = -1
        else:
            self._reading.remove(run)
        self.held_tokens -= run.held
        run.held = 0
        del self.running[run.key]

    def _tell(self, now_s: float) -> None:
        """Tell the policy of all that was served since it was last told."""
        for run in self.running.values():
            self._tell_of(run, now_s)

    def _tell_of(self, run: Run, now_s: float) -> None:
        written = self._decoded - run.from_step if run.from_step >= 0 else 0
        if not (written or run.untold):
            return
        request = run.request
        self.policy.served(request.tenant, request.agent, run.untold, written, now_s)
        self._watcher.charged(request, run.untold, written)
        run.untold = 0
        if written:
            run.written += written
            run.from_step = self._decoded
