"""The core's tests: no Ray, no torch, no clock, and every core is validated at the end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest

from llmos.kernel.core.events import AnyEvent
from llmos.kernel.core.state import Actions, KernelCore


@pytest.fixture(autouse=True)
def _pure() -> Iterator[None]:
    """A unit test that loads Ray or torch is no unit test."""
    before = {"ray", "torch"} & set(sys.modules)
    yield
    assert {"ray", "torch"} & set(sys.modules) == before


@pytest.fixture
def core() -> Iterator[KernelCore]:
    made = KernelCore()
    yield made
    made.validate()


@pytest.fixture
def feed(core: KernelCore) -> Callable[[AnyEvent], Actions]:
    """Hand an event to the core and validate it afterwards."""

    def handle(event: AnyEvent) -> Actions:
        actions = core.handle(event)
        core.validate()
        return actions

    return handle
