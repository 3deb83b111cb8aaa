from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmos.drivers.errors import (
    DriverNotFound,
    EngineFailed,
    InvalidParams,
    NoHead,
    PromptTooLong,
)
from llmos.drivers.protocols import (
    EngineOptions,
    GenerationChunk,
    GenerationJob,
    SamplingParams,
)
from llmos.kernel.device import DeviceServer
from tests.kernel.conftest import sample
from tests.kernel.local import until

ENDLESS = SamplingParams(max_new_tokens=5000, ignore_eos=True)


def job(number: int | str, text: str = "one two three", params: Any = None) -> GenerationJob:
    return GenerationJob(str(number), text, params or SamplingParams(max_new_tokens=50))


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[DeviceServer]:
    made = DeviceServer("device:memory:0", "memory", 0, 1 << 30, 1, str(tmp_path), "INFO")
    assert await made.load("echo", "causal", EngineOptions("chat", Path())) == {}
    assert await made.load("hash", "encoder", EngineOptions("embed", Path())) == {}
    yield made
    await made.close()


async def gather(server: DeviceServer, client: str, jobs: int) -> dict[str, list[GenerationChunk]]:
    """Poll until so many jobs have ended."""
    chunks: dict[str, list[GenerationChunk]] = {}
    async with asyncio.timeout(10):
        while sum(c[-1].finish is not None for c in chunks.values()) < jobs:
            for chunk in await server.poll(client, 1.0):
                chunks.setdefault(chunk.job_id, []).append(chunk)
    return chunks


def text(chunks: list[GenerationChunk]) -> str:
    return "".join(c.text for c in chunks)


# ------------------------------------------------------------------ generation


async def test_a_batch_of_jobs_is_queued_and_polled(server: DeviceServer) -> None:
    before = sample("llmos_engine_requests_total", model="chat", outcome="stop")
    batch = [("chat", job(n, f"this is {n}")) for n in range(20)]
    assert await server.submit("host:0", batch) == [None] * 20
    chunks = await gather(server, "host:0", 20)
    assert {j: text(c) for j, c in chunks.items()} == {str(n): f"this is {n}" for n in range(20)}
    assert all(c.finish is None for cs in chunks.values() for c in cs[:-1])
    assert sample("llmos_engine_requests_total", model="chat", outcome="stop") == before + 20
    assert (await server.statistics())["slots"]["chat"].finished == 20


async def test_clients_get_their_own(server: DeviceServer) -> None:
    await server.submit("host:0", [("chat", job("a", "for zero"))])
    await server.submit("host:1", [("chat", job("b", "for one"))])
    zero, one = await asyncio.gather(gather(server, "host:0", 1), gather(server, "host:1", 1))
    assert (list(zero), list(one)) == (["a"], ["b"])


async def test_each_job_has_its_own_answer_to_submit(server: DeviceServer) -> None:
    results = await server.submit(
        "host:0",
        [
            ("chat", job("good")),
            ("nowhere", job("lost")),
            ("chat", job("long", "word " * 10_000)),
            ("chat", job("bad", params=SamplingParams(temperature=-1))),
        ],
    )
    assert [type(r) for r in results] == [type(None), EngineFailed, PromptTooLong, InvalidParams]
    assert list(await gather(server, "host:0", 1)) == ["good"]


async def test_a_poll_waits_and_comes_back_empty(server: DeviceServer) -> None:
    assert await server.poll("host:0", 0.01) == []
    polling = asyncio.create_task(server.poll("host:0", 5.0))
    await asyncio.sleep(0)
    await server.submit("host:0", [("chat", job(1))])
    assert await polling


async def test_cancel_ends_a_job_and_says_so(server: DeviceServer) -> None:
    await server.submit("host:0", [("chat", job(1, params=ENDLESS)), ("chat", job(2))])
    await server.cancel("host:0", ["1", "unknown"])
    await server.cancel("nobody", ["2"])
    chunks = await gather(server, "host:0", 2)
    assert (chunks["1"][-1].finish, chunks["2"][-1].finish) == ("cancelled", "stop")


async def test_a_client_that_is_gone_leaves_nothing_running(server: DeviceServer) -> None:
    await server.submit("host:0", [("chat", job(n, params=ENDLESS)) for n in range(5)])
    await server.submit("host:1", [("chat", job("mine", params=ENDLESS))])
    await server.forget("host:0")
    await server.forget("never seen")
    engine = server._causal["chat"]
    await until(lambda: engine.statistics().cancelled == 5)
    # Its job may have waited for the memory of those.
    await until(lambda: engine.statistics().running == 1)
    assert (await server.statistics())["slots"]["chat"].waiting == 0
    await server.cancel("host:1", ["mine"])
    assert (await gather(server, "host:1", 1))["mine"][-1].finish == "cancelled"


async def test_unloading_fails_what_is_in_the_engine(server: DeviceServer) -> None:
    await server.submit("host:0", [("chat", job(1, params=ENDLESS))])
    assert await server.unload("chat") is None
    last = (await gather(server, "host:0", 1))["1"][-1]
    assert last.finish == "error"
    assert isinstance(last.error, EngineFailed)
    (refused,) = await server.submit("host:0", [("chat", job(2))])
    assert isinstance(refused, EngineFailed)
    assert await server.unload("chat") is None


async def test_what_cannot_be_loaded_is_returned_as_a_typed_error(
    server: DeviceServer, tmp_path: Path
) -> None:
    refused = await server.load("steam", "causal", EngineOptions("m", tmp_path))
    assert isinstance(refused, DriverNotFound)
    assert set((await server.statistics())["slots"]) == {"chat", "embed"}


# ------------------------------------------------------------------ texts


async def test_texts_go_to_the_encoder_of_the_slot(server: DeviceServer) -> None:
    vectors = await server.embed("embed", ["one", "two"])
    assert isinstance(vectors, np.ndarray)
    assert vectors.shape[0] == 2
    assert isinstance(await server.classify("embed", ["one"]), NoHead)
    for refused in (await server.embed("chat", ["x"]), await server.classify("gone", ["x"])):
        assert isinstance(refused, EngineFailed)
        assert "not resident" in str(refused)


async def test_the_device_says_what_it_is(server: DeviceServer) -> None:
    info = await server.ready()
    assert info.budget_bytes == 1 << 30
    assert await server.ping()
    assert (await server.metrics()).process == "device:memory:0"
