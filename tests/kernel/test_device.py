from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmos.drivers.errors import (
    DriverNotFound,
    EngineBusy,
    EngineFailed,
    InvalidParams,
    PromptTooLong,
)
from llmos.drivers.protocols import (
    EngineOptions,
    GenerationChunk,
    GenerationJob,
    SamplingParams,
    Vectors,
)
from llmos.kernel import device
from llmos.kernel.device import DeviceServer
from tests.kernel.conftest import sample
from tests.kernel.local import until

ENDLESS = SamplingParams(max_new_tokens=5000, ignore_eos=True)


def job(number: int | str, text: str = "one two three", params: Any = None) -> GenerationJob:
    return GenerationJob(str(number), text, params or SamplingParams(max_new_tokens=50))


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[DeviceServer]:
    made = DeviceServer("device:memory:0", "memory", 0, 1 << 30, 1, str(tmp_path), "INFO")
    assert isinstance(await made.load("echo", "causal", EngineOptions("chat", Path())), int)
    assert isinstance(await made.load("hash", "encoder", EngineOptions("embed", Path())), int)
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
    assert (await server.statistics())["slots"]["chat"].running == 1
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


# ------------------------------------------------------------------ embeddings


class Slow:
    """The real encoder behind a gate."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.gate = threading.Event()
        self.batches: list[int] = []
        self.error: Exception | None = None

    def embed(self, texts: Sequence[str]) -> Vectors:
        self.batches.append(len(texts))
        assert self.gate.wait(5)
        if self.error is not None:
            raise self.error
        return np.asarray(self._engine.embed(texts))

    def close(self) -> None:
        self._engine.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def slowed(server: DeviceServer) -> Slow:
    encoder = server._encoders["embed"]
    slow = Slow(encoder.engine)
    encoder.engine = slow
    return slow


async def embed(server: DeviceServer, *texts: str) -> Any:
    return await server.embed("embed", texts)


async def waiting(server: DeviceServer, slow: Slow, *batches: int) -> list[asyncio.Task[Any]]:
    """Callers behind the gate: the first alone in the model, the others in the queue."""
    tasks = []
    for size in batches:
        tasks.append(asyncio.create_task(embed(server, *[f"text {n}" for n in range(size)])))
        await asyncio.sleep(0)
    await until(lambda: slow.batches)
    return tasks


async def test_callers_that_wait_go_through_the_model_together(server: DeviceServer) -> None:
    alone = await embed(server, "text 0", "text 1", "text 2")
    slow = slowed(server)
    tasks = await waiting(server, slow, 1, 2, 3, 1)
    slow.gate.set()
    made = await asyncio.gather(*tasks)
    assert slow.batches == [1, 6]
    for size, vectors in zip((1, 2, 3, 1), made, strict=True):
        np.testing.assert_array_equal(vectors, alone[:size])
        assert vectors.base is None


async def test_a_batch_is_bounded_but_no_caller_is_split(server: DeviceServer) -> None:
    slow = slowed(server)
    tasks = await waiting(server, slow, 1, 40, 30, 200, 1)
    slow.gate.set()
    await asyncio.gather(*tasks)
    assert slow.batches == [1, 40, 30, 200, 1]


async def test_one_who_left_is_not_embedded(server: DeviceServer) -> None:
    slow = slowed(server)
    first, second, third = await waiting(server, slow, 1, 5, 2)
    second.cancel()
    await asyncio.sleep(0)
    slow.gate.set()
    assert (await first).shape[0] == 1
    assert (await third).shape[0] == 2
    assert slow.batches == [1, 2]


async def test_unloading_fails_those_inside_and_those_who_wait(server: DeviceServer) -> None:
    slow = slowed(server)
    tasks = await waiting(server, slow, 1, 2)
    unloading = asyncio.create_task(server.unload("embed"))
    await asyncio.sleep(0.01)
    slow.gate.set()
    async with asyncio.timeout(5):
        results = await asyncio.gather(*tasks)
        await unloading
    assert [type(r) for r in results] == [EngineFailed, EngineFailed]
    assert "unloaded" in str(results[0])
    assert isinstance(await embed(server, "x"), EngineFailed)


async def test_an_encoder_that_breaks_fails_its_batch_alone(server: DeviceServer) -> None:
    slow = slowed(server)
    slow.error = RuntimeError("out of luck")
    (task,) = await waiting(server, slow, 1)
    slow.gate.set()
    broken = await task
    assert isinstance(broken, EngineFailed)
    assert "out of luck" in str(broken)
    slow.error = None
    assert (await embed(server, "x")).shape[0] == 1


async def test_an_encoders_queue_is_bounded(
    server: DeviceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "MAX_WAITING_TEXTS", 3)
    slow = slowed(server)
    tasks = await waiting(server, slow, 1, 3)
    refused = await embed(server, "one more")
    assert isinstance(refused, EngineBusy)
    slow.gate.set()
    await asyncio.gather(*tasks)
    assert (await embed(server, "one more")).shape[0] == 1


async def test_the_device_says_what_it_is(server: DeviceServer) -> None:
    info = await server.ready()
    assert info.budget_bytes == 1 << 30
    assert await server.ping()
    assert (await server.metrics()).process == "device:memory:0"
