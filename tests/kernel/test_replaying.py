"""A recorded turn that runs again offline: what is compared, and what stops it."""

# ruff: noqa: F811 - a script of the same name is what the changed code would be

from __future__ import annotations

import asyncio
import io
import json
import pdb
import sys
from pathlib import Path
from typing import Any

import pytest

from llmos.drivers.errors import LlmosError
from llmos.drivers.stores.rows import DropLaunch
from llmos.kernel.core.errors import Nondeterminism
from llmos.kernel.operating import OperationRefused, UnknownRecord
from llmos.kernel.program import ProgramError
from llmos.kernel.recording import Recording, RecordingError
from llmos.kernel.replaying import NotRecorded, replay
from llmos.syscalls.errors import UnhandledMessage
from tests.kernel.durable import ACTOR, SCRIPTS, Actor, Run, script
from tests.kernel.machine import Machine


@script
async def adds(actor: Actor, os: Any, message: Run) -> Any:
    number = await os.random()
    actor.state.log.append(message.n)
    return [number, len(actor.state.log)]


@pytest.fixture
async def recorded(actors: Machine) -> Recording:
    """The third turn of an agent that keeps what it is told."""
    script(adds)
    for n in range(3):
        reply = await actors.deliver(ACTOR, Run(script="adds", n=n))
    return await actors.operator.recording(reply.turn)


async def test_a_turn_begins_with_the_state_before_it(recorded: Recording) -> None:
    assert recorded.base == 2
    assert json.loads(recorded.state or b"") == {"log": [0, 1]}
    found = await replay(recorded)
    assert found.identical, found.differences
    assert found.ended
    assert found.calls == 1
    assert found.reply is not None
    assert found.reply.json()["value"][1] == 3
    assert found.code_version == found.recorded_code


async def test_the_first_turn_begins_with_the_first_state(
    actors: Machine, recorded: Recording
) -> None:
    turns = await actors.turns(ACTOR)
    first = await actors.operator.recording(turns[-1].turn[:15])
    assert (first.base, first.state) == (0, None)
    assert (await replay(first)).identical


