"""Kernel tests run without Ray: a test that starts one fails."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from llmos.kernel import metrics


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


def sample(name: str, **labels: str) -> float:
    """A metric's value in this process; 0 if it has none."""
    return metrics.REGISTRY.get_sample_value(name, labels) or 0.0
