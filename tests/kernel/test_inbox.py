"""What becomes of messages: once, in order, tried again, given up, and who is told."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest

from llmos import Context
from llmos.drivers.errors import StaleEpoch, StoreUnavailable
from llmos.drivers.stores.rows import (
    SHARDS,
    AgentRow,
    DropLaunch,
    LaunchRow,
    MailRow,
    PutLaunch,
    PutMail,
    SaveAgent,
    TakeShards,
)
from llmos.kernel import activation
from llmos.kernel.core.attempts import MailPolicy
from llmos.kernel.program import StateError
from llmos.syscalls.errors import (
    Busy,
    DeliveryFailed,
    HandlerFailed,
    Quarantined,
    UnknownAgent,
)
from llmos.syscalls.messages import Wire
from tests.kernel.durable import (
    ACTOR,
    OTHER,
    PROGRAM,
    SCRIPTS,
    SEEN,
    THIRD,
    Actor,
    Look,
    Run,
    script,
)
from tests.kernel.local import until
from tests.kernel.machine import Machine
from tests.kernel.programs import gate


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow each other at once, but for the order of their delays."""
    quick = MailPolicy(first_delay_s=0.004, max_delay_s=0.05, jitter=0.0)

    def policy(attempts: int, deaths: int) -> MailPolicy:
        return MailPolicy(attempts, deaths, quick.first_delay_s, 2.0, quick.max_delay_s, 0.0)

    monkeypatch.setattr("llmos.kernel.host.MailPolicy", policy)


@script
async def note(self: Actor, os: Context, message: Run) -> Any:
    SEEN.append(message.n)
    self.state.log.append(message.n)
    return message.n


@pytest.fixture
def scripts(actors: Machine) -> Machine:
    """The machine clears the scripts when it starts."""
    script(note)
    return actors


def idle(machine: Machine) -> bool:
    return not machine.host._inbox.entries


async def log_of(machine: Machine, agent: str) -> list[Any]:
    value = (await machine.ask(agent, Look())).value
    assert isinstance(value, list)
    return value


# ------------------------------------------------------------------ once


async def test_an_ask_repeated_after_the_host_died_finds_the_recorded_reply(
    scripts: Machine,
) -> None:
    envelope = scripts.envelope(ACTOR, Run(script="note", n=1))
    first = await scripts.host_handle.deliver.remote(envelope)
    await scripts.new_host(dead=True)
    again = await scripts.host_handle.deliver.remote(envelope._replace(again=True))
    assert (again.turn, again.message()) == (first.turn, first.message())
    assert again.labels == first.labels
    assert SEEN == [1]
    assert await log_of(scripts, ACTOR) == [1]


async def test_a_failed_ask_repeated_after_the_host_died_finds_its_error(
    scripts: Machine,
) -> None:
    @script
    async def fails(self: Actor, os: Context, message: Run) -> Any:
        SEEN.append("run")
        raise ValueError("no")

    envelope = scripts.envelope(ACTOR, Run(script="fails"))
    first = await scripts.host_handle.deliver.remote(envelope)
    await scripts.new_host(dead=True)
    again = await scripts.host_handle.deliver.remote(envelope._replace(again=True))
    assert type(again.error) is type(first.error) is HandlerFailed
    assert str(again.error) == str(first.error)
    assert SEEN == ["run"]


@pytest.mark.parametrize("dead", [False, True])
async def test_the_same_message_told_twice_is_handled_once(scripts: Machine, dead: bool) -> None:
    envelope = scripts.envelope(ACTOR, Run(script="note", n=1))
    assert await scripts.post(envelope, envelope) == [None, None]
    await until(lambda: idle(scripts))
    assert await scripts.post(envelope._replace(again=True)) == [None]
    # Also by a host that knows nothing of it but what the store knows.
    await scripts.new_host(dead=dead)
    assert await scripts.post(envelope._replace(again=True)) == [None]
    await scripts.ask(ACTOR, Look())
    assert SEEN == [1]
    assert await log_of(scripts, ACTOR) == [1]


