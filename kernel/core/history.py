"""How much work the turns of an agent program take, learned from those that have ended.

*Work* is tokens, weighted: reading one costs :attr:`Cost.read`, writing one
:attr:`Cost.written`. A turn's work is that of all requests of the turn together: agents wait
for their turns, not for single answers.

A program's turns are kept as a histogram with four bins per doubling. From it comes the
*mean remaining work* of a turn that has taken ``a`` already, E[S - a | S > a]: what the
policy of shortest expected remaining processing time (SERPT) sorts by. The Gittins index
(Scully, Grosof and Harchol-Balter, SIGMETRICS 2020, compare both) would be the optimum for a
single server; in the simulation of agents with heavy tails it was no better (within 2 % of the
mean, in both directions) and costs a table per program, so it was left out.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from math import log2

from llmos.drivers.protocols import QueuedRequest

BINS = 160
"""Bins of a histogram: four per doubling, up to 2^40 tokens."""
ENOUGH = 8
"""Turns of a program that must have ended before it is judged by its own."""
KEPT = 2048
"""Turns that count: beyond them all counts are halved, so that a program that changes is
learned anew."""
MAX_PROGRAMS = 10_000
MAX_OPEN = 200_000
"""Turns that are followed at the same time; beyond them the longest silent one is closed."""
IDLE_S = 30.0
"""A turn that asked for nothing for so long has ended."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a token counts."""

    read: float = 1.0
    """A token of a prompt."""
    written: float = 2.0
    """A token generated. Twice that of a read one, as in Sheng et al. (OSDI 2024)."""

    def of(self, read: int, written: int) -> float:
        """Work of so many tokens."""
        return self.read * read + self.written * written

    def validate(self) -> None:
        """Neither is negative, and a token written costs something."""
        assert self.read >= 0, self
        assert self.written > 0, self


class Histogram:
    """Sizes of turns of one program, and what is to be expected of one under way."""

    __slots__ = ("_changes", "_counts", "_sums", "_tails", "_total")

    def __init__(self) -> None:
        self._counts = [0.0] * BINS
        self._sums = [0.0] * BINS
        self._total = 0.0
        self._tails: list[tuple[float, float]] | None = None
        """Per bin: (count, sum) of it and all above."""
        self._changes = 0

    def __len__(self) -> int:
        return int(self._total)

    def add(self, size: float) -> None:
        """A turn ended with so much work."""
        at = _bin(size)
        self._counts[at] += 1
        self._sums[at] += size
        self._total += 1
        self._changes += 1
        if self._total > KEPT:
            self._counts = [c / 2 for c in self._counts]
            self._sums = [s / 2 for s in self._sums]
            self._total /= 2
            self._tails = None
        # Not at every turn: the sums cost 160 additions, and change little.
        elif self._changes * 16 >= self._total:
            self._tails = None

    def remaining(self, attained: float) -> float:
        """Mean work still to come for a turn that has taken ``attained``; above 0."""
        if self._tails is None:
            self._tails = self._summed()
            self._changes = 0
        at = _bin(attained)
        # Of its own bin only what lies above counts; by the bin's mean, since single sizes
        # are not kept.
        inside = self._counts[at] > 0 and self._sums[at] > attained * self._counts[at]
        count, total = self._tails[at if inside else at + 1] if at + 1 < BINS else (0.0, 0.0)
        if count <= 0:
            # Longer than all before it. What has lasted will last as long again: the mean
            # rest of a Pareto law with exponent 2.
            return max(attained, 1.0)
        return max(total / count - attained, 1.0)

    def _summed(self) -> list[tuple[float, float]]:
        tails = [(0.0, 0.0)] * BINS
        count = total = 0.0
        for at in range(BINS - 1, -1, -1):
            count += self._counts[at]
            total += self._sums[at]
            tails[at] = (count, total)
        return tails

    def validate(self) -> None:
        """The counts add up."""
        assert all(c >= 0 for c in self._counts)
        assert abs(sum(self._counts) - self._total) <= 1e-6 * max(1.0, self._total)


def _bin(size: float) -> int:
    return min(BINS - 1, int(4 * log2(size + 1)))


def program_of(agent: str) -> str:
    """``tenant/program`` of ``tenant/program/key``."""
    return agent.rpartition("/")[0] or agent


def _key(request: QueuedRequest) -> tuple[str, str]:
    # Where the turn is not told, each request is one.
    return request.agent, request.turn or request.key


@dataclass(slots=True)
class Turn:
    """A turn under way, as far as a queue sees it."""

    agent: str
    begun_s: float
    """When it first asked."""
    attained: float = 0.0
    """Work so far."""
    waiting: int = 0
    """Its requests in the queue."""
    touched_s: float = 0.0
    """When it was last heard of."""


