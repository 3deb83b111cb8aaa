from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict, Field

from llmos.kernel.core.errors import SlotUnavailable
from llmos.kernel.directory import Directory, DirectoryHolder, SlotRoute
from llmos.kernel.program import ProgramError, load_program, make_config
from llmos.syscalls.errors import UnknownResource

CHAT = SlotRoute("causal", "cpu:0", "d1", incarnation=1)
LOADING = SlotRoute("causal", None, "d1")


# ------------------------------------------------------------------ directory


async def settled(task: asyncio.Task[object]) -> bool:
    """Whether the task is done once all that could run has run."""
    for _ in range(5):
        await asyncio.sleep(0)
    return task.done()


async def test_a_service_is_waited_for() -> None:
    holder = DirectoryHolder()
    waiting = [asyncio.create_task(holder.service(name)) for name in ("journal", "knowledge")]
    assert not await settled(waiting[0])
    await holder.set(Directory(1, journal="J"))
    assert await settled(waiting[0])
    assert not waiting[1].done()
    await holder.set(Directory(2, journal="J", knowledge="K"))
    assert [await t for t in waiting] == ["J", "K"]
    assert await holder.service("journal") == "J"


async def test_an_older_directory_never_replaces_a_newer_one() -> None:
    holder = DirectoryHolder()
    await holder.set(Directory(3, journal="new"))
    await holder.set(Directory(2, journal="old"))
    assert holder.current.journal == "new"


async def test_of_two_that_come_together_the_newer_stays() -> None:
    holder = DirectoryHolder()
    # Somebody holds the lock: both have to wait for it, the newer one first.
    async with holder._changed:
        sets = [
            asyncio.create_task(holder.set(Directory(version, journal=version)))
            for version in (3, 2)
        ]
        await asyncio.sleep(0)
    await asyncio.gather(*sets)
    assert holder.current.version == 3


async def test_newer_waits_for_a_version_after() -> None:
    holder = DirectoryHolder()
    await holder.set(Directory(1))
    assert (await holder.newer(0)).version == 1
    waiting = asyncio.create_task(holder.newer(1))
    assert not await settled(waiting)
    await holder.set(Directory(5))
    assert (await waiting).version == 5


async def test_a_slot_is_waited_for_while_it_is_loaded_and_while_its_device_is_away() -> None:
    holder = DirectoryHolder()
    waiting = asyncio.create_task(holder.slot("chat", "causal"))
    assert not await settled(waiting)
    await holder.set(Directory(1, slots={"chat": LOADING}))
    assert not await settled(waiting)
    await holder.set(Directory(2, slots={"chat": CHAT}))
    assert not await settled(waiting)
    await holder.set(Directory(3, slots={"chat": CHAT}, devices={"device:cpu:0": "D"}))
    assert await waiting == ("D", CHAT)


async def test_a_slot_that_cannot_be_had_raises() -> None:
    holder = DirectoryHolder()
    waiting = asyncio.create_task(holder.slot("chat", "causal"))
    await settled(waiting)
    why = SlotUnavailable("chat", "broken files")
    await holder.set(Directory(1, slots={"chat": SlotRoute("causal", None, "", why)}))
    with pytest.raises(SlotUnavailable, match="broken files"):
        await waiting
    with pytest.raises(UnknownResource) as caught:
        await holder.slot("chatt", "causal")
    assert (caught.value.kind, caught.value.known) == ("causal model", ("chat",))
    # A causal model is no encoder.
    with pytest.raises(UnknownResource, match="encoder model"):
        await holder.slot("chat", "encoder")


# ------------------------------------------------------------------ programs

SOURCES = {
    "llmos_good": """
        from pydantic import BaseModel
        from llmos import Agent, Manifest, Message, on
        class Hi(Message):
            text: str = ""
        class Desk(Agent):
            manifest = Manifest(description="here")
            @on(Hi)
            async def hi(self, message, os):
                return None
        class Silent(Agent):
            pass
        class Other:
            pass
        number = 3
        """,
    "llmos_raises": "value = 1\nraise RuntimeError('at once')\n",
    "llmos_syntax": "def broken(:\n",
    "llmos_needs": "import no_such_package_at_all\n",
    "llmos_exits": "import sys\nsys.exit(3)\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    import textwrap

    for name, source in SOURCES.items():
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
    path = sys.path[:]
    yield tmp_path
    sys.path[:] = path
    for name in SOURCES:
        sys.modules.pop(name, None)


def test_a_program_beside_the_system_file_is_found(folder: Path) -> None:
    loaded = load_program("llmos_good:Desk", folder)
    assert loaded.manifest.description == "here"
    assert list(loaded.handlers) == ["Hi"]
    assert load_program("llmos_good:Desk", folder) is loaded
    assert sys.path.count(str(folder)) == 1


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("llmos_good", "is written module:Class"),
        (":Desk", "is written module:Class"),
        ("llmos_good:", "is written module:Class"),
        ("llmos_nowhere:Desk", "no module 'llmos_nowhere'"),
        ("llmos_needs:Desk", "no module 'no_such_package_at_all'"),
        ("llmos_good:Dask", "has no Dask"),
        ("llmos_good:Desk.hi", "has no Desk.hi"),
        ("llmos_good:number", "does not derive from llmos.Agent"),
        ("llmos_good:Other", "does not derive from llmos.Agent"),
        ("llmos_good:Silent", "has no handler"),
        ("llmos_raises:Desk", "llmos_raises.py:2"),
        ("llmos_syntax:Desk", "SyntaxError"),
        ("llmos_exits:Desk", "SystemExit(3)"),
        (".relative:Desk", "its module raised"),
    ],
)
def test_what_is_no_program_is_told(folder: Path, program: str, said: str) -> None:
    with pytest.raises(ProgramError) as caught:
        load_program(program, folder)
    assert caught.value.program == program
    assert said in str(caught.value)


class Config(BaseModel):
    model: str
    level: int = Field(default=1, ge=1)


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    level: int = 1


class Desk:
    Config = Config


def test_a_configuration_is_checked_field_by_field() -> None:
    made = make_config("m:Desk", Desk, {"model": "chat", "level": "2"})  # type: ignore[arg-type]
    assert made == Config(model="chat", level=2)
    for given, said in (
        ({"modle": "chat"}, "config.modle: unknown field"),
        ({}, "config.model: Field required"),
        ({"model": "chat", "level": 0}, "config.level: Input should be greater"),
    ):
        with pytest.raises(ProgramError) as caught:
            make_config("m:Desk", Desk, given)  # type: ignore[arg-type]
        assert said in str(caught.value)
        assert caught.value.remedy == "Its fields: model, level"


def test_a_configuration_may_be_open() -> None:
    class Wide:
        Config = Open

    assert make_config("m:W", Wide, {"colour": "red"}).model_extra == {"colour": "red"}  # type: ignore[arg-type]
