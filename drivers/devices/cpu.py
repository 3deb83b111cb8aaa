"""The CPU as a device: its memory limit and its thread quota."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from llmos.drivers.errors import DeviceUnavailable
from llmos.drivers.protocols import DeviceInfo, DeviceUsage

BUDGET_SHARE = 0.6
"""Of what is available at the start: agents, stores and page cache need the rest."""
_CGROUP = Path("/sys/fs/cgroup")


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _cgroup_folders() -> list[Path]:
    """Folders of this process's cgroup and all above it, whose limits all hold."""
    folders = [_CGROUP, _CGROUP / "memory", _CGROUP / "cpu"]
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        root = _CGROUP / controllers if controllers else _CGROUP
        here = root / path.strip("/")
        while here not in folders and here != _CGROUP and _CGROUP in here.parents:
            folders.append(here)
            here = here.parent
    return folders


def memory_bytes() -> tuple[int, int]:
    """Total and available memory, of the container where there is a limit, else the machine."""
    # Here and not above: an engine takes its thread quota from this module, and has to run
    # on a machine with torch and transformers alone.
    import psutil

    machine = psutil.virtual_memory()
    total, available = int(machine.total), int(machine.available)
    for folder in _cgroup_folders():
        for limit_file, usage_file in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit = _read(folder / limit_file)
            # "max" and version 1's huge number both mean no limit.
            if limit.isdigit() and int(limit) < machine.total:
                total = min(total, int(limit))
                used = _read(folder / usage_file)
                available = min(available, int(limit) - (int(used) if used.isdigit() else 0))
    return total, max(available, 0)


def usable_threads() -> int:
    """Threads that can run at once: the affinity mask, cut to the cgroup's CPU quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    threads = len(affinity(0)) if affinity else os.cpu_count() or 1
    for folder in _cgroup_folders():
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if not period:
            quota = _read(folder / "cpu.cfs_quota_us")
            period = _read(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):
            threads = min(threads, max(1, int(quota) // int(period)))
    return threads


def set_torch_threads(threads: int) -> None:
    """Let torch use this many threads for what the calling thread computes.

    torch keeps the number per calling thread (OpenMP), so each engine sets it in its own;
    by default it takes every core, and beside a busy neighbour runs 20 times slower.
    """
    import torch

    if threads < 1:
        raise ValueError(f"threads={threads}: at least 1 is needed")
    torch.set_num_threads(threads)


class CpuDevice:
    """See :class:`llmos.drivers.protocols.DeviceDriver`."""

    def __init__(
        self, index: int = 0, budget_bytes: int | None = None, threads: int | None = None
    ) -> None:
        """Take stock of memory and threads.

        Raises:
            DeviceUnavailable: an index other than 0, a budget above the memory, or no thread.
        """
        name = f"cpu:{index}"
        if index != 0:
            raise DeviceUnavailable(name, "there is one CPU device, cpu:0", remedy="Use index 0")
        total, available = memory_bytes()
        budget = int(available * BUDGET_SHARE) if budget_bytes is None else budget_bytes
        if not 0 < budget <= total:
            raise DeviceUnavailable(
                name,
                f"a budget of {budget} bytes does not lie within its {total} bytes",
                remedy="Set a smaller budget_bytes",
            )
        if threads is not None and threads < 1:
            raise DeviceUnavailable(name, f"{threads} threads cannot compute", remedy="Give it 1")
        import psutil

        self._process = psutil.Process()
        self._process.cpu_percent()
        self._info = DeviceInfo(
            name=name,
            kind="cpu",
            total_bytes=total,
            budget_bytes=budget,
            threads=threads or usable_threads(),
            product=platform.processor() or platform.machine(),
        )

    @property
    def info(self) -> DeviceInfo:
        """What the device is."""
        return self._info

    @property
    def torch_device(self) -> str:
        """Always ``cpu``: torch knows no numbers of CPUs."""
        return "cpu"

    def usage(self) -> DeviceUsage:
        """Resident memory of this process, and its share of the threads since the last reading."""
        busy = self._process.cpu_percent() / 100 / self._info.threads
        return DeviceUsage(int(self._process.memory_info().rss), min(max(busy, 0.0), 1.0))

    def set_threads(self, threads: int) -> None:
        """Let computation in the calling thread use this many threads."""
        set_torch_threads(threads)
