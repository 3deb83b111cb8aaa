"""What a person does with the records, carried out by the kernel's part on real servers."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from llmos.drivers.errors import StoreUnavailable, ToolRefused
from llmos.drivers.registry import driver
from llmos.drivers.stores.rows import AgentRow, Append, BuryMail, JournalRow, MailRow, PutMail
from llmos.kernel import auditing
from llmos.kernel.core.errors import NoOtherHost
from llmos.kernel.offline import StoreLedger, SystemNote, opened, restore
from llmos.kernel.operating import (
    CHANGES,
    OPERATIONS,
    OperationRefused,
    Operator,
    UnknownRecord,
)
from llmos.kernel.remote import call
from llmos.kernel.settings import Settings
from llmos.kernel.system import StoreTable, SystemConfig
from llmos.syscalls.errors import InvalidRequest, UnknownAgent
from llmos.syscalls.messages import Envelope, Wire
from tests.kernel.durable import ACTOR, OTHER, Actor, Look, Run, script
from tests.kernel.ledger import LittleKernel
from tests.kernel.local import until
from tests.kernel.machine import DESK, Machine


@pytest.fixture
def kernel(actors: Machine) -> LittleKernel:
    return LittleKernel(actors)


@pytest.fixture
def operator(kernel: LittleKernel) -> Operator:
    return kernel.operator


async def log_of(actors: Machine, agent: str = ACTOR) -> Any:
    return ((await actors.stored(agent)) or {}).get("log")


# ---------------------------------------------------------------- dead letters


async def buried(actors: Machine, turns: list[list[JournalRow]]) -> int:
    """A dead letter as a host leaves it, whose attempts had these turns."""
    wire = Wire.of(Run(script="mended"))
    envelope = Envelope(ACTOR, "client:9", wire, "client:9", 7)
    mail = MailRow(
        ACTOR,
        "client:9",
        7,
        envelope.pack(),
        attempts=len(turns),
        turn=turns[-1][0].turn if turns else "",
    )
    rows = [Append(row) for turn in turns for row in turn]
    part = [*rows, PutMail(mail), BuryMail(*mail.key, "5 attempts failed", "the story", 2.0)]
    assert await actors.journal.commit([part]) == [None]
    return int((await actors.read("dead"))[0].id)


def failed_turn(turn: str, attempt: int, *, ended: bool = True) -> list[JournalRow]:
    call_ = JournalRow(ACTOR, turn, 1, "result", "Random", "", result=b'{"value":0.5}')
    error = {"error": "HandlerFailed", "module": "llmos.syscalls.errors", "message": "it broke"}
    result = json.dumps({"reply": None, "error": error, "base": 0}).encode()
    key = f"client:9#7!{attempt}"
    end = JournalRow(ACTOR, turn, 0, "failed", "turn", "Run", result=result, idem_key=key)
    return [call_, end] if ended else [call_]


async def test_a_dead_letter_is_shown_with_the_slice_of_the_journal(
    actors: Machine, operator: Operator
) -> None:
    id = await buried(actors, [failed_turn("t1", 1), failed_turn("t2", 2, ended=False)])
    assert [d.id for d in await operator.dead_letters()] == [id]
    story = await operator.dead_letter(id)
    assert story.letter.reason == "5 attempts failed"
    assert [[row.kind for row in turn] for turn in story.turns] == [["Random", "turn"], ["Random"]]
    with pytest.raises(UnknownRecord, match="dead letter '77'"):
        await operator.dead_letter(77)


@pytest.mark.parametrize("ended", [True, False])
async def test_a_retried_letter_is_handled(
    actors: Machine, operator: Operator, kernel: LittleKernel, ended: bool
) -> None:
    seen: list[str] = []

    @script
    async def mended(actor: Actor, os: Any, message: Run) -> None:
        await os.random()
        seen.append(os.turn)
        actor.state.log.append("mended")

    rows = failed_turn("t1", 1, ended=ended)
    rows[0] = rows[0]._replace(args_hash=_hash_of_random(), args=b"{}")
    id = await buried(actors, [rows])
    assert await operator.retry_dead([id]) == [id]
    assert kernel.hinted == 1
    async with asyncio.timeout(5):
        while await log_of(actors) != ["mended"]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    # A turn that has ended is not run again; one that was cut off goes on.
    assert (seen == ["t1"]) == (not ended)
    assert await operator.dead_letters() == []
    assert await operator.mail(ACTOR) == []


def _hash_of_random() -> bytes:
    from llmos.kernel import record
    from llmos.syscalls.clock import Random

    return record.hash_of(record.args_of(Random()))


async def test_all_letters_are_retried_or_none(actors: Machine, operator: Operator) -> None:
    @script
    async def mended(actor: Actor, os: Any, message: Run) -> None:
        actor.state.log.append("mended")

    id = await buried(actors, [])
    with pytest.raises(UnknownRecord):
        await operator.retry_dead([id, 99])
    with pytest.raises(UnknownRecord):
        await operator.drop_dead([id, 99])
    assert len(await operator.dead_letters()) == 1
    assert await operator.retry_dead() == [id]
    assert await operator.retry_dead() == []


async def test_a_dropped_letter_is_gone(actors: Machine, operator: Operator) -> None:
    id = await buried(actors, [])
    assert await operator.drop_dead([id]) == [id]
    assert await operator.dead_letters() == []
    await asyncio.sleep(0.05)
    assert await log_of(actors) is None


# ---------------------------------------------------------------- unknown effects


def bank_of(actors: Machine) -> Any:
    """The tool of the host that runs now."""
    (bank,) = [tool for key, tool in actors.tools.items() if "plain" in key]
    tools: Any = actors.host._services._tools
    tools["plain"] = bank
    return bank


async def lose_an_effect(actors: Machine, *, times: int = 1) -> asyncio.Task[Any]:
    """A call that the target neither confirms nor can be asked about, at each attempt."""
    bank_of(actors)._failures[:] = ["uncertain"] * times

    @script
    async def books(actor: Actor, os: Any, message: Run) -> Any:
        try:
            result = await os.call_tool("plain", amount=3)
        except ToolRefused as error:
            actor.state.log.append("refused")
            return str(error)
        actor.state.log.append("booked")
        return result.output

    return actors.asking(ACTOR, Run(script="books"))


async def held(operator: Operator) -> Any:
    async with asyncio.timeout(5):
        while not (found := await operator.unknown_effects()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return found


async def logged(actors: Machine, expected: list[str]) -> None:
    async with asyncio.timeout(5):
        while await log_of(actors) != expected:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_an_unknown_effect_is_listed_with_what_was_asked(
    actors: Machine, operator: Operator
) -> None:
    asking = await lose_an_effect(actors)
    (effect,) = await held(operator)
    assert (effect.agent, effect.tool, effect.seq) == (ACTOR, "plain", 1)
    assert effect.idem_key
    assert json.loads(effect.args)["arguments"] == {"amount": 3}
    assert json.loads(effect.error)["error"] == "ToolUncertain"
    (agent,) = await operator.held()
    assert (agent.agent, agent.hold) == (ACTOR, "unknown effect")
    assert "llmos effects resolve" in agent.story
    with pytest.raises(OperationRefused, match="effects resolve"):
        await operator.release(ACTOR)
    await asyncio.wait([asking])


async def test_a_person_says_that_it_was_carried_out(actors: Machine, operator: Operator) -> None:
    asking = await lose_an_effect(actors)
    (effect,) = await held(operator)
    await operator.resolve(f"{effect.turn}/1", "result", {"booked": 7})
    await logged(actors, ["booked"])
    assert await operator.held() == await operator.unknown_effects() == []
    rows = await operator.turn(effect.turn)
    (row,) = [r for r in rows if r.phase == "result" and r.seq == 1]
    assert json.loads(row.provenance)[0]["kind"] == "person"
    assert json.loads(rows[-1].result)["reply"]["body"] == {"value": {"booked": 7}}
    # It was called once, and never again.
    assert len(bank_of(actors).attempts) == 1
    await asyncio.wait([asking])


async def test_a_person_says_that_it_was_not_and_will_not_be(
    actors: Machine, operator: Operator
) -> None:
    asking = await lose_an_effect(actors)
    (effect,) = await held(operator)
    await operator.resolve(f"{effect.turn[:12]}/1", "failed", "the bank knows nothing of it")
    await logged(actors, ["refused"])
    reply = json.loads((await operator.turn(effect.turn))[-1].result)["reply"]
    assert "the bank knows nothing of it" in reply["body"]["value"]
    await asyncio.wait([asking])


async def test_an_effect_that_is_tried_again_may_be_lost_again(
    actors: Machine, operator: Operator
) -> None:
    asking = await lose_an_effect(actors, times=2)
    bank = bank_of(actors)
    for attempt in (1, 2):
        (effect,) = await held(operator)
        assert len(bank.attempts) == attempt
        await operator.resolve(f"{effect.turn}/1", "retry")
        await until(lambda attempt=attempt: len(bank.attempts) > attempt)  # type: ignore[misc]
    await logged(actors, ["booked"])
    assert len(bank.attempts) == 3
    assert len(set(bank.attempts)) == 1
    rows = await operator.turn(effect.turn)
    assert [(r.phase, r.part) for r in rows if r.seq == 1] == [
        *[("intent", 0), ("unknown", 0), ("mark", 1)],
        *[("intent", 1), ("unknown", 1), ("mark", 2)],
        *[("intent", 2), ("result", 0)],
    ]
    await asyncio.wait([asking])


async def test_a_retry_that_is_cut_off_is_not_tried_once_more(
    actors: Machine, operator: Operator
) -> None:
    asking = await lose_an_effect(actors)
    bank = bank_of(actors)
    (effect,) = await held(operator)
    bank.after.clear()
    await operator.resolve(f"{effect.turn}/1", "retry")
    await until(lambda: bank.left == 1)
    await actors.new_host(dead=True)
    bank_of(actors).after.set()
    (again,) = await held(operator)
    assert again.idem_key == effect.idem_key
    assert bank.entered == 2
    asking.cancel()
    await asyncio.wait([asking])


async def test_what_is_not_unknown_cannot_be_resolved(actors: Machine, operator: Operator) -> None:
    for effect in ("t9/1", "1", "", "/1"):
        with pytest.raises(UnknownRecord, match="Unknown are: none"):
            await operator.resolve(effect, "retry")


# ---------------------------------------------------------------- held agents


async def test_a_quarantine_is_lifted(actors: Machine, operator: Operator) -> None:
    from llmos.drivers.stores.rows import SetHold

    @script
    async def works(actor: Actor, os: Any, message: Run) -> None:
        actor.state.log.append("worked")

    await actors.journal.commit([[SetHold(ACTOR, "quarantined", "it failed too often")]])
    await actors.host.hold(ACTOR, "quarantined", "it failed too often")
    assert [h.story for h in await operator.held()] == ["it failed too often"]
    assert (await operator.release(ACTOR)).hold == "quarantined"
    assert await operator.held() == []
    await actors.ask(ACTOR, Run(script="works"))
    assert await log_of(actors) == ["worked"]
    with pytest.raises(OperationRefused, match="not held"):
        await operator.release(ACTOR)
    with pytest.raises(UnknownAgent):
        await operator.release("acme/nobody/main")
    with pytest.raises(UnknownAgent):
        await operator.release("nobody")


# ---------------------------------------------------------------- timers and mail


async def test_timers_and_mail_are_listed(actors: Machine, operator: Operator) -> None:
    @script
    async def plans(actor: Actor, os: Any, message: Run) -> None:
        await os.timer("later", Look(), after_s=3600)
        await os.schedule("daily", Look(), "0 9 * * *")

    await actors.ask(ACTOR, Run(script="plans"))
    assert {t.name for t in await operator.timers()} == {"later", "daily"}
    assert [t.name for t in await operator.timers(ACTOR)] == ["daily", "later"]
    assert await operator.timers(OTHER) == []
    mail = MailRow(OTHER, "client:3", 1, b"x")
    await actors.journal.commit([[PutMail(mail)]])
    assert [m.key for m in await operator.mail(OTHER)] == [mail.key]
    assert await operator.full_id("main") == DESK


# ---------------------------------------------------------------- audit


class Direct:
    """A store as an audit reads it."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def agents(self, after: str = "", limit: int = 1000) -> list[AgentRow]:
        found: list[AgentRow] = self._store.agents(after=after, limit=limit)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