async def test_a_message_told_again_while_it_is_recovered_has_one_turn(scripts: Machine) -> None:
    @script
    async def slow(self: Actor, os: Context, message: Run) -> Any:
        SEEN.append("slow")
        await gate("slow").wait()

    envelope = scripts.envelope(ACTOR, Run(script="slow"))
    assert await scripts.post(envelope) == [None]
    await until(lambda: SEEN == ["slow"])
    await scripts.new_host(dead=True)
    posting = asyncio.create_task(scripts.post(envelope._replace(again=True)))
    await until(lambda: SEEN == ["slow"] * 2)
    gate("slow").set()
    assert await posting == [None]
    await until(lambda: idle(scripts))
    assert len(SEEN) == 2
    assert len(await scripts.turns(ACTOR)) == 1


async def test_a_tell_is_acknowledged_when_it_is_durable(scripts: Machine) -> None:
    await scripts.ask(ACTOR, Look())
    scripts.journal.gate.clear()
    telling = asyncio.create_task(scripts.tell(ACTOR, Run(script="note", n=1)))
    await asyncio.sleep(0.03)
    assert not telling.done()
    scripts.journal.gate.set()
    assert await telling is None
    # A host that is lost right after still leaves it to the next.
    await scripts.new_host(dead=True)
    await until(lambda: idle(scripts))
    assert await log_of(scripts, ACTOR) == [1]


async def test_what_was_acknowledged_and_not_begun_is_handled_by_the_next_host(
    scripts: Machine,
) -> None:
    @script
    async def stays(self: Actor, os: Context, message: Run) -> Any:
        await gate("stays").wait()

    await scripts.tell(ACTOR, Run(script="stays"))
    for n in range(5):
        assert await scripts.tell(ACTOR, Run(script="note", n=n)) is None
    await scripts.new_host(dead=True)
    gate("stays").set()
    await until(lambda: idle(scripts))
    assert await log_of(scripts, ACTOR) == [0, 1, 2, 3, 4]


# ------------------------------------------------------------------ tried again


async def test_a_failing_message_is_tried_again_and_then_a_dead_letter(scripts: Machine) -> None:
    times: list[float] = []

    @script
    async def fails(self: Actor, os: Context, message: Run) -> Any:
        times.append(asyncio.get_running_loop().time())
        self.state.log.append("never")
        await os.random()
        raise ValueError(f"no {len(times)}")

    envelope = scripts.envelope(ACTOR, Run(script="fails", n=7))
    assert await scripts.post(envelope) == [None]
    await until(lambda: len(times) == 5)
    await until(lambda: idle(scripts))
    (letter,) = await scripts.read("dead")
    assert letter.mail.key == envelope.key
    assert letter.mail.attempts == 5
    assert "5 of 5" in letter.reason
    assert [f"no {n}" in letter.story for n in range(1, 6)] == [True] * 5
    # Each attempt has a turn of its own, with its calls.
    turns = await scripts.turns(ACTOR)
    assert len({t.turn for t in turns}) == 5
    assert {t.phase for t in turns} == {"failed"}
    assert all(t.turn in letter.story for t in turns)
    assert await log_of(scripts, ACTOR) == []
    # The waits grow.
    waits = [after - before for before, after in pairwise(times)]
    assert all(wait >= 0.004 * 2**n for n, wait in enumerate(waits))
    # It is handled no more, whoever repeats it; a person can.
    assert await scripts.post(envelope._replace(again=True)) == [None]
    await asyncio.sleep(0.01)
    assert len(times) == 5
    SCRIPTS["fails"] = note
    assert await scripts.operator.retry_dead([letter.id]) == [letter.id]
    await until(lambda: SEEN == [7])
    await until(lambda: idle(scripts))
    assert await log_of(scripts, ACTOR) == [7]
    assert not await scripts.read("dead")


