"""The queue before an encoder: rounds, fairness, bounds, and callers that leave."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmos.drivers.engines.hashing import HashEncoder
from llmos.drivers.errors import EngineBusy, EngineFailed, NoHead
from llmos.drivers.protocols import EngineOptions, Vectors
from llmos.kernel import encoding
from llmos.kernel.encoding import Encoder
from tests.kernel.local import until

TEXTS, TOKENS = 16, 256
"""Of one pass; two make a round."""


class Gated:
    """The built-in encoder behind a gate, with a head that knows even lengths."""

    labels: tuple[str, ...] = ("even", "odd")

    def __init__(self) -> None:
        self._engine = HashEncoder(EngineOptions("embed", Path()))
        self.dimension, self.max_tokens = self._engine.dimension, self._engine.max_tokens
        self.gate = threading.Event()
        self.gate.set()
        self.rounds: list[list[str]] = []
        self.work: list[str] = []
        self.error: Exception | None = None

    def _enter(self, work: str, texts: Sequence[str]) -> None:
        self.rounds.append(list(texts))
        self.work.append(work)
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error

    def embed(self, texts: Sequence[str]) -> Vectors:
        self._enter("embed", texts)
        return self._engine.embed(texts)

    def classify(self, texts: Sequence[str]) -> Vectors:
        self._enter("classify", texts)
        return np.array([[1 - len(t) % 2, len(t) % 2] for t in texts], dtype=np.float32)

    def statistics(self) -> Any:
        return self._engine.statistics()

    def close(self) -> None:
        self._engine.close()

    @property
    def sizes(self) -> list[int]:
        return [len(texts) for texts in self.rounds]


@pytest.fixture
def engine() -> Gated:
    return Gated()


@pytest.fixture
async def encoder(engine: Gated) -> AsyncIterator[Encoder]:
    made = Encoder("embed", engine, TEXTS, TOKENS)
    yield made
    engine.gate.set()
    async with asyncio.timeout(10):
        await made.close()
    assert (made._texts, made._tokens, made._running, made._inside) == (0, 0, set(), set())
    assert not any(made._waiting.values())


def texts(count: int, name: str = "text", words: int = 1) -> list[str]:
    return [f"{name} {n} " + "word " * words for n in range(count)]


async def behind(encoder: Encoder, engine: Gated, *asked: list[str]) -> list[asyncio.Task[Any]]:
    """Callers while the gate is shut: the first is in the model, the others came after."""
    engine.gate.clear()
    tasks = []
    for each in asked:
        tasks.append(asyncio.create_task(encoder.embed(each)))
        if len(tasks) == 1:
            await until(lambda: engine.rounds)
        await asyncio.sleep(0)
    return tasks


async def test_callers_that_wait_go_through_the_model_together(
    encoder: Encoder, engine: Gated
) -> None:
    alone = await encoder.embed(texts(3))
    engine.rounds.clear()
    tasks = await behind(encoder, engine, texts(1), texts(2), texts(3), texts(1))
    engine.gate.set()
    made = await asyncio.gather(*tasks)
    assert engine.sizes == [1, 6]
    for size, vectors in zip((1, 2, 3, 1), made, strict=True):
        np.testing.assert_array_equal(vectors, alone[:size])
        assert vectors.base is None


async def test_callers_of_one_moment_share_a_round(encoder: Encoder, engine: Gated) -> None:
    await asyncio.gather(*(encoder.embed(texts(2)) for _ in range(5)))
    assert engine.sizes == [10]


async def test_one_text_does_not_wait_for_ten_thousand(encoder: Encoder, engine: Gated) -> None:
    many = texts(10_000, "many", words=20)
    big, small = await behind(encoder, engine, many, ["a question"])
    # The first round runs, and the second was handed over before the question came.
    assert len(engine.rounds) == 2
    small.add_done_callback(lambda _: seen.append(len(engine.rounds)))
    seen: list[int] = []
    engine.gate.set()
    vectors = await small
    assert seen[0] <= 5
    assert not big.done()
    np.testing.assert_array_equal(
        vectors, HashEncoder(EngineOptions("m", Path())).embed(["a question"])
    )
    rows = await big
    np.testing.assert_array_equal(rows[4321], (await encoder.embed([many[4321]]))[0])


async def test_big_callers_share_every_round(encoder: Encoder, engine: Gated) -> None:
    tasks = await behind(
        encoder, engine, texts(1), *(texts(200, f"caller{n}", words=20) for n in range(4))
    )
    engine.gate.set()
    await asyncio.gather(*tasks)
    whole = engine.rounds[2:20]
    for each in whole:
        assert {t.split()[0] for t in each} == {f"caller{n}" for n in range(4)}
    assert all(len(each) <= 2 * TEXTS for each in engine.rounds)


async def test_texts_of_like_length_come_together(encoder: Encoder, engine: Gated) -> None:
    asked = [w for pair in zip(texts(60, words=1), texts(60, words=40), strict=True) for w in pair]
    rows = await encoder.embed(asked)
    lengths = [len(t) // 100 for each in engine.rounds for t in each]
    assert lengths == sorted(lengths, reverse=True)
    np.testing.assert_array_equal(rows[5], (await encoder.embed([asked[5]]))[0])


async def test_embedding_and_classifying_take_turns(encoder: Encoder, engine: Gated) -> None:
    (first,) = await behind(encoder, engine, texts(1))
    asked: list[Any] = [asyncio.create_task(encoder.embed(texts(100, words=20)))]
    asked.append(asyncio.create_task(encoder.classify(["ab", "abc"])))
    await asyncio.sleep(0)
    engine.gate.set()
    _, classes = await asyncio.gather(*asked)
    await first
    assert classes.tolist() == [[1, 0], [0, 1]]
    assert "classify" in engine.work[1:4]


async def test_one_who_left_is_not_embedded(encoder: Encoder, engine: Gated) -> None:
    first, second, third = await behind(encoder, engine, texts(1), texts(5), texts(2))
    second.cancel()
    await asyncio.sleep(0)
    assert encoder._texts == 2
    engine.gate.set()
    assert (await first).shape[0] == 1
    assert (await third).shape[0] == 2
    assert engine.sizes == [1, 2]


async def test_of_one_who_left_midway_nothing_more_is_begun(
    encoder: Encoder, engine: Gated
) -> None:
    (big,) = await behind(encoder, engine, texts(5000, words=20))
    begun = sum(engine.sizes)
    big.cancel()
    await asyncio.sleep(0)
    assert (encoder._texts, encoder._tokens) == (0, 0)
    engine.gate.set()
    await until(lambda: not encoder._running)
    assert sum(engine.sizes) == begun < 100


async def test_unloading_fails_those_inside_and_those_who_wait(
    encoder: Encoder, engine: Gated
) -> None:
    tasks = await behind(encoder, engine, texts(1), texts(2), texts(900, words=20))
    unloading = asyncio.create_task(encoder.close())
    await asyncio.sleep(0)
    engine.gate.set()
    async with asyncio.timeout(5):
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await unloading
    assert [type(r) for r in results] == [EngineFailed] * 3
    assert "unloaded" in str(results[0])
    with pytest.raises(EngineFailed):
        await encoder.embed(["x"])


async def test_an_engine_that_breaks_fails_its_round_alone(encoder: Encoder, engine: Gated) -> None:
    engine.error = RuntimeError("out of luck")
    with pytest.raises(EngineFailed, match="out of luck"):
        await encoder.embed(texts(300, words=20))
    engine.error = None
    assert (await encoder.embed(["x"])).shape[0] == 1


async def test_the_queue_is_bounded_and_says_when_to_come_again(
    encoder: Encoder, engine: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "MAX_WAITING_TEXTS", 3)
    tasks = await behind(encoder, engine, texts(1), texts(3))
    with pytest.raises(EngineBusy) as refused:
        await encoder.embed(["one more"])
    assert refused.value.waiting == 3
    assert 0 < refused.value.retry_after_s <= 60
    engine.gate.set()
    await asyncio.gather(*tasks)
    assert (await encoder.embed(["one more"])).shape[0] == 1


async def test_no_texts_and_no_head(encoder: Encoder, engine: Gated) -> None:
    assert (await encoder.embed([])).shape == (0, engine.dimension)
    assert (await encoder.classify([])).shape == (0, 2)
    engine.labels = ()
    with pytest.raises(NoHead):
        await encoder.classify(["x"])
    assert not engine.rounds