async def test_chains_are_verified_and_ends_are_kept(actors: Machine, operator: Operator) -> None:
    @script
    async def works(actor: Actor, os: Any, message: Run) -> None:
        await os.random()

    for _ in range(3):
        await actors.ask(ACTOR, Run(script="works"))
    store = Direct(actors.journal._store)
    agents = list(auditing.names(store))
    assert ACTOR in agents
    found = auditing.audit(store, agents)
    assert found.findings == []
    assert found.rows >= 6
    (head,) = [h for h in auditing.heads(store, agents) if h.agent == ACTOR]
    assert len(head.hash) == 64
    await actors.ask(ACTOR, Run(script="works"))
    assert auditing.audit(store, agents, [head]).findings == []
    forged = head._replace(hash="0" * 64)
    assert [f.problem for f in auditing.audit(store, agents, [forged]).findings] == ["edited"]
    cut = head._replace(pos=999)
    assert [f.problem for f in auditing.audit(store, agents, [cut]).findings] == ["missing"]
    # By way of the kernel: the pages that the hashes are made of.
    assert [r.pos for r in await operator.chain(ACTOR, 0, 2)] == [1, 2]
    end = await operator.chain_end(ACTOR)
    assert end is not None
    assert end.pos > head.pos
    assert any(row.agent == ACTOR for row in await operator.agents())


