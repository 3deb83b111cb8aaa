"""With one part of the design switched off, the same checker must fail: else it, or the
faults it is shown, would be worth nothing. The schedules were found by search."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from tests.simulation import switches
from tests.simulation.workload import simulate
from tests.simulation.world import Faults

SEED = 1

SWITCHES: tuple[tuple[Callable[[], AbstractContextManager[None]], bool, str, set[str]], ...] = (
    (contextlib.nullcontext, False, "cut host:0", {"effect", "duplicated", "money", "lost"}),
    (switches.no_dedup, True, "kill host:1", {"duplicated"}),
    (switches.no_barrier, True, "kill host:1", {"duplicated", "effect"}),
    (switches.messages_first, True, "refuse all 3", {"duplicated", "money", "lost"}),
)
"""What is off, whether the store fences, what happens, and kinds of which one must be found."""

BOUNDARIES = range(10, 44)
"""Among these there is one for each of them."""


@pytest.mark.parametrize("number", range(len(SWITCHES)))
def test_the_checker_fails(number: int) -> None:
    switch, fencing, action, kinds = SWITCHES[number]
    for boundary in BOUNDARIES:
        found = simulate(SEED, Faults(at={boundary: action}))
        assert not found.violations, (boundary, found.violations)
        with switch():
            found = simulate(SEED, Faults(at={boundary: action}, fencing=fencing))
        if kinds & {violation.kind for violation in found.violations}:
            return
    pytest.fail(f"{switch} was switched off, and nobody has noticed")
