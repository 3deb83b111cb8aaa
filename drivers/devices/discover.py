"""Which devices this machine has."""

from __future__ import annotations

from llmos.drivers.devices import nvml
from llmos.drivers.devices.cpu import CpuDevice
from llmos.drivers.errors import DeviceUnavailable
from llmos.drivers.protocols import DeviceInfo


def discover() -> list[DeviceInfo]:
    """The CPU, then every CUDA GPU that this process can use, with default budgets.

    torch is imported only where something speaks for a GPU: that takes seconds, and
    the CLI asks on every start.
    """
    found = [CpuDevice().info]
    if nvml.count() == 0 or not (nvml.device_files() or nvml.count()):
        return found
    from llmos.drivers.devices.cuda import CudaDevice

    index = 0
    while True:
        try:
            found.append(CudaDevice(index).info)
        except (DeviceUnavailable, ModuleNotFoundError):
            # Past the last one, or a GPU that torch cannot use.
            return found
        index += 1
