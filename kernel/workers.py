"""The kernel's processes as Ray actors: how each is started and stopped.

Plain classes become actors here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from llmos.drivers.protocols import DeviceInfo
from llmos.kernel.core.actions import StartProcess
from llmos.kernel.core.types import ProcessKind
from llmos.kernel.device import DeviceServer
from llmos.kernel.host import HostServer
from llmos.kernel.journal import JournalServer
from llmos.kernel.knowledge import KnowledgeServer
from llmos.kernel.remote import Handle
from llmos.kernel.settings import Settings
from llmos.kernel.system import SystemConfig

NAMESPACE = "llmos"
"""Ray namespace of all our actors."""

CONCURRENCY = 10_000
"""Calls that an actor may have in progress: all are coroutines, and each has its own bound."""


def start(
    action: StartProcess,
    system: SystemConfig,
    settings: Settings,
    run: Path,
    infos: Mapping[str, DeviceInfo],
    kernel: Handle,
) -> Handle:
    """Start a process. Its actor dies with the kernel actor, which owns it."""
    log_dir, level = str(run / "logs"), settings.log_level
    options: dict[str, Any] = {
        # The kernel restarts processes itself: Ray's own restart knows no epochs.
        "max_restarts": 0,
        "max_task_retries": 0,
        "max_concurrency": CONCURRENCY,
        "num_cpus": 0,
        "namespace": NAMESPACE,
    }
    name = action.process
    match action.kind:
        case ProcessKind.JOURNAL:
            cls: type[Any] = JournalServer
            args: tuple[Any, ...] = (name, "sqlite", str(run / "store.db"), log_dir, level)
        case ProcessKind.KNOWLEDGE:
            cls = KnowledgeServer
            args = (name, system, str(settings.home / "cache" / "indexes"), log_dir, level)
        case ProcessKind.DEVICE:
            info = infos[name.removeprefix("device:")]
            index = int(info.name.partition(":")[2])
            if info.kind == "cuda":
                # Ray gives the process one GPU, which is then its number 0.
                options["num_gpus"], index = 1, 0
            cls = DeviceServer
            args = (name, info.kind, index, info.budget_bytes, info.threads, log_dir, level)
        case ProcessKind.HOST:
            cls = HostServer
            args = (name, action.epoch, kernel, str(system.base), log_dir, level)
    handle: Handle = ray.remote(cls).options(**options).remote(*args)
    return handle


def kill(handle: Handle) -> None:
    """End a process at once."""
    ray.kill(handle, no_restart=True)


def this_actor() -> Handle:
    """The handle of the actor this runs in."""
    return ray.get_runtime_context().current_actor
