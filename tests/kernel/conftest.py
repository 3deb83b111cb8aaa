"""Kernel tests run without Ray: a test that starts one fails."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from llmos.kernel import metrics
from tests.kernel import durable, programs
from tests.kernel.machine import SYSTEM, Machine


@pytest.fixture(autouse=True)
def _no_ray() -> Iterator[None]:
    import ray

    before = ray.is_initialized()
    yield
    assert ray.is_initialized() == before


@pytest.fixture(autouse=True)
def _logger_as_it_was() -> Iterator[None]:
    """Servers send the logs of ``llmos`` to files; afterwards they go where they went."""
    logger = logging.getLogger("llmos")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    for handler in logger.handlers[:]:
        if handler not in handlers:
            logger.removeHandler(handler)
            handler.close()
    for handler in handlers:
        if handler not in logger.handlers:
            logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = propagate


@pytest.fixture
async def actors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Machine]:
    """A little kernel with agents ``acme/actor/*`` that do what a test says."""
    monkeypatch.setattr("llmos.kernel.committer.FLUSH_S", 0.001)
    monkeypatch.setattr("llmos.kernel.turns.STORE_RETRY_S", 0.02)
    monkeypatch.setattr("llmos.kernel.inbox.STORE_RETRY_S", 0.02)
    monkeypatch.setattr("llmos.kernel.timers.LOOK_S", 0.02)
    programs.GATES.clear()
    durable.SCRIPTS.clear()
    durable.SEEN.clear()
    made = Machine(tmp_path, SYSTEM + durable.SYSTEM)
    for name, options in (
        ("keyed", {"idempotent": True, "queryable": False}),
        ("asked", {"idempotent": False, "queryable": True}),
        ("plain", {"idempotent": False, "queryable": False}),
    ):
        made.tools[name] = durable.Bank(name, **options)
    await made.start()
    await made.register("acme/actor/*", durable.PROGRAM)
    yield made
    for event in programs.GATES.values():
        event.set()
    await made.stop()


def sample(name: str, **labels: str) -> float:
    """A metric's value in this process; 0 if it has none."""
    return metrics.REGISTRY.get_sample_value(name, labels) or 0.0
