"""The device process: one per device, with all slots of that device in it.

Hosts hand in generation jobs in batches and fetch what is new by one long poll each,
so a step with 32 requests in it costs one message per host instead of 32.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmos.drivers.errors import EngineFailed, LlmosError, UnknownAdapter
from llmos.drivers.protocols import (
    CausalEngine,
    DeviceDriver,
    DeviceInfo,
    EngineOptions,
    GenerationChunk,
    GenerationJob,
    Vectors,
)
from llmos.drivers.registry import driver
from llmos.kernel import logs
from llmos.kernel.encoding import Encoder
from llmos.kernel.metrics import (
    ENGINES,
    REFUSED,
    REQUEST_WAIT,
    REQUESTS,
    TENANT_TOKENS,
    TOKENS,
    Exported,
    export,
    tenant_label,
)
from llmos.kernel.remote import answers
from llmos.kernel.scheduling import Meter, Scheduling
from llmos.kernel.usage import Usage

log = logging.getLogger("llmos.device")


@dataclass(slots=True)
class _Client:
    """A host that has jobs here."""

    jobs: dict[str, str] = field(default_factory=dict)
    """Job id → slot."""
    cancelled: set[str] = field(default_factory=set)
    """Cancelled while they were still being handed to the engine."""
    outbox: deque[GenerationChunk] = field(default_factory=deque)
    news: asyncio.Event = field(default_factory=asyncio.Event)


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
        self._encoders: dict[str, Encoder] = {}
        self._clients: dict[str, _Client] = {}
        self._meter = Meter()
        self._usage = Usage()
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
    async def load(
        self,
        engine: str,
        kind: str,
        options: EngineOptions,
        scheduling: Scheduling | None = None,
    ) -> dict[str, int]:
        """Make a model resident; returns the bytes that it keeps on the device, by purpose.

        Raises:
            DriverError: why it could not be loaded; nothing of it stays.
        """
        loop = asyncio.get_running_loop()
        factory = driver("engine", engine)
        options = _on(options, self._device.torch_device)
        try:
            loaded = await loop.run_in_executor(None, factory, options)
        except LlmosError:
            raise
        except Exception as error:
            log.exception("loading %s", options.model)
            raise EngineFailed(options.model, f"{type(error).__name__}: {error}") from error
        if kind == "causal":
            if scheduling is not None:
                self._meter.use(scheduling.quotas)
                loaded.use_policy(scheduling.make_policy())
            self._causal[options.model] = loaded
        else:
            self._encoders[options.model] = Encoder(
                options.model, loaded, options.max_batch_texts, options.max_batch_tokens
            )
        return dict(loaded.memory_bytes())

    @answers
    async def unload(self, slot: str) -> None:
        """Take a model off the device; what is in it fails."""
        engine = self._causal.pop(slot, None)
        if engine is not None:
            await asyncio.get_running_loop().run_in_executor(None, engine.close)
        encoder = self._encoders.pop(slot, None)
        if encoder is not None:
            await encoder.close()

    @answers
    async def load_adapter(self, slot: str, name: str, path: Path) -> int:
        """Make an adapter resident beside a model; returns its bytes.

        Raises:
            EngineFailed, AdapterUnusable, AdaptersFull
        """
        engine = self._causal.get(slot)
        if engine is None:
            raise EngineFailed(slot, f"it is not resident on {self._name}")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, engine.load_adapter, name, path)

    @answers
    async def unload_adapter(self, slot: str, name: str) -> None:
        """Drop an adapter when its last job has ended; new jobs are refused at once.

        Raises:
            UnknownAdapter
        """
        engine = self._causal.get(slot)
        if engine is not None:
            engine.unload_adapter(name)

    # -- generation

    async def submit(
        self, client: str, jobs: Sequence[tuple[str, GenerationJob]]
    ) -> list[LlmosError | None]:
        """Queue jobs for slots; for each its error, or None: its chunks come by :meth:`poll`.

        Their ``deadline_s`` are seconds from now, not a time of the sender's clock.
        """
        state = self._clients.setdefault(client, _Client())
        loop = asyncio.get_running_loop()
        results: list[LlmosError | None] = []
        for slot, job in jobs:
            engine = self._causal.get(slot)
            if engine is None:
                results.append(EngineFailed(slot, f"it is not resident on {self._name}"))
                continue

            if job.deadline_s is not None:
                job = dataclasses.replace(job, deadline_s=time.monotonic() + job.deadline_s)
            metered = f"{client}/{job.id}"
            over = self._meter.enter(metered, job, time.monotonic())
            if over is not None:
                REFUSED.labels(tenant=tenant_label(job.tenant), limit=over.limit).inc()
                results.append(over)
                continue

            def deliver(chunk: GenerationChunk, slot: str = slot, metered: str = metered) -> None:
                loop.call_soon_threadsafe(self._deliver, state, slot, metered, chunk)

            state.jobs[job.id] = slot
            self._usage.begins(metered, slot, job, time.monotonic())
            try:
                # In a thread: tokenizing a long prompt must not hold up everybody's chunks.
                await loop.run_in_executor(None, engine.submit, job, deliver)
            except LlmosError as error:
                self._meter.leave(metered)
                self._usage.ends(metered)
                state.jobs.pop(job.id, None)
                state.cancelled.discard(job.id)
                if isinstance(error, UnknownAdapter):
                    # It has just gone. The engine's list has adapters of other tenants, too.
                    error = UnknownAdapter(error.model, error.adapter, ())
                results.append(error.with_traceback(None))
            else:
                if job.id in state.cancelled or self._clients.get(client) is not state:
                    state.cancelled.discard(job.id)
                    engine.cancel(job.id)
                results.append(None)
        return results

    def _deliver(self, client: _Client, slot: str, metered: str, chunk: GenerationChunk) -> None:
        self._usage.told(metered, chunk, time.monotonic())
        request = self._usage.requests.get(metered)
        tenant = tenant_label(request.tenant) if request is not None else ""
        if chunk.tokens or chunk.prompt_tokens:
            self._meter.charge(metered, chunk.tokens + chunk.prompt_tokens, time.monotonic())
        if chunk.tokens:
            TOKENS.labels(model=slot, phase="decode").inc(chunk.tokens)
            TENANT_TOKENS.labels(tenant=tenant, phase="decode").inc(chunk.tokens)
        if chunk.finish is not None:
            self._meter.leave(metered)
            self._usage.ends(metered)
            client.jobs.pop(chunk.job_id, None)
            client.cancelled.discard(chunk.job_id)
            TOKENS.labels(model=slot, phase="prefill").inc(chunk.prompt_tokens)
            TENANT_TOKENS.labels(tenant=tenant, phase="prefill").inc(chunk.prompt_tokens)
            REQUEST_WAIT.labels(tenant).observe(chunk.queued_s)
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

    # -- embeddings and classes

    @answers
    async def embed(self, slot: str, texts: Sequence[str]) -> Vectors:
        """Embed texts. Shape (len(texts), dimension)."""
        return await self._encoder(slot).embed(texts)

    @answers
    async def classify(self, slot: str, texts: Sequence[str]) -> tuple[tuple[str, ...], Vectors]:
        """The labels of a model's head, and their probabilities for each text. Shape
        (len(texts), len(labels))."""
        encoder = self._encoder(slot)
        return encoder.engine.labels, await encoder.classify(texts)

    def _encoder(self, slot: str) -> Encoder:
        encoder = self._encoders.get(slot)
        if encoder is None:
            raise EngineFailed(slot, f"it is not resident on {self._name}")
        return encoder

    # -- looking

    async def places(self, agent: str) -> dict[str, Any]:
        """An agent's requests here, where each stands in its engine, and whether its tenant
        would be refused now."""
        found = []
        for request in self._usage.requests.values():
            engine = self._causal.get(request.slot)
            if request.agent != agent or engine is None:
                continue
            place = engine.place(request.job_id)
            found.append({"model": request.slot, "turn": request.turn, "place": place})
        refused = self._meter.refuses(agent.split("/", 1)[0], time.monotonic())
        return {"requests": found, "refused": refused}

    async def statistics(self) -> dict[str, Any]:
        """Memory now, the counters of each slot, how long its steps take, and who used it."""
        usage = self._device.usage()
        engines: dict[str, Any] = {n: e.statistics() for n, e in self._causal.items()}
        engines.update({n: e.engine.statistics() for n, e in self._encoders.items()})
        return {
            "used_bytes": usage.used_bytes,
            "utilisation": usage.utilisation,
            "slots": engines,
            "step_times": {n: e.step_time() for n, e in self._causal.items()},
            "usage": self._usage.summary(time.monotonic()),
        }

    async def metrics(self) -> Exported:
        """This process's metrics."""
        ENGINES.read = lambda: {n: e.statistics() for n, e in self._causal.items()}
        return export(self._name)

    async def close(self) -> None:
        """Unload everything."""
        for slot in [*self._causal, *self._encoders]:
            await self.unload(slot)
        self._ended.set()


def _on(options: EngineOptions, torch_device: str) -> EngineOptions:
    return dataclasses.replace(options, torch_device=torch_device)
