"""The kernel's processes as Ray actors: how each is started and stopped.

Plain classes become actors here and nowhere else.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from llmos.drivers.protocols import DeviceInfo
from llmos.kernel.core.actions import StartProcess
from llmos.kernel.core.placement import Place
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

MEMORY_BYTES = 1
"""Asked of Ray for each actor. One that asks for nothing is placed by a node drawn at random,
which may have joined just now and not know the node that we name; one that asks for something is
placed by the node of whoever starts it."""

CONCURRENCY = 10_000
"""Calls that an actor may have in progress: all are coroutines, and each has its own bound."""


def start(
    action: StartProcess,
    system: SystemConfig,
    settings: Settings,
    run: Path,
    infos: Mapping[str, DeviceInfo],
    kernel: Handle,
    where: Place,
) -> Handle:
    """Start a process. Its actor dies with the kernel actor, which owns it."""
    log_dir, level = str(run / "logs"), settings.log_level
    options: dict[str, Any] = {
        # The kernel restarts processes itself: Ray's own restart knows no epochs.
        "max_restarts": 0,
        "max_task_retries": 0,
        "max_concurrency": CONCURRENCY,
        "num_cpus": 0,
        "memory": MEMORY_BYTES,
        "namespace": NAMESPACE,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(where.node, soft=not where.hard),
    }
    name = action.process
    match action.kind:
        case ProcessKind.JOURNAL:
            cls: type[Any] = JournalServer
            store = system.store
            path = store.address(os.environ) or str(run / "store.db")
            args: tuple[Any, ...] = (name, store.driver, path, log_dir, level)
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
            args = (name, action.epoch, kernel, system, log_dir, level)
    handle: Handle = ray.remote(cls).options(**options).remote(*args)
    return handle


def kill(handle: Handle) -> None:
    """End a process at once."""
    ray.kill(handle, no_restart=True)


def _node(server: Any) -> str:
    return str(ray.get_runtime_context().get_node_id())


def node_of(handle: Handle) -> Any:
    """Ask an actor for the id of the node it is on."""
    return handle.__ray_call__.remote(_node)


def restarted() -> bool:
    """Whether the actor this runs in was lost before, and was started again by Ray."""
    return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def this_actor() -> Handle:
    """The handle of the actor this runs in."""
    return ray.get_runtime_context().current_actor
