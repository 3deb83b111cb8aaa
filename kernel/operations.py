"""Operations on a running system: the part of the kernel actor that carries them out."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from typing import Any

from llmos.drivers.errors import LlmosError
from llmos.drivers.stores.rows import AgentRow, LaunchRow, Part
from llmos.kernel.clock import Clock
from llmos.kernel.core import events as ev
from llmos.kernel.core.state import KernelCore
from llmos.kernel.core.types import ProcessKind
from llmos.kernel.operating import OPERATIONS, Operator
from llmos.kernel.remote import Handle, ProcessGone, answers, call
from llmos.syscalls.errors import DeadlineExceeded, InvalidRequest

log = logging.getLogger("llmos.kernel")

TELL_S = 10.0
"""What a host gets to take note of something."""
BACKUP_S = 3_600.0
"""Longest backup."""


class Operations:
    """Mixed into the kernel actor, which is their :class:`~llmos.kernel.operating.Ledger`."""

    _core: KernelCore
    _clock: Clock
    _handles: dict[str, Handle]
    _kinds: dict[str, ProcessKind]

    @answers
    async def operate(self, operation: str, *args: Any, **options: Any) -> Any:
        """Carry out a method of :class:`~llmos.kernel.operating.Operator`.

        Raises:
            InvalidRequest: there is no such operation.
        """
        if operation not in OPERATIONS:
            raise InvalidRequest("kernel", operation, "is no operation")
        await self._booted()
        operator = Operator(_Ledger(self), self._clock.time)
        return await getattr(operator, operation)(*args, **options)

    # -- what the kernel actor has

    async def _booted(self) -> None:
        raise NotImplementedError

    async def _journal(self, method: str, *args: Any, **options: Any) -> Any:
        raise NotImplementedError

    async def _commit(self, parts: list[Part]) -> None:
        raise NotImplementedError

    async def _request(self, request: str, event: ev.AnyEvent, timeout_s: float) -> Any:
        raise NotImplementedError

    def _resolve(self, agent: str) -> str:
        raise NotImplementedError

    def _hint_all(self) -> None:
        raise NotImplementedError

    def _apply(self, event: ev.AnyEvent) -> None:
        raise NotImplementedError

    # -- what is done with it

    async def _tell_hosts(self, method: str, *args: Any) -> None:
        """Call a method of every host. One that does not answer finds the same in the store
        when it is asked for the agent next."""

        async def tell(name: str, handle: Handle) -> None:
            try:
                await call(getattr(handle, method).remote(*args), name, TELL_S)
            except LlmosError as error:
                log.warning("%s was not told (%s): %s", name, method, error)

        hosts = [(n, h) for n, h in self._handles.items() if self._kinds[n] is ProcessKind.HOST]
        await asyncio.gather(*(tell(name, handle) for name, handle in hosts))

    async def _backup(self, target: str) -> int:
        handle = self._handles.get("journal")
        if handle is None:
            raise ProcessGone("journal", "it is being restarted", final=False)
        return int(await call(handle.backup.remote(target), "the backup", BACKUP_S))

    async def _drain_node(self, name: str, timeout_s: float) -> None:
        raise NotImplementedError

    async def _drain(self, host: str, timeout_s: float) -> None:
        if host not in self._core.processes:
            await self._drain_node(host, timeout_s)
            return
        request = f"drain:{host}:{os.urandom(4).hex()}"
        event = ev.DrainAsked(now=self._clock.monotonic(), cause=request, process=host)
        try:
            await self._request(request, event, timeout_s)
        except DeadlineExceeded:
            raise DeadlineExceeded(f"draining {host}, which goes on,", timeout_s) from None

    def _rebalance(self) -> int:
        cause = f"rebalance:{os.urandom(4).hex()}"
        self._apply(ev.RebalanceAsked(now=self._clock.monotonic(), cause=cause))
        return sum(1 for shard in self._core.shards if shard.to)


class _Ledger:
    """The kernel actor's store and hosts."""

    def __init__(self, kernel: Operations) -> None:
        self._kernel = kernel

    async def read(self, method: str, *args: Any, **options: Any) -> Any:
        return await self._kernel._journal("read", method, *args, **options)

    async def commit(self, parts: Sequence[Part]) -> None:
        await self._kernel._commit(list(parts))

    async def launch_of(self, agent: str) -> LaunchRow | None:
        found: list[tuple[LaunchRow | None, AgentRow | None]]
        found = await self._kernel._journal("activate", [agent])
        return found[0][0]

    async def resolve(self, agent: str) -> str:
        return self._kernel._resolve(agent)

    async def go_on(self, agent: str) -> None:
        # All of them: the agent may move just now.
        await self._kernel._tell_hosts("go_on", agent)

    async def mail_came(self) -> None:
        self._kernel._hint_all()

    async def backup(self, target: str) -> int:
        return await self._kernel._backup(target)

    async def drain(self, host: str, timeout_s: float) -> None:
        await self._kernel._drain(host, timeout_s)

    async def rebalance(self) -> int:
        return self._kernel._rebalance()
