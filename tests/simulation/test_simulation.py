"""The design, played: crashes at every boundary, and by seeds; and what must not be left out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from tests.simulation import switches
from tests.simulation.schedules import CRASHES, random_faults
from tests.simulation.workload import Run, simulate
from tests.simulation.world import Faults

SEED = 1
SEEDS = int(os.environ.get("LLMOS_SIMULATION_SEEDS", "120"))
"""Random schedules; thousands by hand: LLMOS_SIMULATION_SEEDS=5000."""
STRIDE = int(os.environ.get("LLMOS_SIMULATION_STRIDE", "6"))
"""Every how many boundaries the rarer crashes are tried; 1 by hand."""
EVERYWHERE = ("kill host:0", "kill journal")
"""Crashes that are tried at every boundary."""


@pytest.fixture(scope="module")
def boundaries() -> int:
    """How many there are in a run without faults, which must go well."""
    run = simulate(SEED, Faults())
    assert not run.violations, run.violations
    assert run.handled > 10
    assert len(run.trace) > 100
    return len(run.trace)


def wrong(run: Run, what: object) -> list[str]:
    return [f"{what}: {v.kind}: {v}" for v in run.violations]


@pytest.mark.parametrize("crash", CRASHES)
def test_a_crash_at_any_boundary_loses_doubles_and_reorders_nothing(
    boundaries: int, crash: str
) -> None:
    stride = 1 if crash in EVERYWHERE else STRIDE
    found = []
    for boundary in range(2 + CRASHES.index(crash) % stride, boundaries, stride):
        found += wrong(simulate(SEED, Faults(at={boundary: crash})), boundary)
    assert not found, found[:5]


def test_random_schedules_of_faults_lose_double_and_reorder_nothing() -> None:
    started, found = time.monotonic(), []
    for seed in range(SEEDS):
        found += wrong(simulate(seed, random_faults(seed)), f"seed {seed}")
    rate = SEEDS / (time.monotonic() - started)
    assert not found, (found[:5], f"{rate:.0f} seeds a second")


@contextmanager
def nothing() -> Iterator[None]:
    yield


@pytest.mark.parametrize(
    ("switch", "crash", "fencing"),
    [
        (nothing, "cut host:0", False),
        (switches.no_dedup, "kill host:0", True),
        (switches.no_barrier, "kill host:0", True),
        (switches.messages_first, "kill host:0", True),
    ],
    ids=["fencing", "deduplication", "commit barrier", "messages with their turn"],
)
def test_what_is_switched_off_is_missed(
    boundaries: int,
    switch: Callable[[], AbstractContextManager[None]],
    crash: str,
    fencing: bool,
) -> None:
    """The same checker finds something as soon as one part of the design is not there."""
    for boundary in range(2, boundaries):
        with switch():
            run = simulate(SEED, Faults(at={boundary: crash}, fencing=fencing))
        if run.violations:
            return
    pytest.fail("the checker missed nothing")
