"""Heads, passes and turns of the encoder engine, on small random models."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from llmos.drivers.engines.encoder import TransformersEncoderEngine
from llmos.drivers.engines.fairlock import FairLock
from llmos.drivers.engines.ragged import groups_of
from llmos.drivers.errors import EngineFailed, NoHead, WeightsUnsupported
from llmos.drivers.models.footprint import predict_footprint
from llmos.drivers.protocols import EngineOptions, Vectors
from tests.drivers.engines.classifiers import LABELS, make_classifier, without_head

TEXTS = ["refund", "a b c", "", "the parcel never came", "x", "zz top", "a b c", "money back now"]
KINDS = ["bert", "roberta", "distilbert"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("classifiers")
    return {kind: make_classifier(root / kind, kind) for kind in KINDS}


def engine_of(folder: Path, **options: Any) -> TransformersEncoderEngine:
    return TransformersEncoderEngine(EngineOptions("tiny", folder, **options))


def reference(folder: Path, texts: list[str]) -> tuple[Vectors, Vectors]:
    """Logits and mean vectors as the library has them, text by text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    logits, means = [], []
    with torch.inference_mode():
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            logits.append(model(input_ids=ids).logits[0])
            hidden = model.base_model(input_ids=ids).last_hidden_state[0]
            means.append(torch.nn.functional.normalize(hidden.mean(0), dim=0))
    return torch.stack(logits).numpy(), torch.stack(means).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_and_vectors_are_those_of_the_library(
    folders: dict[str, Path], kind: str
) -> None:
    engine = engine_of(folders[kind], max_batch_tokens=24)
    logits, means = reference(folders[kind], TEXTS)
    expected = torch.from_numpy(logits).softmax(-1).numpy()
    assert engine.labels == LABELS
    np.testing.assert_allclose(engine.classify(TEXTS), expected, atol=1e-5)
    np.testing.assert_allclose(engine.embed(TEXTS), means, atol=1e-5)
    assert logits.std(axis=0).min() > 0.05  # the texts do differ
    assert engine.classify([]).shape == (0, 3)
    assert engine.statistics().steps >= 4
    engine.close()
    with pytest.raises(EngineFailed):
        engine.classify(TEXTS)


def test_several_labels_each_stand_for_themselves(tmp_path: Path) -> None:
    folder = make_classifier(tmp_path / "m", problem_type="multi_label_classification")
    logits, _ = reference(folder, TEXTS)
    expected = 1 / (1 + np.exp(-logits))
    np.testing.assert_allclose(engine_of(folder).classify(TEXTS), expected, atol=1e-5)


def test_a_score_is_no_class(tmp_path: Path) -> None:
    folder = make_classifier(tmp_path / "m", id2label={0: "score"}, label2id={"score": 0})
    engine = engine_of(folder)
    assert engine.labels == ()
    with pytest.raises(NoHead):
        engine.classify(TEXTS)
    assert engine.embed(["x"]).shape == (1, 64)


