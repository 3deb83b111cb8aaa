"""What a turn leaves to its commit, when the turn is cut off before it."""

from __future__ import annotations

from typing import Any

from llmos import Context
from tests.kernel.durable import ACTOR, OTHER, SEEN, Actor, Run, script
from tests.kernel.local import until
from tests.kernel.machine import Machine
from tests.kernel.programs import gate
from tests.kernel.test_replay_turns import cut_off


async def test_messages_and_timers_of_a_turn_that_was_cut_off_come_with_its_commit(
    actors: Machine,
) -> None:
    dues: list[float] = []

    @script
    async def leave(self: Actor, os: Context, message: Run) -> Any:
        for _ in range(2):
            await os.send(OTHER, Run(script="note"))
        dues.append(await os.timer("later", Run(script="note"), after_s=1000))
        await os.now()
        if len(dues) == 1:
            await gate("never").wait()

    @script
    async def note(self: Actor, os: Context, message: Run) -> Any:
        SEEN.append("told")

    await cut_off(actors, "leave", results=4)
    await until(lambda: SEEN == ["told", "told"])
    # Due when the agent was told first, however long the crash took.
    assert dues[0] == dues[1]
    assert [t.due for t in await actors.read("timers_of", ACTOR)] == [dues[0]]
    assert len(await actors.turns(ACTOR)) == 1
