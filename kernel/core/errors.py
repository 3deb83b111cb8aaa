"""Errors of the core's decisions.

::

    LlmosError
    └── KernelError
        ├── DoesNotFit         no device could ever hold it
        ├── AlreadyLaunched
        ├── NoDevice
        ├── SlotUnavailable    the model cannot be loaded
        ├── HostUnavailable    no host process can be kept alive
        ├── UnknownProcess     the kernel runs no such process, or it is not of that kind
        ├── NoOtherHost        a host cannot be drained: nobody could take what it serves
        ├── UnknownNode        the cluster has no such node, or several are meant
        ├── NodeNeeded         a node cannot be drained: what is on it can be nowhere else
        ├── Nondeterminism     a turn that runs again does something else than before
        ├── InvalidCron
        └── NeverDue           a cron expression that fits no time
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import json
from collections.abc import Iterable, Mapping

from llmos.drivers.errors import LlmosError

MAX_DIFF_LINES = 60
"""Of a diff are shown."""


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


class UnknownProcess(KernelError):
    """The kernel runs no process of that name and kind."""

    def __init__(self, process: str, known: Iterable[str]) -> None:
        self.process, self.known = process, tuple(sorted(known))
        super().__init__(
            f"There is no process {process!r}", remedy="Known: " + (", ".join(self.known) or "none")
        )


class NoOtherHost(KernelError):
    """A host cannot be drained."""

    def __init__(self, process: str, reason: str = "no other host is up") -> None:
        self.process, self.reason = process, reason
        super().__init__(
            f"{process} cannot be drained: {reason}",
            remedy="Wait until another host is up (llmos status), or raise the number of hosts "
            "in system.toml",
        )


class UnknownNode(KernelError):
    """The cluster has no node of that address or id, or several are meant."""

    def __init__(self, node: str, meant: Iterable[str], known: Iterable[str]) -> None:
        self.node, self.meant, self.known = node, tuple(sorted(meant)), tuple(sorted(known))
        super().__init__(
            f"{node!r} means {len(self.meant)} nodes"
            if self.meant
            else f"There is no process and no node {node!r}",
            remedy="Nodes: " + (", ".join(self.meant or self.known) or "none"),
        )


class NodeNeeded(KernelError):
    """A node cannot be drained: some of what is on it can be nowhere else."""

    def __init__(self, node: str, address: str, processes: Mapping[str, str]) -> None:
        self.node, self.address = node, address
        self.processes = dict(processes)
        """Why each cannot be moved, by the process's name."""
        reasons = "; ".join(f"{name}: {why}" for name, why in self.processes.items())
        super().__init__(
            f"Node {node[:8]} ({address}) cannot be drained: {reasons}",
            remedy="Stop the system (llmos down) and boot it on another node",
        )


class Nondeterminism(KernelError):
    """A turn that runs again does something else than its journal says it did.

    Calls are given as (kind, name, args): class name of the request, resource, JSON.
    """

    def __init__(
        self,
        agent: str,
        turn: str,
        seq: int,
        expected: tuple[str, str, str],
        actual: tuple[str, str, str] | None,
        missing: Iterable[tuple[int, str, str]] = (),
    ) -> None:
        self.agent, self.turn, self.seq = agent, turn, seq
        self.expected = expected
        self.actual = actual
        """None: the turn ended without making the call again."""
        self.missing = tuple(missing)
        """(seq, kind, name) of all recorded calls that were not made again, at the end."""
        if actual is None:
            names = ", ".join(f"{n} {kind}({name})" for n, kind, name in self.missing)
            what = f"it ended without making these recorded calls again: {names}"
        else:
            what = (
                f"call {seq} was {expected[0]}({expected[1]}) and is now "
                f"{actual[0]}({actual[1]})\n{_difference(expected[2], actual[2])}"
            )
        super().__init__(
            f"Turn {turn} of {agent} does not run as it did before: {what}",
            remedy="A handler must do the same when it runs again: take time, ids and chance "
            "from the context, and keep no state outside of it. If its code was changed, put "
            'the change behind ctx.patched("name"), so that turns begun before it run as they did',
        )


def _difference(expected: str, actual: str) -> str:
    """Two JSON texts, as a diff of their lines."""
    if not expected or not actual:
        return "(the arguments differ; they are not at hand)"
    if expected == actual:
        return "(with the same arguments)"
    lines = difflib.unified_diff(
        _pretty(expected), _pretty(actual), "recorded", "now", n=2, lineterm=""
    )
    return "\n".join(itertools.islice(lines, MAX_DIFF_LINES))


def _pretty(text: str) -> list[str]:
    # A reference to a blob, or not ours: as it is.
    with contextlib.suppress(ValueError):
        text = json.dumps(json.loads(text), indent=2, sort_keys=True, ensure_ascii=False)
    return text.splitlines()


class InvalidCron(KernelError):
    """A cron expression cannot be read."""

    def __init__(self, text: str, position: int, reason: str) -> None:
        self.text, self.position, self.reason = text, position, reason
        super().__init__(
            f"Cron expression {text!r}, at position {position}: {reason}",
            remedy='Five fields: minute hour day-of-month month day-of-week, e.g. "30 8 * * mon-fri"',
        )


class NeverDue(KernelError):
    """No time within years fits a cron expression."""

    def __init__(self, text: str, years: int) -> None:
        self.text, self.years = text, years
        super().__init__(
            f"Cron expression {text!r} fits no time within {years} years",
            remedy="Check the day against the month: there is no 30 February",
        )
