"""Errors of the core's decisions.

::

    LlmosError
    └── KernelError
        ├── DoesNotFit         no device could ever hold it
        ├── AlreadyLaunched
        ├── NoDevice
        ├── SlotUnavailable    the model cannot be loaded
        └── HostUnavailable    no host process can be kept alive
"""

from __future__ import annotations

from collections.abc import Iterable

from llmos.drivers.errors import LlmosError


class KernelError(LlmosError):
    """The kernel refuses or cannot go on."""


def gib(size_bytes: int) -> str:
    """Bytes for people."""
    if size_bytes >= 1 << 30:
        return f"{size_bytes / (1 << 30):.2f} GiB"
    return f"{size_bytes / (1 << 20):.0f} MiB"


class DoesNotFit(KernelError):
    """The model needs more memory than any device has, now or ever."""

    def __init__(
        self,
        agent: str,
        model: str,
        needed_bytes: int,
        device: str,
        capacity_bytes: int,
        pinned_bytes: int = 0,
    ) -> None:
        self.agent, self.model, self.device = agent, model, device
        self.needed_bytes, self.capacity_bytes = needed_bytes, capacity_bytes
        self.pinned_bytes = pinned_bytes
        pinned = f", of which pinned models hold {gib(pinned_bytes)}" if pinned_bytes else ""
        super().__init__(
            f"{agent} needs {gib(needed_bytes)} ({needed_bytes} bytes) for model {model!r}; the "
            f"largest device, {device or 'none'}, has {gib(capacity_bytes)} "
            f"({capacity_bytes} bytes){pinned}",
            remedy="Lower kv_tokens or the manifest's memory, choose a smaller model, or raise "
            "the device's memory in system.toml",
        )


class AlreadyLaunched(KernelError):
    """An agent of that name runs."""

    def __init__(self, agent: str) -> None:
        self.agent = agent
        super().__init__(f"Agent {agent} is launched already", remedy="Use another key, or kill it")


class NoDevice(KernelError):
    """The system has no device that could take the model."""

    def __init__(self, model: str, device: str | None, known: Iterable[str]) -> None:
        self.model, self.device, self.known = model, device, tuple(sorted(known))
        super().__init__(
            f"Model {model!r} has no device" + (f" {device!r}" if device else ""),
            remedy="Devices: " + (", ".join(self.known) or "none"),
        )


class SlotUnavailable(KernelError):
    """The model's slot failed; the reason is the engine's."""

    def __init__(self, model: str, reason: str) -> None:
        self.model, self.reason = model, reason
        super().__init__(f"Model {model!r} could not be made resident: {reason}")


class HostUnavailable(KernelError):
    """No host can serve the agent."""

    def __init__(self, agent: str, reason: str) -> None:
        self.agent, self.reason = agent, reason
        super().__init__(f"No host can serve {agent}: {reason}", remedy="See: llmos logs")
