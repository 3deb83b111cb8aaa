"""The contract of :class:`llmos.drivers.protocols.QueuePolicy`, for every policy there is."""

from __future__ import annotations

import random
import time
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos.kernel.core import policies
from llmos.kernel.core.policies.edf import EarliestDeadline
from llmos.kernel.core.policies.fair import Fair
from llmos.kernel.core.policies.priority import HIGHEST, Priority
from llmos.kernel.core.policies.ranked import OLDEST, Ranked
from tests.core.policies.suite import Policy, anybody, request, ride

every = pytest.mark.parametrize("name", policies.NAMES)


@every
def test_nobody_waits_nobody_is_first(name: str) -> None:
    policy = policies.make(name)
    assert policy.first(0.0) is None
    assert policy.victim([request("r")], 0.0) is None
    policy.add(request("a"), 0.0)
    assert policy.first(1.0) == "a"
    policy.remove("a", 1.0)
    assert policy.first(1.0) is None
    policy.validate()


@every
def test_wrong_use_is_refused_and_changes_nothing(name: str) -> None:
    policy = policies.make(name)
    policy.add(request("a"), 0.0)
    with pytest.raises(ValueError, match="waits already"):
        policy.add(request("a"), 0.0)
    with pytest.raises(KeyError):
        policy.remove("b", 0.0)
    assert len(policy) == 1
    policy.validate()


@every
def test_charges_of_strangers_do_no_harm(name: str) -> None:
    policy = policies.make(name)
    policy.served("nobody", "nobody/p/a", 100, 100, 0.0)
    policy.add(request("a"), 0.0)
    assert policy.victim([request("x", tenant="other", new_tokens=1)], 0.0) is None
    policy.validate()


@every
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_random_events_keep_it_whole_and_it_decides_alike(name: str, seed: int) -> None:
    first, again = policies.make(name), policies.make(name)
    assert ride(first, seed, 250) == ride(again, seed, 250)


def inner(policy: Policy) -> Ranked:
    """What sorts the requests of the tenant of these tests."""
    return policy.queue_of("bank") if isinstance(policy, Fair) else policy


@every
@settings(max_examples=15, deadline=None)
@given(older=st.integers(0, 12), seed=st.integers(0, 2**32), width=st.integers(1, 4))
def test_nobody_starves(name: str, older: int, seed: int, width: int) -> None:
    """The worst request there is, beside arrivals made to overtake it for ever; it enters
    within the bound that its policy states, in entries of its tenant."""
    policy = policies.make(name)
    chance = random.Random(seed)
    # Its turn has had a million tokens written.
    policy.add(request("before", agent="bank/huge/a", turn="t"), 0.0)
    policy.remove("before", 0.0)
    policy.served("bank", "bank/huge/a", 0, 10**6, 0.0)
    entered = 1
    for number in range(older):
        policy.add(
            request(f"o{number}", agent=f"bank/old/{number}", prompt_tokens=chance.randint(1, 99)),
            0.0,
        )
    policy.add(
        request(
            "worst", agent="bank/huge/a", turn="t", prompt_tokens=10**5, max_new_tokens=10**5,
            priority=-HIGHEST, submitted_s=1.0,
        ),
        1.0,
    )  # fmt: skip
    sorts = inner(policy)
    step_s = 20.0
    arrived = 0
    if isinstance(sorts, Priority | EarliestDeadline):
        # Nothing that comes later than this overtakes it.
        horizon_s = sorts.horizon_s if isinstance(sorts, EarliestDeadline) else 0.0
        if isinstance(sorts, Priority):
            horizon_s = 2 * HIGHEST * sorts.ageing_s
        bound = older + width + int(horizon_s / step_s + 1) + 1
    else:
        bound = (OLDEST * sorts.patience if sorts.patience else 1) * (older + 1)
    now_s = 1.0
    for number in range(width):
        policy.add(fast(number, now_s), now_s)
    arrived = width
    entered = 0
    while (key := policy.first(now_s)) != "worst":
        assert key is not None
        policy.remove(key, now_s)
        entered += 1
        assert entered <= bound, (entered, bound)
        policy.served("bank", f"bank/tiny/{entered}", 1, 1, now_s)
        now_s += step_s
        policy.add(fast(arrived, now_s), now_s)
        arrived += 1
    policy.validate()


def fast(number: int, now_s: float):  # type: ignore[no-untyped-def]
    """A request that every policy likes."""
    return request(
        f"n{number}", agent=f"bank/tiny/{number}", turn="x", prompt_tokens=1, max_new_tokens=1,
        priority=HIGHEST, deadline_s=now_s, submitted_s=now_s,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["fair", "fair-fcfs"])
def test_a_tenant_is_not_held_up_by_a_flood_of_another(name: str) -> None:
    policy = policies.make(name)
    flood = deque(range(2000))
    for number in flood:
        policy.add(request(f"f{number}", tenant="flood", agent=f"flood/p/{number}"), 0.0)
    policy.served("flood", "flood/p/0", 0, 500, 0.0)
    policy.add(request("one", tenant="calm", agent="calm/p/a", submitted_s=9.0), 9.0)
    entered = 0
    while policy.first(9.0) != "one":
        key = policy.first(9.0)
        assert key is not None
        policy.remove(key, 9.0)
        entered += 1
    assert entered <= 1


@pytest.mark.parametrize("name", ["fcfs", "priority", "serpt", "fair"])
def test_a_decision_takes_microseconds_with_100_000_waiting(name: str) -> None:
    policy = policies.make(name)
    chance = random.Random(1)
    for number in range(100_000):
        policy.add(anybody(chance, number, number * 1e-3), number * 1e-3)
    now_s = 100.0
    best = float("inf")
    for part in range(5):
        coming = [anybody(chance, 10**6 + part * 500 + number, now_s) for number in range(500)]
        started = time.perf_counter()
        for new in coming:
            key = policy.first(now_s)
            assert key is not None
            policy.remove(key, now_s)
            policy.served("t0", "t0/p0/a0", 0, 1, now_s)
            policy.add(new, now_s)
        best = min(best, (time.perf_counter() - started) / 500)
    # Leaving, a charge and coming back together. The aim for a decision is 20 µs on a quiet
    # machine; the benchmark measures it. Here neighbours may slow it down.
    assert best < 150e-6, best
