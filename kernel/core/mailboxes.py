"""The run queue of a host: which message gets its turn next.

Three rules, from the inside out:

1. *Within an agent.* Messages of one stream are started in the order they were offered;
   between streams the higher priority comes first, then what was offered first. A message
   that waits for its next attempt blocks its own stream and no other.
2. *Exclusion.* A turn that may change the state runs alone. Read-only turns run beside
   each other up to the agent's limit, so each of them sees a committed state; a writer that
   is next waits for them and is not overtaken by what comes after it.
3. *Between agents.* Tenants take turns, and the agents of a tenant take turns, so that a
   tenant with many messages does not hold up one with few.
"""

from __future__ import annotations

from collections import deque
from heapq import heapify, heappop, heappush
from typing import NamedTuple, TypeAlias

FIRST = 1 << 20
"""A priority above those of all messages."""


class Turn(NamedTuple):
    """A message that waits for its turn, or has it."""

    id: str
    """Unique."""
    agent: str
    tenant: str
    """The agent's; the same in all of its turns."""
    read_only: bool
    stream: str = ""
    seq: int = 0
    """Number within the stream; kept for the caller. The order is that of offering."""
    priority: int = 0
    """Higher first, between streams."""
    not_before: float = 0.0
    """Seconds, wall clock; 0: at once."""


_Entry: TypeAlias = tuple[int, int, Turn]
"""(-priority, number of the offer, turn): sorts in the order in which an agent's are started."""


class _Mailbox:
    """What waits for one agent, and what of it runs."""

    __slots__ = ("heads", "listed", "readers", "streams", "tenant", "waiting", "writing")

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.waiting = 0
        self.readers = 0
        self.writing = False
        self.listed = False
        """Whether it stands in its tenant's ring."""
        self.streams: dict[str, deque[_Entry]] = {}
        """None of them is empty; sorted by number."""
        self.heads: list[_Entry] = []
        """Heap of the streams' first messages, but for those that wait for a time. An entry
        that is no longer the first of its stream is left in and skipped when it comes up."""


