"""NVIDIA's management library, where it is installed: GPUs seen without starting CUDA."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob
from typing import Any


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as NVML sees it."""

    uuid: str
    product: str
    total_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int]
    process_bytes: int | None
    """Used by this process; None where the driver does not say (containers, MIG)."""
    utilisation: float | None


@contextmanager
def session() -> Iterator[Any]:
    """NVML's module, started; None where the package or the driver is missing."""
    try:
        import pynvml
    except ImportError:
        yield None
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def device_files() -> bool:
    """Whether the system shows an NVIDIA GPU to this process."""
    return bool(glob("/dev/nvidia[0-9]*") or glob("/dev/nvidia-caps/*") or glob("/dev/dxg"))


def count() -> int | None:
    """GPUs that NVML knows; None where it cannot be asked."""
    with session() as nvml:
        return None if nvml is None else int(nvml.nvmlDeviceGetCount())


def handle(nvml: Any, index: int) -> Any:
    """NVML's handle of CUDA device ``index``, whose numbers CUDA_VISIBLE_DEVICES may shift."""
    visible = [v.strip() for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v]
    if index >= len(visible):
        return nvml.nvmlDeviceGetHandleByIndex(index)
    chosen = visible[index]
    if chosen.isdigit():
        return nvml.nvmlDeviceGetHandleByIndex(int(chosen))
    return nvml.nvmlDeviceGetHandleByUUID(chosen)


def read(index: int) -> Gpu | None:
    """The GPU that CUDA calls ``index``; None where NVML cannot say."""
    with session() as nvml:
        if nvml is None:
            return None
        try:
            gpu = handle(nvml, index)
            memory = nvml.nvmlDeviceGetMemoryInfo(gpu)
            product = nvml.nvmlDeviceGetName(gpu)
            uuid = nvml.nvmlDeviceGetUUID(gpu)
            capability = tuple(nvml.nvmlDeviceGetCudaComputeCapability(gpu))
        except nvml.NVMLError:
            return None
        mine: int | None = None
        busy: float | None = None
        try:
            for process in nvml.nvmlDeviceGetComputeRunningProcesses(gpu):
                if process.pid == os.getpid() and process.usedGpuMemory is not None:
                    mine = int(process.usedGpuMemory)
        except nvml.NVMLError:
            mine = None
        try:
            busy = nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100
        except nvml.NVMLError:
            busy = None
    return Gpu(
        uuid=uuid if isinstance(uuid, str) else uuid.decode(),
        product=product if isinstance(product, str) else product.decode(),
        total_bytes=int(memory.total),
        free_bytes=int(memory.free),
        compute_capability=(int(capability[0]), int(capability[1])),
        process_bytes=mine,
        utilisation=busy,
    )