async def test_attempts_are_counted_over_hosts(scripts: Machine) -> None:
    @script
    async def fails(self: Actor, os: Context, message: Run) -> Any:
        SEEN.append("run")
        raise ValueError("no")

    await scripts.tell(ACTOR, Run(script="fails"))
    await until(lambda: len(SEEN) >= 2)
    await scripts.new_host()
    await until(lambda: idle(scripts) and len(SEEN) >= 5)
    assert len(SEEN) in (5, 6)  # The old host may have been in the middle of one.
    (letter,) = await scripts.read("dead")
    assert letter.mail.attempts == 5


async def test_a_message_that_succeeds_at_last_is_handled_once(scripts: Machine) -> None:
    @script
    async def third_time(self: Actor, os: Context, message: Run) -> Any:
        SEEN.append("run")
        self.state.log.append(len(SEEN))
        await os.send(OTHER, Run(script="note", n=len(SEEN)))
        if len(SEEN) < 3:
            raise ValueError("not yet")

    await scripts.tell(ACTOR, Run(script="third_time"))
    await until(lambda: SEEN[-1:] == [3] and idle(scripts))
    assert await log_of(scripts, ACTOR) == [3]
    # What the failed attempts sent was never sent.
    assert await log_of(scripts, OTHER) == [3]
    assert not await scripts.read("dead")


async def test_an_asked_message_is_not_tried_again(scripts: Machine) -> None:
    @script
    async def fails(self: Actor, os: Context, message: Run) -> Any:
        SEEN.append("run")
        raise ValueError("no")

    with pytest.raises(HandlerFailed):
        await scripts.ask(ACTOR, Run(script="fails"))
    await asyncio.sleep(0.03)
    assert SEEN == ["run"]
    assert not await scripts.read("dead")
    assert not await scripts.read("waiting", ACTOR)


async def test_what_another_attempt_would_not_change_is_given_up_at_once(
    scripts: Machine,
) -> None:
    """It was good when it was sent; the program has changed since."""
    bad = scripts.envelope(ACTOR, Run(script="note"), asked=False)._replace(
        wire=Wire.of_json("Run", {"script": 3, "m": 1}), stream="acme/actor/other", seq=1
    )
    strange = bad._replace(wire=Wire.of_json("Strange", {}), seq=2)
    rows = [MailRow(ACTOR, e.stream, e.seq, e.pack()) for e in (bad, strange)]
    rows.append(MailRow(ACTOR, "garbled", 3, b"\xc1"))
    assert await scripts.journal.commit([[PutMail(row)] for row in rows]) == [None] * 3
    await scripts.host.hint()
    letters: list[Any] = []
    async with asyncio.timeout(5):
        while len(letters) < 3:
            letters = await scripts.read("dead")
            await asyncio.sleep(0.002)
    reasons = {letter.mail.seq: letter.reason for letter in letters}
    assert "m: Extra inputs" in reasons[1]
    assert "Strange" in reasons[2]
    assert not await scripts.read("waiting", ACTOR)


# ------------------------------------------------------------------ hosts that die


async def test_a_message_under_which_two_hosts_die_is_a_dead_letter(scripts: Machine) -> None:
    @script
    async def poison(self: Actor, os: Context, message: Run) -> Any:
        SEEN.append("poison")
        await gate("never").wait()

    await scripts.tell(ACTOR, Run(script="poison"))
    await scripts.tell(ACTOR, Run(script="note", n=1))
    await until(lambda: SEEN == ["poison"])
    await scripts.new_host(dead=True)
    await until(lambda: SEEN == ["poison"] * 2)
    await asyncio.sleep(0.005)
    await scripts.new_host(dead=True)
    # What waited behind it is handled.
    await until(lambda: SEEN == ["poison", "poison", 1])
    await until(lambda: idle(scripts))
    (letter,) = await scripts.read("dead")
    assert letter.mail.deaths == 2
    assert "2 hosts were lost" in letter.reason
    assert "llmos strace" in letter.story