# ---------------------------------------------------------------- the kernel's part


async def test_only_operations_are_carried_out(kernel: LittleKernel) -> None:
    for name in ("__init__", "_dead", "nothing"):
        with pytest.raises(InvalidRequest):
            await call(kernel.operate(name), "x")
    assert CHANGES < OPERATIONS
    assert "turn" in OPERATIONS


async def test_a_backup_is_written_and_restored(
    actors: Machine, operator: Operator, tmp_path: Path
) -> None:
    @script
    async def works(actor: Actor, os: Any, message: Run) -> None:
        actor.state.log.append("worked")

    reply = await actors.deliver(ACTOR, Run(script="works"))
    target = tmp_path / "copy"
    assert await operator.backup(str(target)) == target.stat().st_size
    with pytest.raises(StoreUnavailable):
        await operator.backup(str(target))
    settings = Settings(home=tmp_path / "home")
    where = restore(settings, target, system="again", url=None)
    assert where == str(tmp_path / "home" / "runs" / "again" / "store.db")
    with opened(settings, SystemNote.of(settings, "again")) as offline:
        assert (await offline.turns())[0].turn == reply.turn
        assert len(await offline.turn(reply.turn)) == 1
        assert await offline.full_id("actor") == "acme/actor/*"
        with pytest.raises(UnknownAgent):
            await offline.full_id("nobody")
        with pytest.raises(OperationRefused, match="the kernel is down"):
            await offline.drain("host:0")
        with pytest.raises(OperationRefused):
            await offline.rebalance()
        assert (await offline.recording(reply.turn)).agent == ACTOR
    with pytest.raises(StoreUnavailable):
        restore(settings, target, system="again", url=None)


