"""The device process: one per device, with all slots of that device in it.

Hosts hand in generation jobs in batches and fetch what is new by one long poll each,
so a step with 32 requests in it costs one message per host instead of 32.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmos.drivers.errors import EngineBusy, EngineFailed, LlmosError
from llmos.drivers.protocols import (
    CausalEngine,
    DeviceDriver,
    DeviceInfo,
    EncoderEngine,
    EngineOptions,
    GenerationChunk,
    GenerationJob,
    Vectors,
)
from llmos.drivers.registry import driver
from llmos.kernel import logs
from llmos.kernel.metrics import EMBED_BATCH, REQUESTS, TOKENS, Exported, export
from llmos.kernel.remote import answers

log = logging.getLogger("llmos.device")

MAX_WAITING_TEXTS = 20_000
"""Texts that may wait for an encoder; more are answered EngineBusy."""


@dataclass(slots=True)
class _Client:
    """A host that has jobs here."""

    jobs: dict[str, str] = field(default_factory=dict)
    """Job id → slot."""
    cancelled: set[str] = field(default_factory=set)
    """Cancelled while they were still being handed to the engine."""
    outbox: deque[GenerationChunk] = field(default_factory=deque)
    news: asyncio.Event = field(default_factory=asyncio.Event)


class _Encoder:
    """An encoder slot: texts of all callers that wait go through the model together."""

    def __init__(self, model: str, engine: EncoderEngine, batch: int) -> None:
        self.engine = engine
        self._model = model
        self._batch = batch
        self._waiting: deque[tuple[Sequence[str], asyncio.Future[Vectors]]] = deque()
        self._texts = 0
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, f"encoder-{model}")
        self._task = asyncio.create_task(self._run())

    async def embed(self, texts: Sequence[str]) -> Vectors:
        if self._texts + len(texts) > MAX_WAITING_TEXTS:
            raise EngineBusy(self._model, self._texts, 1.0)
        future: asyncio.Future[Vectors] = asyncio.get_running_loop().create_future()
        self._waiting.append((texts, future))
        self._texts += len(texts)
        self._wake.set()
        return await future

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                group: list[tuple[Sequence[str], asyncio.Future[Vectors]]] = []
                count = 0
                # At least one caller, then more while they fit: a caller with many texts is
                # not split here, the engine batches inside.
                while self._waiting and (
                    not group or count + len(self._waiting[0][0]) <= self._batch
                ):
                    texts, future = self._waiting.popleft()
                    self._texts -= len(texts)
                    if future.cancelled():
                        continue
                    group.append((texts, future))
                    count += len(texts)
                if not group:
                    continue
                flat = [t for texts, _ in group for t in texts]
                EMBED_BATCH.labels(model=self._model).observe(len(flat))
                try:
                    vectors = await loop.run_in_executor(self._thread, self.engine.embed, flat)
                except asyncio.CancelledError:
                    self._fail(group, EngineFailed(self._model, "it was unloaded"))
                    raise
                except LlmosError as error:
                    self._fail(group, error)
                    continue
                except Exception as error:
                    log.exception("encoder %s", self._model)
                    self._fail(group, EngineFailed(self._model, repr(error)))
                    continue
                at = 0
                for texts, future in group:
                    if not future.cancelled():
                        # A copy: a view would send the whole batch to every caller.
                        future.set_result(np.array(vectors[at : at + len(texts)]))
                    at += len(texts)

    @staticmethod
    def _fail(
        group: list[tuple[Sequence[str], asyncio.Future[Vectors]]], error: LlmosError
    ) -> None:
        for _, future in group:
            if not future.cancelled():
                future.set_exception(error)

    async def close(self) -> None:
        self._task.cancel()
        self._fail(list(self._waiting), EngineFailed(self._model, "it was unloaded"))
        self._waiting.clear()
        await asyncio.get_running_loop().run_in_executor(self._thread, self.engine.close)
        self._thread.shutdown(wait=False)


class DeviceServer:
    """Owns one device. Runs as a Ray actor."""

    def __init__(
        self,
        name: str,
        driver_name: str,
        index: int,
        budget_bytes: int | None,
        threads: int | None,
        log_dir: str,
        log_level: str,
    ) -> None:
        self._name = name
        logs.configure(Path(log_dir), name, log_level)
        self._device: DeviceDriver = driver("device", driver_name)(index, budget_bytes, threads)
        self._causal: dict[str, CausalEngine] = {}
        self._encoders: dict[str, _Encoder] = {}
        self._clients: dict[str, _Client] = {}
        self._ended = asyncio.Event()

    async def ready(self) -> DeviceInfo:
        """What this device is."""
        return self._device.info

    async def lifeline(self) -> None:
        """Returns when the process is closed; fails when it is lost, which is how that is seen."""
        await self._ended.wait()

    async def ping(self) -> bool:
        """Answer."""
        return True

    # -- slots

    @answers
    async def load(self, engine: str, kind: str, options: EngineOptions) -> int:
        """Make a model resident; returns the bytes that the device now uses more.

        Raises:
            DriverError: why it could not be loaded; nothing of it stays.
        """
        loop = asyncio.get_running_loop()
        factory = driver("engine", engine)
        if engine in ("causal", "encoder"):
            # What the libraries themselves take is not the model's.
            await loop.run_in_executor(None, __import__, "torch")
            await loop.run_in_executor(None, __import__, "transformers")
        before = self._device.usage().used_bytes
        options = _on(options, self._device.torch_device)
        try:
            loaded = await loop.run_in_executor(None, factory, options)
        except LlmosError:
            raise
        except Exception as error:
            log.exception("loading %s", options.model)
            raise EngineFailed(options.model, f"{type(error).__name__}: {error}") from error
        if kind == "causal":
            self._causal[options.model] = loaded
        else:
            self._encoders[options.model] = _Encoder(options.model, loaded, options.max_batch_texts)
        return max(0, self._device.usage().used_bytes - before)

    @answers
    async def unload(self, slot: str) -> None:
        """Take a model off the device; what is in it fails."""
        engine = self._causal.pop(slot, None)
        if engine is not None:
            await asyncio.get_running_loop().run_in_executor(None, engine.close)
        encoder = self._encoders.pop(slot, None)
        if encoder is not None:
            await encoder.close()

    # -- generation

    async def submit(
        self, client: str, jobs: Sequence[tuple[str, GenerationJob]]
    ) -> list[LlmosError | None]:
        """Queue jobs for slots; for each its error, or None: its chunks come by :meth:`poll`."""
        state = self._clients.setdefault(client, _Client())
        loop = asyncio.get_running_loop()
        results: list[LlmosError | None] = []
        for slot, job in jobs:
            engine = self._causal.get(slot)
            if engine is None:
                results.append(EngineFailed(slot, f"it is not resident on {self._name}"))
                continue

            def deliver(chunk: GenerationChunk, slot: str = slot) -> None:
                loop.call_soon_threadsafe(self._deliver, state, slot, chunk)

            state.jobs[job.id] = slot
            try:
                # In a thread: tokenizing a long prompt must not hold up everybody's chunks.
                await loop.run_in_executor(None, engine.submit, job, deliver)
            except LlmosError as error:
                state.jobs.pop(job.id, None)
                state.cancelled.discard(job.id)
                results.append(error.with_traceback(None))
            else:
                if job.id in state.cancelled or self._clients.get(client) is not state:
                    state.cancelled.discard(job.id)
                    engine.cancel(job.id)
                results.append(None)
        return results

    def _deliver(self, client: _Client, slot: str, chunk: GenerationChunk) -> None:
        if chunk.tokens:
            TOKENS.labels(model=slot, phase="decode").inc(chunk.tokens)
        if chunk.finish is not None:
            client.jobs.pop(chunk.job_id, None)
            client.cancelled.discard(chunk.job_id)
            TOKENS.labels(model=slot, phase="prefill").inc(chunk.prompt_tokens)
            REQUESTS.labels(model=slot, outcome=chunk.finish).inc()
        client.outbox.append(chunk)
        client.news.set()

    async def poll(self, client: str, wait_s: float) -> list[GenerationChunk]:
        """What is new for this client; waits up to ``wait_s`` for something."""
        state = self._clients.setdefault(client, _Client())
        if not state.outbox:
            try:
                async with asyncio.timeout(wait_s):
                    await state.news.wait()
            except TimeoutError:
                return []
        state.news.clear()
        chunks = list(state.outbox)
        state.outbox.clear()
        return chunks

    async def cancel(self, client: str, jobs: Sequence[str]) -> None:
        """Stop jobs; their last chunks say so."""
        state = self._clients.get(client)
        if state is None:
            return
        for job in jobs:
            slot = state.jobs.get(job)
            engine = self._causal.get(slot) if slot else None
            if engine is not None and not engine.cancel(job):
                state.cancelled.add(job)

    async def forget(self, client: str) -> None:
        """A client is gone: stop all it had here."""
        state = self._clients.pop(client, None)
        if state is not None:
            log.info("forgetting %s with %d jobs", client, len(state.jobs))
            for job, slot in list(state.jobs.items()):
                if slot in self._causal:
                    self._causal[slot].cancel(job)

    # -- embeddings

    @answers
    async def embed(self, slot: str, texts: Sequence[str]) -> Vectors:
        """Embed texts. Shape (len(texts), dimension)."""
        encoder = self._encoders.get(slot)
        if encoder is None:
            raise EngineFailed(slot, f"it is not resident on {self._name}")
        return await encoder.embed(texts)

    # -- looking

    async def statistics(self) -> dict[str, Any]:
        """Memory now, and the counters of each slot."""
        usage = self._device.usage()
        engines: dict[str, Any] = {n: e.statistics() for n, e in self._causal.items()}
        engines.update({n: e.engine.statistics() for n, e in self._encoders.items()})
        return {"used_bytes": usage.used_bytes, "utilisation": usage.utilisation, "slots": engines}

    async def metrics(self) -> Exported:
        """This process's metrics."""
        return export(self._name)

    async def close(self) -> None:
        """Unload everything."""
        for slot in [*self._causal, *self._encoders]:
            await self.unload(slot)
        self._ended.set()


def _on(options: EngineOptions, torch_device: str) -> EngineOptions:
    import dataclasses

    return dataclasses.replace(options, torch_device=torch_device)