def test_a_head_without_weights_is_not_made_up(tmp_path: Path) -> None:
    folder = without_head(make_classifier(tmp_path / "m"))
    with pytest.raises(EngineFailed, match=r"lack classifier\.bias"):
        engine_of(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_near(folders: dict[str, Path], kind: str) -> None:
    exact, near = engine_of(folders[kind]), engine_of(folders[kind], dtype="bfloat16")
    assert (exact.embed(TEXTS) * near.embed(TEXTS)).sum(1).min() > 0.999


@pytest.mark.parametrize(("weights", "least"), [("int8", 0.999), ("int4", 0.95)])
@pytest.mark.parametrize("kind", KINDS)
def test_narrow_weights_are_near_and_as_small_as_predicted(
    folders: dict[str, Path], kind: str, weights: Any, least: float
) -> None:
    exact, near = engine_of(folders[kind]), engine_of(folders[kind], weights=weights)
    assert (exact.embed(TEXTS) * near.embed(TEXTS)).sum(1).min() > least
    assert near.labels == LABELS
    tensors = [*near._model.parameters(), *near._model.buffers()]
    held = sum(
        {
            t.data_ptr(): t.nbytes
            for t in tensors
            if t.is_floating_point() or t.dtype in (torch.int8, torch.uint8)
        }.values()
    )
    predicted = predict_footprint(
        folders[kind],
        kind="encoder",
        dtype="float32",
        weights=weights,
        kv_tokens=0,
        max_batch_tokens=512,
        max_batch_texts=64,
    )
    assert predicted.weights_bytes == pytest.approx(held, rel=0.03)


def test_what_the_processor_cannot_do_is_an_error_at_load(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmos.drivers.engines import quantize

    monkeypatch.setattr(quantize, "has_int4", lambda: False)
    with pytest.raises(WeightsUnsupported, match="int4") as caught:
        engine_of(folders["bert"], weights="int4")
    assert (caught.value.model, caught.value.weights) == ("tiny", "int4")
    monkeypatch.setattr(quantize, "int8_is_exact", lambda: False)
    with pytest.raises(WeightsUnsupported, match="exact"):
        engine_of(folders["bert"], weights="int8")


# ------------------------------------------------------------------ passes and turns


@given(
    lengths=st.lists(st.integers(1, 64), max_size=60),
    ragged=st.booleans(),
    budget=st.integers(8, 200),
    most=st.integers(1, 20),
)
def test_passes_hold_every_text_once_within_their_budget(
    lengths: list[int], ragged: bool, budget: int, most: int
) -> None:
    engine = object.__new__(TransformersEncoderEngine)
    engine._ragged = ragged
    engine._options = EngineOptions("m", Path(), max_batch_tokens=budget, max_batch_texts=most)
    passes = engine._passes_of(lengths)
    assert sorted(i for chosen in passes for i in chosen) == list(range(len(lengths)))
    for chosen in passes:
        sizes = [lengths[i] for i in chosen]
        tokens = sum(sizes) if ragged else len(sizes) * max(sizes)
        assert len(chosen) == 1 or (tokens <= budget and len(chosen) <= most)
        assert sizes == sorted(sizes, reverse=True)
        groups = groups_of(sizes)
        assert sum(g.count * g.length for g in groups) == sum(sizes)
        assert len(groups) == len(set(sizes))


def test_few_texts_do_not_wait_for_many(folders: dict[str, Path]) -> None:
    engine = engine_of(folders["bert"], max_batch_texts=1)
    compute, began, gate = engine._embed, threading.Event(), threading.Event()
    order: list[int] = []

    def gated(ids: list[list[int]]) -> torch.Tensor:
        order.append(len(ids[0]))
        began.set()
        assert gate.wait(10)
        return compute(ids)

    engine._embed = gated  # type: ignore[method-assign]
    with ThreadPoolExecutor(2) as pool:
        many = pool.submit(engine.embed, ["a b c d"] * 50)
        assert began.wait(10)
        few = pool.submit(engine.embed, ["a"])
        # Its pass waits behind the one that runs: the gate opens when it does.
        while not engine._turn._waiting:
            assert not few.done()
        gate.set()
        assert few.result(10).shape == (1, 64)
        assert many.result(30).shape == (50, 64)
    assert order[1] == 3


def test_threads_take_turns_in_their_order() -> None:
    lock, order = FairLock(), list[int]()

    def take(number: int) -> None:
        with lock:
            order.append(number)

    with ThreadPoolExecutor(8) as pool:
        with lock:
            waiting = []
            for number in range(8):
                waiting.append(pool.submit(take, number))
                while len(lock._waiting) <= number:
                    assert not waiting[-1].done()
        for task in waiting:
            task.result(10)
    assert order == list(range(8))


def test_threads_that_mix_both_kinds_of_work_get_their_own(folders: dict[str, Path]) -> None:
    engine = engine_of(folders["roberta"], max_batch_tokens=16)
    rows, classes = engine.embed(TEXTS), engine.classify(TEXTS)
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(engine.embed if n % 2 else engine.classify, TEXTS) for n in range(12)]
    for n, task in enumerate(asked):
        np.testing.assert_allclose(task.result(), rows if n % 2 else classes, atol=1e-5)


async def test_behind_the_slots_queue_every_caller_gets_its_own(folders: dict[str, Path]) -> None:
    import asyncio

    from llmos.kernel.encoding import Encoder

    engine = engine_of(folders["bert"], max_batch_tokens=32, max_batch_texts=8)
    texts = [f"{'abc ' * (n % 11)}{'xyz'[n % 3]}" for n in range(40)]
    rows, classes = engine.embed(texts), engine.classify(texts)
    encoder = Encoder("tiny", engine, 8, 32)
    async with asyncio.timeout(60):
        found = await asyncio.gather(
            encoder.embed(texts),
            encoder.classify(texts),
            *(encoder.embed([text]) for text in texts),
        )
        await encoder.close()
    np.testing.assert_allclose(found[0], rows, atol=1e-5)
    np.testing.assert_allclose(found[1], classes, atol=1e-5)
    np.testing.assert_allclose(np.concatenate(found[2:]), rows, atol=1e-5)
