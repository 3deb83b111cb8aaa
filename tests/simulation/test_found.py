"""Schedules under which something was wrong once. Each is what its name says; as the kernel
changes, its boundaries move, and the random schedules have to find the like of it again."""

from __future__ import annotations

import pytest

from tests.simulation.schedules import random_faults
from tests.simulation.workload import simulate
from tests.simulation.world import Faults

FOUND: dict[str, tuple[int, Faults, int]] = {
    "an opening that could not be kept is not written again": (
        1,
        Faults(at={26: "refuse all 3"}),
        1,
    ),
    "an error of the store is remembered as the reply": (1, Faults(at={2: "refuse some 3"}), 1),
    "a message whose part failed is never acknowledged": (1, Faults(at={43: "refuse some 3"}), 1),
    "what an agent sent before its move is overtaken": (1124, random_faults(1124), 2),
    "the next turn begins with a state that an unknown commit has changed": (
        1248,
        random_faults(1248),
        2,
    ),
    "the same, for a message that only its asker knows": (1035, random_faults(1035), 2),
    "the same, while the commit is still on its way": (1870, random_faults(1870), 2),
    "the same, for a turn that is moved away between two attempts to commit": (
        603,
        random_faults(603),
        2,
    ),
    "a turn that waits to run again is withdrawn with its asker": (1097, random_faults(1097), 2),
    "a turn is forgotten by the host when its asker goes during its commit": (
        47,
        random_faults(47),
        2,
    ),
    "the move of an agent that was asked puts down the turn of the asker": (
        40,
        random_faults(40),
        2,
    ),
    "that an agent is held is told to nobody while the store is away": (13, random_faults(13), 2),
    "a call that had begun has no outcome when its message is given up": (
        566,
        random_faults(566),
        2,
    ),
    "numbers of messages are used again after an agent was read again": (
        104,
        random_faults(104),
        2,
    ),
    "a turn that is to be held is forgotten with its asker": (10157, random_faults(10157), 2),
    "another turn comes between a turn and its running again": (24286, random_faults(24286), 2),
    "a question of a zombie is answered a second time": (23101, random_faults(23101), 2),
    "a turn whose commit was kept runs again": (1_000_010, random_faults(1_000_010), 2),
    "an agent that comes back to a host finds the state that it left there": (
        2451,
        random_faults(2451),
        2,
    ),
}


@pytest.mark.parametrize("what", FOUND)
def test_it_is_right_now(what: str) -> None:
    seed, faults, size = FOUND[what]
    found = simulate(seed, faults, size=size)
    assert not found.violations, found.violations