class Mailboxes:
    """Bounded mailboxes, and the turns that run. All is O(log n) amortised, but that
    :meth:`withdraw`, :meth:`release` and :meth:`drop` look through one stream or agent.
    """

    def __init__(self, *, running_limit: int = 256, mailbox_limit: int = 256) -> None:
        self.running_limit = running_limit
        """Turns at the same time, all agents together."""
        self.mailbox_limit = mailbox_limit
        """Messages that may wait per agent, where the agent's own limit is not lower."""
        self.running: dict[str, Turn] = {}
        self._entries: dict[str, _Entry] = {}
        """All that waits or runs, by id."""
        self._mailboxes: dict[str, _Mailbox] = {}
        self._limits: dict[str, int] = {}
        self._concurrent: dict[str, int] = {}
        self._held: set[str] = set()
        self._rings: dict[str, deque[str]] = {}
        """By tenant: agents that have something to start."""
        self._tenants: deque[str] = deque()
        self._late: dict[tuple[str, str], _Entry] = {}
        """By agent and stream: first messages that wait for a time."""
        self._wakes: list[tuple[float, int, str, str]] = []
        """Heap of (not_before, number, agent, stream) over ``_late``. What is not there any
        more is skipped; of held agents some are missing until :meth:`release`."""
        self._now = 0.0
        self._number = 0

    def __len__(self) -> int:
        """Turns that wait."""
        return len(self._entries) - len(self.running)

    def waiting(self, agent: str) -> int:
        """Turns of one agent that wait."""
        mailbox = self._mailboxes.get(agent)
        return mailbox.waiting if mailbox is not None else 0

    def idle(self, agent: str) -> bool:
        """Whether nothing of this agent waits or runs."""
        mailbox = self._mailboxes.get(agent)
        return mailbox is None or not (mailbox.waiting or mailbox.readers or mailbox.writing)

    def held(self, agent: str) -> bool:
        """Whether nothing of this agent is started."""
        return agent in self._held

    def order(self, agent: str) -> list[Turn]:
        """What waits of an agent, in the order in which it would be started if all were due."""
        mailbox = self._mailboxes.get(agent)
        if mailbox is None:
            return []
        heads = [(queue[0], stream, 0) for stream, queue in mailbox.streams.items()]
        heapify(heads)
        found: list[Turn] = []
        while heads:
            entry, stream, place = heappop(heads)
            found.append(entry[2])
            queue = mailbox.streams[stream]
            if place + 1 < len(queue):
                heappush(heads, (queue[place + 1], stream, place + 1))
        return found

    def side_by_side(self, agent: str) -> int:
        """Read-only turns that an agent may have at the same time."""
        return self._concurrent.get(agent, 1)

    # ------------------------------------------------------------ in and out

    def offer(self, turn: Turn, *, force: bool = False) -> bool:
        """Queue a turn; one whose id waits or runs already is left out.

        Args:
            turn: what to queue.
            force: take it even if the mailbox is full: the store holds it already, and
                leaving it out here would only lose its place.

        Returns:
            False if the agent's mailbox is full, and nothing was changed.
        """
        if turn.id in self._entries:
            return True
        agent = turn.agent
        mailbox = self._mailboxes.get(agent)
        waiting = 0 if mailbox is None else mailbox.waiting
        if not force and waiting >= self._limits.get(agent, self.mailbox_limit):
            return False
        if mailbox is None:
            mailbox = self._mailboxes[agent] = _Mailbox(turn.tenant)
        self._number += 1
        entry = (-turn.priority, self._number, turn)
        self._entries[turn.id] = entry
        mailbox.waiting += 1
        queue = mailbox.streams.get(turn.stream)
        if queue is not None:
            queue.append(entry)
            return True
        mailbox.streams[turn.stream] = deque((entry,))
        self._new_head(mailbox, entry)
        self._list(agent, mailbox)
        return True

    def take(self, now: float) -> list[Turn]:
        """Turns that may start now; they count as running until :meth:`done` or :meth:`again`.

        Args:
            now: seconds, wall clock.
        """
        self._now = now
        if self._wakes and self._wakes[0][0] <= now:
            self._wake()
        started: list[Turn] = []
        running, tenants, rings = self.running, self._tenants, self._rings
        room = self.running_limit - len(running)
        while tenants and room > 0:
            tenant = tenants[0]
            ring = rings[tenant]
            agent = ring.popleft()
            mailbox = self._mailboxes[agent]
            mailbox.listed = False
            if self._startable(agent, mailbox):
                turn = heappop(mailbox.heads)[2]
                queue = mailbox.streams[turn.stream]
                queue.popleft()
                if queue:
                    self._new_head(mailbox, queue[0])
                else:
                    del mailbox.streams[turn.stream]
                mailbox.waiting -= 1
                if turn.read_only:
                    mailbox.readers += 1
                else:
                    mailbox.writing = True
                running[turn.id] = turn
                room -= 1
                started.append(turn)
                if mailbox.heads:
                    self._list(agent, mailbox)
            else:
                self._tidy(agent, mailbox)
            # The next tenant's turn, whether or not this one had something to run.
            if ring:
                tenants.rotate(-1)
            else:
                tenants.popleft()
                del rings[tenant]
        return started

    def done(self, turn_id: str) -> None:
        """A running turn has ended.

        Raises:
            KeyError: it does not run.
        """
        turn = self.running.pop(turn_id)
        del self._entries[turn_id]
        self._stop(turn)

    def again(self, turn_id: str, not_before: float, *, first: bool = False) -> None:
        """A running turn failed; its message goes back to the front of its stream.

        Where read-only turns of one stream ran beside each other and several go back, they
        stand in the order they were offered.

        Args:
            turn_id: the turn.
            not_before: seconds, wall clock; 0: at once.
            first: before all other messages of its agent, whatever their priority.

        Raises:
            KeyError: it does not run.
        """
        turn = self.running.pop(turn_id)
        priority, number, _ = self._entries[turn_id]
        if first:
            priority = -FIRST
        entry = (priority, number, turn._replace(not_before=not_before))
        self._entries[turn_id] = entry
        mailbox = self._mailboxes[turn.agent]
        mailbox.waiting += 1
        queue = mailbox.streams.get(turn.stream)
        if queue is None:
            queue = mailbox.streams[turn.stream] = deque()
        place = 0
        while place < len(queue) and queue[place][1] < number:
            place += 1
        queue.insert(place, entry)
        if place == 0:
            # What was first is so no more: its entry in the heap is skipped from now on.
            self._late.pop((turn.agent, turn.stream), None)
            self._new_head(mailbox, entry)
        self._stop(turn)

    def withdraw(self, turn_id: str, agent: str) -> bool:
        """Take a waiting turn out, e.g. because its caller has gone. False: it is not waiting."""
        entry = self._entries.get(turn_id)
        if entry is None or turn_id in self.running or entry[2].agent != agent:
            return False
        del self._entries[turn_id]
        stream = entry[2].stream
        mailbox = self._mailboxes[agent]
        mailbox.waiting -= 1
        queue = mailbox.streams[stream]
        if queue[0] is not entry:
            queue.remove(entry)
            return True
        queue.popleft()
        self._late.pop((agent, stream), None)
        if queue:
            self._new_head(mailbox, queue[0])
        else:
            del mailbox.streams[stream]
        # What stood behind it, in its stream or in another, may be able to run now.
        self._list(agent, mailbox)
        self._tidy(agent, mailbox)
        return True

    def drop(self, agent: str) -> list[Turn]:
        """Forget all that waits of an agent, and return it in the order of offering.

        What runs goes on; a :meth:`hold` stays.
        """
        mailbox = self._mailboxes.get(agent)
        if mailbox is None:
            return []
        entries = sorted(
            (entry for queue in mailbox.streams.values() for entry in queue), key=lambda e: e[1]
        )
        for stream in mailbox.streams:
            self._late.pop((agent, stream), None)
        for entry in entries:
            del self._entries[entry[2].id]
        mailbox.streams.clear()
        mailbox.heads.clear()
        mailbox.waiting = 0
        self._tidy(agent, mailbox)
        return [entry[2] for entry in entries]

    # ------------------------------------------------------------ bounds and holds

    def limit(self, agent: str, *, mailbox: int, concurrent_turns: int) -> None:
        """Set an agent's own bounds: messages that may wait, read-only turns side by side."""
        self._limits[agent] = min(mailbox, self.mailbox_limit)
        self._concurrent[agent] = concurrent_turns
        box = self._mailboxes.get(agent)
        if box is not None:
            self._list(agent, box)

    def forget(self, agent: str) -> None:
        """Drop an agent's own bounds: it is no longer in memory. A :meth:`hold` stays."""
        self._limits.pop(agent, None)
        self._concurrent.pop(agent, None)

    def hold(self, agent: str) -> None:
        """Start nothing more of this agent; what waits stays, and more may come."""
        self._held.add(agent)

    def release(self, agent: str) -> None:
        """End a hold."""
        if agent not in self._held:
            return
        self._held.discard(agent)
        mailbox = self._mailboxes.get(agent)
        if mailbox is None:
            return
        for stream in mailbox.streams:
            late = self._late.get((agent, stream))
            if late is not None:
                # Its entry among the wakes may have come up meanwhile, and gone.
                del self._late[agent, stream]
                self._new_head(mailbox, late)
        self._list(agent, mailbox)

    def next_wake(self) -> float | None:
        """The earliest time (seconds, wall clock) at which another message may be started.

        Later than the ``now`` of the last :meth:`take`; None: no message waits for a time.
        """
        while self._wakes:
            when, number, agent, stream = self._wakes[0]
            late = self._late.get((agent, stream))
            current = late is not None and late[1] == number and late[2].not_before == when
            if current and agent not in self._held:
                return when
            heappop(self._wakes)
        return None

    # ------------------------------------------------------------ inside

    def _startable(self, agent: str, mailbox: _Mailbox) -> bool:
        """Whether an agent's next message may run now; it is then ``mailbox.heads[0]``."""
        heads = mailbox.heads
        while heads:
            first = heads[0]
            turn = first[2]
            queue = mailbox.streams.get(turn.stream)
            if queue is None or queue[0] is not first:
                heappop(heads)
                continue
            if mailbox.writing or agent in self._held:
                return False
            if turn.read_only:
                readers = mailbox.readers
                return not readers or readers < self._concurrent.get(agent, 1)
            return not mailbox.readers
        return False

    def _list(self, agent: str, mailbox: _Mailbox) -> None:
        """Put an agent into its tenant's ring, if it has something that could run."""
        if mailbox.listed or mailbox.writing or not self._startable(agent, mailbox):
            return
        mailbox.listed = True
        tenant = mailbox.tenant
        ring = self._rings.get(tenant)
        if ring is None:
            ring = self._rings[tenant] = deque()
            self._tenants.append(tenant)
        ring.append(agent)

    def _tidy(self, agent: str, mailbox: _Mailbox) -> None:
        """Drop a mailbox in which nothing waits or runs, once no ring names it."""
        if not (mailbox.waiting or mailbox.readers or mailbox.writing or mailbox.listed):
            self._mailboxes.pop(agent, None)

    def _stop(self, turn: Turn) -> None:
        """A turn does not run any more."""
        mailbox = self._mailboxes[turn.agent]
        if turn.read_only:
            mailbox.readers -= 1
        else:
            mailbox.writing = False
        if mailbox.waiting:
            self._list(turn.agent, mailbox)
        else:
            self._tidy(turn.agent, mailbox)

    def _new_head(self, mailbox: _Mailbox, entry: _Entry) -> None:
        """An entry has become the first of its stream."""
        turn = entry[2]
        if turn.not_before > self._now:
            self._late[turn.agent, turn.stream] = entry
            self._push_wake(entry)
            return
        heads = mailbox.heads
        if len(heads) > 2 * len(mailbox.streams) + 16:
            # Mostly entries to be skipped, behind one that does not come up.
            agent = turn.agent
            heads[:] = [q[0] for s, q in mailbox.streams.items() if (agent, s) not in self._late]
            heapify(heads)  # Has the new one among them.
        else:
            heappush(heads, entry)

    def _push_wake(self, entry: _Entry) -> None:
        turn = entry[2]
        if len(self._wakes) > 2 * len(self._late) + 64:
            self._wakes = [
                (e[2].not_before, e[1], agent, stream)
                for (agent, stream), e in self._late.items()
                if agent not in self._held
            ]
            heapify(self._wakes)
        heappush(self._wakes, (turn.not_before, entry[1], turn.agent, turn.stream))

    def _wake(self) -> None:
        """First messages whose time has come wait for nothing but their turn."""
        while self._wakes and self._wakes[0][0] <= self._now:
            when, number, agent, stream = heappop(self._wakes)
            late = self._late.get((agent, stream))
            if late is None or late[1] != number or late[2].not_before != when:
                continue
            if agent in self._held:
                continue  # release() puts it back.
            del self._late[agent, stream]
            mailbox = self._mailboxes[agent]
            self._new_head(mailbox, late)
            self._list(agent, mailbox)

    def validate(self) -> None:
        """Counters, heaps, rings and mailboxes agree; whatever could run is listed."""
        assert len(self.running) <= self.running_limit
        assert set(self.running) <= set(self._entries)
        total = 0
        assert sorted(self._tenants) == sorted(self._rings), (self._tenants, self._rings)
        listed = [a for ring in self._rings.values() for a in ring]
        assert all(self._rings.values()), self._rings
        assert len(listed) == len(set(listed)), listed
        assert set(listed) <= set(self._mailboxes), listed
        by_agent: dict[str, list[Turn]] = {}
        for id_, turn in self.running.items():
            assert turn.id == id_
            assert self._entries[id_][2] == turn, turn
            by_agent.setdefault(turn.agent, []).append(turn)
        assert set(by_agent) <= set(self._mailboxes)
        wakes = {(w[2], w[3], w[1]): w[0] for w in sorted(self._wakes, reverse=True)}
        seen_late = 0
        for agent, mailbox in self._mailboxes.items():
            assert mailbox.waiting or mailbox.readers or mailbox.writing or mailbox.listed, agent
            running = by_agent.get(agent, [])
            assert mailbox.readers == sum(t.read_only for t in running), agent
            assert mailbox.writing == any(not t.read_only for t in running), agent
            assert sum(not t.read_only for t in running) <= 1, agent
            assert not (mailbox.writing and mailbox.readers), agent
            assert mailbox.listed == (agent in listed), agent
            assert not mailbox.listed or agent in self._rings[mailbox.tenant], agent
            assert mailbox.waiting == sum(map(len, mailbox.streams.values())), agent
            assert len(mailbox.heads) <= 2 * len(mailbox.streams) + 17 + len(mailbox.streams)
            total += mailbox.waiting
            for stream, queue in mailbox.streams.items():
                assert queue, (agent, stream)
                numbers = [e[1] for e in queue]
                assert numbers == sorted(set(numbers)), (agent, stream)
                for entry in queue:
                    assert self._entries[entry[2].id] is entry, entry
                    assert (entry[2].agent, entry[2].stream) == (agent, stream), entry
                    assert entry[2].id not in self.running, entry
                late = self._late.get((agent, stream))
                if late is None:
                    assert queue[0] in mailbox.heads, (agent, stream)
                else:
                    seen_late += 1
                    assert late is queue[0], (agent, stream)
                    assert late not in mailbox.heads, (agent, stream)
                    if agent not in self._held:
                        assert wakes.get((agent, stream, late[1])) is not None, late
            if self._startable(agent, mailbox):
                assert mailbox.listed, agent
        assert seen_late == len(self._late), self._late
        assert total == len(self), (total, len(self))