class History:
    """Follows turns from their first request on, and learns from those that end.

    A queue is not told when a turn ends. It has ended when its agent asks in another turn
    while nothing of the first one waits, or after :data:`IDLE_S` of silence. What is served
    to an agent counts for the turn that asked last, so turns of one agent beside each other
    (read-only ones) are told apart only roughly.
    """

    def __init__(self, cost: Cost | None = None) -> None:
        self.cost = cost or Cost()
        self._programs: OrderedDict[str, Histogram] = OrderedDict()
        self._all = Histogram()
        """Of all programs: stands in for one that is not known yet."""
        self._open: OrderedDict[tuple[str, str], Turn] = OrderedDict()
        """By agent and turn, the longest silent first."""
        self._latest: dict[str, tuple[str, str]] = {}
        """By agent: the turn that asked last."""

    def queued(self, request: QueuedRequest, now_s: float) -> Turn:
        """A request waits; returns the turn that it is part of."""
        self._close_silent(now_s)
        key = _key(request)
        before = self._latest.get(request.agent)
        if before is not None and before != key:
            former = self._open.get(before)
            if former is not None and not former.waiting:
                self._close(before)
        self._latest[request.agent] = key
        turn = self._open.get(key)
        if turn is None:
            turn = self._open[key] = Turn(request.agent, min(now_s, request.submitted_s))
            if len(self._open) > MAX_OPEN:
                self._close(next(iter(self._open)))
        else:
            self._open.move_to_end(key)
        turn.waiting += 1
        turn.touched_s = now_s
        return turn

    def begun_s(self, request: QueuedRequest) -> float:
        """When the turn of a request that waits first asked."""
        return self._open[_key(request)].begun_s

    def left(self, request: QueuedRequest, now_s: float) -> None:
        """A request waits no longer."""
        turn = self._open.get(_key(request))
        if turn is not None:
            turn.waiting = max(0, turn.waiting - 1)
            turn.touched_s = now_s
            self._open.move_to_end(_key(request))

    def served(self, agent: str, read: int, written: int, now_s: float) -> None:
        """Tokens were read and written for an agent."""
        key = self._latest.get(agent)
        turn = self._open.get(key) if key is not None else None
        if key is not None and turn is not None:
            turn.attained += self.cost.read * read + self.cost.written * written
            turn.touched_s = now_s
            self._open.move_to_end(key)

    def remaining(self, request: QueuedRequest, attained: float) -> float:
        """Work that the turn of a request is expected to take from now on.

        The request's own prompt will be read for certain, so it is counted in full and the
        rest is what is to be expected after it. Of a program that nobody has seen, and with
        nothing else seen, the request's own limits say it.
        """
        prompt = self.cost.read * request.prompt_tokens
        known = self._programs.get(program_of(request.agent))
        if known is None or len(known) < ENOUGH:
            known = self._all
        if len(known) < ENOUGH:
            return prompt + self.cost.written * (request.max_new_tokens - request.new_tokens)
        return prompt + known.remaining(attained + prompt)

    def _close_silent(self, now_s: float) -> None:
        # Two at most: enough to keep up with those that come, and no burst of work.
        for _ in range(2):
            key = next(iter(self._open), None)
            if key is None or now_s - self._open[key].touched_s < IDLE_S:
                return
            if self._open[key].waiting:
                self._open[key].touched_s = now_s
                self._open.move_to_end(key)
            else:
                self._close(key)

    def _close(self, key: tuple[str, str]) -> None:
        turn = self._open.pop(key)
        if self._latest.get(turn.agent) == key:
            del self._latest[turn.agent]
        if turn.attained <= 0:
            return  # It never ran: withdrawn while it waited.
        self.learn(program_of(turn.agent), turn.attained)

    def learn(self, program: str, work: float) -> None:
        """A turn of a program (``tenant/program``) has taken so much work in all."""
        known = self._programs.get(program)
        if known is None:
            known = self._programs[program] = Histogram()
            if len(self._programs) > MAX_PROGRAMS:
                self._programs.popitem(last=False)
        else:
            self._programs.move_to_end(program)
        known.add(work)
        self._all.add(work)

    def validate(self) -> None:
        """Bounds hold, and every agent's latest turn is its own."""
        assert len(self._open) <= MAX_OPEN
        assert len(self._programs) <= MAX_PROGRAMS
        for agent, key in self._latest.items():
            assert key[0] == agent, (agent, key)
            assert key in self._open, (agent, key)
        for turn in self._open.values():
            assert turn.waiting >= 0, turn
            assert turn.attained >= 0, turn
        for histogram in (self._all, *self._programs.values()):
            histogram.validate()
