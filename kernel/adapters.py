"""Adapters of a system: which there are, whose, and that each is where its model is. The part
of the kernel actor that answers for them.

Their memory was granted with their model's, so no decision of the core is needed.
"""

from __future__ import annotations

import asyncio
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmos.drivers.errors import AdapterUnusable, LlmosError, UnknownAdapter
from llmos.kernel.core.slots import SlotState
from llmos.kernel.core.state import KernelCore
from llmos.kernel.directory import AdapterRoute
from llmos.kernel.remote import Handle, ProcessGone, answers, call
from llmos.kernel.system import AdapterTable, SystemConfig
from llmos.syscalls.labels import Sensitivity

log = logging.getLogger("llmos.kernel")

LOAD_S = 120.0
"""Longest time for one adapter: its file is read, and a step that is under way ends."""


@dataclass(slots=True)
class Adapter:
    """One adapter of the system."""

    table: AdapterTable
    """Its path is absolute."""
    size_bytes: int | None = None
    """On the device; None: not there."""
    error: LlmosError | None = None
    """Why it could not be loaded."""


def resident_name(name: str, tenant: str | None) -> str:
    """What the engine calls an adapter.

    With the tenant, so that a name which changes hands never leads a host that has not
    heard of it to somebody else's weights.
    """
    return f"{tenant}/{name}" if tenant else name


class Adapters:
    """Mixed into the kernel actor, by the part that loads models."""

    _system: SystemConfig
    _core: KernelCore
    _handles: dict[str, Handle]
    _adapters: dict[str, Adapter]
    _adapters_lock: asyncio.Lock

    async def _booted(self) -> None:
        raise NotImplementedError

    async def _announce(self) -> None:
        raise NotImplementedError

    def _declared_adapters(self) -> dict[str, Adapter]:
        """Those of the system file."""
        return {
            name: Adapter(table.model_copy(update={"path": self._system.at(table.path)}))
            for name, table in self._system.adapters.items()
        }

    def _adapter_routes(self) -> dict[str, AdapterRoute]:
        return {
            name: AdapterRoute(
                adapter.table.model,
                resident_name(name, adapter.table.tenant),
                adapter.table.labels,
                adapter.error,
            )
            for name, adapter in self._adapters.items()
        }

    async def _load_adapters(self, model: str, device: Handle) -> None:
        """Load all of a model that has just been loaded; one that fails is noted, and the
        others serve.

        Raises:
            ProcessGone: the device is lost.
        """
        for adapter in self._adapters.values():
            if adapter.table.model == model:
                adapter.size_bytes = adapter.error = None
        while True:
            # Looked up anew each time: one may be added meanwhile.
            waiting = [
                (name, a)
                for name, a in self._adapters.items()
                if a.table.model == model and a.size_bytes is None and a.error is None
            ]
            if not waiting:
                return
            name, adapter = waiting[0]
            try:
                adapter.size_bytes = await self._put(name, adapter.table, device)
            except ProcessGone:
                raise
            except LlmosError as error:
                adapter.error = error
                log.error("adapter %s: %s", name, error)

    async def _put(self, name: str, table: AdapterTable, device: Handle) -> int:
        resident = resident_name(name, table.tenant)
        loading = device.load_adapter.remote(table.model, resident, table.path)
        return int(await call(loading, f"loading adapter {name}", LOAD_S))

    def _device_with(self, model: str) -> Handle:
        """The device on which a model is ready; None where it is not."""
        slot = self._core.slots.get(model)
        if slot is None or slot.state is not SlotState.READY:
            return None
        return self._handles.get(f"device:{slot.device}")

    # ------------------------------------------------------------ for people

    @answers
    async def load_adapter(
        self, name: str, model: str, path: str, tenant: str | None, sensitivity: str
    ) -> dict[str, Any]:
        """Add an adapter while the system runs, or replace it by a new version. It is known
        until the kernel stops; what is to stay is written in the system file.

        Raises:
            AdapterUnusable, AdaptersFull: nothing has changed.
        """
        await self._booted()
        table = self._checked(name, model, path, tenant, sensitivity)
        async with self._adapters_lock:
            old = self._adapters.get(name)
            if old is not None and (old.table.model, old.table.tenant) != (model, tenant):
                raise AdapterUnusable(
                    model, name, "the name is taken by an adapter of another model or tenant"
                )
            device = self._device_with(model)
            size = None if device is None else await self._put(name, table, device)
            self._adapters[name] = Adapter(table, size)
            await self._announce()
        log.info("loaded adapter %s of %s from %s", name, model, path)
        return self._adapter_row(name)

    @answers
    async def unload_adapter(self, name: str) -> None:
        """Refuse new requests for an adapter at once; those that run go on with it.

        Raises:
            UnknownAdapter: there is none of that name.
        """
        await self._booted()
        async with self._adapters_lock:
            adapter = self._adapters.pop(name, None)
            if adapter is None:
                raise UnknownAdapter("", name, self._adapters)
            await self._announce()
            device = self._device_with(adapter.table.model)
            if device is None or adapter.size_bytes is None:
                return
            resident = resident_name(name, adapter.table.tenant)
            leaving = device.unload_adapter.remote(adapter.table.model, resident)
            await call(leaving, f"unloading adapter {name}", LOAD_S)
        log.info("unloaded adapter %s", name)

    @answers
    async def adapters(self) -> list[dict[str, Any]]:
        """All adapters: name, model, tenant, path, state, bytes, error."""
        await self._booted()
        return [self._adapter_row(name) for name in sorted(self._adapters)]

    def _adapter_row(self, name: str) -> dict[str, Any]:
        adapter = self._adapters[name]
        table = adapter.table
        here = self._device_with(table.model) is not None
        ready = here and adapter.size_bytes is not None
        return {
            "name": name,
            "model": table.model,
            "tenant": table.tenant,
            "path": str(table.path),
            "state": "failed" if adapter.error else "ready" if ready else "waiting",
            "size_bytes": adapter.size_bytes if ready else 0,
            "error": str(adapter.error) if adapter.error else "",
        }

    def _checked(
        self, name: str, model: str, path: str, tenant: str | None, sensitivity: str
    ) -> AdapterTable:
        """The same rules as in a system file."""
        found = self._system.models.get(model)
        if found is None or not found.max_adapters:
            raise AdapterUnusable(
                model, name, "the system has no such model with max_adapters above 0"
            )
        for what in (name, *([tenant] if tenant else [])):
            if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", what):
                raise AdapterUnusable(model, name, f"{what!r} is no name")
        if sensitivity.upper() not in Sensitivity.__members__:
            raise AdapterUnusable(model, name, f"{sensitivity!r} is no sensitivity")
        return AdapterTable(
            model=model,
            path=self._system.at(Path(path)),
            tenant=tenant,
            sensitivity=Sensitivity[sensitivity.upper()],
        )
