"""One CUDA GPU as a device."""

from __future__ import annotations

from llmos.drivers.devices import nvml
from llmos.drivers.errors import DeviceUnavailable
from llmos.drivers.protocols import DeviceInfo, DeviceUsage

BUDGET_SHARE = 0.9
"""Of what is free at the start: CUDA's context, kernels and fragmentation need the rest."""


class CudaDevice:
    """See :class:`llmos.drivers.protocols.DeviceDriver`."""

    def __init__(
        self, index: int = 0, budget_bytes: int | None = None, threads: int | None = None
    ) -> None:
        """Open the GPU; starts CUDA in this process.

        Raises:
            DeviceUnavailable: no CUDA, no such GPU, or a budget above its memory.
        """
        import torch

        name = f"cuda:{index}"
        if not torch.cuda.is_available():
            built = torch.version.cuda is not None
            raise DeviceUnavailable(
                name,
                "no GPU is visible to this process" if built else "torch was built without CUDA",
                remedy="Check nvidia-smi and CUDA_VISIBLE_DEVICES"
                if built
                else "Install a CUDA build of torch",
            )
        if not 0 <= index < torch.cuda.device_count():
            raise DeviceUnavailable(
                name,
                f"this process sees {torch.cuda.device_count()} GPUs",
                remedy="Use an index from 0, or check CUDA_VISIBLE_DEVICES",
            )
        free, total = torch.cuda.mem_get_info(index)
        budget = int(free * BUDGET_SHARE) if budget_bytes is None else budget_bytes
        if not 0 < budget <= total:
            raise DeviceUnavailable(
                name,
                f"a budget of {budget} bytes does not lie within its {total} bytes",
                remedy="Set a smaller budget_bytes",
            )
        if threads is not None and threads < 1:
            raise DeviceUnavailable(name, f"{threads} threads cannot compute", remedy="Give it 1")
        properties = torch.cuda.get_device_properties(index)
        self._index = index
        self._info = DeviceInfo(
            name=name,
            kind="cuda",
            total_bytes=int(total),
            budget_bytes=budget,
            # One thread launches kernels; more would only wait for each other.
            threads=threads or 1,
            product=properties.name,
            compute_capability=(properties.major, properties.minor),
        )

    @property
    def info(self) -> DeviceInfo:
        """What the device is."""
        return self._info

    @property
    def torch_device(self) -> str:
        """``cuda:N``."""
        return self._info.name

    def usage(self) -> DeviceUsage:
        """This process's bytes as NVML counts them, else as torch's allocator holds them.

        torch's number leaves out CUDA's own context, some hundred MB.
        """
        import torch

        seen = nvml.read(self._index)
        if seen is not None and seen.process_bytes is not None:
            return DeviceUsage(seen.process_bytes, seen.utilisation)
        reserved = int(torch.cuda.memory_reserved(self._index))
        return DeviceUsage(reserved, None if seen is None else seen.utilisation)

    def set_threads(self, threads: int) -> None:
        """No effect: the work is done by the GPU."""
