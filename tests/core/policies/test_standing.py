"""Where a policy says that a job stands is where it enters, if nothing else happens."""

from __future__ import annotations

import random

import pytest

from llmos.drivers.engines.queue import Fifo
from llmos.drivers.protocols import QueuedRequest
from llmos.kernel.core.policies import NAMES, make


def request(number: int, chance: random.Random) -> QueuedRequest:
    tenant = chance.choice(["a", "b", "c"])
    return QueuedRequest(
        key=str(number),
        tenant=tenant,
        agent=f"{tenant}/p/{chance.randrange(4)}",
        prompt_tokens=chance.randrange(1, 400),
        max_new_tokens=chance.randrange(1, 400),
        priority=chance.randrange(-3, 4),
        deadline_s=chance.choice([None, 50.0 + number]),
        submitted_s=float(number),
        turn=str(number),
    )


@pytest.mark.parametrize("name", [*NAMES, "arrival"])
def test_jobs_enter_in_the_order_that_was_told(name: str) -> None:
    chance = random.Random(7)
    policy = Fifo() if name == "arrival" else make(name, weights={"a": 2.0})
    now = 20.0
    for number in range(20):
        policy.add(request(number, chance), float(number))
    policy.served("a", "a/p/1", 300, 40, now)
    policy.served("b", "b/p/1", 10, 5, now)
    told = {str(n): policy.standing(str(n), now) for n in range(20)}
    assert all(s.reason and "\n" not in s.reason for s in told.values())
    order = sorted(told, key=lambda key: len(told[key].before))
    assert [len(told[key].before) for key in order] == list(range(20))
    for place, key in enumerate(order):
        assert set(told[key].before) == set(order[:place])
    # Policies with patience give every sixth place by age: up to there the order is exact.
    for key in order[:5]:
        assert policy.first(now) == key
        policy.remove(key, now)
    with pytest.raises((KeyError, ValueError)):
        policy.standing(order[0], now)