async def test_who_asked_what_two_hosts_died_of_gets_an_error(scripts: Machine) -> None:
    @script
    async def poison(self: Actor, os: Context, message: Run) -> Any:
        SEEN.append("poison")
        await gate("never").wait()

    envelope = scripts.envelope(ACTOR, Run(script="poison"))
    asking = asyncio.ensure_future(scripts.host_handle.deliver.remote(envelope))
    for n in range(2):
        await until(lambda n=n: len(SEEN) == n + 1)
        await asyncio.sleep(0.01)
        await scripts.new_host(dead=True)
        with pytest.raises(Exception):  # noqa: B017, PT011
            await asking
        asking = asyncio.ensure_future(
            scripts.host_handle.deliver.remote(envelope._replace(again=True))
        )
    reply = await asking
    assert isinstance(reply.error, DeliveryFailed)
    assert (reply.error.agent, reply.error.losses) == (ACTOR, 2)
    assert not await scripts.read("dead")
    assert not await scripts.read("waiting", ACTOR)
    assert len(SEEN) == 2
    # It is the recorded reply, also for the host after.
    await scripts.new_host()
    again = await scripts.host_handle.deliver.remote(envelope._replace(again=True))
    assert isinstance(again.error, DeliveryFailed)


# ------------------------------------------------------------------ order


