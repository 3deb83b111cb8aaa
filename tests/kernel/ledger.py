"""The operations of the kernel actor on a :class:`tests.kernel.machine.Machine`, without Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from llmos.drivers.stores.rows import Part
from llmos.kernel.clock import SystemClock
from llmos.kernel.core import actions as act
from llmos.kernel.core import events as ev
from llmos.kernel.core.errors import NoOtherHost
from llmos.kernel.core.types import ProcessKind
from llmos.kernel.operating import Operator
from llmos.kernel.operations import Operations
from llmos.kernel.remote import call
from llmos.syscalls.errors import UnknownAgent
from tests.kernel.local import LocalHandle
from tests.kernel.machine import DESK, Machine


class LittleKernel(Operations):
    """The kernel actor's part of a machine."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._clock = SystemClock()
        self._core = cast(Any, SimpleNamespace(processes={"host:0": None, "host:1": None}))
        self._journal_handle = LocalHandle(machine.journal)
        self._kinds = {"host:0": ProcessKind.HOST, "journal": ProcessKind.JOURNAL}
        self.hinted = 0

    @property
    def _handles(self) -> dict[str, Any]:  # type: ignore[override]
        return {"host:0": self._machine.host_handle, "journal": self._journal_handle}

    async def _booted(self) -> None:
        pass

    async def _journal(self, method: str, *args: Any, **options: Any) -> Any:
        return await call(getattr(self._journal_handle, method).remote(*args, **options), "journal")

    async def _commit(self, parts: list[Part]) -> None:
        for error in await self._journal("commit", parts):
            if error is not None:
                raise error

    async def _request(self, request: str, event: ev.AnyEvent, timeout_s: float) -> Any:
        assert isinstance(event, ev.DrainAsked)
        if event.process == "host:0":
            raise NoOtherHost(event.process)
        return act.Drained(process=event.process, cause=request)

    def _resolve(self, agent: str) -> str:
        if agent == "main":
            return DESK
        raise UnknownAgent(agent)

    def _hint_all(self) -> None:
        self.hinted += 1
        self._machine.host_handle.hint.remote()

    @property
    def operator(self) -> Operator:
        """As a client has it."""
        return cast(Operator, _Called(self))


class _Called:
    def __init__(self, kernel: LittleKernel) -> None:
        self._kernel = kernel

    def __getattr__(self, operation: str) -> Any:
        return lambda *a, **k: call(self._kernel.operate(operation, *a, **k), "the kernel")
