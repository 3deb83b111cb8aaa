"""Where in a cluster a process is started.

Hosts are spread, everything else stays near the kernel: a node less that can take the system
down. A store that is a file can only be where the file is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from llmos.kernel.core.types import ProcessKind


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the cluster."""

    id: str
    """Hexadecimal; a machine that comes back is a new node."""
    address: str
    """Names the machine: what a node keeps in files is there again under the same address."""
    port: int = 0
    """Where the node's own process listens; 0: not known."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where to start a process."""

    node: str
    """Id."""
    hard: bool
    """There or nowhere."""


def same_machine(nodes: Sequence[Node], as_of: Node) -> Node | None:
    """The node that is there now on the machine of ``as_of``."""
    known = [node for node in nodes if node.id == as_of.id]
    known += [node for node in nodes if node.address == as_of.address]
    return known[0] if known else None


def place(
    kind: ProcessKind,
    nodes: Sequence[Node],
    *,
    kernel: str,
    hosts: Mapping[str, int],
    closed: Collection[str] = (),
    file_on: Node | None = None,
) -> Place | None:
    """Choose a node for a process; None: there is none now that could take it.

    Args:
        kind: of the process.
        nodes: those that can be reached.
        kernel: id of the kernel's own node.
        hosts: how many hosts are on each node, by id.
        closed: ids of nodes that get nothing new, unless only they will do.
        file_on: the node that the store's file was made on; None: the store is a server.
    """
    if kind is ProcessKind.DEVICE:
        # The kernel has looked for devices on its own node, and dies with it.
        return Place(kernel, hard=True)
    fit = [node for node in nodes if node.id not in closed]
    if kind is ProcessKind.JOURNAL and file_on is not None:
        there = same_machine(fit, file_on) or same_machine(nodes, file_on)
        return Place(there.id, hard=True) if there is not None else None
    fit = fit or list(nodes)
    if not fit:
        return None
    if kind is not ProcessKind.HOST and any(node.id == kernel for node in fit):
        return Place(kernel, hard=False)
    # Among equals not the kernel's: what is lost with it takes longest to come back.
    best = min(fit, key=lambda node: (hosts.get(node.id, 0), node.id == kernel))
    return Place(best.id, hard=False)
