"""Calls outside: once, or found out, or a person is asked."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from llmos import Context
from llmos.drivers.errors import LlmosError, StaleEpoch, StoreUnavailable, ToolRefused
from llmos.drivers.stores.rows import SHARDS, TakeShards
from llmos.kernel.operating import OperationRefused
from llmos.syscalls.errors import EffectUnknown
from tests.kernel.durable import ACTOR, OTHER, SEEN, Actor, Bank, Look, Run, script
from tests.kernel.local import until
from tests.kernel.machine import Machine
from tests.kernel.programs import gate


def bank(machine: Machine, name: str) -> Bank:
    found = machine.tools[name]
    assert isinstance(found, Bank)
    return found


def paying(tool: str) -> None:
    @script
    async def pay(self: Actor, os: Context, message: Run) -> Any:
        chance = await os.random()
        done = await os.call_tool(tool, amount=message.n)
        SEEN.append(done.idem_key)
        self.state.log.append([done.output, done.idem_key])
        await os.random()
        return [chance, done.output, done.idem_key]


async def pay(machine: Machine, **more: Any) -> Any:
    return await machine.host_handle.deliver.remote(
        machine.envelope(ACTOR, Run(script="pay", n=7), **more)
    )


async def lost_in_call(machine: Machine, tool: str, *, done: bool) -> Any:
    """Lose the host in the middle of a call, before or after it was carried out."""
    paying(tool)
    outside = bank(machine, tool)
    held = outside.after if done else outside.before
    held.clear()
    envelope = machine.envelope(ACTOR, Run(script="pay", n=7))
    asking = asyncio.ensure_future(machine.host_handle.deliver.remote(envelope))
    await until(lambda: outside.left if done else outside.entered)
    await machine.new_host(dead=True)
    with pytest.raises(Exception):  # noqa: B017, PT011 - as Ray tells of a lost actor
        await asking
    held.set()
    return await machine.host_handle.deliver.remote(envelope._replace(again=True))


async def phases(machine: Machine, turn: str) -> list[str]:
    rows = await machine.read("turn", turn)
    return [row.phase for row in rows if row.kind == "Call"]


# ------------------------------------------------------------------ without a crash


async def test_an_intent_is_durable_before_the_call_leaves(actors: Machine) -> None:
    paying("keyed")
    await actors.ask(ACTOR, Look())
    actors.journal.gate.clear()
    asking = asyncio.create_task(pay(actors))
    await asyncio.sleep(0.03)
    assert bank(actors, "keyed").attempts == []
    actors.journal.gate.set()
    reply = await asking
    assert reply.message().value[1] == {"amount": 7}
    assert await phases(actors, reply.turn) == ["intent", "result"]
    assert not reply.labels.trusted


async def test_a_stale_owner_does_not_call(actors: Machine) -> None:
    """Somebody else may be calling already."""
    paying("plain")
    await actors.ask(ACTOR, Look())
    await actors.journal.commit([[TakeShards(tuple(range(SHARDS)), 99)]])
    reply = await pay(actors)
    assert isinstance(reply.error, StaleEpoch)
    assert bank(actors, "plain").attempts == []
    assert [t.name for t in await actors.turns(ACTOR)] == ["Look"]


async def test_a_refusal_is_an_error_like_others(actors: Machine) -> None:
    refusing = Bank("plain", idempotent=False, queryable=False, failures=("refused",))
    actors.host._services._tools["plain"] = refusing
    errors: list[LlmosError] = []

    @script
    async def tries(self: Actor, os: Context, message: Run) -> Any:
        try:
            await os.call_tool("plain", amount=1)
        except ToolRefused as error:
            errors.append(error)
        return (await os.call_tool("plain", amount=2)).output

    assert (await actors.ask(ACTOR, Run(script="tries"))).value == {"amount": 2}
    assert len(errors) == 1
    assert len(refusing.attempts) == 2


# ------------------------------------------------------------------ the host is lost in the call


@pytest.mark.parametrize("done", [False, True])
async def test_an_idempotent_tool_is_called_again_with_the_same_key(
    actors: Machine, done: bool
) -> None:
    reply = await lost_in_call(actors, "keyed", done=done)
    tool = bank(actors, "keyed")
    assert len(tool.attempts) == 2 if done else tool.entered == 2
    assert len(set(tool.attempts)) == 1
    assert [len(calls) for calls in tool.calls.values()] == [1]
    assert reply.message().value[1] == {"amount": 7}
    assert (await actors.stored(ACTOR))["log"] == [[{"amount": 7}, tool.attempts[0]]]
    assert [tool.attempts[0]] == SEEN
    assert await phases(actors, reply.turn) == ["intent", "result"]


@pytest.mark.parametrize("done", [False, True])
async def test_a_tool_that_can_be_asked_is_asked_and_called_only_if_it_was_not(
    actors: Machine, done: bool
) -> None:
    reply = await lost_in_call(actors, "asked", done=done)
    tool = bank(actors, "asked")
    assert [len(calls) for calls in tool.calls.values()] == [1]
    assert reply.message().value[1] == {"amount": 7}
    assert len(SEEN) == 1
    assert tool.entered == (1 if done else 2)


@pytest.mark.parametrize("done", [False, True])
async def test_of_any_other_tool_nobody_knows_and_the_agent_waits_for_a_person(
    actors: Machine, done: bool
) -> None:
    reply = await lost_in_call(actors, "plain", done=done)
    tool = bank(actors, "plain")
    assert isinstance(reply.error, EffectUnknown)
    assert (reply.error.agent, reply.error.tool) == (ACTOR, "plain")
    assert tool.entered == 1
    assert (await actors.read("agent", ACTOR)).hold == "unknown effect"
    # Its messages wait, as many as come; others are served.
    assert await actors.tell(ACTOR, Run(script="pay", n=8)) is None
    assert (await actors.ask(OTHER, Look())).value == []
    await asyncio.sleep(0.01)
    assert tool.entered == 1
    (effect,) = await actors.operator.unknown_effects()
    assert (effect.agent, effect.tool) == (ACTOR, "plain")
    # Not by the hosts after either, however many are lost meanwhile.
    for _ in range(3):
        await actors.new_host(dead=True)
        await actors.ask(OTHER, Look())
    assert tool.entered == 1
    assert not await actors.read("dead")
    name = f"{effect.turn}/{effect.seq}"
    await actors.operator.resolve(name, "result", {"amount": "as the bank says"})
    await until(lambda: not actors.host._inbox.entries)
    log = (await actors.stored(ACTOR))["log"]
    assert log[0][0] == {"amount": "as the bank says"}
    assert log[1][0] == {"amount": 8}
    assert tool.entered == 2
    assert (await actors.read("agent", ACTOR)).hold == ""
    assert (await phases(actors, effect.turn))[-1] == "result"


async def test_a_person_may_say_that_it_was_not_done(actors: Machine) -> None:
    reply = await lost_in_call(actors, "plain", done=False)
    assert isinstance(reply.error, EffectUnknown)
    (effect,) = await actors.operator.unknown_effects()
    await actors.operator.resolve(f"{effect.turn}/{effect.seq}", "failed", "the bank was closed")
    await until(lambda: not actors.host._inbox.entries)
    (turn,) = await actors.turns(ACTOR)
    assert turn.phase == "failed"
    assert b"the bank was closed" in turn.result
    assert bank(actors, "plain").entered == 1


async def test_a_person_may_have_it_tried_again(actors: Machine) -> None:
    reply = await lost_in_call(actors, "plain", done=False)
    assert isinstance(reply.error, EffectUnknown)
    (effect,) = await actors.operator.unknown_effects()
    await actors.operator.resolve(f"{effect.turn}/{effect.seq}", "retry")
    await until(lambda: not actors.host._inbox.entries)
    tool = bank(actors, "plain")
    assert (tool.entered, len(tool.attempts)) == (2, 1)
    assert (await actors.stored(ACTOR))["log"][0][0] == {"amount": 7}


async def test_who_asked_may_ask_again_for_what_a_person_has_settled(actors: Machine) -> None:
    paying("plain")
    tool = bank(actors, "plain")
    tool.after.clear()
    envelope = actors.envelope(ACTOR, Run(script="pay", n=7))
    asking = asyncio.ensure_future(actors.host_handle.deliver.remote(envelope))
    await until(lambda: tool.left)
    await actors.new_host(dead=True)
    with pytest.raises(Exception):  # noqa: B017, PT011
        await asking
    unknown = await actors.host_handle.deliver.remote(envelope._replace(again=True))
    assert isinstance(unknown.error, EffectUnknown)
    (effect,) = await actors.operator.unknown_effects()
    again = asyncio.ensure_future(actors.host_handle.deliver.remote(envelope._replace(again=True)))
    await asyncio.sleep(0.01)
    await actors.operator.resolve(f"{effect.turn}/{effect.seq}", "result", "paid")
    assert (await again).message().value[1] == "paid"


# ------------------------------------------------------------------ the answer is lost


async def test_an_answer_that_was_lost_is_found_out_at_once(actors: Machine) -> None:
    for name, options in (
        ("keyed", {"idempotent": True, "queryable": False}),
        ("asked", {"idempotent": False, "queryable": True}),
    ):
        lossy = Bank(name, failures=("uncertain",), **options)
        actors.host._services._tools[name] = lossy
        paying(name)
        reply = await pay(actors)
        assert reply.message().value[1] == {"amount": 7}
        assert [len(calls) for calls in lossy.calls.values()] == [1]


async def test_an_answer_that_was_lost_for_good_holds_the_agent(actors: Machine) -> None:
    lossy = Bank("plain", failures=("uncertain",), idempotent=False, queryable=False)
    actors.host._services._tools["plain"] = lossy
    paying("plain")
    reply = await pay(actors)
    assert isinstance(reply.error, EffectUnknown)
    assert (await actors.read("agent", ACTOR)).hold == "unknown effect"
    (effect,) = await actors.operator.unknown_effects()
    await actors.operator.resolve(f"{effect.turn}/{effect.seq}", "result", "paid")
    await until(lambda: not actors.host._inbox.entries)
    assert (await actors.stored(ACTOR))["log"][0][0] == "paid"
    assert len(lossy.attempts) == 1


async def test_a_handler_that_cleans_up_after_it_was_held_leaves_no_rows(
    actors: Machine,
) -> None:
    lossy = Bank("plain", failures=("uncertain",), idempotent=False, queryable=False)
    actors.host._services._tools["plain"] = lossy

    @script
    async def tidy(self: Actor, os: Context, message: Run) -> Any:
        try:
            paid = await os.call_tool("plain", amount=1)
        finally:
            SEEN.append("clean")
            await os.random()
        return paid.output

    with pytest.raises(EffectUnknown):
        await actors.ask(ACTOR, Run(script="tidy"))
    (effect,) = await actors.operator.unknown_effects()
    await actors.operator.resolve(f"{effect.turn}/{effect.seq}", "result", "paid")
    await until(lambda: not actors.host._inbox.entries)
    (turn,) = await actors.turns(ACTOR)
    assert turn.phase == "result"
    assert SEEN == ["clean", "clean"]


# ------------------------------------------------------------------ attempts


@pytest.mark.parametrize("tool", ["keyed", "asked", "plain"])
async def test_a_call_that_was_made_is_not_made_again_by_the_next_attempt(
    actors: Machine, tool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmos.kernel.core.attempts.spread", lambda *_: 0.005)

    @script
    async def flaky(self: Actor, os: Context, message: Run) -> Any:
        paid = await os.call_tool(tool, amount=1)
        SEEN.append(paid.output)
        if len(SEEN) < 3:
            raise ValueError("not yet")
        self.state.log.append(paid.output)

    await actors.tell(ACTOR, Run(script="flaky"))
    await until(lambda: len(SEEN) == 3)
    await until(lambda: not actors.host._inbox.entries)
    outside = bank(actors, tool)
    assert [len(calls) for calls in outside.calls.values()] == [1]
    assert SEEN == [{"amount": 1}] * 3
    assert (await actors.stored(ACTOR))["log"] == [{"amount": 1}]


async def test_two_calls_of_one_turn_are_two_calls(actors: Machine) -> None:
    @script
    async def twice(self: Actor, os: Context, message: Run) -> Any:
        first, second = await asyncio.gather(
            os.call_tool("plain", amount=1), os.call_tool("plain", amount=1)
        )
        return [first.idem_key, second.idem_key]

    keys = (await actors.ask(ACTOR, Run(script="twice"))).value
    assert len(set(keys)) == 2
    assert sorted(bank(actors, "plain").attempts) == sorted(keys)


async def test_a_call_whose_outcome_is_durable_is_not_found_out_again(actors: Machine) -> None:
    @script
    async def slow(self: Actor, os: Context, message: Run) -> Any:
        paid = await os.call_tool("plain", amount=1)
        SEEN.append(paid.output)
        await gate("slow").wait()
        return paid.output

    envelope = actors.envelope(ACTOR, Run(script="slow"))
    asking = asyncio.ensure_future(actors.host_handle.deliver.remote(envelope))
    await until(lambda: SEEN)
    await asyncio.sleep(0.02)
    await actors.new_host(dead=True)
    with pytest.raises(Exception):  # noqa: B017, PT011
        await asking
    gate("slow").set()
    reply = await actors.host_handle.deliver.remote(envelope._replace(again=True))
    assert reply.message().value == {"amount": 1}
    assert bank(actors, "plain").entered == 1


async def test_a_host_that_closes_right_after_a_call_keeps_its_outcome(
    actors: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmos.kernel.committer.FLUSH_S", 10.0)

    @script
    async def slow(self: Actor, os: Context, message: Run) -> Any:
        paid = await os.call_tool("plain", amount=1)
        SEEN.append(paid.output)
        await gate("slow").wait()
        return paid.output

    envelope = actors.envelope(ACTOR, Run(script="slow"))
    asking = asyncio.ensure_future(actors.host_handle.deliver.remote(envelope))
    await until(lambda: SEEN)
    await actors.host.close(0.01)
    assert (await asking).error is not None
    await actors.new_host()
    gate("slow").set()
    reply = await actors.host_handle.deliver.remote(envelope._replace(again=True))
    assert reply.message().value == {"amount": 1}
    assert bank(actors, "plain").entered == 1


async def test_a_call_of_a_question_that_was_cancelled_is_listed_until_somebody_says(
    actors: Machine,
) -> None:
    paying("plain")
    outside = bank(actors, "plain")
    outside.before.clear()
    envelope = actors.envelope(ACTOR, Run(script="pay", n=7))
    asking = asyncio.ensure_future(actors.host._inbox.ask(envelope))
    await until(lambda: outside.entered)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    outside.before.set()
    await until(lambda: not actors.host._inbox.entries)
    (found,) = await actors.operator.unknown_effects()
    assert (found.tool, found.ended, found.agent) == ("plain", True, ACTOR)
    name = f"{found.turn}/{found.seq}"
    with pytest.raises(OperationRefused, match="nobody waits for it"):
        await actors.operator.resolve(name, "retry")
    await actors.operator.resolve(name, "failed", "the bank knows nothing of it")
    assert await actors.operator.unknown_effects() == []
    assert not isinstance((await pay(actors)).error, LlmosError)


async def test_a_store_that_stays_away_does_not_keep_a_turn_that_is_to_be_held(
    actors: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmos.kernel.turns.STORE_PATIENCE_S", 0.05)
    monkeypatch.setattr("llmos.kernel.turns.STORE_RETRY_S", 0.01)
    paying("plain")
    outside = Bank("plain", failures=("uncertain",), idempotent=False, queryable=False)
    actors.host._services._tools["plain"] = outside
    envelope = actors.envelope(ACTOR, Run(script="pay", n=7))
    outside.before.clear()
    asking = asyncio.ensure_future(actors.host_handle.deliver.remote(envelope))
    await until(lambda: outside.entered)
    actors.journal.refuse_all = StoreUnavailable("store", "away")
    outside.before.set()
    assert isinstance((await asking).error, StoreUnavailable)
    actors.journal.refuse_all = None
    reply = await actors.host_handle.deliver.remote(envelope._replace(again=True))
    assert isinstance(reply.error, EffectUnknown)
    assert (await actors.read("agent", ACTOR)).hold == "unknown effect"
    assert outside.entered == 1
