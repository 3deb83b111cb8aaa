from __future__ import annotations

from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from llmos.kernel.core.runqueue import RunQueue, Turn


def turn(number: int, agent: str = "t/p/a", *, read_only: bool = False) -> Turn:
    return Turn(str(number), agent, agent.split("/")[0], read_only)


def test_turns_of_one_agent_run_one_after_the_other() -> None:
    queue = RunQueue()
    for n in range(3):
        assert queue.offer(turn(n))
    order = []
    while started := queue.take():
        assert len(started) == 1
        order.append(started[0].id)
        queue.validate()
        queue.done(started[0].id)
    assert order == ["0", "1", "2"]
    assert len(queue) == 0
    queue.validate()


def test_read_only_turns_run_side_by_side_up_to_their_limit() -> None:
    queue = RunQueue()
    queue.limit("t/p/a", mailbox=10, concurrent_turns=3)
    for n in range(5):
        queue.offer(turn(n, read_only=True))
    assert [t.id for t in queue.take()] == ["0", "1", "2"]
    queue.done("1")
    assert [t.id for t in queue.take()] == ["3"]
    queue.validate()


def test_a_writing_turn_waits_for_readers_and_is_not_overtaken() -> None:
    queue = RunQueue()
    queue.limit("t/p/a", mailbox=10, concurrent_turns=4)
    queue.offer(turn(0, read_only=True))
    queue.offer(turn(1))
    queue.offer(turn(2, read_only=True))
    assert [t.id for t in queue.take()] == ["0"]
    assert queue.take() == []
    queue.done("0")
    assert [t.id for t in queue.take()] == ["1"]
    assert queue.take() == []
    queue.done("1")
    assert [t.id for t in queue.take()] == ["2"]
    queue.validate()


def test_a_full_mailbox_refuses_and_changes_nothing() -> None:
    queue = RunQueue(mailbox_limit=2)
    assert queue.offer(turn(0))
    assert queue.offer(turn(1))
    assert not queue.offer(turn(2))
    assert queue.waiting("t/p/a") == 2
    queue.validate()


def test_a_flooding_tenant_does_not_hold_up_another() -> None:
    queue = RunQueue(running_limit=2, mailbox_limit=1000)
    for n in range(100):
        queue.offer(turn(n, f"flood/p/{n}"))
    queue.offer(turn(1000, "quiet/p/a"))
    first = [t.tenant for t in queue.take()]
    assert sorted(first) == ["flood", "quiet"]
    queue.validate()


def test_withdraw_lets_the_next_one_run() -> None:
    queue = RunQueue()
    queue.limit("t/p/a", mailbox=10, concurrent_turns=4)
    queue.offer(turn(0, read_only=True))
    queue.take()
    queue.offer(turn(1))
    queue.offer(turn(2, read_only=True))
    assert queue.take() == []
    assert queue.withdraw("1", "t/p/a")
    assert not queue.withdraw("1", "t/p/a")
    assert [t.id for t in queue.take()] == ["2"]
    queue.validate()


def test_a_message_withdrawn_while_it_is_listed_leaves_nothing_behind() -> None:
    queue = RunQueue(running_limit=1)
    queue.limit("t/p/a", mailbox=10, concurrent_turns=4)
    queue.offer(turn(0, read_only=True))
    queue.take()
    queue.offer(turn(1, read_only=True))
    assert queue.withdraw("1", "t/p/a")
    queue.validate()
    queue.done("0")
    queue.validate()
    assert queue.take() == []
    queue.offer(turn(2))
    assert [t.id for t in queue.take()] == ["2"]
    queue.done("2")
    queue.validate()
    assert not queue._mailboxes


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("offer"), st.integers(0, 5), st.booleans()),
            st.tuples(st.just("take"), st.just(0), st.just(False)),
            st.tuples(st.just("done"), st.integers(0, 100), st.just(False)),
            st.tuples(st.just("withdraw"), st.integers(0, 100), st.just(False)),
        ),
        max_size=120,
    ),
    st.integers(1, 4),
)
def test_order_exclusion_and_nothing_lost(
    steps: list[tuple[str, int, bool]], running_limit: int
) -> None:
    queue = RunQueue(running_limit=running_limit, mailbox_limit=5)
    for a in range(6):
        queue.limit(f"t{a % 2}/p/{a}", mailbox=5, concurrent_turns=2)
    number = 0
    waiting: dict[str, Turn] = {}
    running: dict[str, Turn] = {}
    started: dict[str, list[int]] = defaultdict(list)

    def take() -> None:
        for t in queue.take():
            assert waiting.pop(t.id) == t
            running[t.id] = t
            started[t.agent].append(int(t.id))

    for what, n, flag in steps:
        if what == "offer":
            t = turn(number, f"t{n % 2}/p/{n}", read_only=flag)
            if queue.offer(t):
                waiting[t.id] = t
            number += 1
        elif what == "take":
            take()
        elif what == "done" and running:
            id_ = sorted(running)[n % len(running)]
            del running[id_]
            queue.done(id_)
        elif what == "withdraw" and waiting:
            id_ = sorted(waiting)[n % len(waiting)]
            assert queue.withdraw(id_, waiting.pop(id_).agent)
        queue.validate()
    # Whatever happened, all that waits can be brought to its end.
    for _ in range(1000):
        take()
        if not running:
            break
        queue.done(next(iter(running)))
        del running[next(iter(running))]
    assert not waiting
    assert not len(queue)
    for order in started.values():
        assert order == sorted(order)
    queue.validate()