async def test_a_message_that_is_tried_again_is_not_overtaken_by_its_stream(
    scripts: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = MailPolicy(first_delay_s=0.3, jitter=0.0)
    monkeypatch.setattr(scripts.host._inbox._runner, "_policy", patient)

    @script
    async def shaky(self: Actor, os: Context, message: Run) -> Any:
        SEEN.append(message.n)
        if SEEN.count(message.n) < 2:
            raise ValueError("not yet")
        self.state.log.append(message.n)

    envelopes = [
        scripts.envelope(ACTOR, Run(script="shaky" if n == 1 else "note", n=n)) for n in range(4)
    ]
    other = scripts.envelope(ACTOR, Run(script="note", n=100), stream="client:2", seq=1)
    assert await scripts.post(*envelopes, other) == [None] * 5
    await until(lambda: idle(scripts))
    log = await log_of(scripts, ACTOR)
    assert [n for n in log if n < 100] == [0, 1, 2, 3]
    # Another stream does not wait for it.
    assert log.index(100) < log.index(1)


async def test_the_order_of_a_stream_is_kept_by_the_next_host(scripts: Machine) -> None:
    @script
    async def shaky(self: Actor, os: Context, message: Run) -> Any:
        SEEN.append("shaky")
        if len(SEEN) < 3:
            raise ValueError("not yet")
        self.state.log.append("shaky")

    envelopes = [
        scripts.envelope(ACTOR, Run(script="shaky")),
        *(scripts.envelope(ACTOR, Run(script="note", n=n)) for n in range(4)),
    ]
    await scripts.post(*envelopes)
    await until(lambda: SEEN)
    await scripts.new_host(dead=True)
    await until(lambda: idle(scripts) and len(SEEN) >= 7)
    assert await log_of(scripts, ACTOR) == ["shaky", 0, 1, 2, 3]


async def test_higher_priority_comes_first_between_streams_only(scripts: Machine) -> None:
    @script
    async def stays(self: Actor, os: Context, message: Run) -> Any:
        await gate("stays").wait()

    await scripts.tell(ACTOR, Run(script="stays"))

    def sent(n: int, stream: str, priority: int) -> Any:
        message = Run(script="note", n=n)
        return scripts.envelope(ACTOR, message, stream=stream, seq=n, priority=priority)

    await scripts.post(
        sent(1, "a", 0), sent(2, "a", 100), sent(3, "b", 0), sent(4, "c", 5), sent(5, "c", 50)
    )
    # The store keeps priorities, too.
    await scripts.new_host(dead=True)
    gate("stays").set()
    await until(lambda: idle(scripts))
    log = await log_of(scripts, ACTOR)
    assert log[:2] == [4, 5]
    assert log.index(1) < log.index(2)
    assert sorted(log) == [1, 2, 3, 4, 5]


async def test_asks_that_arrive_while_an_agent_is_loaded_keep_their_order(
    scripts: Machine,
) -> None:
    envelopes = [scripts.envelope(ACTOR, Run(script="note", n=n)) for n in range(10)]
    # Some of them as repetitions, for which the store is asked first.
    envelopes = [e._replace(again=n % 3 == 0) for n, e in enumerate(envelopes)]
    await asyncio.gather(*(scripts.host_handle.deliver.remote(e) for e in envelopes))
    assert list(range(10)) == SEEN
    assert not scripts.host._inbox._doors


async def test_a_full_mailbox_says_busy_and_the_order_is_kept(scripts: Machine) -> None:
    @script
    async def stays(self: Actor, os: Context, message: Run) -> Any:
        await gate("stays").wait()

    await scripts.tell(ACTOR, Run(script="stays"))
    await asyncio.sleep(0.01)
    envelopes = [scripts.envelope(ACTOR, Run(script="note", n=n)) for n in range(25)]
    first = await scripts.post(*envelopes)
    refused = [n for n, result in enumerate(first) if result is not None]
    assert refused == list(range(20, 25))
    assert all(isinstance(first[n], Busy) and first[n].retry_after_s > 0 for n in refused)
    gate("stays").set()
    left = envelopes[20:]
    while left:
        results = await scripts.post(*left)
        left = [e for e, result in zip(left, results, strict=True) if result is not None]
        await asyncio.sleep(0.002)
    await until(lambda: idle(scripts))
    assert await log_of(scripts, ACTOR) == list(range(25))


async def test_what_a_store_finds_full_waits_and_then_fails_with_nothing_sent(
    scripts: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmos.kernel.turns.MAX_MAILBOX", 2)
    monkeypatch.setattr("llmos.kernel.turns.FULL_RETRY_S", 0.002)

    @script
    async def stays(self: Actor, os: Context, message: Run) -> Any:
        await gate("stays").wait()

    @script
    async def sends(self: Actor, os: Context, message: Run) -> Any:
        self.state.log.append("sent")
        await os.send(OTHER, Run(script="note", n=message.n))
        await os.send(THIRD, Run(script="note", n=message.n))

    await scripts.tell(OTHER, Run(script="stays"))
    await scripts.tell(OTHER, Run(script="note", n=1))
    sending = scripts.asking(ACTOR, Run(script="sends", n=2))
    await asyncio.sleep(0.03)
    assert not sending.done()
    gate("stays").set()
    await sending
    await until(lambda: sorted(SEEN) == [1, 2, 2])
    # It does not wait for ever.
    monkeypatch.setattr("llmos.kernel.turns.STORE_PATIENCE_S", 0.02)
    gate("stays").clear()
    await scripts.tell(OTHER, Run(script="stays"))
    await scripts.tell(OTHER, Run(script="note", n=3))
    with pytest.raises(Busy, match=f"mailbox of {OTHER}"):
        await scripts.ask(ACTOR, Run(script="sends", n=4))
    assert await log_of(scripts, ACTOR) == ["sent"]
    gate("stays").set()
    await until(lambda: idle(scripts))
    assert 4 not in SEEN
    # What is sent next has the next number, and is not taken for what never left.
    await scripts.ask(ACTOR, Run(script="sends", n=5))
    await until(lambda: SEEN.count(5) == 2)


# ------------------------------------------------------------------ quarantine


async def test_an_agent_that_fails_too_often_is_quarantined_and_its_messages_wait(
    scripts: Machine,
) -> None:
    @script
    async def fails(self: Actor, os: Context, message: Run) -> Any:
        SEEN.append(message.n)
        raise ValueError(f"no {message.n}")

    for n in range(4):
        stream = f"client:{n}"
        await scripts.tell(ACTOR, Run(script="fails", n=n), stream=stream, seq=1)
    async with asyncio.timeout(5):
        while (  # noqa: ASYNC110 - the store has no event to wait for
            await scripts.read("agent", ACTOR) or AgentRow(ACTOR)
        ).hold != "quarantined":
            await asyncio.sleep(0.002)
    row = await scripts.read("agent", ACTOR)
    assert "4 different messages failed" in row.story
    assert "ValueError: no 3" in row.story
    seen = len(SEEN)
    await asyncio.sleep(0.03)
    assert len(SEEN) == seen
    assert isinstance(await scripts.tell(ACTOR, Run(script="note")), Quarantined)
    assert await log_of(scripts, OTHER) == []
    waiting = await scripts.read("waiting", ACTOR)
    # The program is mended, and a person lets it go on.
    script(note)
    SCRIPTS["fails"] = note
    await scripts.operator.release(ACTOR)
    await until(lambda: idle(scripts))
    assert len(await log_of(scripts, ACTOR)) == len(waiting)


# ------------------------------------------------------------------ virtual agents


async def test_an_agent_comes_into_being_with_its_first_message(scripts: Machine) -> None:
    born = "acme/actor/born-just-now"
    assert await scripts.read("agent", born) is None
    await scripts.tell(born, Run(script="note", n=3))
    await until(lambda: idle(scripts))
    assert (await scripts.stored(born))["log"] == [3]
    for stranger in ("acme/actress/main", "globex/actor/main", "acme/actor"):
        with pytest.raises(UnknownAgent):
            await scripts.ask(stranger, Look())
        assert isinstance(await scripts.tell(stranger, Look()), UnknownAgent)


async def test_an_idle_agent_leaves_memory_and_comes_back_with_its_state(
    scripts: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = scripts.host
    await scripts.ask(ACTOR, Run(script="note", n=1))
    await scripts.ask(OTHER, Run(script="note", n=2))

    @script
    async def stays(self: Actor, os: Context, message: Run) -> Any:
        await gate("stays").wait()

    running = scripts.asking(OTHER, Run(script="stays"))
    await asyncio.sleep(0.01)
    monkeypatch.setattr(activation, "IDLE_S", 0.0)

    def busy(agent: str) -> bool:
        return not host._inbox.mailboxes.idle(agent)

    assert host._activations.passivate(host._clock.monotonic(), busy) == 1
    assert host._activations.agents() == [OTHER]
    gate("stays").set()
    await running
    assert await log_of(scripts, ACTOR) == [1]
    await scripts.ask(ACTOR, Run(script="note", n=3))
    assert await log_of(scripts, ACTOR) == [1, 3]


async def test_many_agents_are_passivated_one_by_one(
    scripts: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activation, "MAX_ACTIVE", 3)
    names = [f"acme/actor/{n}" for n in range(8)]
    for n, name in enumerate(names):
        await scripts.ask(name, Run(script="note", n=n))
    host = scripts.host
    assert host._activations.passivate(host._clock.monotonic(), lambda agent: False) == 5
    assert host._activations.agents() == names[5:]
    assert [await log_of(scripts, name) for name in names] == [[n] for n in range(8)]


async def test_a_newer_state_than_the_program_is_refused_and_nothing_is_lost(
    scripts: Machine,
) -> None:
    await scripts.ask(ACTOR, Run(script="note", n=1))
    newer = SaveAgent(ACTOR, 0, b'{"log": [1], "of_the_future": 2}', Actor.state_version + 1, 2)
    assert await scripts.journal.commit([[newer]]) == [None]
    await scripts.new_host()
    with pytest.raises(StateError):
        await scripts.ask(ACTOR, Look())
    refused = await scripts.tell(ACTOR, Run(script="note", n=2))
    assert isinstance(refused, StateError)
    assert (await scripts.stored(ACTOR))["of_the_future"] == 2


async def test_mail_of_an_agent_that_cannot_be_loaded_is_not_lost(scripts: Machine) -> None:
    await scripts.register("acme/broken/main", "tests.kernel.durable:NoSuchProgram")
    envelope = scripts.envelope("acme/broken/main", Look(), asked=False)
    row = MailRow(envelope.receiver, envelope.stream, envelope.seq, envelope.pack())
    assert await scripts.journal.commit([[PutMail(row)]]) == [None]
    await scripts.host.hint()
    await asyncio.sleep(0.03)
    kept = [*await scripts.read("waiting", envelope.receiver), *await scripts.read("dead")]
    assert len(kept) == 1


# ------------------------------------------------------------------ owners


async def test_a_host_that_lost_its_shard_sends_the_asker_on(
    scripts: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmos.kernel.inbox.SHARD_S", 0.02)
    await scripts.ask(ACTOR, Look())
    scripts.host._inbox.take_shards(())
    reply = await scripts.deliver(ACTOR, Look())
    assert isinstance(reply.error, StaleEpoch)
    assert isinstance(await scripts.tell(ACTOR, Look()), StaleEpoch)
    # It waits a little for shards that it is just being given.
    asking = scripts.asking(ACTOR, Look())
    await asyncio.sleep(0.005)
    scripts.host._inbox.take_shards(range(SHARDS))
    assert (await asking).value == []


async def test_an_owner_that_was_replaced_acknowledges_nothing(scripts: Machine) -> None:
    await scripts.ask(ACTOR, Look())
    await scripts.journal.commit([[TakeShards(tuple(range(SHARDS)), 99)]])
    assert isinstance(await scripts.tell(ACTOR, Run(script="note", n=1)), StaleEpoch)
    assert not await scripts.read("waiting", ACTOR)


# ------------------------------------------------------------------ the store is away


async def test_a_store_that_is_away_when_a_host_begins_is_waited_for(scripts: Machine) -> None:
    @script
    async def stays(self: Actor, os: Context, message: Run) -> Any:
        await gate("stays").wait()
        self.state.log.append("stays")

    await scripts.tell(ACTOR, Run(script="stays"))
    await scripts.tell(ACTOR, Run(script="note", n=1))
    away = [StoreUnavailable("store", "the database is away")] * 3
    reads, activates = scripts.journal.read, scripts.journal.activate

    async def read(method: str, *args: Any, **options: Any) -> Any:
        if method == "mail" and len(away) > 1:
            return away.pop()
        return await reads(method, *args, **options)

    async def activate(agents: Any) -> Any:
        return away.pop() if len(away) == 1 else await activates(agents)

    scripts.journal.read = read  # type: ignore[method-assign]
    scripts.journal.activate = activate  # type: ignore[method-assign]
    await scripts.new_host(dead=True)
    assert await scripts.tell(ACTOR, Run(script="note", n=2)) is None
    assert not away
    gate("stays").set()
    await until(lambda: idle(scripts))
    # Nothing was given up because it could not be read for a while.
    assert await log_of(scripts, ACTOR) == ["stays", 1, 2]
    assert not await scripts.read("dead")


# ------------------------------------------------------------------ launches


async def test_a_killed_agents_turn_that_ends_late_changes_nothing(scripts: Machine) -> None:
    @script
    async def late(self: Actor, os: Context, message: Run) -> Any:
        SEEN.append("late")
        await gate("late").wait()
        self.state.log.append("late")

    asking = asyncio.create_task(scripts.deliver(ACTOR, Run(script="late")))
    await until(lambda: SEEN)
    again = LaunchRow("acme/actor/*", PROGRAM, b"\x80", "another launch", 2.0)
    drop, put = DropLaunch("acme/actor/*"), PutLaunch(again)
    assert await scripts.journal.commit([[drop, put]]) == [None]
    gate("late").set()
    reply = await asking
    assert reply.error is not None
    assert await scripts.stored(ACTOR) is None
