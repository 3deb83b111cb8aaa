"""A host among its servers, in one event loop, no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from llmos.drivers.errors import LlmosError, StaleEpoch, StoreUnavailable
from llmos.drivers.stores.rows import SHARDS, TakeShards
from llmos.kernel import record
from llmos.kernel.manifest import Manifest
from llmos.kernel.program import MAX_IMPORTS, ProgramError
from llmos.syscalls.errors import (
    Busy,
    Cancelled,
    CapabilityDenied,
    DeadlineExceeded,
    HandlerFailed,
    InvalidMessage,
    ReadOnlyTurn,
    UnhandledMessage,
    UnknownAgent,
    UnknownResource,
)
from llmos.syscalls.labels import Labels
from llmos.syscalls.messages import Message, Wire
from tests.kernel import programs
from tests.kernel.local import LocalHandle, until
from tests.kernel.machine import BORN, DESK, LIAR, PEER, Machine
from tests.kernel.programs import (
    GATES,
    STARTED,
    Count,
    Counted,
    Do,
    Gate,
    Peek,
    Said,
    Say,
    gate,
)


@pytest.fixture
async def machine(tmp_path: Path) -> AsyncIterator[Machine]:
    GATES.clear()
    STARTED.clear()
    made = Machine(tmp_path)
    await made.start()
    yield made
    for event in GATES.values():
        event.set()
    await made.stop()


# ------------------------------------------------------------------ a turn


async def test_a_turn_replies_and_is_recorded_with_its_syscalls(machine: Machine) -> None:
    reply = await machine.deliver(DESK, Say(text="hello there"))
    assert reply.message() == Said(text="hello there")
    assert reply.labels == Labels(trusted=False)
    assert [p.source for p in reply.provenance] == ["chat"]
    call, row = await machine.read("turn", reply.turn)
    assert (row.agent, row.kind, row.name, row.phase, row.epoch) == (
        DESK,
        "turn",
        "Say",
        "result",
        1,
    )
    assert record.view(row.result)["reply"]["body"] == {"text": "hello there"}
    assert (call.kind, call.name, call.phase, call.seq) == ("Generate", "chat", "result", 1)
    assert record.view(call.result)["text"] == "hello there"
    assert record.reply_of(row).message() == reply.message()


async def test_state_is_kept_from_turn_to_turn_and_in_the_store(machine: Machine) -> None:
    assert [(await machine.ask(DESK, Count())).total for _ in range(3)] == [1, 2, 3]
    assert (await machine.stored(DESK))["total"] == 3
    # Another host goes on where this one stopped.
    await machine.new_host()
    assert await machine.ask(DESK, Count()) == Counted(total=4)


async def test_many_turns_of_many_agents_lose_nothing(machine: Machine) -> None:
    for n in range(10):
        await machine.register(f"acme/desk/{n}", "tests.kernel.programs:Desk")
    agents = [f"acme/desk/{n}" for n in range(10) for _ in range(3)]
    await asyncio.gather(*(machine.ask(agent, Count()) for agent in agents))
    assert [(await machine.stored(f"acme/desk/{n}"))["total"] for n in range(10)] == [3] * 10


async def test_the_same_message_is_handled_once(machine: Machine) -> None:
    envelope = machine.envelope(DESK, Count())
    both = await asyncio.gather(*(machine.host_handle.deliver.remote(envelope) for _ in range(2)))
    again = await machine.host_handle.deliver.remote(envelope)
    assert {r.turn for r in (*both, again)} == {again.turn}
    assert await machine.post(envelope) == [None]
    assert (await machine.ask(DESK, Peek())).total == 1
    assert STARTED == ["count 1", "peek "]


# ------------------------------------------------------------------ order


async def test_turns_that_change_state_run_one_after_the_other(machine: Machine) -> None:
    first = machine.asking(DESK, Gate(name="one"))
    await until(lambda: STARTED)
    second = machine.asking(DESK, Gate(name="two"))
    other = await machine.ask(PEER, Count())
    assert other == Counted(total=1)
    assert STARTED == ["one", "count 1"]
    gate("two").set()
    gate("one").set()
    assert (await first, await second) == (Counted(total=1000), Counted(total=2000))


async def test_readers_run_beside_each_other_up_to_their_limit(machine: Machine) -> None:
    readers = [machine.asking(DESK, Peek(gate="g")) for _ in range(3)]
    await until(lambda: len(STARTED) == 2)
    await asyncio.sleep(0.01)
    assert len(STARTED) == 2
    writer = machine.asking(DESK, Count())
    gate("g").set()
    assert await asyncio.gather(*readers) == [Counted(total=0)] * 3
    assert await writer == Counted(total=1)
    assert STARTED[-1] == "count 1"


async def test_a_full_mailbox_answers_busy_and_takes_nothing(machine: Machine) -> None:
    first = machine.asking(DESK, Gate(name="g"))
    await until(lambda: STARTED)
    waiting = [machine.asking(DESK, Count()) for _ in range(3)]
    await asyncio.sleep(0.01)
    with pytest.raises(Busy, match="mailbox of acme/desk/main"):
        await machine.ask(DESK, Count())
    gate("g").set()
    await first
    assert [c.total for c in await asyncio.gather(*waiting)] == [1001, 1002, 1003]


async def test_of_posts_that_come_together_each_is_taken_or_told(machine: Machine) -> None:
    first = machine.asking(DESK, Gate(name="g"))
    await until(lambda: STARTED)
    envelopes = [machine.envelope(DESK, Count(by=10**n)) for n in range(6)]
    results = await machine.post(*envelopes)
    taken = [n for n, result in enumerate(results) if result is None]
    assert taken == [0, 1, 2]
    assert all(isinstance(r, Busy) for r in results[3:])
    gate("g").set()
    await first
    # One that was refused may come again under its own id.
    assert await machine.post(envelopes[4]) == [None]
    await until(lambda: "count 10000" in STARTED)
    assert (await machine.ask(DESK, Peek())).total == 1000 + 111 + 10**4


# ------------------------------------------------------------------ errors


async def test_a_handlers_error_is_told_recorded_and_leaves_the_state(machine: Machine) -> None:
    await machine.ask(DESK, Count(by=3))
    reply = await machine.deliver(DESK, Do(what="raise"))
    assert isinstance(reply.error, HandlerFailed)
    assert reply.error.error == "ZeroDivisionError: one by zero"
    assert reply.error.where.startswith("programs.py:")
    assert reply.error.turn == reply.turn
    row = (await machine.turns(DESK))[0]
    assert (row.turn, row.phase) == (reply.turn, "failed")
    assert record.view(row.result)["error"]["error"] == "HandlerFailed"
    assert await machine.ask(DESK, Peek()) == Counted(total=3)


@pytest.mark.parametrize(
    ("what", "error", "said"),
    [
        ("exit", HandlerFailed, "SystemExit"),
        ("type", HandlerFailed, "returned str"),
        ("denied", CapabilityDenied, "generate:forbidden"),
        ("odd state", LlmosError, "cannot be stored"),
        ("huge reply", Exception, "body"),
    ],
)
async def test_whatever_a_handler_does_ends_in_a_typed_error(
    machine: Machine, what: str, error: type[Exception], said: str
) -> None:
    reply = await machine.deliver(DESK, Do(what=what))
    assert isinstance(reply.error, error)
    assert said in str(reply.error)
    assert (await machine.turns(DESK))[0].phase == "failed"
    assert await machine.ask(DESK, Count()) == Counted(total=1)


async def test_a_program_that_cannot_be_made_is_told(machine: Machine) -> None:
    reply = await machine.deliver(BORN, Count())
    assert isinstance(reply.error, HandlerFailed)
    assert "no desk left" in str(reply.error)
    assert (await machine.turns(BORN))[0].phase == "failed"


async def test_a_reader_that_changes_the_state_is_refused(machine: Machine) -> None:
    reply = await machine.deliver(LIAR, Say())
    assert isinstance(reply.error, ReadOnlyTurn)
    assert reply.error.handler == "say"
    assert await machine.stored(LIAR) is None


async def test_messages_that_nobody_can_handle_are_told(machine: Machine) -> None:
    class Strange(Message):
        x: int = 0

    for agent, message, error in (
        ("acme/nobody/main", Say(), UnknownAgent),
        (DESK, Strange(), UnhandledMessage),
    ):
        reply = await machine.deliver(agent, message)
        assert isinstance(reply.error, error)
        posted = await machine.tell(agent, message)
        assert isinstance(posted, error)
    wrong = Wire.of_json("Count", {"by": "many"})
    bad = [machine.envelope(DESK, Say())._replace(wire=wrong) for _ in range(2)]
    assert isinstance((await machine.host_handle.deliver.remote(bad[0])).error, InvalidMessage)
    assert isinstance((await machine.post(bad[1]))[0], InvalidMessage)
    assert not await machine.turns(DESK)


# ------------------------------------------------------------------ deadlines and cancelling


async def test_a_turn_that_takes_too_long_is_ended_and_recorded(machine: Machine) -> None:
    await machine.ask(DESK, Peek())  # Loading the agent takes its time, too.
    reply = await machine.deliver(DESK, Gate(name="never"), deadline_s=0.1)
    assert isinstance(reply.error, DeadlineExceeded)
    assert reply.turn
    assert (await machine.turns(DESK))[0].phase == "failed"
    assert await machine.ask(DESK, Count()) == Counted(total=1)


async def test_a_message_that_waits_too_long_never_begins(machine: Machine) -> None:
    first = machine.asking(DESK, Gate(name="g"))
    await until(lambda: STARTED)
    late = await machine.deliver(DESK, Count(by=5), deadline_s=0.02)
    assert isinstance(late.error, DeadlineExceeded)
    assert late.turn == ""
    gate("g").set()
    await first
    assert STARTED == ["g"]
    assert await machine.ask(DESK, Peek()) == Counted(total=1000)


async def test_an_asker_who_leaves_cancels_the_turn(machine: Machine) -> None:
    asking = machine.asking(DESK, Gate(name="g"))
    await until(lambda: STARTED)
    asking.cancel()
    await until(lambda: not machine.host._inbox.entries)
    row = (await machine.turns(DESK))[0]
    assert isinstance(record.reply_of(row).error, Cancelled)
    assert await machine.ask(DESK, Peek()) == Counted(total=0)


async def test_a_turn_cancelled_while_it_is_committed_is_still_done(machine: Machine) -> None:
    """The store has its state, so memory must have it as well, or the next turn undoes it."""
    await machine.ask(DESK, Count())
    machine.journal.gate.clear()
    before = machine.journal.commits
    asking = machine.asking(DESK, Count(by=10))
    await until(lambda: machine.journal.commits > before and "count 10" in STARTED)
    asking.cancel()
    await asyncio.sleep(0.01)
    machine.journal.gate.set()
    assert await machine.ask(DESK, Count(by=100)) == Counted(total=111)
    assert (await machine.stored(DESK))["total"] == 111


async def test_a_killed_agent_is_forgotten_with_its_turns(machine: Machine) -> None:
    asking = machine.asking(DESK, Gate(name="g"))
    await until(lambda: STARTED)
    waiting = machine.asking(DESK, Count())
    await asyncio.sleep(0.01)
    await machine.host_handle.drop.remote(DESK, "a kill")
    for task in (asking, waiting):
        with pytest.raises(Cancelled, match="a kill"):
            await task


async def test_a_host_that_closes_takes_nothing_new(machine: Machine) -> None:
    asking = machine.asking(DESK, Gate(name="g"))
    await until(lambda: STARTED)
    closing = asyncio.create_task(machine.host.close(0.02))
    await asyncio.sleep(0)
    with pytest.raises(Cancelled, match="shutdown"):
        await machine.ask(PEER, Count())
    with pytest.raises(Cancelled, match="shutdown"):
        await asking
    await closing


# ------------------------------------------------------------------ commits


async def test_an_owner_that_was_replaced_commits_nothing(machine: Machine) -> None:
    await machine.ask(DESK, Count())
    asking = asyncio.create_task(machine.deliver(DESK, Gate(name="g")))
    await until(lambda: "g" in STARTED)
    await machine.journal.commit([[TakeShards(tuple(range(SHARDS)), 99)]])
    gate("g").set()
    reply = await asking
    assert isinstance(reply.error, StaleEpoch)
    assert reply.wire is None
    assert (await machine.stored(DESK))["total"] == 1


async def test_what_the_store_cannot_keep_nobody_sees_until_it_can(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmos.kernel.turns.STORE_RETRY_S", 0.05)
    await machine.ask(DESK, Count())
    machine.journal.refuse_all = StoreUnavailable("store", "disk full")
    asking = asyncio.create_task(machine.deliver(DESK, Do(what="tell")))
    await asyncio.sleep(0.15)
    assert not asking.done()
    assert STARTED == ["count 1"]
    machine.journal.refuse_all = None
    assert (await asking).error is None
    await until(lambda: "count 5" in STARTED)
    assert await machine.ask(DESK, Peek()) == Counted(total=1_000_001)


async def test_a_journal_that_is_restarted_is_waited_for(machine: Machine) -> None:
    await machine.ask(DESK, Count())
    machine.journal_handle.kill()
    asking = machine.asking(DESK, Count())
    await until(lambda: "commit" in machine.journal_handle.calls[-1:])
    await machine.publish(journal=None)
    await asyncio.sleep(0.01)
    assert not asking.done()
    machine.journal_handle = LocalHandle(machine.journal)
    await machine.publish()
    assert await asking == Counted(total=2)


# ------------------------------------------------------------------ other agents


async def test_a_message_leaves_when_its_turn_has_committed(machine: Machine) -> None:
    assert (await machine.ask(DESK, Count())).total == 1
    machine.journal.gate.clear()
    telling = machine.asking(DESK, Do(what="tell"))
    await asyncio.sleep(0.02)
    assert STARTED == ["count 1"]
    machine.journal.gate.set()
    assert await telling is None
    await until(lambda: "count 5" in STARTED)
    assert await machine.ask(PEER, Count()) == Counted(total=6)


async def test_a_message_of_a_turn_that_failed_never_leaves(machine: Machine) -> None:
    with pytest.raises(HandlerFailed):
        await machine.ask(DESK, Do(what="tell and fail"))
    await asyncio.sleep(0.01)
    assert await machine.ask(PEER, Count()) == Counted(total=1)


async def test_agents_ask_each_other_and_read_each_others_state(machine: Machine) -> None:
    assert await machine.ask(DESK, Do(what="relay")) == Said(text="via desk")
    asked, told = (await machine.turns(DESK))[0], (await machine.turns(PEER))[0]
    assert told.cause == f"{asked.turn}/1"
    await machine.ask(PEER, Count(by=4))
    assert await machine.ask(DESK, Do(what="read")) == Counted(total=4)


# ------------------------------------------------------------------ devices and knowledge


async def test_a_stream_that_is_left_is_in_the_record_of_its_turn(machine: Machine) -> None:
    reply = await machine.deliver(DESK, Do(what="leave stream"))
    assert reply.message() == Said(text="one")
    assert reply.labels == Labels(trusted=False)
    *calls, _ = await machine.read("turn", reply.turn)
    # What was handed out is recorded apart from how it ended.
    assert [(c.kind, c.phase) for c in calls] == [("Generate", "partial"), ("Generate", "failed")]
    assert isinstance(record.raised(calls[1].result), Cancelled)
    engine = machine.device._causal["chat"]
    await until(lambda: engine.statistics().running == 0)


async def test_a_turn_waits_for_a_device_that_is_restarted(machine: Machine) -> None:
    machine.device_handle.kill()
    await machine.publish(devices={})  # type: ignore[arg-type]
    asking = machine.asking(DESK, Say(text="still here"))
    await asyncio.sleep(0.01)
    assert not asking.done()
    machine.device_handle = LocalHandle(machine.device)
    await machine.publish()
    assert await asking == Said(text="still here")


async def test_rules_are_read_once_per_host(machine: Machine) -> None:
    for _ in range(2):
        assert await machine.ask(DESK, Do(what="rules")) == Said(text="agree")
    assert machine.knowledge_handle.calls.count("rules_source") == 1


async def test_a_program_is_inspected_before_it_is_launched(machine: Machine) -> None:
    inspect = machine.host_handle.inspect.remote
    manifest = await inspect("tests.kernel.programs:Desk", "acme", {"peer": PEER})
    assert isinstance(manifest, Manifest)
    assert f"ask:{PEER}" in manifest.capabilities
    assert isinstance(await inspect("tests.kernel.programs:Dusk", "acme", {}), ProgramError)
    wrong = await inspect("tests.kernel.programs:Desk", "acme", {"pier": PEER})
    assert isinstance(wrong, ProgramError)
    assert "config.pier" in str(wrong)


async def test_another_tenants_rules_are_not_there(machine: Machine) -> None:
    refused = await machine.knowledge_handle.rules_source.remote("acme", "theirs")
    assert isinstance(refused, UnknownResource)
    assert refused.known == ("desk",)
    assert (await machine.knowledge_handle.rules_source.remote("globex", "theirs"))[0] == "memory"


async def test_a_host_tells_how_it_stands(machine: Machine) -> None:
    await machine.ask(DESK, Count())
    told = await machine.host_handle.statistics.remote()
    assert (told["active"], told["running"], told["waiting"]) == (1, 0, 0)
    assert await machine.host_handle.ping.remote()
    assert (await machine.host_handle.metrics.remote()).process == "host:0"


# ------------------------------------------------------------------ unruly programs

UNRULY = "acme/unruly/main"
MODULE = "tests.kernel.programs"


async def test_a_handler_that_ignores_its_cancellation_does_not_keep_its_agent(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmos.kernel.turns.STOP_S", 0.05)
    await machine.register(UNRULY, f"{MODULE}:Unruly")
    with pytest.raises(DeadlineExceeded):
        await machine.ask(UNRULY, Do(what="ignore cancellation"))
    assert await machine.ask(UNRULY, Do(what="x")) == Said(text="done")


async def test_a_task_that_outlives_its_turn_makes_no_syscalls(machine: Machine) -> None:
    await machine.register(UNRULY, f"{MODULE}:Unruly")
    reply = await machine.deliver(UNRULY, Do(what="leave a task"))
    programs.LATE.clear()
    programs.gate("late").set()
    await until(lambda: programs.LATE)
    assert isinstance(programs.LATE[0], Cancelled)
    assert [row.kind for row in await machine.read("turn", reply.turn)] == ["turn"]


async def test_the_state_of_another_tenants_agent_is_not_there(machine: Machine) -> None:
    await machine.register(UNRULY, f"{MODULE}:Unruly")
    await machine.register("bank/keeper/main", f"{MODULE}:Keeper")
    with pytest.raises(UnknownAgent):
        await machine.ask(UNRULY, Do(what="read bank/keeper/main"))
    await machine.register("acme/keeper/main", f"{MODULE}:Keeper")
    assert await machine.ask(UNRULY, Do(what="read acme/keeper/main")) == Said(text="done")


async def test_a_strict_state_comes_back_as_it_was(machine: Machine) -> None:
    keeper = "acme/keeper/main"
    await machine.register(keeper, f"{MODULE}:Keeper")
    before = await machine.ask(keeper, Do(what="keep"))
    await machine.host.drop(keeper, "a test")
    assert await machine.ask(keeper, Do(what="look")) == before
    assert "2026-01-02" in before.text


async def test_imports_that_never_come_back_hold_up_nobody(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    await machine.ask(DESK, Say(text="already here"))
    for n in range(MAX_IMPORTS):
        (tmp_path / f"stuck_{n}.py").write_text(
            "import tests.kernel.programs as p\np.STUCK.wait(30)\nclass P: pass\n"
        )
    stuck = [
        asyncio.create_task(machine.host.inspect(f"stuck_{n}:P", "acme", {}))
        for n in range(MAX_IMPORTS)
    ]
    await asyncio.sleep(0.05)
    assert isinstance(await machine.host.inspect("another:P", "acme", {}), Busy)
    assert await machine.ask(DESK, Say(text="hello")) == Said(text="hello")
    programs.STUCK.set()
    assert all(isinstance(e, ProgramError) for e in await asyncio.gather(*stuck))
