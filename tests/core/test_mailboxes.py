from __future__ import annotations

import itertools
import time
from collections import defaultdict

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from llmos.kernel.core.mailboxes import Mailboxes, Turn

NOW = 100.0


def turn(
    number: int,
    agent: str = "t/p/a",
    *,
    read_only: bool = False,
    stream: str = "",
    priority: int = 0,
    not_before: float = 0.0,
) -> Turn:
    tenant = agent.split("/")[0]
    return Turn(str(number), agent, tenant, read_only, stream, number, priority, not_before)


def run_all(queue: Mailboxes, now: float = NOW) -> list[str]:
    """Bring all that can run to its end; ids in the order of their starts."""
    order = []
    while started := queue.take(now):
        for t in started:
            order.append(t.id)
            queue.done(t.id)
        queue.validate()
    return order


def test_turns_of_one_agent_run_one_after_the_other() -> None:
    queue = Mailboxes()
    for n in range(3):
        assert queue.offer(turn(n))
    order = []
    while started := queue.take(NOW):
        assert len(started) == 1
        order.append(started[0].id)
        queue.validate()
        queue.done(started[0].id)
    assert order == ["0", "1", "2"]
    assert len(queue) == 0
    queue.validate()


def test_read_only_turns_run_side_by_side_up_to_their_limit() -> None:
    queue = Mailboxes()
    queue.limit("t/p/a", mailbox=10, concurrent_turns=3)
    for n in range(5):
        queue.offer(turn(n, read_only=True))
    assert [t.id for t in queue.take(NOW)] == ["0", "1", "2"]
    queue.done("1")
    assert [t.id for t in queue.take(NOW)] == ["3"]
    queue.validate()


def test_a_writing_turn_waits_for_readers_and_is_not_overtaken() -> None:
    queue = Mailboxes()
    queue.limit("t/p/a", mailbox=10, concurrent_turns=4)
    queue.offer(turn(0, read_only=True))
    queue.offer(turn(1))
    queue.offer(turn(2, read_only=True))
    assert [t.id for t in queue.take(NOW)] == ["0"]
    assert queue.take(NOW) == []
    queue.done("0")
    assert [t.id for t in queue.take(NOW)] == ["1"]
    assert queue.take(NOW) == []
    queue.done("1")
    assert [t.id for t in queue.take(NOW)] == ["2"]
    queue.validate()


def test_a_full_mailbox_refuses_and_changes_nothing() -> None:
    queue = Mailboxes(mailbox_limit=2)
    assert queue.offer(turn(0))
    assert queue.offer(turn(1))
    assert not queue.offer(turn(2))
    assert queue.waiting("t/p/a") == 2
    queue.validate()


def test_a_flooding_tenant_does_not_hold_up_another() -> None:
    queue = Mailboxes(running_limit=2, mailbox_limit=1000)
    for n in range(100):
        queue.offer(turn(n, f"flood/p/{n}"))
    queue.offer(turn(1000, "quiet/p/a"))
    first = [t.tenant for t in queue.take(NOW)]
    assert sorted(first) == ["flood", "quiet"]
    queue.validate()


def test_withdraw_lets_the_next_one_run() -> None:
    queue = Mailboxes()
    queue.limit("t/p/a", mailbox=10, concurrent_turns=4)
    queue.offer(turn(0, read_only=True))
    queue.take(NOW)
    queue.offer(turn(1))
    queue.offer(turn(2, read_only=True))
    assert queue.take(NOW) == []
    assert queue.withdraw("1", "t/p/a")
    assert not queue.withdraw("1", "t/p/a")
    assert [t.id for t in queue.take(NOW)] == ["2"]
    queue.validate()


def test_a_message_withdrawn_while_it_is_listed_leaves_nothing_behind() -> None:
    queue = Mailboxes(running_limit=1)
    queue.limit("t/p/a", mailbox=10, concurrent_turns=4)
    queue.offer(turn(0, read_only=True))
    queue.take(NOW)
    queue.offer(turn(1, read_only=True))
    assert queue.withdraw("1", "t/p/a")
    queue.validate()
    queue.done("0")
    queue.validate()
    assert queue.take(NOW) == []
    queue.offer(turn(2))
    assert [t.id for t in queue.take(NOW)] == ["2"]
    queue.done("2")
    queue.validate()
    assert not queue._mailboxes


