from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llmos.kernel.system import SystemConfig
from tests.agents.local import Local, first_passage

EXAMPLE = Path(__file__).parents[2] / "examples" / "clinic-and-bank" / "system.toml"


@pytest.fixture(scope="session")
def system() -> SystemConfig:
    return SystemConfig.read(EXAMPLE)


@pytest.fixture
def local(system: SystemConfig) -> Iterator[Local]:
    """The example with hashed embeddings and a writer that repeats the best passage."""
    made = Local(system, engines={"embed": "hash"}, writers={"chat": first_passage})
    yield made
    made.close()
