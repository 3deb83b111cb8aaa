"""The kernel's policies in a real engine, with a small random model."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from llmos.drivers.engines import causal
from llmos.drivers.protocols import (
    GenerationChunk,
    GenerationJob,
    QueuedRequest,
    QueuePolicy,
    SamplingParams,
)
from llmos.kernel.core import policies
from llmos.kernel.core.history import Cost
from tests.drivers.engines import tiny_causal

KV_TOKENS = 512


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(causal, "CALIBRATION_S", 0.0)
        yield tiny_causal.make(tmp_path_factory.mktemp("tiny"))


class Watched:
    """A policy, and the gap of what it was told was served, while both tenants wait."""

    def __init__(self, policy: policies.Ranked | policies.Fair) -> None:
        self.policy = policy
        self.waiting = {"light": 0, "heavy": 0}
        self.tenants: dict[str, str] = {}
        self.work = {"light": 0.0, "heavy": 0.0}
        self.gaps: list[float] = []

    def add(self, request: QueuedRequest, now_s: float) -> None:
        self.policy.add(request, now_s)
        self.tenants[request.key] = request.tenant
        self.waiting[request.tenant] += 1

    def remove(self, key: str, now_s: float) -> None:
        self.policy.remove(key, now_s)
        self.waiting[self.tenants[key]] -= 1

    def first(self, now_s: float) -> str | None:
        return self.policy.first(now_s)

    def served(self, tenant: str, agent: str, read: int, written: int, now_s: float) -> None:
        self.policy.served(tenant, agent, read, written, now_s)
        self.work[tenant] += Cost().of(read, written)
        if all(self.waiting.values()):
            self.gaps.append(self.work["light"] - self.work["heavy"])

    def victim(self, running: Sequence[QueuedRequest], now_s: float) -> str | None:
        return self.policy.victim(running, now_s)


def run(folder: Path, policy: QueuePolicy) -> None:
    """Sixty jobs of two tenants; all of them end."""
    engine = tiny_causal.engine(folder, kv_tokens=KV_TOKENS, max_batch_tokens=64)
    try:
        engine.use_policy(policy)
        ended = threading.Semaphore(0)
        failed: list[GenerationChunk] = []

        def deliver(chunk: GenerationChunk) -> None:
            if chunk.finish is not None:
                if chunk.finish != "length":
                    failed.append(chunk)
                ended.release()

        for number in range(60):
            tenant, new = ("heavy", 40) if number < 40 else ("light", 10)
            job = GenerationJob(
                str(number),
                f"case {number}: the agents wait",
                SamplingParams(max_new_tokens=new, ignore_eos=True),
                tenant=tenant,
                agent=f"{tenant}/p/{number % 7}",
                turn=str(number),
                priority=number % 3,
            )
            engine.submit(job, deliver)
        for _ in range(60):
            assert ended.acquire(timeout=60)
        assert not failed
        statistics = engine.statistics()
        assert statistics.kv_tokens_used == 0
    finally:
        engine.close()


@pytest.mark.parametrize("name", policies.NAMES)
def test_every_job_ends_under_every_policy(folder: Path, name: str) -> None:
    policy = policies.make(name)
    run(folder, policy)
    assert len(policy) == 0
    policy.validate()


def test_fair_bounds_the_gap_of_two_tenants_that_wait(folder: Path) -> None:
    policy = Watched(policies.make("fair"))
    run(folder, policy)
    assert policy.gaps, "both had something waiting"
    assert max(policy.gaps) - min(policy.gaps) <= 2 * 2.0 * KV_TOKENS
