"""Random requests and random events, for all tests of policies."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from llmos.drivers.protocols import QueuedRequest
from llmos.kernel.core.policies.fair import Fair
from llmos.kernel.core.policies.ranked import Ranked

Policy = Ranked | Fair


def request(key: str, **fields: Any) -> QueuedRequest:
    known: dict[str, Any] = {
        "tenant": "bank",
        "agent": "bank/help/main",
        "prompt_tokens": 100,
        "max_new_tokens": 64,
        "priority": 0,
        "deadline_s": None,
        "submitted_s": 0.0,
    }
    return QueuedRequest(key, **{**known, **fields})


def anybody(chance: random.Random, number: int, now_s: float) -> QueuedRequest:
    tenant = f"t{chance.randrange(3)}"
    return request(
        f"r{number}",
        tenant=tenant,
        agent=f"{tenant}/p{chance.randrange(3)}/a{chance.randrange(5)}",
        turn=f"turn{chance.randrange(40)}",
        prompt_tokens=chance.randint(1, 4000),
        max_new_tokens=chance.randint(1, 1000),
        priority=chance.randint(-3, 3),
        deadline_s=chance.choice((None, now_s + chance.uniform(0, 100))),
        submitted_s=now_s,
    )


def ride(policy: Policy, seed: int, steps: int) -> list[str | None]:
    """Random events; everything that the policy answered."""
    chance = random.Random(seed)
    waiting: dict[str, QueuedRequest] = {}
    running: dict[str, QueuedRequest] = {}
    answers: list[str | None] = []
    now_s = 0.0
    for number in range(steps):
        now_s += chance.choice((0.0, 0.01, 1.0, 40.0))
        event = chance.random()
        if event < 0.4:
            new = anybody(chance, number, now_s)
            waiting[new.key] = new
            policy.add(new, now_s)
        elif event < 0.65:
            key = policy.first(now_s)
            answers.append(key)
            assert (key is None) == (not waiting)
            if key is not None:
                policy.remove(key, now_s)
                running[key] = waiting.pop(key)
        elif event < 0.7 and waiting:
            gone = chance.choice(sorted(waiting))
            policy.remove(gone, now_s)
            del waiting[gone]
        elif event < 0.9 and running:
            for key, job in list(running.items()):
                read, written = chance.choice(((200, 0), (0, 8), (0, 64)))
                policy.served(job.tenant, job.agent, read, written, now_s)
                running[key] = replace(job, new_tokens=job.new_tokens + written)
        elif event < 0.95 and running:
            del running[chance.choice(sorted(running))]
        elif running:
            victim = policy.victim(list(running.values()), now_s)
            answers.append(victim)
            if victim is not None:
                assert victim in running, "it named somebody who does not run"
                waiting[victim] = running.pop(victim)
                policy.add(waiting[victim], now_s)
        if number % 16 == 0:
            policy.validate()
            assert policy.first(now_s) == policy.first(now_s)
    policy.validate()
    assert len(policy) == len(waiting)
    return answers