def test_between_streams_priority_goes_first_but_never_within_one() -> None:
    queue = Mailboxes()
    queue.offer(turn(0, stream="a", priority=0))
    queue.offer(turn(1, stream="a", priority=9))
    queue.offer(turn(2, stream="b", priority=5))
    queue.offer(turn(3, stream="c", priority=5))
    assert run_all(queue) == ["2", "3", "0", "1"]


def test_a_message_that_waits_for_its_time_blocks_only_its_stream() -> None:
    queue = Mailboxes()
    queue.offer(turn(0, stream="a", not_before=NOW + 5))
    queue.offer(turn(1, stream="a"))
    queue.offer(turn(2, stream="b"))
    assert run_all(queue) == ["2"]
    assert queue.next_wake() == NOW + 5
    assert run_all(queue, NOW + 4.9) == []
    assert run_all(queue, NOW + 5) == ["0", "1"]
    assert queue.next_wake() is None


def test_a_failed_turn_goes_back_to_the_front_of_its_stream() -> None:
    queue = Mailboxes()
    for n in range(3):
        queue.offer(turn(n, stream="a"))
    queue.offer(turn(3, stream="b"))
    (first,) = queue.take(NOW)
    queue.again(first.id, NOW + 1)
    queue.validate()
    assert queue.waiting("t/p/a") == 4
    assert run_all(queue) == ["3"]
    assert run_all(queue, NOW + 1) == ["0", "1", "2"]
    assert queue.idle("t/p/a")


@pytest.mark.parametrize("order", [["0", "1"], ["1", "0"]])
def test_readers_of_one_stream_that_go_back_keep_their_order(order: list[str]) -> None:
    queue = Mailboxes()
    queue.limit("t/p/a", mailbox=10, concurrent_turns=2)
    for n in range(3):
        queue.offer(turn(n, read_only=True))
    assert [t.id for t in queue.take(NOW)] == ["0", "1"]
    for id_ in order:
        queue.again(id_, 0.0)
        queue.validate()
    assert run_all(queue) == ["0", "1", "2"]


def test_what_the_store_holds_comes_in_though_the_mailbox_is_full() -> None:
    queue = Mailboxes(mailbox_limit=1)
    assert queue.offer(turn(0))
    assert not queue.offer(turn(1))
    assert queue.offer(turn(1), force=True)
    assert queue.waiting("t/p/a") == 2


def test_the_same_message_twice_is_one() -> None:
    queue = Mailboxes()
    assert queue.offer(turn(0))
    assert queue.offer(turn(0))
    assert len(queue) == 1
    queue.take(NOW)
    assert queue.offer(turn(0))
    assert len(queue) == 0
    queue.done("0")
    assert queue.offer(turn(0))
    assert run_all(queue) == ["0"]


def test_a_held_agent_starts_nothing_and_loses_nothing() -> None:
    queue = Mailboxes()
    queue.offer(turn(0))
    queue.take(NOW)
    queue.offer(turn(1))
    queue.offer(turn(2, stream="late", not_before=NOW + 1))
    queue.offer(turn(3, "t/p/b"))
    queue.hold("t/p/a")
    assert queue.next_wake() is None
    queue.done("0")
    assert run_all(queue, NOW + 2) == ["3"]
    assert queue.offer(turn(4))
    assert queue.waiting("t/p/a") == 3
    assert queue.next_wake() is None
    queue.release("t/p/a")
    queue.validate()
    assert run_all(queue, NOW + 2) == ["1", "2", "4"]


def test_a_hold_survives_that_the_agent_leaves_memory() -> None:
    queue = Mailboxes()
    queue.hold("t/p/a")
    queue.forget("t/p/a")
    queue.offer(turn(0))
    assert queue.take(NOW) == []
    queue.release("t/p/a")
    assert run_all(queue) == ["0"]


def test_what_is_dropped_is_returned_and_what_runs_goes_on() -> None:
    queue = Mailboxes()
    for n in range(4):
        queue.offer(turn(n, stream=str(n % 2), not_before=NOW + 9 if n == 1 else 0.0))
    queue.take(NOW)
    assert [t.id for t in queue.drop("t/p/a")] == ["1", "2", "3"]
    queue.validate()
    assert len(queue) == 0
    assert queue.next_wake() is None
    assert not queue.idle("t/p/a")
    queue.done("0")
    assert queue.idle("t/p/a")
    assert queue.drop("t/p/a") == []


