"""With one part of the design switched off, the same checker must fail: else it, or the
faults it is shown, would be worth nothing. The seed and the range were found by search; which
boundary of it does it changes with the kernel."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from tests.simulation import switches
from tests.simulation.workload import simulate
from tests.simulation.world import Faults

SEED = 1

SWITCHES: tuple[
    tuple[Callable[[], AbstractContextManager[None]], bool, tuple[str, ...], set[str]], ...
] = (
    (contextlib.nullcontext, False, ("cut host:0", "cut host:1"), {"effect", "money", "lost"}),
    (switches.no_dedup, True, ("kill host:1", "kill host:0"), {"duplicated"}),
    (switches.no_barrier, True, ("kill host:1", "kill host:0"), {"duplicated", "effect"}),
    (switches.messages_first, True, ("kill host:1", "kill host:0"), {"duplicated", "money"}),
)
"""What is off, whether the store fences, what happens, and kinds of which one must be found."""

BOUNDARIES = range(20, 60)
"""Among these there is one for each of them."""


@pytest.mark.parametrize("number", range(len(SWITCHES)))
def test_the_checker_fails(number: int) -> None:
    switch, fencing, actions, kinds = SWITCHES[number]
    for boundary in BOUNDARIES:
        for action in actions:
            with switch():
                off = simulate(SEED, Faults(at={boundary: action}, fencing=fencing))
            if kinds & {violation.kind for violation in off.violations}:
                # The same with everything on: nothing is found.
                on = simulate(SEED, Faults(at={boundary: action}))
                assert on.happened == off.happened
                assert not on.violations, (boundary, action, on.violations)
                return
    pytest.fail(f"{switch} was switched off, and nobody has noticed")
