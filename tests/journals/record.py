"""Record turns of the programs beside this file: ``python -m tests.journals.record [NAME…]``.

Files that are there already are left alone: they are what later code is held to.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

from llmos.agents.messages import Question
from llmos.kernel.server import agent_id
from llmos.kernel.system import AgentTable
from tests.journals import programs
from tests.journals.programs import Go
from tests.kernel.ledger import LittleKernel
from tests.kernel.machine import SYSTEM, Machine

HERE = Path(__file__).parent
TOOLS = """
[tools.booking]
driver = "memory"

[tools.strict]
driver = "memory"

[tools.strict.options]
failures = ["refused", "refused", "refused"]
"""
TURNS = {
    "gather": ("Gatherer", 2),
    "race": ("Racer", 1),
    "tool": ("Booker", 3),
    "stream": ("Streamer", 1),
    "patched": ("Patched", 1),
    "patched-before": ("Patched", 1),
    "ask": ("Asker", 1),
    "asked": ("Teller", 1),
    "asked-with-its-time": ("Teller", 1),
    "plan": ("Planner", 1),
    "failed": ("Failing", 1),
    "cut-off": ("Slow", 1),
}
"""Name of a file → program, and which of its turns is kept."""


EXAMPLE = HERE.parent.parent / "examples" / "clinic-and-bank"
SERVICE = "bank/customer-service/main"
QUESTIONS = {
    "service-refund": Question(text="I was charged twice", data={"amount": 38.2, "days": 5}),
    "service-answer": Question(text="How long does a transfer to another bank take?"),
}
"""Turns of a whole program, on the example's documents and rules."""


async def record(folder: Path, names: list[str]) -> None:
    """Write the files that are not there."""
    if wanted := [n for n in names if n in QUESTIONS]:
        await record_example(folder, wanted)
    names = [n for n in names if n in TURNS]
    with tempfile.TemporaryDirectory() as run:
        machine = Machine(Path(run), SYSTEM + TOOLS)
        await machine.start()
        try:
            agents = {}
            for program, _ in TURNS.values():
                path = f"{programs.__name__}:{program}"
                agent = agents[program] = agent_id(AgentTable(program=path, tenant="acme"))
                await machine.register(agent, path)
            operator = LittleKernel(machine).operator
            for name in names:
                program, count = TURNS[name]
                for number in range(count):
                    reply = await machine.deliver(
                        agents[program], Go(text=f"one two {number}"), deadline_s=30.0
                    )
                file = folder / f"{name}.json"
                if not file.exists():
                    (await operator.recording(reply.turn)).write(file)
        finally:
            await machine.stop()


async def record_example(folder: Path, names: list[str]) -> None:
    """Customer service of the example, with engines that need no weights."""
    text = (EXAMPLE / "system.toml").read_text().replace('path = "', f'path = "{EXAMPLE}/')
    with tempfile.TemporaryDirectory() as run:
        machine = Machine(Path(run), text)
        (table,) = [a for a in machine.system.agents if agent_id(a) == SERVICE]
        await machine.start()
        try:
            await machine.knowledge.directory(machine.host._directory.current)
            async with asyncio.timeout(60):
                while not await _ready(machine):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            await machine.register(SERVICE, table.program, **{**table.config, "finance": ""})
            operator = LittleKernel(machine).operator
            for name in names:
                reply = await machine.deliver(SERVICE, QUESTIONS[name], deadline_s=30.0)
                file = folder / f"{name}.json"
                if not file.exists():
                    (await operator.recording(reply.turn)).write(file)
        finally:
            await machine.stop()


async def _ready(machine: Machine) -> bool:
    corpora = (await machine.knowledge.status())["corpora"]
    return all(corpus["ready"] for corpus in corpora.values())


if __name__ == "__main__":
    asyncio.run(record(HERE, sys.argv[1:] or [*TURNS, *QUESTIONS]))