async def test_hosts_are_drained_by_the_core(operator: Operator) -> None:
    with pytest.raises(NoOtherHost):
        await operator.drain("host:0")
    await operator.drain("host:1")


# ---------------------------------------------------------------- a system that is down


def test_a_note_tells_where_a_system_was(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    assert SystemNote.find(settings, None) is None
    settings.make_folders("one")
    config = SystemConfig.parse(
        '[system]\nname = "one"\n[store]\ndriver = "postgres"\nurl = "env:DATABASE"\n',
        "system.toml",
        tmp_path,
    )
    SystemNote.write(settings, config)
    assert SystemNote.path(settings, "one").stat().st_mode & 0o077 == 0
    note = SystemNote.find(settings, None)
    assert note is not None
    assert (note.system, note.store, note.base) == ("one", config.store, tmp_path)
    settings.make_folders("two")
    (settings.run_dir("two") / "store.db").touch()
    assert SystemNote.find(settings, None) is None
    two = SystemNote.find(settings, "two")
    assert two == SystemNote(system="two", store=StoreTable())
    assert two.address(settings).endswith("runs/two/store.db")


async def test_an_open_store_is_operated_on_directly(tmp_path: Path) -> None:
    store = driver("store", "sqlite")(tmp_path / "s")
    operator = Operator(StoreLedger(store), lambda: 5.0)
    mail = MailRow("t/p/a", "client:1", 1, Envelope("t/p/a", "c", Wire.of(Look()), "c", 1).pack())
    store.commit([[PutMail(mail), BuryMail(*mail.key, "r", "s", 1.0)]])
    (letter,) = await operator.dead_letters()
    assert await operator.retry_dead([letter.id]) == [letter.id]
    assert [m.key for m in await operator.mail("t/p/a")] == [mail.key]
    assert await operator.held() == await operator.unknown_effects() == []
    store.close()
