"""Virtual time, and that a seed gives one run."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from tests.simulation.loop import BEGIN_S, Stuck, VirtualClock, run
from tests.simulation.schedules import random_faults
from tests.simulation.workload import simulate
from tests.simulation.world import Faults


def test_an_hour_passes_at_once() -> None:
    async def main() -> list[str]:
        out: list[str] = []

        async def one(name: str, wait_s: float) -> None:
            await asyncio.sleep(wait_s)
            out.append(name)

        await asyncio.gather(one("late", 3600.0), one("early", 1.0))
        async with asyncio.timeout(10.0):
            await asyncio.sleep(9.0)
        out.append(f"{asyncio.get_running_loop().time():.3f}")
        return out

    began = time.monotonic()
    assert run(main()) == ["early", "late", "3609.000"]
    assert time.monotonic() - began < 1.0


def test_who_waits_for_ever_is_found() -> None:
    async def main() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Stuck):
        run(main())


def test_the_wall_clock_can_be_set_and_the_other_goes_on() -> None:
    async def main() -> None:
        clock = VirtualClock(random.Random(1))
        before = clock.monotonic()
        assert clock.time() == BEGIN_S
        clock.ahead_s = -3600.0
        await clock.sleep(2.0)
        assert clock.time() == BEGIN_S - 3598.0
        assert clock.monotonic() - before == 2.0

    run(main())


def test_a_seed_gives_one_run() -> None:
    faults = random_faults(16)
    first, again = simulate(16, faults, size=2), simulate(16, faults, size=2)
    assert first == again
    assert simulate(17, faults, size=2).trace != first.trace


def test_without_faults_all_is_well() -> None:
    found = simulate(1, Faults(), size=3)
    assert found.violations == []
    assert found.handled > 20
    assert any("before blind" in step for step in found.trace)
