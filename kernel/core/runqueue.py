"""The run queue of a host: which turn runs next.

Turns of one agent run one after the other in the order their messages came; read-only
turns run beside each other, but never beside a turn that may change the state (so a
read-only turn sees a committed state). Agents take turns round-robin between tenants,
so that a tenant with many messages does not hold up one with few.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple


class Turn(NamedTuple):
    """A message that waits for its turn."""

    id: str
    agent: str
    tenant: str
    read_only: bool


@dataclass(slots=True)
class _Mailbox:
    waiting: deque[Turn] = field(default_factory=deque)
    readers: int = 0
    writing: bool = False
    listed: bool = False
    """Whether it stands in its tenant's ring."""

    def ready(self, concurrent: int) -> bool:
        """Whether its first message may run now."""
        if not self.waiting or self.writing:
            return False
        if self.waiting[0].read_only:
            return self.readers < concurrent
        return self.readers == 0


class RunQueue:
    """Bounded queue of turns. All operations are O(1) amortised."""

    def __init__(self, *, running_limit: int = 256, mailbox_limit: int = 256) -> None:
        self.running_limit = running_limit
        """Turns at the same time, all agents together."""
        self.mailbox_limit = mailbox_limit
        """Messages that may wait per agent, where the agent's own limit is not lower."""
        self.running: dict[str, Turn] = {}
        self._mailboxes: dict[str, _Mailbox] = {}
        self._concurrent: dict[str, int] = {}
        self._limits: dict[str, int] = {}
        self._rings: dict[str, deque[str]] = {}
        self._tenants: deque[str] = deque()
        self._waiting = 0

    def __len__(self) -> int:
        """Turns that wait."""
        return self._waiting

    def waiting(self, agent: str) -> int:
        """Turns of one agent that wait."""
        mailbox = self._mailboxes.get(agent)
        return len(mailbox.waiting) if mailbox else 0

    def limit(self, agent: str, *, mailbox: int, concurrent_turns: int) -> None:
        """Set an agent's own bounds."""
        self._limits[agent] = min(mailbox, self.mailbox_limit)
        self._concurrent[agent] = concurrent_turns

    def offer(self, turn: Turn) -> bool:
        """Queue a turn; False if the agent's mailbox is full, and nothing was changed."""
        mailbox = self._mailboxes.setdefault(turn.agent, _Mailbox())
        if len(mailbox.waiting) >= self._limits.get(turn.agent, self.mailbox_limit):
            return False
        mailbox.waiting.append(turn)
        self._waiting += 1
        self._list(turn.agent, turn.tenant, mailbox)
        return True

    def take(self) -> list[Turn]:
        """Turns that may start now; they count as running until :meth:`done`."""
        started: list[Turn] = []
        while self._tenants and len(self.running) < self.running_limit:
            tenant = self._tenants[0]
            ring = self._rings[tenant]
            agent = ring.popleft()
            mailbox = self._mailboxes[agent]
            mailbox.listed = False
            self._tidy(agent, mailbox)
            if mailbox.ready(self._concurrent.get(agent, 1)):
                turn = mailbox.waiting.popleft()
                self._waiting -= 1
                if turn.read_only:
                    mailbox.readers += 1
                else:
                    mailbox.writing = True
                self.running[turn.id] = turn
                started.append(turn)
                self._list(agent, tenant, mailbox)
            # The next tenant's turn, whether or not this one had something to run.
            self._tenants.popleft()
            if ring:
                self._tenants.append(tenant)
            else:
                del self._rings[tenant]
        return started

    def done(self, turn_id: str) -> None:
        """A running turn has ended."""
        turn = self.running.pop(turn_id)
        mailbox = self._mailboxes[turn.agent]
        if turn.read_only:
            mailbox.readers -= 1
        else:
            mailbox.writing = False
        self._list(turn.agent, turn.tenant, mailbox)
        self._tidy(turn.agent, mailbox)

    def withdraw(self, turn_id: str, agent: str) -> bool:
        """Take a waiting turn out, e.g. because its caller has gone. False: it is not waiting."""
        mailbox = self._mailboxes.get(agent)
        if mailbox is None:
            return False
        for turn in mailbox.waiting:
            if turn.id == turn_id:
                mailbox.waiting.remove(turn)
                self._waiting -= 1
                # What stood behind it may be able to run now.
                self._list(agent, turn.tenant, mailbox)
                self._tidy(agent, mailbox)
                return True
        return False

    def forget(self, agent: str) -> None:
        """Drop an agent's own bounds: it is no longer in memory."""
        self._limits.pop(agent, None)
        self._concurrent.pop(agent, None)

    def _tidy(self, agent: str, mailbox: _Mailbox) -> None:
        """Drop a mailbox in which nothing waits or runs, once no ring names it."""
        if not (mailbox.waiting or mailbox.readers or mailbox.writing or mailbox.listed):
            self._mailboxes.pop(agent, None)

    def _list(self, agent: str, tenant: str, mailbox: _Mailbox) -> None:
        """Put an agent into its tenant's ring, if it has something that could run."""
        if mailbox.listed or not mailbox.ready(self._concurrent.get(agent, 1)):
            return
        mailbox.listed = True
        ring = self._rings.get(tenant)
        if ring is None:
            ring = self._rings[tenant] = deque()
            self._tenants.append(tenant)
        ring.append(agent)

    def validate(self) -> None:
        """Counters, rings and mailboxes agree; whatever could run is listed."""
        assert self._waiting == sum(len(m.waiting) for m in self._mailboxes.values())
        assert len(self.running) <= self.running_limit
        assert sorted(self._tenants) == sorted(self._rings), (self._tenants, self._rings)
        listed = [a for ring in self._rings.values() for a in ring]
        assert len(listed) == len(set(listed)), listed
        assert set(listed) <= set(self._mailboxes), listed
        for agent, mailbox in self._mailboxes.items():
            assert mailbox.waiting or mailbox.readers or mailbox.writing or mailbox.listed, agent
            running = [t for t in self.running.values() if t.agent == agent]
            assert mailbox.readers == sum(t.read_only for t in running), agent
            assert mailbox.writing == any(not t.read_only for t in running), agent
            assert not (mailbox.writing and mailbox.readers), agent
            assert mailbox.listed == (agent in listed), agent
            if mailbox.ready(self._concurrent.get(agent, 1)):
                assert mailbox.listed, agent
