"""Boot a detached kernel near a named node and leave: ``boot_at ADDRESS NODE HOME SYSTEM``.

A process of its own, since a driver ends with the head that it is connected to; and near a
node other than the driver's, which on a machine with several is always the head's.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import ray

from llmos.kernel import nodes
from llmos.kernel.client import Kernel
from llmos.kernel.core.placement import Node
from llmos.kernel.settings import Settings


def main(address: str, name: str, home: str, system: str) -> None:
    """Boot, and print the launched agents."""

    def at() -> Node:
        listed: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        found = next(n for n in listed if n["NodeName"] == name)
        return Node(found["NodeID"], found["NodeManagerAddress"], found["NodeManagerPort"])

    nodes.here = at
    settings = Settings(home=Path(home), log_level="DEBUG")
    with Kernel.boot(system, address=address, settings=settings, detached=True) as kernel:
        print(" ".join(a["agent"] for a in kernel.ps()))


if __name__ == "__main__":
    main(*sys.argv[1:])
