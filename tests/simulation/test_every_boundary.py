"""A crash at every boundary of a run: before and after each commit, each call of a tool and
each answer that comes in. All must recover, and the checker must find nothing."""

from __future__ import annotations

import pytest

from tests.simulation.conftest import RUNS
from tests.simulation.schedules import CRASHES
from tests.simulation.workload import simulate
from tests.simulation.world import Faults

SEED = 1
STEP = 1 if RUNS > 1 else 4
"""By default each kind of crash takes every fourth boundary; together they take all."""


@pytest.mark.parametrize("number", range(len(CRASHES)))
def test_every_boundary(number: int) -> None:
    action = CRASHES[number]
    length = len(simulate(SEED, Faults()).trace)
    assert length > 100
    for boundary in range(1 + number % STEP, length + 1, STEP):
        found = simulate(SEED, Faults(at={boundary: action}))
        assert found.happened == [f"{boundary} {action}"]
        assert not found.violations, (boundary, found.trace[boundary - 1], found.violations)
