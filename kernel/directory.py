"""Who serves what, as the kernel last said. Every process holds a copy."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from llmos.drivers.errors import LlmosError, UnknownAdapter
from llmos.kernel.remote import Handle
from llmos.syscalls.errors import UnknownResource
from llmos.syscalls.labels import Labels

_EMPTY: Mapping[str, Handle] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class SlotRoute:
    """Where a model is resident, or why it is not."""

    kind: str
    device: str | None
    digest: str
    error: LlmosError | None = None
    incarnation: int = 0
    """Of the device's process: handles of one process are not one object everywhere."""


@dataclass(frozen=True, slots=True)
class AdapterRoute:
    """An adapter, and who may be answered by it."""

    model: str
    resident: str
    """What the engine calls it."""
    labels: Labels
    """What its answers carry; with a tenant, it is not there for others."""
    error: LlmosError | None = None
    """Why it could not be loaded."""


@dataclass(frozen=True, slots=True)
class Directory:
    """One version of the whole directory. Handles of lost processes are left out."""

    version: int = 0
    kernel: Handle = None
    journal: Handle = None
    knowledge: Handle = None
    devices: Mapping[str, Handle] = field(default_factory=lambda: dict(_EMPTY))
    """By the process's name: ``device:cpu:0``."""
    slots: Mapping[str, SlotRoute] = field(default_factory=dict)
    adapters: Mapping[str, AdapterRoute] = field(default_factory=dict)
    hosts: Mapping[str, Handle] = field(default_factory=lambda: dict(_EMPTY))
    """By the process's name: ``host:0``."""
    shards: tuple[tuple[str, int], ...] = ()
    """Of each shard the host that serves it and its epoch; ("", 0) while nobody does."""
    leaving: frozenset[int] = frozenset()
    """Shards that their hosts were asked to release, and may have released already."""


class DirectoryHolder:
    """The newest directory, and waiting for what is not in it yet."""

    def __init__(self) -> None:
        self.current = Directory()
        self._changed = asyncio.Condition()

    async def set(self, directory: Directory) -> None:
        """Take a directory, unless a newer one came first."""
        async with self._changed:
            # Compared under the lock: two that wait for it may get it in the wrong order.
            if directory.version > self.current.version:
                self.current = directory
                self._changed.notify_all()

    async def newer(self, version: int) -> Directory:
        """Wait for a version after this one. The caller sets the deadline."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.current.version > version)
            return self.current

    async def service(self, name: str) -> Handle:
        """``journal`` or ``knowledge``; waits while it is being restarted."""
        while True:
            directory = self.current
            handle = getattr(directory, name)
            if handle is not None:
                return handle
            await self.newer(directory.version)

    async def slot(self, model: str, kind: str) -> tuple[Handle, SlotRoute]:
        """The device that serves a model; waits while the model is being loaded.

        Raises:
            UnknownResource: the system has no model of that name and kind.
            LlmosError: why the model could not be loaded.
        """
        while True:
            directory = self.current
            route = directory.slots.get(model)
            if directory.version and (route is None or route.kind != kind):
                known = [n for n, r in directory.slots.items() if r.kind == kind]
                raise UnknownResource(f"{kind} model", model, known)
            if route is not None:
                if route.device is not None:
                    handle = directory.devices.get(f"device:{route.device}")
                    if handle is not None:
                        return handle, route
                elif route.error is not None:
                    raise route.error
            await self.newer(directory.version)

    async def adapter(self, tenant: str, model: str, name: str) -> AdapterRoute:
        """An adapter that a tenant may use; waits while its model is being loaded.

        Raises:
            UnknownAdapter: there is none of that name for this model and tenant.
            LlmosError: why it, or its model, could not be loaded.
        """
        await self.slot(model, "causal")
        visible = {
            n: route
            for n, route in self.current.adapters.items()
            if route.model == model and route.labels.tenants <= {tenant}
        }
        route = visible.get(name)
        if route is None:
            raise UnknownAdapter(model, name, visible)
        if route.error is not None:
            raise route.error
        return route
