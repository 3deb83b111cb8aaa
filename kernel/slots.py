"""Models on devices, and who serves what: the part of the kernel actor that carries out the
core's decisions about slots, and tells every process of them."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from llmos.drivers.devices.precision import Precision
from llmos.drivers.errors import LlmosError
from llmos.drivers.protocols import EngineOptions
from llmos.kernel.adapters import Adapters
from llmos.kernel.clock import Clock
from llmos.kernel.core import actions as act
from llmos.kernel.core import events as ev
from llmos.kernel.core.slots import SlotState
from llmos.kernel.core.state import KernelCore
from llmos.kernel.core.types import ProcessKind, ProcessState
from llmos.kernel.directory import Directory, SlotRoute
from llmos.kernel.remote import Handle, ProcessGone, call
from llmos.kernel.system import SystemConfig

log = logging.getLogger("llmos.kernel")


class Slots(Adapters):
    """Mixed into the kernel actor."""

    _system: SystemConfig
    _clock: Clock
    _core: KernelCore
    _self: Handle
    _handles: dict[str, Handle]
    _kinds: dict[str, ProcessKind]
    _digests: dict[str, str]
    _paths: dict[str, Path]
    _dtypes: dict[str, Precision]
    _model_errors: dict[str, LlmosError]
    _routes_changed: asyncio.Condition
    _version: int

    def _apply(self, event: ev.AnyEvent) -> None:
        raise NotImplementedError

    async def _load(self, action: act.LoadSlot) -> None:
        table = self._system.models[action.slot]
        options = EngineOptions(
            model=action.slot,
            path=self._paths.get(action.slot, Path()),
            dtype=self._dtypes.get(action.slot, "float32"),
            threads=action.threads,
            kv_tokens=table.kv_tokens,
            max_batch_tokens=table.max_batch_tokens,
            max_batch_texts=table.max_batch_texts,
            max_waiting=table.max_waiting,
            max_adapters=table.max_adapters,
            max_adapter_rank=table.max_adapter_rank,
            weights=table.weights,
            remote=table.remote.options(action.slot, os.environ) if table.remote else None,
        )
        handle = self._handles.get(f"device:{action.device}")
        if handle is None:
            return  # It died meanwhile; the core hears of that and decides again.
        try:
            measured = await call(
                handle.load.remote(table.engine, table.kind, options, self._system.scheduling),
                f"loading {action.slot}",
            )
            await self._load_adapters(action.slot, handle)
        except ProcessGone:
            return
        except LlmosError as error:
            event: ev.AnyEvent = ev.SlotFailed(
                now=self._clock.monotonic(), cause=action.cause, slot=action.slot, error=error
            )
        else:
            event = ev.SlotLoaded(
                now=self._clock.monotonic(),
                cause=action.cause,
                slot=action.slot,
                measured=measured,
            )
        self._apply(event)
        await self._announce()

    async def _unload(self, action: act.UnloadSlot) -> None:
        handle = self._handles.get(f"device:{action.device}")
        if handle is None:
            return
        try:
            await call(handle.unload.remote(action.slot), f"unloading {action.slot}")
        except ProcessGone:
            return  # The core hears that its device is lost.
        except LlmosError as error:
            log.error("unloading %s: %s", action.slot, error)
        self._apply(
            ev.SlotUnloaded(now=self._clock.monotonic(), cause=action.cause, slot=action.slot)
        )
        await self._announce()

    async def _announce(self) -> None:
        """Tell every process who serves what, and wake who waits for a route."""
        self._version += 1
        slots: dict[str, SlotRoute] = {}
        for name, table in self._system.models.items():
            slot = self._core.slots.get(name)
            error = self._model_errors.get(name)
            if slot is not None and slot.state is SlotState.FAILED:
                # A device that is being restarted will load it again: let them wait.
                device_lost = any(
                    p.kind is ProcessKind.DEVICE and p.state is not ProcessState.UP
                    for p in self._core.processes.values()
                )
                error = None if device_lost else slot.error
            resident = slot is not None and slot.state is SlotState.READY
            device = slot.device if slot is not None and resident else None
            process = self._core.processes.get(f"device:{device}")
            slots[name] = SlotRoute(
                table.kind,
                device,
                self._digests.get(name, ""),
                error,
                process.incarnation if process else 0,
            )
        directory = Directory(
            version=self._version,
            kernel=self._self,
            journal=self._handles.get("journal"),
            knowledge=self._handles.get("knowledge"),
            devices={
                n: h for n, h in self._handles.items() if self._kinds[n] is ProcessKind.DEVICE
            },
            slots=slots,
            adapters=self._adapter_routes(),
            hosts={n: h for n, h in self._handles.items() if self._kinds[n] is ProcessKind.HOST},
            shards=self._core.shard_map(),
            leaving=frozenset(n for n, shard in enumerate(self._core.shards) if shard.to),
        )
        for name, handle in list(self._handles.items()):
            if self._kinds[name] in (ProcessKind.HOST, ProcessKind.KNOWLEDGE):
                handle.directory.remote(directory)
        async with self._routes_changed:
            self._routes_changed.notify_all()
