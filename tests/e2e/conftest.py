"""The example system with its real models, on a real Ray."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from llmos.drivers.errors import LlmosError
from llmos.drivers.models.store import ModelStore
from llmos.kernel.client import Kernel
from llmos.kernel.settings import Settings

EXAMPLE = Path(__file__).parents[2] / "examples" / "clinic-and-bank"


def processes_with(mark: str) -> list[psutil.Process]:
    """Processes whose environment carries the mark, so: those that a test has started."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("LLMOS_TEST_MARK") == mark:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return [p for p in found if p.pid != os.getpid()]


def gone(mark: str, within_s: float = 10.0) -> list[str]:
    """What is still there after a while; empty is what a test wants."""
    until = time.monotonic() + within_s
    while (left := processes_with(mark)) and time.monotonic() < until:
        time.sleep(0.1)
    return [" ".join(p.cmdline())[:120] for p in left if p.is_running()]


@pytest.fixture(scope="session")
def models() -> Path:
    """The model store with the example's models in it."""
    root = Settings().models_dir
    store = ModelStore(root)
    for name in ("smollm2-135m-instruct", "minilm-l6"):
        try:
            store.get(name)
        except LlmosError as error:
            pytest.skip(f"{error}")
    return root


@pytest.fixture
def environment(tmp_path: Path, models: Path) -> dict[str, str]:
    """For a command of its own: own home, shared models, and a mark to find what it starts."""
    return {
        **os.environ,
        "LLMOS_HOME": str(tmp_path / "home"),
        "LLMOS_MODELS": str(models),
        "LLMOS_TEST_MARK": uuid.uuid4().hex,
    }


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Kernel]:
    settings = Settings(home=tmp_path_factory.mktemp("home"), models=models)
    with Kernel.boot(EXAMPLE / "system.toml", settings=settings) as booted:
        yield booted