async def test_a_recording_comes_back_from_its_file(recorded: Recording, tmp_path: Path) -> None:
    file = tmp_path / "turn.json"
    recorded.write(file)
    again = Recording.read(file)
    assert again.envelope == recorded.envelope._replace(again=True)
    assert (again.base, json.loads(again.state or b"")) == (2, {"log": [0, 1]})
    assert again.dump() == file.read_text()
    assert (await replay(again)).identical
    with pytest.raises(RecordingError, match="already"):
        recorded.write(file)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no recorded turn"),
        ("[]", "no recorded turn"),
        ("{}", "no recorded turn"),
        ('{"llmos_turn": 9}', "format is 9"),
        ('{"llmos_turn": 1}', "no recorded turn"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "x.json"
    with pytest.raises(RecordingError):
        Recording.read(file)
    file.write_text(text)
    with pytest.raises(RecordingError, match=said):
        Recording.read(file)


# ---------------------------------------------------------------- what differs


async def test_another_reply_state_or_error_is_a_difference(recorded: Recording) -> None:
    @script
    async def adds(actor: Actor, os: Any, message: Run) -> Any:
        await os.random()
        actor.state.log.append("else")
        return "else"

    found = await replay(recorded)
    assert not found.identical
    assert [d.splitlines()[0] for d in found.differences] == [
        "the reply differs",
        "the state differs",
    ]
    assert '+    "value": "else"' in found.differences[0]

    @script
    async def adds(actor: Actor, os: Any, message: Run) -> Any:
        await os.random()
        raise ZeroDivisionError

    found = await replay(recorded)
    assert "the error differs" in found.differences[1]
    assert "HandlerFailed" in found.differences[1]


async def test_a_call_that_is_not_recorded_does_not_go_out(
    actors: Machine, recorded: Recording
) -> None:
    caught: list[Exception] = []

    @script
    async def adds(actor: Actor, os: Any, message: Run) -> Any:
        await os.random()
        try:
            await os.call_tool("keyed", amount=1)
        except LlmosError as error:
            caught.append(error)

    found = await replay(recorded)
    assert isinstance(found.error, NotRecorded)
    assert (found.error.seq, found.error.kind, found.error.name) == (2, "Call", "keyed")
    assert "is not recorded" in found.differences[0]
    assert not found.identical
    assert not caught


async def test_another_call_and_a_missing_one_are_told_with_a_diff(recorded: Recording) -> None:
    @script
    async def adds(actor: Actor, os: Any, message: Run) -> Any:
        await os.now()

    found = await replay(recorded)
    assert isinstance(found.error, Nondeterminism)
    assert "call 1 was Random() and is now Now()" in found.differences[0]

    @script
    async def adds(actor: Actor, os: Any, message: Run) -> Any:
        return None

    found = await replay(recorded)
    assert isinstance(found.error, Nondeterminism)
    assert "1 Random()" in found.differences[0]


async def test_where_an_error_was_raised_does_not_count(actors: Machine) -> None:
    @script
    async def fails(actor: Actor, os: Any, message: Run) -> None:
        raise ZeroDivisionError("by zero")

    reply = await actors.deliver(ACTOR, Run(script="fails"))
    recording = await actors.operator.recording(reply.turn)

    @script
    async def fails(actor: Actor, os: Any, message: Run) -> None:
        # Some lines further down.
        raise ZeroDivisionError("by zero")

    assert (await replay(recording)).identical

    @script
    async def fails(actor: Actor, os: Any, message: Run) -> None:
        raise ZeroDivisionError("by one")

    assert not (await replay(recording)).identical


# ---------------------------------------------------------------- turns without an end


async def test_a_held_turn_is_run_as_far_as_it_goes(actors: Machine) -> None:
    ways = ["random"]

    @script
    async def wanders(actor: Actor, os: Any, message: Run) -> Any:
        await (os.random() if ways[0] == "random" else os.now())
        await os.call_tool("plain", amount=1)
        return "done"

    (bank,) = [tool for key, tool in actors.tools.items() if "plain" in key]
    tools: Any = actors.host._services._tools
    tools["plain"] = bank
    bank._failures[:] = ["uncertain"]  # type: ignore[attr-defined]
    asking = actors.asking(ACTOR, Run(script="wanders"))
    await asyncio.wait([asking], timeout=5)
    (mail,) = await actors.operator.mail(ACTOR)
    recording = await actors.operator.recording(mail.turn)
    assert recording.end is None
    found = await replay(recording)
    assert not found.ended
    assert found.identical
    assert "Nobody knows" in str(found.error)
    ways[0] = "now"
    found = await replay(recording)
    assert isinstance(found.error, Nondeterminism)
    assert not found.identical
    # Without the effect's rows it was cut off before it.
    short = recording._replace(rows=recording.rows[:1])
    ways[0] = "random"
    found = await replay(short)
    assert isinstance(found.error, NotRecorded)
    assert found.identical


# ---------------------------------------------------------------- what cannot be run


async def test_what_is_not_there_is_told(actors: Machine, recorded: Recording) -> None:
    operator = actors.operator
    with pytest.raises(UnknownRecord, match="turn 'ffff'"):
        await operator.recording("ffff")
    row = recorded.rows[0]
    await actors.journal.commit([[DropLaunch("acme/actor/*")]])
    with pytest.raises(OperationRefused, match="not launched any more"):
        await operator.recording(row.turn)
    launch = recorded.launch._replace(program="tests.kernel.nowhere:Actor")
    with pytest.raises(ProgramError):
        await replay(recorded._replace(launch=launch))
    other = recorded.launch._replace(program="tests.kernel.programs:Liar")
    with pytest.raises(UnhandledMessage):
        await replay(recorded._replace(launch=other))


# ---------------------------------------------------------------- the debugger


async def test_the_debugger_stops_at_the_first_line_of_the_handler(recorded: Recording) -> None:
    commands = io.StringIO("p message.n\nn\ncontinue\n")
    out = io.StringIO()
    before = sys.gettrace()
    debugger = pdb.Pdb(stdin=commands, stdout=out, nosigint=True, readrc=False)
    found = await replay(recorded, debugger=debugger)
    assert sys.gettrace() is before
    assert found.identical
    shown = out.getvalue()
    assert "value = await SCRIPTS[message.script]" in shown
    assert "(Pdb) 2" in shown
    assert "adds" in SCRIPTS
