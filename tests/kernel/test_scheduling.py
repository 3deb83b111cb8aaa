"""Policies and quotas of the system file, as a device process carries them out."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from llmos.drivers.protocols import EngineOptions, GenerationChunk, GenerationJob, SamplingParams
from llmos.kernel.core.limits import Quota
from llmos.kernel.core.policies import NAMES
from llmos.kernel.device import DeviceServer
from llmos.kernel.metrics import Exported
from llmos.kernel.scheduling import Meter, Scheduling
from llmos.kernel.system import SystemConfig, SystemFileError
from llmos.syscalls.errors import Busy, OverQuota


def job(name: str, tenant: str = "bank", tokens: int = 20) -> GenerationJob:
    params = SamplingParams(max_new_tokens=tokens)
    return GenerationJob(name, "a b c d e f", params, tenant=tenant, agent=f"{tenant}/p/a")


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[DeviceServer]:
    made = DeviceServer("device:cpu:0", "memory", 0, 1 << 30, 1, str(tmp_path), "WARNING")
    yield made
    await made.close()


async def last(server: DeviceServer, client: str) -> GenerationChunk:
    async with asyncio.timeout(20):
        while True:
            for chunk in await server.poll(client, 5.0):
                if chunk.finish is not None:
                    return chunk


@pytest.mark.parametrize("name", NAMES)
async def test_every_policy_serves(server: DeviceServer, name: str) -> None:
    await server.load("echo", "causal", EngineOptions("chat", Path()), Scheduling(name))
    assert await server.submit("host:0", [("chat", job("1"))]) == [None]
    assert (await last(server, "host:0")).finish in ("stop", "length")


async def test_a_tenant_beyond_its_tokens_is_told_when_to_come_back(server: DeviceServer) -> None:
    scheduling = Scheduling("fair", {}, {"bank": Quota(tokens_per_minute=10)})
    await server.load("echo", "causal", EngineOptions("chat", Path()), scheduling)
    assert await server.submit("host:0", [("chat", job("1"))]) == [None]
    ended = await last(server, "host:0")
    assert ended.prompt_tokens + ended.new_tokens > 10
    (over,) = await server.submit("host:0", [("chat", job("2"))])
    assert isinstance(over, OverQuota)
    assert over.limit == "tokens_per_minute"
    assert 0 < over.retry_after_s < 600
    assert isinstance(over, Busy)
    assert str(pickle.loads(pickle.dumps(over))) == str(over)
    # Others are none the worse for it.
    assert await server.submit("host:0", [("chat", job("3", "clinic"))]) == [None]
    await last(server, "host:0")


async def test_the_metrics_say_who_waited_and_who_was_refused(server: DeviceServer) -> None:
    scheduling = Scheduling("fair", {}, {"shop": Quota(tokens_per_minute=10)})
    await server.load("echo", "causal", EngineOptions("chat", Path()), scheduling)
    before = figures(await server.metrics())
    assert await server.submit("host:0", [("chat", job("1", "shop"))]) == [None]
    ended = await last(server, "host:0")
    (refused,) = await server.submit("host:0", [("chat", job("2", "shop"))])
    assert isinstance(refused, OverQuota)
    after = figures(await server.metrics())

    def grown(name: str, **labels: str) -> float:
        key = (name, tuple(sorted(labels.items())))
        return after[key] - before.get(key, 0.0)

    shop = {"tenant": "shop"}
    assert grown("llmos_tenant_tokens_total", **shop, phase="prefill") == ended.prompt_tokens
    assert grown("llmos_tenant_tokens_total", **shop, phase="decode") == ended.new_tokens
    assert grown("llmos_request_wait_seconds_count", **shop) == 1
    assert grown("llmos_refused_requests_total", **shop, limit="tokens_per_minute") == 1
    assert grown("llmos_engine_queue", model="chat", state="running") == 0
    assert after["llmos_kv_tokens", (("model", "chat"), ("state", "capacity"))] == 8192
    assert grown("llmos_engine_steps_total", model="chat") > 0


def figures(exported: Exported) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (name, tuple(sorted(labels.items()))): value
        for _, _, _, samples in exported.families
        for name, labels, value in samples
    }


def test_a_request_that_has_ended_makes_room_for_another() -> None:
    meter = Meter()
    meter.use({"bank": Quota(concurrent_requests=1)})
    assert meter.enter("1", job("1"), 0.0) is None
    over = meter.enter("2", job("2"), 0.0)
    assert over is not None
    assert (over.allowed, over.used) == (1, 1)
    # The same quotas again, from the next model that is loaded: nothing is forgotten.
    meter.use({"bank": Quota(concurrent_requests=1)})
    assert meter.enter("2", job("2"), 0.0) is not None
    meter.leave("1")
    assert meter.enter("2", job("2"), 0.0) is None


async def test_a_refused_request_is_counted_no_longer(server: DeviceServer) -> None:
    scheduling = Scheduling("fair", {}, {"bank": Quota(concurrent_requests=1)})
    await server.load("echo", "causal", EngineOptions("chat", Path()), scheduling)
    for number in range(3):
        (error,) = await server.submit("host:0", [("chat", job(str(number), tokens=-1))])
        assert error is not None
        assert not isinstance(error, OverQuota)


def test_the_system_file_names_policy_shares_and_quotas() -> None:
    text = """
[scheduler]
policy = "fair-edf"
[tenants.bank]
weight = 3
tokens_per_minute = 6000
"""
    scheduling = SystemConfig.parse(text, "s.toml", Path()).scheduling
    assert scheduling.policy == "fair-edf"
    assert scheduling.weights == {"bank": 3.0}
    assert scheduling.quotas == {"bank": Quota(tokens_per_minute=6000)}
    assert SystemConfig.parse("", "s.toml", Path()).scheduling == Scheduling()
    for wrong, field in (
        ('[scheduler]\npolicy = "lottery"', "scheduler.policy"),
        ("[tenants.bank]\nweight = 0", "tenants.bank.weight"),
        ("[tenants.bank]\ntokens_per_minute = 0", "tenants.bank.tokens_per_minute"),
    ):
        with pytest.raises(SystemFileError) as caught:
            SystemConfig.parse(wrong, "s.toml", Path())
        assert caught.value.field == field
        assert caught.value.line == 2
