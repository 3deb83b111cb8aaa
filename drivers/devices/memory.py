"""A made-up device: memory that only the ledger knows, for tests and simulation."""

from __future__ import annotations

from llmos.drivers.errors import DeviceUnavailable
from llmos.drivers.protocols import DeviceInfo, DeviceUsage

DEFAULT_BYTES = 8 << 30


class MemoryDevice:
    """See :class:`llmos.drivers.protocols.DeviceDriver`. Computation runs on the CPU."""

    def __init__(
        self, index: int = 0, budget_bytes: int | None = None, threads: int | None = None
    ) -> None:
        """A device of exactly ``budget_bytes`` (8 GiB where none are given)."""
        size = DEFAULT_BYTES if budget_bytes is None else budget_bytes
        quota = 1 if threads is None else threads
        if index < 0 or size < 1 or quota < 1:
            raise DeviceUnavailable(
                f"cpu:{index}",
                f"index {index}, {size} bytes and {quota} threads make no device",
                remedy="Give it positive numbers",
            )
        self._info = DeviceInfo(f"cpu:{index}", "cpu", size, size, quota, product="made-up memory")
        self._used = 0
        self.thread_quota = quota
        """What the last ``set_threads`` asked for."""

    @property
    def info(self) -> DeviceInfo:
        """What the device is."""
        return self._info

    @property
    def torch_device(self) -> str:
        """Engines on it would compute on the CPU."""
        return "cpu"

    def occupy(self, used_bytes: int) -> None:
        """Say how much is in use; what ``usage`` reports from now on."""
        if not 0 <= used_bytes <= self._info.total_bytes:
            raise ValueError(f"used_bytes={used_bytes} is not within the device's memory")
        self._used = used_bytes

    def usage(self) -> DeviceUsage:
        """What ``occupy`` said last."""
        return DeviceUsage(self._used, None)

    def set_threads(self, threads: int) -> None:
        """Remember the quota."""
        if threads < 1:
            raise ValueError(f"threads={threads}: at least 1 is needed")
        self.thread_quota = threads
