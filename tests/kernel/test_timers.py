"""Timers, topics, monitors and links: messages that nobody sends just now."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from llmos import Context
from llmos.drivers.errors import StoreUnavailable
from llmos.drivers.stores.rows import SHARDS, DropTimer, PutTimer, TimerRow
from llmos.kernel.clock import next_due
from llmos.syscalls.errors import InvalidRequest, Quarantined, UnknownAgent
from tests.kernel.durable import ACTOR, OTHER, SEEN, THIRD, Actor, Look, Run, script
from tests.kernel.local import until
from tests.kernel.machine import Machine, MovedClock

DAY_S = 86_400.0


@script
async def ring(self: Actor, os: Context, message: Run) -> Any:
    SEEN.append(message.n)
    self.state.log.append(message.n)


@script
async def set_one(self: Actor, os: Context, message: Run) -> Any:
    return await os.timer("wake", Run(script="ring", n=message.n), after_s=message.n / 1000)


@pytest.fixture
def clocks(actors: Machine) -> Machine:
    script(ring)
    script(set_one)
    return actors


async def timers(machine: Machine, agent: str = ACTOR) -> list[Any]:
    found: list[Any] = await machine.read("timers_of", agent)
    return found


async def settled(machine: Machine) -> None:
    await until(lambda: not machine.host._inbox.entries)


# ------------------------------------------------------------------ once


async def test_a_timer_rings_once_when_it_is_due(clocks: Machine) -> None:
    before = clocks.clock.time()
    due = (await clocks.ask(ACTOR, Run(script="set_one", n=30))).value
    assert 0.03 <= due - before < 1.0
    (timer,) = await timers(clocks)
    assert (timer.name, timer.due, timer.cron) == ("wake", due, "")
    await until(lambda: SEEN)
    assert clocks.clock.time() >= due
    await settled(clocks)
    assert await timers(clocks) == []
    await asyncio.sleep(0.05)
    assert SEEN == [30]


async def test_a_timer_of_a_turn_that_fails_was_never_set(clocks: Machine) -> None:
    @script
    async def fails(self: Actor, os: Context, message: Run) -> Any:
        await os.timer("wake", Run(script="ring"), after_s=0)
        raise ValueError("no")

    with pytest.raises(Exception, match="no"):
        await clocks.ask(ACTOR, Run(script="fails"))
    assert await timers(clocks) == []
    await asyncio.sleep(0.03)
    assert SEEN == []


async def test_a_timer_survives_the_host_and_rings_at_its_time(clocks: Machine) -> None:
    due = (await clocks.ask(ACTOR, Run(script="set_one", n=60))).value
    await clocks.new_host(dead=True)
    await until(lambda: SEEN)
    assert clocks.clock.time() >= due
    await settled(clocks)
    assert SEEN == [60]


async def test_what_was_due_while_nobody_served_rings_once(clocks: Machine) -> None:
    await clocks.ask(ACTOR, Run(script="set_one", n=5))
    await clocks.kill()
    await asyncio.sleep(0.05)
    assert SEEN == []
    await clocks.new_host()
    await until(lambda: SEEN)
    await settled(clocks)
    await clocks.new_host(dead=True)
    await asyncio.sleep(0.05)
    assert SEEN == [5]


async def test_a_host_lost_right_after_it_rang_leaves_one_message(clocks: Machine) -> None:
    """The message comes with the commit that takes the timer away."""
    clocks.journal.parts.clear()
    await clocks.ask(ACTOR, Run(script="set_one", n=20))
    await until(
        lambda: any(type(w).__name__ == "TakeTimer" for p in clocks.journal.parts for w in p)
    )
    await clocks.new_host(dead=True)
    await until(lambda: SEEN)
    await settled(clocks)
    await asyncio.sleep(0.05)
    assert (await clocks.stored(ACTOR))["log"] == [20]


async def test_a_timer_of_the_same_name_replaces_the_one_before(clocks: Machine) -> None:
    first = (await clocks.ask(ACTOR, Run(script="set_one", n=60_000))).value
    second = (await clocks.ask(ACTOR, Run(script="set_one", n=10))).value
    assert second < first
    await until(lambda: SEEN == [10])
    await settled(clocks)
    assert await timers(clocks) == []


async def test_a_cancelled_timer_does_not_ring(clocks: Machine) -> None:
    @script
    async def cancels(self: Actor, os: Context, message: Run) -> Any:
        await os.cancel_timer("wake")
        await os.cancel_timer("there is none")

    await clocks.ask(ACTOR, Run(script="set_one", n=3_000_000))
    await clocks.ask(ACTOR, Run(script="cancels"))
    assert await timers(clocks) == []
    clocks.clock.ahead_s = 3600.0
    await asyncio.sleep(0.08)
    assert SEEN == []


async def test_agents_have_timers_of_their_own(clocks: Machine) -> None:
    await clocks.ask(ACTOR, Run(script="set_one", n=10))
    await clocks.ask(OTHER, Run(script="set_one", n=12))
    await until(lambda: sorted(SEEN) == [10, 12])
    await settled(clocks)


# ------------------------------------------------------------------ the wall clock


async def test_a_wall_clock_set_ahead_rings(clocks: Machine) -> None:
    await clocks.ask(ACTOR, Run(script="set_one", n=3_000_000))
    await asyncio.sleep(0.03)
    assert SEEN == []
    clocks.clock.ahead_s = 3600.0
    await until(lambda: SEEN == [3_000_000])
    await settled(clocks)


async def test_a_wall_clock_set_back_rings_neither_early_nor_twice(clocks: Machine) -> None:
    await clocks.ask(ACTOR, Run(script="set_one", n=10))
    await until(lambda: SEEN == [10])
    await settled(clocks)
    clocks.clock.ahead_s = -3600.0
    await clocks.ask(ACTOR, Run(script="set_one", n=11))
    await until(lambda: SEEN == [10, 11])
    await settled(clocks)
    clocks.clock.ahead_s = 0.0
    await asyncio.sleep(0.05)
    assert SEEN == [10, 11]


# ------------------------------------------------------------------ again and again


async def test_a_schedule_rings_again_and_again_until_it_is_cancelled(clocks: Machine) -> None:
    @script
    async def daily(self: Actor, os: Context, message: Run) -> Any:
        return await os.schedule("report", Run(script="ring"), "0 9 * * *", "Europe/Berlin")

    @script
    async def no_more(self: Actor, os: Context, message: Run) -> Any:
        await os.cancel_timer("report")

    first = (await clocks.ask(ACTOR, Run(script="daily"))).value
    for n in range(1, 4):
        (timer,) = await timers(clocks)
        assert timer.due == pytest.approx(first, abs=3 * DAY_S + 7200)
        clocks.clock.ahead_s += timer.due - clocks.clock.time() + 1.0
        await until(lambda n=n: len(SEEN) == n)
        await settled(clocks)
        (following,) = await timers(clocks)
        assert following.due == next_due("0 9 * * *", "Europe/Berlin", timer.due)
    await clocks.ask(ACTOR, Run(script="no_more"))
    clocks.clock.ahead_s += 2 * DAY_S
    await asyncio.sleep(0.05)
    assert len(SEEN) == 3
    assert await timers(clocks) == []


async def test_what_a_schedule_missed_it_makes_up_for_once(clocks: Machine) -> None:
    @script
    async def hourly(self: Actor, os: Context, message: Run) -> Any:
        await os.schedule("tick", Run(script="ring"), "0 * * * *")

    await clocks.ask(ACTOR, Run(script="hourly"))
    clocks.clock.ahead_s += DAY_S
    await until(lambda: SEEN)
    await settled(clocks)
    await asyncio.sleep(0.05)
    assert len(SEEN) == 1
    (timer,) = await timers(clocks)
    assert 0 < timer.due - clocks.clock.time() <= 3600


async def test_a_schedule_that_cannot_be_read_is_refused(clocks: Machine) -> None:
    @script
    async def wrong(self: Actor, os: Context, message: Run) -> Any:
        await os.schedule("x", Run(script="ring"), "61 * * * *")

    with pytest.raises(InvalidRequest, match="cron"):
        await clocks.ask(ACTOR, Run(script="wrong"))


async def test_a_schedule_cancelled_while_it_rings_is_not_set_again(clocks: Machine) -> None:
    @script
    async def hourly(self: Actor, os: Context, message: Run) -> Any:
        await os.schedule("tick", Run(script="ring"), "0 * * * *")

    await clocks.ask(ACTOR, Run(script="hourly"))
    assert len(await timers(clocks)) == 1
    # The host has read it; then it goes, as with a kill or a cancellation.
    reads = clocks.journal.read

    async def late(method: str, *args: Any, **options: Any) -> Any:
        found = await reads(method, *args, **options)
        if method == "timers" and found:
            await clocks.journal.commit([[DropTimer(ACTOR, "tick")]])
        return found

    clocks.journal.read = late  # type: ignore[method-assign]
    clocks.clock.ahead_s += 3600.0
    await asyncio.sleep(0.06)
    assert await timers(clocks) == []
    assert SEEN == []


async def test_timers_of_others_shards_are_left_alone(clocks: Machine) -> None:
    clocks.host._inbox.take_shards(())
    from llmos.drivers.stores.rows import TimerRow

    envelope = clocks.envelope(ACTOR, Run(script="ring", n=1)).pack()
    row = TimerRow(ACTOR, "wake", 1.0, envelope)
    assert await clocks.journal.commit([[PutTimer(row)]]) == [None]
    await asyncio.sleep(0.05)
    assert SEEN == []
    clocks.host._inbox.take_shards(range(SHARDS))
    await until(lambda: SEEN == [1])
    await settled(clocks)


def test_a_clock_can_be_set() -> None:
    clock = MovedClock()
    before = clock.time()
    clock.ahead_s = 3600.0
    assert clock.time() - before >= 3600


# ------------------------------------------------------------------ topics


async def test_what_is_published_reaches_all_who_want_it(clocks: Machine) -> None:
    @script
    async def wants(self: Actor, os: Context, message: Run) -> Any:
        await os.subscribe("news")

    @script
    async def wants_no_more(self: Actor, os: Context, message: Run) -> Any:
        await os.unsubscribe("news")

    @script
    async def tells(self: Actor, os: Context, message: Run) -> Any:
        return await os.publish("news", Run(script="ring", n=message.n))

    assert (await clocks.ask(ACTOR, Run(script="tells", n=0))).value == 0
    for agent in (ACTOR, OTHER, THIRD):
        await clocks.ask(agent, Run(script="wants"))
    # Not to oneself.
    assert (await clocks.ask(ACTOR, Run(script="tells", n=1))).value == 2
    await until(lambda: SEEN == [1, 1])
    await clocks.ask(OTHER, Run(script="wants_no_more"))
    await clocks.new_host(dead=True)
    assert (await clocks.ask(ACTOR, Run(script="tells", n=2))).value == 1
    await until(lambda: SEEN == [1, 1, 2])
    await settled(clocks)
    assert (await clocks.stored(THIRD))["log"] == [1, 2]
    assert (await clocks.stored(OTHER))["log"] == [1]


async def test_a_publication_of_a_turn_that_fails_never_was(clocks: Machine) -> None:
    @script
    async def wants(self: Actor, os: Context, message: Run) -> Any:
        await os.subscribe("news")

    @script
    async def fails(self: Actor, os: Context, message: Run) -> Any:
        await os.publish("news", Run(script="ring", n=1))
        await os.subscribe("news")
        raise ValueError("no")

    await clocks.ask(OTHER, Run(script="wants"))
    with pytest.raises(Exception, match="no"):
        await clocks.ask(ACTOR, Run(script="fails"))
    await asyncio.sleep(0.01)
    assert SEEN == []
    assert await clocks.read("subscribers", "acme/news") == [OTHER]


# ------------------------------------------------------------------ monitors and links


async def quarantine(machine: Machine, agent: str) -> None:
    @script
    async def breaks(self: Actor, os: Context, message: Run) -> Any:
        raise ValueError(f"no {message.n}")

    for n in range(4):
        await machine.tell(agent, Run(script="breaks", n=n), stream=f"breaker:{n}", seq=1)
    await until(lambda: (agent, "quarantined") in machine.kernel.ended_agents)


async def test_who_monitors_an_agent_is_told_when_it_is_quarantined(clocks: Machine) -> None:
    @script
    async def watches(self: Actor, os: Context, message: Run) -> Any:
        await os.monitor(ACTOR)

    @script
    async def watches_no_more(self: Actor, os: Context, message: Run) -> Any:
        await os.demonitor(ACTOR)

    await clocks.ask(OTHER, Run(script="watches"))
    await clocks.ask(THIRD, Run(script="watches"))
    await clocks.ask(THIRD, Run(script="watches_no_more"))
    await clocks.new_host()
    await quarantine(clocks, ACTOR)
    async with asyncio.timeout(5):
        while not (told := (await clocks.ask(OTHER, Look())).value):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    assert told == [["exited", ACTOR, "quarantined"]]
    assert (await clocks.ask(THIRD, Look())).value == []
    # It is told, not ended.
    assert (await clocks.read("agent", OTHER)).hold == ""


async def test_who_is_linked_to_an_agent_is_held_with_it(clocks: Machine) -> None:
    @script
    async def links(self: Actor, os: Context, message: Run) -> Any:
        await os.link(ACTOR)

    await clocks.ask(OTHER, Run(script="links"))
    assert {(m.watched, m.watcher) for m in await clocks.read("monitors", ACTOR)} == {
        (ACTOR, OTHER)
    }
    assert {(m.watched, m.watcher) for m in await clocks.read("monitors", OTHER)} == {
        (OTHER, ACTOR)
    }
    await quarantine(clocks, ACTOR)
    async with asyncio.timeout(5):
        while not (hold := (await clocks.read("agent", OTHER)).hold):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    assert hold == "quarantined"
    assert f"linked to {ACTOR}" in (await clocks.read("agent", OTHER)).story
    assert isinstance(await clocks.tell(OTHER, Run(script="ring")), Quarantined)
    assert (await clocks.ask(THIRD, Look())).value == []


async def test_only_agents_of_ones_tenant_can_be_watched(clocks: Machine) -> None:
    @script
    async def spies(self: Actor, os: Context, message: Run) -> Any:
        await os.monitor("globex/actor/main")

    with pytest.raises(UnknownAgent):
        await clocks.ask(ACTOR, Run(script="spies"))


async def test_a_page_of_timers_that_cannot_be_kept_is_not_asked_for_without_end(
    clocks: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmos.kernel.timers.PAGE", 1)
    monkeypatch.setattr("llmos.kernel.timers.LOOK_S", 1.0)
    reads = 0
    read = clocks.host._timers._services.read_store

    async def counted(method: str, *args: Any, **options: Any) -> Any:
        nonlocal reads
        reads += method == "timers"
        return await read(method, *args, **options)

    monkeypatch.setattr(clocks.host._timers._services, "read_store", counted)
    envelope = clocks.envelope(ACTOR, Look())._replace(asked=False).pack()
    due = [PutTimer(TimerRow(ACTOR, name, 1.0, envelope)) for name in "ab"]
    assert await clocks.journal.commit([due]) == [None]
    clocks.journal.refuse_all = StoreUnavailable("store", "disk full")
    clocks.host._timers.changed()
    await until(lambda: reads)
    await asyncio.sleep(0.3)  # In which it would ask hundreds of times.
    assert reads <= 3
    clocks.journal.refuse_all = None
    clocks.host._timers.changed()
    async with asyncio.timeout(5):
        while await timers(clocks):  # noqa: ASYNC110 - for what has no event to wait for
            await asyncio.sleep(0.01)
