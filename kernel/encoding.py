"""An encoder slot: the texts of all callers share the model fairly.

Texts go through the engine in rounds. A round takes a slice of each caller in turn until
it is full, so a caller with one text waits for a round or two, and not until another's ten
thousand are done. While a round computes, the next one is handed over as soon as there is
enough for a full one: the engine tokenizes it meanwhile. Less than that waits, since more
callers may join.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np

from llmos.drivers.errors import EngineBusy, EngineFailed, LlmosError, NoHead
from llmos.drivers.protocols import EncoderEngine, Vectors
from llmos.kernel.metrics import EMBED_BATCH

log = logging.getLogger("llmos.device")

MAX_WAITING_TEXTS = 20_000
"""Texts that may wait for an encoder; more are answered EngineBusy."""
PASSES = 2
"""Forward passes in a round: fewer cost more calls, more let newcomers wait longer."""
SLICES = 8
"""Callers that share a round at least, if so many wait."""
_CHARS_PER_TOKEN = 4
"""Of English text. The engine counts exactly; here a rough figure is enough to be fair."""
_LONGEST_RETRY_S = 60.0

Work = Literal["embed", "classify"]


class _Call:
    """One caller's texts."""

    def __init__(self, work: Work, texts: Sequence[str], max_tokens: int) -> None:
        self.work, self.texts = work, texts
        self.tokens = [min(max_tokens, len(t) // _CHARS_PER_TOKEN + 2) for t in texts]
        """Estimated."""
        # Texts of like length come into one round, where an engine that pads wants them.
        self.order = sorted(range(len(texts)), key=self.tokens.__getitem__, reverse=True)
        self.taken = 0
        """So many of ``order`` are in a round, or were."""
        self.unanswered = len(texts)
        self.rows: Vectors | None = None
        self.answer: asyncio.Future[Vectors] = asyncio.get_running_loop().create_future()

    def fill(self, places: list[int], rows: Vectors) -> None:
        """Some of its rows are there."""
        if self.rows is None:
            self.rows = np.empty((len(self.texts), rows.shape[1]), dtype=np.float32)
        self.rows[places] = rows
        self.unanswered -= len(places)
        if not self.unanswered and not self.answer.done():
            self.answer.set_result(self.rows)


_Round = list[tuple[_Call, list[int]]]


class Encoder:
    """The queue before an encoder engine. Used in one event loop."""

    def __init__(self, model: str, engine: EncoderEngine, texts: int, tokens: int) -> None:
        """``texts`` and ``tokens`` are those of one forward pass."""
        self.engine = engine
        self._model = model
        self._most_texts, self._most_tokens = texts * PASSES, tokens * PASSES
        self._waiting: dict[Work, OrderedDict[_Call, None]] = {
            "embed": OrderedDict(),
            "classify": OrderedDict(),
        }
        self._texts = self._tokens = 0
        """In no round yet; tokens are estimated."""
        self._running: set[asyncio.Task[None]] = set()
        self._inside: set[_Call] = set()
        self._last: Work = "classify"
        self._tokens_per_s = 0.0
        self._closed = False
        self._threads = ThreadPoolExecutor(2, f"encoder-{model}")

    async def embed(self, texts: Sequence[str]) -> Vectors:
        """Shape (len(texts), dimension).

        Raises:
            EngineBusy: too many texts wait.
            EngineFailed: the engine broke, or was unloaded.
        """
        if not texts:
            return np.zeros((0, self.engine.dimension), dtype=np.float32)
        return await self._ask("embed", texts)

    async def classify(self, texts: Sequence[str]) -> Vectors:
        """Shape (len(texts), len(labels)).

        Raises:
            NoHead: the model has none.
            EngineBusy, EngineFailed: as :meth:`embed`.
        """
        labels = self.engine.labels
        if not labels:
            raise NoHead(self._model)
        if not texts:
            return np.zeros((0, len(labels)), dtype=np.float32)
        return await self._ask("classify", texts)

    async def _ask(self, work: Work, texts: Sequence[str]) -> Vectors:
        if self._closed:
            raise EngineFailed(self._model, "it was unloaded")
        if self._texts + len(texts) > MAX_WAITING_TEXTS:
            raise EngineBusy(self._model, self._texts, self._wait_s())
        call = _Call(work, texts, self.engine.max_tokens)
        self._waiting[work][call] = None
        self._texts += len(texts)
        self._tokens += sum(call.tokens)
        # Not at once: callers of the same moment go together.
        asyncio.get_running_loop().call_soon(self._start)
        try:
            return await call.answer
        finally:
            self._leave(call)

    def _wait_s(self) -> float:
        if not self._tokens_per_s:
            return 1.0
        return min(_LONGEST_RETRY_S, max(0.1, self._tokens / self._tokens_per_s))

    def _leave(self, call: _Call) -> None:
        """Whatever of it is in no round never will be."""
        if call in self._waiting[call.work]:
            del self._waiting[call.work][call]
            left = call.order[call.taken :]
            self._texts -= len(left)
            self._tokens -= sum(call.tokens[i] for i in left)

    def _start(self) -> None:
        while not self._closed and self._texts:
            if self._running and (len(self._running) > 1 or self._tokens < self._most_tokens):
                return
            task = asyncio.create_task(self._compute(*self._compose()))
            self._running.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._start()

    def _compose(self) -> tuple[Work, _Round]:
        """The next round. Embedding and classifying take turns where both are asked for."""
        other: Work = "classify" if self._last == "embed" else "embed"
        work = other if self._waiting[other] else self._last
        self._last = work
        ring = self._waiting[work]
        texts, tokens = self._most_texts, self._most_tokens
        parts: dict[_Call, list[int]] = {}
        while ring and texts > 0 and tokens > 0:
            call = next(iter(ring))
            taken = 0
            slice_tokens = min(tokens, max(1, self._most_tokens // SLICES))
            places = parts.setdefault(call, [])
            while call.taken < len(call.order) and texts and taken < slice_tokens:
                place = call.order[call.taken]
                places.append(place)
                call.taken += 1
                taken += call.tokens[place]
                texts -= 1
                self._texts -= 1
            tokens -= taken
            self._tokens -= taken
            if call.taken == len(call.order):
                del ring[call]
            else:
                ring.move_to_end(call)
        return work, list(parts.items())

    async def _compute(self, work: Work, parts: _Round) -> None:
        texts = [call.texts[i] for call, places in parts for i in places]
        tokens = sum(call.tokens[i] for call, places in parts for i in places)
        calls = [call for call, _ in parts]
        self._inside.update(calls)
        EMBED_BATCH.labels(model=self._model).observe(len(texts))
        run = self.engine.embed if work == "embed" else self.engine.classify
        began = time.perf_counter()
        try:
            loop = asyncio.get_running_loop()
            rows = await loop.run_in_executor(self._threads, run, texts)
        except LlmosError as error:
            self._fail(calls, error)
            return
        except Exception as error:
            log.exception("encoder %s", self._model)
            self._fail(calls, EngineFailed(self._model, repr(error)))
            return
        finally:
            self._inside.difference_update(calls)
        rate = tokens / max(1e-9, time.perf_counter() - began)
        self._tokens_per_s = rate if not self._tokens_per_s else (self._tokens_per_s + rate) / 2
        at = 0
        for call, places in parts:
            call.fill(places, rows[at : at + len(places)])
            at += len(places)

    def _fail(self, calls: Sequence[_Call], error: LlmosError) -> None:
        for call in calls:
            if not call.answer.done():
                call.answer.set_exception(error)
            self._leave(call)

    async def close(self) -> None:
        """Fail who waits and who is inside, and free the engine when its pass is over."""
        self._closed = True
        waiting = [call for ring in self._waiting.values() for call in ring]
        self._fail([*waiting, *self._inside], EngineFailed(self._model, "it was unloaded"))
        await asyncio.get_running_loop().run_in_executor(None, self.engine.close)
        # What is left of rounds ends now, since the engine refuses.
        await asyncio.gather(*self._running)
        self._threads.shutdown(wait=False)
