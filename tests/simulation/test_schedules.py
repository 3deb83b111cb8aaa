"""Random schedules: several crashes, zombies, moves of shards, a store that refuses or does
not say, lost and late answers, a wall clock that is set."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.simulation.conftest import RUNS
from tests.simulation.schedules import CRASHES, random_faults
from tests.simulation.workload import simulate
from tests.simulation.world import Faults

CALM = settings(
    deadline=None,
    database=None,
    derandomize=RUNS <= 1,
    suppress_health_check=list(HealthCheck),
)

actions = st.one_of(
    st.sampled_from(CRASHES),
    st.builds(
        lambda how, seconds: f"refuse {how} {seconds}",
        st.sampled_from(("all", "some")),
        st.sampled_from((0.05, 1.0, 5.0, 35.0)),
    ),
    st.sampled_from(("clock 3600", "clock -3600", "clock 1", "move host:1>host:0")),
)

schedules = st.builds(
    Faults,
    at=st.dictionaries(st.integers(2, 300), actions, max_size=4),
    delay_s=st.sampled_from((0.002, 0.001, 0.02)),
    late=st.sampled_from((0.0, 0.05, 0.2)),
    late_s=st.sampled_from((0.1, 0.5, 3.0)),
    lost=st.sampled_from((0.0, 0.01, 0.05)),
    uncertain=st.sampled_from((0.0, 0.2)),
    deaths=st.sampled_from((1000, 2)),
)


@settings(CALM, max_examples=int(100 * RUNS))
@given(seed=st.integers(0, 2**32), faults=schedules)
def test_a_schedule(seed: int, faults: Faults) -> None:
    """Hypothesis finds the schedule, and makes it small."""
    found = simulate(seed, faults)
    assert not found.violations, found.violations


@pytest.mark.parametrize("block", range(4))
def test_seeds(block: int) -> None:
    """Many seeds of longer runs."""
    count = int(40 * RUNS)
    for seed in range(block * 1_000_000, block * 1_000_000 + count):
        found = simulate(seed, random_faults(seed), size=2)
        assert not found.violations, (seed, found.happened, found.violations)


def test_an_owner_that_the_store_does_not_know_yet() -> None:
    """A moved shard's mail was refused, dropped, and never looked for again."""
    found = simulate(9, random_faults(9))
    assert not found.violations, (found.happened, found.violations)
