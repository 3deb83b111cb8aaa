"""Who used a device in the last minute."""

from __future__ import annotations

import pytest

from llmos.drivers.protocols import GenerationChunk, GenerationJob
from llmos.kernel.usage import MAX_USERS, OTHERS, Usage, joined


def job(name: str, agent: str = "bank/help/a") -> GenerationJob:
    return GenerationJob(name, "x", tenant=agent.split("/")[0], agent=agent, turn="t")


def last(name: str, prompt: int, cached: int = 0) -> GenerationChunk:
    return GenerationChunk(
        name, "y", 1, finish="stop", prompt_tokens=prompt, cached_tokens=cached, new_tokens=1
    )


def test_tokens_count_for_a_minute() -> None:
    usage = Usage()
    usage.begins("1", "chat", job("1"), 100.0)
    usage.told("1", GenerationChunk("1", "a b", 2), 100.5)
    usage.told("1", last("1", 30, cached=10), 101.2)
    assert usage.summary(101.9)["tenants"] == {
        "bank": {"read": 20, "written": 3, "under_way": 1},
    }
    ended = usage.ends("1")
    assert ended is not None
    assert ended.turn == "t"
    assert usage.ends("1") is None
    usage.told("1", GenerationChunk("1", "late", 1), 102.0)  # Nobody's any more.
    found = usage.summary(103.0)
    assert found["tenants"]["bank"] == {"read": 20, "written": 3, "under_way": 0}
    assert found["rates"]["chat"] == pytest.approx({"read_per_s": 4.0, "written_per_s": 0.6})
    assert usage.summary(160.5)["tenants"]["bank"]["written"] == 1
    assert usage.summary(161.5)["tenants"] == {}


def test_the_second_that_has_only_begun_is_in_no_rate() -> None:
    usage = Usage()
    usage.begins("1", "chat", job("1"), 10.0)
    usage.told("1", GenerationChunk("1", "a", 5), 10.1)
    assert usage.summary(10.9)["rates"] == {}
    assert usage.summary(11.0)["rates"]["chat"]["written_per_s"] == 1.0


def test_agents_beyond_the_bound_are_one() -> None:
    usage = Usage()
    for n in range(MAX_USERS + 20):
        usage.begins(str(n), "chat", job(str(n), f"bank/help/{n}"), 5.0)
        usage.told(str(n), GenerationChunk(str(n), "a", 1), 5.0)
        usage.ends(str(n))
    found = usage.summary(6.0)
    assert found["tenants"]["bank"]["written"] == MAX_USERS + 20
    assert found["agents"][0] == {"agent": OTHERS, "tenant": "bank", "read": 0, "written": 20}


def test_two_devices_are_joined() -> None:
    both = []
    for slot, agent in (("a", "bank/help/a"), ("b", "bank/help/a")):
        usage = Usage()
        usage.begins("1", slot, job("1", agent), 1.0)
        usage.told("1", GenerationChunk("1", "x", 4), 1.0)
        both.append(usage.summary(2.0))
    found = joined(both)
    assert found["tenants"]["bank"] == {"read": 0, "written": 8, "under_way": 2}
    assert found["agents"] == [{"agent": "bank/help/a", "tenant": "bank", "read": 0, "written": 8}]
    assert set(found["rates"]) == {"a", "b"}