def test_withdrawn_and_retried_messages_leave_no_garbage() -> None:
    queue = Mailboxes()
    queue.offer(turn(0))
    queue.take(NOW)
    for n in range(1, 2000):
        late = NOW + n if n % 2 else 0.0
        queue.offer(turn(n, stream=str(n), priority=-n, not_before=late))
        assert queue.withdraw(str(n), "t/p/a")
    queue.offer(turn(5000))
    queue.offer(turn(5001, stream="late", not_before=NOW + 1))
    queue.validate()
    assert len(queue._mailboxes["t/p/a"].heads) < 50
    assert len(queue._wakes) < 100


def test_a_decision_takes_microseconds() -> None:
    queue = Mailboxes()
    best = 1.0
    for n in range(300):
        queue.offer(turn(n))
        began = time.perf_counter()
        queue.take(NOW)
        best = min(best, time.perf_counter() - began)
        queue.done(str(n))
    assert best < 10e-6
    queue = Mailboxes(running_limit=1, mailbox_limit=100)
    for n in range(20_000):
        queue.offer(turn(n, f"t{n % 7}/p/{n % 2000}", stream=str(n % 3), priority=n % 2))
    best = 1.0
    for _ in range(300):
        began = time.perf_counter()
        (started,) = queue.take(NOW)
        best = min(best, time.perf_counter() - began)
        queue.done(started.id)
    assert best < 50e-6


