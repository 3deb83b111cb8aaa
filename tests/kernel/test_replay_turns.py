"""A turn whose host was lost runs again: what it knew is handed back, the rest is made."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from llmos import Context
from llmos.drivers.errors import LlmosError, StaleEpoch
from llmos.drivers.protocols import Passage
from llmos.drivers.stores.rows import Append, JournalRow
from llmos.kernel.remote import answers
from llmos.syscalls.base import Hit
from llmos.syscalls.errors import Quarantined
from llmos.syscalls.generate import Generate
from llmos.syscalls.labels import Labels, Provenance
from tests.kernel.durable import ACTOR, OTHER, SEEN, Actor, Done, Look, Run, script
from tests.kernel.local import until
from tests.kernel.machine import Machine
from tests.kernel.programs import gate


def rows(machine: Machine, phase: str = "result") -> list[JournalRow]:
    """What has been sent to the store of syscalls, in that order."""
    writes = [w for part in machine.journal.parts for w in part]
    found = [w.row for w in writes if isinstance(w, Append)]
    return [r for r in found if r.phase == phase and r.kind != "turn"]


async def cut_off(machine: Machine, name: str, *, results: int, agent: str = ACTOR) -> Any:
    """Ask for a turn, and lose the host when so many results are in the store.

    Returns what the asker gets who asks the next host again.
    """
    envelope = machine.envelope(agent, Run(script=name))
    asking = asyncio.ensure_future(machine.host_handle.deliver.remote(envelope))
    await until(lambda: len(rows(machine)) >= results)
    await machine.new_host(dead=True)
    with pytest.raises(Exception):  # noqa: B017, PT011 - as Ray tells of a lost actor
        await asking
    return await again(machine, envelope)


async def again(machine: Machine, envelope: Any) -> Any:
    reply = await machine.host_handle.deliver.remote(envelope._replace(again=True))
    return reply.message()


# ------------------------------------------------------------------ results are handed back


async def test_what_a_turn_had_read_it_gets_again_without_a_call(actors: Machine) -> None:
    @answers
    async def retrieve(tenant: str, corpus: str, query: str, k: int) -> Any:
        SEEN.append("retrieve")
        return [Hit(Passage("a#0", "a.md", "v1", (0, 4), "text"), 0.8)], Labels(
            tenants=frozenset({"acme"})
        )

    actors.knowledge.retrieve = retrieve  # type: ignore[method-assign]
    before: list[tuple[Any, ...]] = []

    @script
    async def read(self: Actor, os: Context, message: Run) -> Any:
        written = await os.generate("chat", "one two three")
        embedded = await os.embed("embed", ["a", "b"])
        found = await os.retrieve("help", "where")
        told = await os.ask(OTHER, Run(script="answer"), Done)
        now, chance, name = await os.now(), await os.random(), os.uuid()
        before.append(
            (
                *(written, embedded.vectors.tolist(), found, told, now, chance, name),
                *(os.labels, embedded.provenance),
            )
        )
        await gate("crash").wait()
        self.state.log.append(chance)
        return [written.text, chance, name]

    @script
    async def answer(self: Actor, os: Context, message: Run) -> Any:
        SEEN.append("answer")
        self.state.log.append("asked")
        return 42

    task = asyncio.create_task(cut_off(actors, "read", results=6))
    await until(lambda: len(before) == 2)
    assert before[0] == before[1]
    assert isinstance(before[0][2].provenance[0], Provenance)
    calls = actors.device_handle.calls
    assert (calls.count("submit"), calls.count("embed")) == (1, 1)
    assert SEEN == ["answer", "retrieve"] or SEEN == ["retrieve", "answer"]
    gate("crash").set()
    done = await task
    assert done.value == ["one two three", before[0][5], before[0][6]]
    # All of it is one turn with each call once, and the other agent was asked once.
    (turn,) = await actors.turns(ACTOR)
    recorded = await actors.read("turn", turn.turn)
    assert [r.seq for r in recorded] == [1, 2, 3, 4, 5, 6, 0]
    assert {r.epoch for r in recorded} == {1, 2}
    assert (await actors.ask(OTHER, Look())).value == ["asked"]


async def test_a_call_that_had_not_ended_is_made_again_and_the_rest_is_live(
    actors: Machine,
) -> None:
    @script
    async def half(self: Actor, os: Context, message: Run) -> Any:
        first = await os.random()
        SEEN.append(first)
        await os.ask(OTHER, Run(script="slow"))
        second = await os.random()
        self.state.log += [first, second]
        return [first, second]

    @script
    async def slow(self: Actor, os: Context, message: Run) -> Any:
        SEEN.append("slow")
        await gate("slow").wait()

    task = asyncio.create_task(cut_off(actors, "half", results=1))
    await until(lambda: len([s for s in SEEN if s != "slow"]) == 2)
    gate("slow").set()
    done = await task
    assert SEEN[0] == done.value[0]
    assert done.value[0] != done.value[1]
    (turn,) = await actors.turns(ACTOR)
    assert [r.seq for r in await actors.read("turn", turn.turn)] == [1, 2, 3, 0]


async def test_an_error_is_handed_back_as_it_was(actors: Machine) -> None:
    raised: list[LlmosError] = []

    @script
    async def wrong(self: Actor, os: Context, message: Run) -> Any:
        try:
            await os.generate("no-such-model", "x")
        except LlmosError as error:
            raised.append(error)
        await os.now()
        await gate("crash").wait()
        return str(raised[-1])

    task = asyncio.create_task(cut_off(actors, "wrong", results=1))
    await until(lambda: len(raised) == 2)
    gate("crash").set()
    done = await task
    assert type(raised[0]) is type(raised[1])
    assert raised[0].facts == raised[1].facts
    assert done.value == str(raised[0])


async def test_a_turn_with_a_long_result_gets_it_back_whole(actors: Machine) -> None:
    text = "word " * 3000

    @script
    async def long(self: Actor, os: Context, message: Run) -> Any:
        told = await os.ask(OTHER, Run(script="tell"), Done)
        SEEN.append(told.value)
        await gate("crash").wait()
        return len(told.value)

    @script
    async def tell(self: Actor, os: Context, message: Run) -> Any:
        return text

    task = asyncio.create_task(cut_off(actors, "long", results=1))
    await until(lambda: len(SEEN) == 2)
    gate("crash").set()
    assert (await task).value == len(text)
    assert [text, text] == SEEN


# ------------------------------------------------------------------ order


async def test_the_first_of_many_is_the_same_one_again(actors: Machine) -> None:
    @script
    async def race(self: Actor, os: Context, message: Run) -> Any:
        agents = [f"acme/actor/racer-{n}" for n in range(4)]
        tasks = {
            asyncio.create_task(os.ask(agent, Run(script="racer", n=n), Done)): n
            for n, agent in enumerate(agents)
        }
        done, late = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        winner = sorted(tasks[t] for t in done)
        SEEN.append(("winner", winner))
        await os.now()
        await gate("crash").wait()
        return winner

    @script
    async def racer(self: Actor, os: Context, message: Run) -> Any:
        SEEN.append(("racer", message.n))
        if message.n != 2 and not gate("others").is_set():
            await gate("others").wait()
        return message.n

    def winners() -> list[Any]:
        return [what for kind, what in SEEN if kind == "winner"]

    task = asyncio.create_task(cut_off(actors, "race", results=2))
    # When it runs again, all the others would be faster.
    await until(lambda: winners())
    gate("others").set()
    await until(lambda: len(winners()) == 2)
    gate("crash").set()
    assert (await task).value == [2]
    assert winners() == [[2], [2]]
    assert SEEN.count(("racer", 2)) == 1


async def test_results_come_in_the_order_in_which_they_had_come(actors: Machine) -> None:
    order = [3, 0, 2, 1]
    runs: list[list[int]] = []

    @script
    async def fan(self: Actor, os: Context, message: Run) -> Any:
        came: list[int] = []
        runs.append(came)

        async def one(n: int) -> None:
            await os.ask(f"acme/actor/fan-{n}", Run(script="branch", n=n))
            came.append(n)
            # What comes next depends on who came first.
            await os.ask(f"acme/actor/fan-{n}", Run(script="after", n=len(came)))

        await asyncio.gather(*(one(n) for n in range(4)))
        await gate("crash").wait()
        return came

    @script
    async def branch(self: Actor, os: Context, message: Run) -> Any:
        if len(runs) == 1:
            await gate(f"branch {message.n}").wait()

    @script
    async def after(self: Actor, os: Context, message: Run) -> Any:
        SEEN.append(message.n)

    async def open_in_order() -> None:
        await until(lambda: runs)
        for place, n in enumerate(order, 1):
            gate(f"branch {n}").set()
            await until(lambda place=place: len(runs[0]) == place)

    opening = asyncio.create_task(open_in_order())
    task = asyncio.create_task(cut_off(actors, "fan", results=8))
    await until(lambda: len(runs) == 2 and len(runs[1]) == 4)
    gate("crash").set()
    assert (await task).value == order
    assert runs == [order, order]
    assert sorted(SEEN) == [1, 2, 3, 4]
    await opening


@pytest.mark.parametrize("results", range(1, 9))
async def test_a_crash_at_any_boundary_of_a_gather_leaves_one_outcome(
    actors: Machine, results: int
) -> None:
    @script
    async def wide(self: Actor, os: Context, message: Run) -> Any:
        async def two(n: int) -> float:
            return await os.random() + n + await os.random()

        first = await asyncio.gather(*(two(n) for n in range(4)))
        # Not held up here: the cut comes wherever it comes.
        await os.ask(OTHER, Run(script="pause"))
        self.state.log.append(first)
        return first

    @script
    async def pause(self: Actor, os: Context, message: Run) -> Any:
        await gate("pause").wait()

    task = asyncio.create_task(cut_off(actors, "wide", results=results))
    await asyncio.sleep(0.03)
    gate("pause").set()
    done = await task
    assert (await actors.stored(ACTOR))["log"] == [done.value]
    (turn,) = await actors.turns(ACTOR)
    recorded = await actors.read("turn", turn.turn)
    assert sorted(r.seq for r in recorded) == list(range(10))


# ------------------------------------------------------------------ streams


async def test_a_stream_goes_on_after_what_was_shown_and_says_nothing_else(
    actors: Machine,
) -> None:
    words = [f"w{n}" for n in range(12)]
    runs: list[list[str]] = []

    @script
    async def talk(self: Actor, os: Context, message: Run) -> Any:
        shown: list[str] = []
        runs.append(shown)
        async for text in os.stream(Generate(model="chat", prompt=" ".join(words))):
            shown.append(text)
            if len(runs) == 1 and len(shown) == 5:
                await gate("never").wait()
        return "".join(shown)

    envelope = actors.envelope(ACTOR, Run(script="talk"))
    asking = asyncio.ensure_future(actors.host_handle.deliver.remote(envelope))

    def pieces() -> int:
        return sum(len(json.loads(r.result)["pieces"]) for r in rows(actors, "partial"))

    await until(lambda: pieces() == 5)
    jobs = _jobs(actors)
    await actors.new_host(dead=True)
    with pytest.raises(Exception):  # noqa: B017, PT011
        await asking
    done = await again(actors, envelope)
    assert done.value == " ".join(words)
    assert runs[1][:5] == runs[0]
    assert "".join(runs[1]) == " ".join(words)
    # The model was asked to go on from exactly there, with the tokens that were left.
    (job,) = jobs
    assert job.prefix == "".join(runs[0])
    assert job.params.max_new_tokens == 128 - 5
    (turn,) = await actors.turns(ACTOR)
    recorded = await actors.read("turn", turn.turn)
    assert [r.phase for r in recorded if r.seq == 1][-1] == "result"


async def test_a_stream_that_had_ended_is_told_again_piece_by_piece(actors: Machine) -> None:
    runs: list[list[str]] = []

    @script
    async def talk(self: Actor, os: Context, message: Run) -> Any:
        request = Generate(model="chat", prompt="one two three four")
        runs.append([text async for text in os.stream(request)])
        await os.now()
        await gate("crash").wait()
        return runs[-1]

    task = asyncio.create_task(cut_off(actors, "talk", results=2))
    await until(lambda: len(runs) == 2)
    gate("crash").set()
    assert (await task).value == ["one", " two", " three", " four"] == runs[0] == runs[1]
    assert actors.device_handle.calls.count("submit") == 1


def _jobs(machine: Machine) -> list[Any]:
    """Jobs that the device gets from now on."""
    found: list[Any] = []
    submit = machine.device.submit

    async def noted(client: str, batch: Any) -> Any:
        found.extend(job for _, job in batch)
        return await submit(client, batch)

    machine.device.submit = noted  # type: ignore[method-assign]
    return found


# ------------------------------------------------------------------ another way


async def test_a_turn_that_takes_another_way_is_held_with_a_diff(actors: Machine) -> None:
    @script
    async def fickle(self: Actor, os: Context, message: Run) -> Any:
        SEEN.append("run")
        await os.now()
        if len(SEEN) == 1:
            await os.generate("chat", "the first way")
        else:
            await os.generate("chat", "quite another way")
        await os.now()
        await gate("crash").wait()
        return "done"

    with pytest.raises(Quarantined) as caught:
        await cut_off(actors, "fickle", results=3)
    story = str(caught.value)
    assert "the first way" in story
    assert "quite another way" in story
    assert "Generate" in story
    row = await actors.read("agent", ACTOR)
    assert row.hold == "quarantined"
    assert "quite another way" in row.story
    # Nothing gets through to it, its message waits, and others are served.
    assert isinstance(await actors.tell(ACTOR, Run(script="fickle")), Quarantined)
    assert len(await actors.read("waiting", ACTOR)) == 1
    assert (await actors.ask(OTHER, Look())).value == []
    await until(lambda: actors.kernel.ended_agents == [(ACTOR, "quarantined")])

    # The program is mended; a person lets the agent go on.
    @script
    async def fickle(self: Actor, os: Context, message: Run) -> Any:  # noqa: F811
        await os.now()
        written = await os.generate("chat", "the first way")
        await os.now()
        self.state.log.append(written.text)

    held = await actors.operator.release(ACTOR)
    assert held.hold == "quarantined"
    await until(lambda: not actors.host._inbox.entries)
    assert (await actors.ask(ACTOR, Look())).value == ["the first way"]
    assert (await actors.read("agent", ACTOR)).hold == ""
    assert actors.device_handle.calls.count("submit") == 1


async def test_a_turn_that_makes_fewer_calls_is_held(actors: Machine) -> None:
    @script
    async def lazy(self: Actor, os: Context, message: Run) -> Any:
        SEEN.append("run")
        await os.now()
        if len(SEEN) == 1:
            await os.random()
            await gate("crash").wait()
        return "done"

    with pytest.raises(Quarantined, match="Random"):
        await cut_off(actors, "lazy", results=2)


async def test_a_held_agent_is_still_held_by_the_next_host(actors: Machine) -> None:
    @script
    async def lazy(self: Actor, os: Context, message: Run) -> Any:
        SEEN.append("run")
        await os.now()
        if len(SEEN) == 1:
            await os.random()
            await gate("crash").wait()

    with pytest.raises(Quarantined):
        await cut_off(actors, "lazy", results=2)
    await actors.new_host()
    await asyncio.sleep(0.02)
    assert len(SEEN) == 2
    assert isinstance(await actors.tell(ACTOR, Run(script="lazy")), Quarantined)


async def test_a_handler_cannot_catch_that_it_left_its_way(actors: Machine) -> None:
    @script
    async def stubborn(self: Actor, os: Context, message: Run) -> Any:
        SEEN.append("run")
        try:
            await (os.now() if len(SEEN) == 1 else os.random())
        except BaseException:
            if len(SEEN) > 1:
                return "caught it"
            raise
        await os.now()
        await gate("crash").wait()
        return "done"

    with pytest.raises(Quarantined):
        await cut_off(actors, "stubborn", results=2)


# ------------------------------------------------------------------ changes of code


async def test_a_turn_from_before_a_change_runs_the_old_way_and_a_new_one_the_new(
    actors: Machine,
) -> None:
    changed = False

    @script
    async def patchy(self: Actor, os: Context, message: Run) -> Any:
        await os.now()
        if changed and os.patched("ask-twice"):
            SEEN.append("new way")
            await os.random()
            await os.random()
        else:
            SEEN.append("old way")
            await os.random()
        await gate("crash").wait()
        return "done"

    envelope = actors.envelope(ACTOR, Run(script="patchy"))
    asking = asyncio.ensure_future(actors.host_handle.deliver.remote(envelope))
    await until(lambda: len(rows(actors)) == 2)
    changed = True
    await actors.new_host(dead=True)
    with pytest.raises(Exception):  # noqa: B017, PT011
        await asking
    await until(lambda: SEEN == ["old way", "old way"])
    gate("crash").set()
    assert (await again(actors, envelope)).value == "done"
    # A turn that began after the change takes the new way, also when it runs again.
    gate("crash").clear()
    del SEEN[:]
    del actors.journal.parts[:]
    task = asyncio.create_task(cut_off(actors, "patchy", results=3))
    await until(lambda: SEEN == ["new way", "new way"])
    gate("crash").set()
    assert (await task).value == "done"
    rows_ = await actors.read("turn", (await actors.turns(ACTOR))[0].turn)
    assert [(r.name, r.phase) for r in rows_ if r.kind == "Patched"] == [("ask-twice", "mark")]


# ------------------------------------------------------------------ what is durable before


async def test_another_agent_is_asked_when_what_was_read_before_is_durable(
    actors: Machine,
) -> None:
    @script
    async def careful(self: Actor, os: Context, message: Run) -> Any:
        await os.random()
        SEEN.append("asks")
        return (await os.ask(OTHER, Run(script="answer"), Done)).value

    @script
    async def answer(self: Actor, os: Context, message: Run) -> Any:
        SEEN.append("answers")
        return "yes"

    await actors.ask(OTHER, Look())
    actors.journal.gate.clear()
    asking = actors.asking(ACTOR, Run(script="careful"))
    await until(lambda: SEEN)
    await asyncio.sleep(0.02)
    assert SEEN == ["asks"]
    actors.journal.gate.set()
    assert (await asking).value == "yes"
    (turn,) = await actors.turns(ACTOR)
    (other,) = [t for t in await actors.turns(OTHER) if t.name == "Run"]
    recorded = await actors.read("turn", turn.turn)
    assert recorded[0].kind == "Random"
    assert other.cause == f"{turn.turn}/2"


async def test_reads_wait_for_nothing(actors: Machine) -> None:
    @script
    async def reads(self: Actor, os: Context, message: Run) -> Any:
        for _ in range(50):
            await os.random()
        await os.generate("chat", "hello")
        SEEN.append("read")

    await actors.ask(ACTOR, Look())
    actors.journal.gate.clear()
    asking = actors.asking(ACTOR, Run(script="reads"))
    await until(lambda: SEEN == ["read"])
    assert not asking.done()
    actors.journal.gate.set()
    await asking


# ------------------------------------------------------------------ a host that closes


async def test_a_turn_that_is_put_down_goes_on_at_the_next_host(actors: Machine) -> None:
    @script
    async def work(self: Actor, os: Context, message: Run) -> Any:
        chance = await os.random()
        SEEN.append(chance)
        await gate("work").wait()
        self.state.log.append(chance)

    # More often than hosts may be lost.
    assert await actors.tell(ACTOR, Run(script="work")) is None
    for n in range(1, 5):
        await until(lambda n=n: len(SEEN) == n and rows(actors))
        await asyncio.sleep(0.005)
        await actors.host.close(0.01)
        (mail,) = await actors.read("waiting", ACTOR)
        assert (mail.attempts, mail.deaths, mail.epoch) == (1, 0, 0)
        await actors.new_host()
    await until(lambda: len(SEEN) == 5)
    gate("work").set()
    await until(lambda: not actors.host._inbox.entries)
    assert len(set(SEEN)) == 1
    assert (await actors.stored(ACTOR))["log"] == SEEN[:1]
    assert not await actors.read("dead")


async def test_an_asker_of_a_turn_that_is_put_down_gets_its_end(actors: Machine) -> None:
    @script
    async def work(self: Actor, os: Context, message: Run) -> Any:
        SEEN.append(await os.random())
        await gate("work").wait()
        return SEEN[-1]

    envelope = actors.envelope(ACTOR, Run(script="work"))
    asking = asyncio.ensure_future(actors.host_handle.deliver.remote(envelope))
    await until(lambda: rows(actors))
    await actors.host.close(0.01)
    assert (await asking).error is not None
    await actors.new_host()
    gate("work").set()
    assert (await again(actors, envelope)).value == SEEN[0]


async def test_what_a_handler_does_while_it_is_put_down_belongs_to_no_turn(
    actors: Machine,
) -> None:
    errors: list[LlmosError] = []

    @script
    async def tidy(self: Actor, os: Context, message: Run) -> Any:
        SEEN.append(await os.random())
        try:
            await os.ask(OTHER, Run(script="slow"))
        finally:
            # Longer than a row waits for others.
            await asyncio.sleep(0.02)
            try:
                await os.now()
            except LlmosError as error:
                errors.append(error)
        return SEEN[-1]

    @script
    async def slow(self: Actor, os: Context, message: Run) -> Any:
        await gate("slow").wait()

    envelope = actors.envelope(ACTOR, Run(script="tidy"))
    asking = asyncio.ensure_future(actors.host_handle.deliver.remote(envelope))
    await until(lambda: rows(actors))
    await asyncio.sleep(0.005)
    await actors.host.close(0.01)
    assert (await asking).error is not None
    assert [str(error) for error in errors] == [
        f"A syscall of {ACTOR} was cancelled by the end of its turn"
    ]
    await actors.new_host()
    gate("slow").set()
    assert (await again(actors, envelope)).value == SEEN[0]
    (turn,) = await actors.turns(ACTOR)
    recorded = await actors.read("turn", turn.turn)
    assert [(r.kind, r.phase) for r in recorded[:-1]] == [
        ("Random", "result"),
        ("Ask", "result"),
        ("Now", "result"),
    ]


async def test_an_asker_whose_agent_moves_is_sent_on(actors: Machine) -> None:
    @script
    async def work(self: Actor, os: Context, message: Run) -> Any:
        SEEN.append(await os.random())
        await gate("work").wait()
        return SEEN[-1]

    envelope = actors.envelope(ACTOR, Run(script="work"))
    asking = asyncio.ensure_future(actors.host_handle.deliver.remote(envelope))
    waiting = asyncio.ensure_future(
        actors.host_handle.deliver.remote(actors.envelope(ACTOR, Run(script="work")))
    )
    await until(lambda: rows(actors))
    await actors.host.release(range(256), 0.01)
    assert isinstance((await asking).error, StaleEpoch)
    assert isinstance((await waiting).error, StaleEpoch)
    await actors.new_host()
    gate("work").set()
    assert (await again(actors, envelope)).value == SEEN[0]
    assert SEEN[0] == SEEN[1]


async def test_a_turn_that_the_store_has_not_heard_of_leaves_nothing_behind(
    actors: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmos.kernel.committer.FLUSH_S", 10.0)

    @script
    async def work(self: Actor, os: Context, message: Run) -> Any:
        SEEN.append(await os.random())
        await gate("work").wait()
        return SEEN[-1]

    envelope = actors.envelope(ACTOR, Run(script="work"))
    asking = asyncio.ensure_future(actors.host_handle.deliver.remote(envelope))
    await until(lambda: SEEN)
    await actors.host.close(0.01)
    assert (await asking).error is not None
    assert not await actors.read("waiting", ACTOR)
    assert not await actors.turns(ACTOR)
    await actors.new_host()
    gate("work").set()
    assert (await again(actors, envelope)).value == SEEN[1]
    assert len(SEEN) == 2
