"""Schedules of faults: at every boundary, and by seeds."""

from __future__ import annotations

import random

from tests.simulation.world import Faults

CRASHES = (
    "kill host:0",
    "kill host:1",
    "kill journal",
    "cut host:0",
    "cut host:1",
    "kill host:0,host:1",
    "kill host:0,host:1,journal",
    "move host:0>host:1",
    "refuse all 3",
    "refuse some 3",
)
"""What a boundary may be the last thing before."""


def random_faults(seed: int) -> Faults:
    """A schedule of faults by its seed: some runs are mild, some are wild."""
    chance = random.Random(seed)
    length = chance.choice((160, 300, 600))
    at: dict[int, str] = {}
    for _ in range(chance.choice((0, 1, 2, 3, 5))):
        at[chance.randrange(2, length)] = _action(chance)
    return Faults(
        at=at,
        delay_s=chance.choice((0.001, 0.003, 0.02)),
        late=chance.choice((0.0, 0.0, 0.05, 0.2)),
        late_s=chance.choice((0.1, 0.5, 3.0)),
        lost=chance.choice((0.0, 0.0, 0.01, 0.05)),
        uncertain=chance.choice((0.0, 0.0, 0.2)),
        deaths=chance.choice((1000, 1000, 2)),
    )


def _action(chance: random.Random) -> str:
    kind = chance.choice(("kill", "kill", "kill", "cut", "move", "refuse", "clock"))
    match kind:
        case "kill":
            return f"kill {chance.choice(('host:0', 'host:1', 'journal', 'host:0,host:1'))}"
        case "cut":
            return f"cut {chance.choice(('host:0', 'host:1'))}"
        case "move":
            return f"move {chance.choice(('host:0>host:1', 'host:1>host:0'))}"
        case "refuse":
            how = chance.choice(("all", "some", "some"))
            return f"refuse {how} {chance.choice((0.05, 1.0, 5.0, 35.0))}"
        case _:
            return f"clock {chance.choice((3600.0, -3600.0, 1.0, -1.0))}"