class Machine(RuleBasedStateMachine):
    """Random lives of the mailboxes beside a model that is too slow and plain to be wrong."""

    AGENTS = ("x/p/a", "x/p/b", "y/p/c", "y/p/d")
    LIMIT = 4

    @initialize(running_limit=st.integers(1, 4), concurrent=st.integers(1, 3))
    def begin(self, running_limit: int, concurrent: int) -> None:
        self.queue = Mailboxes(running_limit=running_limit, mailbox_limit=self.LIMIT)
        self.concurrent = concurrent
        for agent in self.AGENTS:
            self.queue.limit(agent, mailbox=self.LIMIT, concurrent_turns=concurrent)
        self.now = NOW
        self.number = 0
        self.order: dict[str, int] = {}
        self.waiting: dict[str, Turn] = {}
        self.running: dict[str, Turn] = {}
        self.held: set[str] = set()

    @rule(
        agent=st.sampled_from(AGENTS),
        stream=st.sampled_from("st"),
        read_only=st.booleans(),
        priority=st.integers(0, 2),
        delay=st.sampled_from([0.0, 0.0, 0.0, 1.0, 5.0]),
        force=st.booleans(),
    )
    def offer(
        self, agent: str, stream: str, read_only: bool, priority: int, delay: float, force: bool
    ) -> None:
        t = turn(
            self.number,
            agent,
            read_only=read_only,
            stream=stream,
            priority=priority,
            not_before=self.now + delay if delay else 0.0,
        )
        self.number += 1
        room = sum(w.agent == agent for w in self.waiting.values()) < self.LIMIT
        assert self.queue.offer(t, force=force) == (room or force)
        if room or force:
            self.waiting[t.id] = t
            self.order[t.id] = int(t.id)

    def could_start(self, agent: str) -> Turn | None:
        """What the rules say is next for an agent, as things stand now."""
        if agent in self.held:
            return None
        firsts: dict[str, Turn] = {}
        for t in sorted(self.waiting.values(), key=lambda t: self.order[t.id]):
            if t.agent == agent:
                firsts.setdefault(t.stream, t)
        due = [t for t in firsts.values() if t.not_before <= self.now]
        if not due:
            return None
        best = min(due, key=lambda t: (-t.priority, self.order[t.id]))
        mine = [r for r in self.running.values() if r.agent == agent]
        if any(not r.read_only for r in mine):
            return None
        if best.read_only:
            return best if len(mine) < self.concurrent else None
        return None if mine else best

    @rule()
    def take(self) -> None:
        for t in self.queue.take(self.now):
            assert self.could_start(t.agent) == t
            del self.waiting[t.id]
            self.running[t.id] = t
        if len(self.running) < self.queue.running_limit:
            assert not [a for a in self.AGENTS if self.could_start(a)]
        assert self.queue.running == self.running

    @rule(n=st.integers(0, 100))
    def done(self, n: int) -> None:
        if self.running:
            id_ = sorted(self.running)[n % len(self.running)]
            self.queue.done(id_)
            del self.running[id_]

    @rule(n=st.integers(0, 100), delay=st.sampled_from([0.0, 1.0, 5.0]))
    def again(self, n: int, delay: float) -> None:
        if self.running:
            id_ = sorted(self.running)[n % len(self.running)]
            until = self.now + delay if delay else 0.0
            self.queue.again(id_, until)
            self.waiting[id_] = self.running.pop(id_)._replace(not_before=until)

    @rule(n=st.integers(0, 100))
    def withdraw(self, n: int) -> None:
        if self.waiting:
            id_ = sorted(self.waiting)[n % len(self.waiting)]
            agent = self.waiting.pop(id_).agent
            assert self.queue.withdraw(id_, agent)
            assert not self.queue.withdraw(id_, agent)

    @rule(agent=st.sampled_from(AGENTS), on=st.booleans())
    def hold(self, agent: str, on: bool) -> None:
        if on:
            self.queue.hold(agent)
            self.held.add(agent)
        else:
            self.queue.release(agent)
            self.held.discard(agent)

    @rule(agent=st.sampled_from(AGENTS))
    def drop(self, agent: str) -> None:
        mine = [t for t in self.waiting.values() if t.agent == agent]
        assert self.queue.drop(agent) == sorted(mine, key=lambda t: self.order[t.id])
        for t in mine:
            del self.waiting[t.id]

    @rule(by=st.sampled_from([0.5, 1.0, 10.0]))
    def time_passes(self, by: float) -> None:
        self.now += by

    @rule()
    def wakes_in_time(self) -> None:
        """After a take: the next wake is the first time at which the model has more to run."""
        self.take()
        wake = self.queue.next_wake()
        firsts: dict[tuple[str, str], Turn] = {}
        for t in sorted(self.waiting.values(), key=lambda t: self.order[t.id]):
            firsts.setdefault((t.agent, t.stream), t)
        times = [
            t.not_before
            for t in firsts.values()
            if t.not_before > self.now and t.agent not in self.held
        ]
        assert wake == min(times, default=None)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "queue"):
            return
        self.queue.validate()
        assert len(self.queue) == len(self.waiting)
        for agent in self.AGENTS:
            mine = sum(t.agent == agent for t in self.waiting.values())
            assert self.queue.waiting(agent) == mine
            busy = any(t.agent == agent for t in self.running.values())
            assert self.queue.idle(agent) == (not mine and not busy)

    def teardown(self) -> None:
        """Whatever happened, all that waits can be brought to its end, in the pairs' order."""
        if not hasattr(self, "queue"):
            return
        for agent in list(self.held):
            self.hold(agent, on=False)
        self.now += 100.0
        started: dict[tuple[str, str], list[int]] = defaultdict(list)
        for _ in range(1000):
            self.take()
            if not self.running:
                break
            id_, t = next(iter(self.running.items()))
            started[t.agent, t.stream].append(int(id_))
            self.queue.done(id_)
            del self.running[id_]
        assert not self.waiting
        self.queue.take(self.now)
        assert not self.queue._mailboxes
        assert not self.queue._entries
        assert not self.queue._late


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)


@pytest.mark.parametrize("running_limit", [1, 3])
def test_no_tenant_starves_whatever_the_others_offer(running_limit: int) -> None:
    """Between two starts of a tenant that has work, every other starts at most once."""
    queue = Mailboxes(running_limit=running_limit, mailbox_limit=10_000)
    number = 0
    for tenant, agents in (("a", 50), ("b", 3), ("c", 1)):
        for n in range(60):
            queue.offer(turn(number, f"{tenant}/p/{n % agents}", priority=n))
            number += 1
    order: list[str] = []
    running: list[str] = []
    while len(order) < 120:
        started = queue.take(NOW)
        order += [t.tenant for t in started]
        running += [t.id for t in started]
        queue.done(running.pop(0))
    for tenant in "abc":
        places = [i for i, t in enumerate(order) if t == tenant]
        assert len(places) > 20
        gaps = [b - a for a, b in itertools.pairwise(places)]
        # One agent alone has to wait for its own turn to end, and no longer.
        assert max(gaps) <= 3 * running_limit, (tenant, max(gaps))
