"""What commands share: options, JSON output, and the way to a system that runs or not."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmos.kernel.settings import Settings
from llmos.shell import exits

if TYPE_CHECKING:
    from llmos.kernel.client import Kernel, SyncOperator

System = Annotated[
    str | None, typer.Option("--system", help="Name of the system, where several run.")
]
Address = Annotated[
    str | None,
    typer.Option("--address", help="Ray cluster; default: $RAY_ADDRESS or this machine."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def print_json(value: Any) -> None:
    """One line on standard output."""
    sys.stdout.write(json.dumps(value, default=str, ensure_ascii=False) + "\n")
    sys.stdout.flush()


@contextmanager
def connected(system: str | None, address: str | None, as_json: bool = False) -> Iterator[Kernel]:
    """The kernel that runs; errors inside end the command with their exit code."""
    with exits.errors(as_json=as_json):
        from llmos.kernel.client import Kernel

        with Kernel.connect(system, address=address) as kernel:
            yield kernel


@contextmanager
def operating(
    system: str | None, address: str | None, as_json: bool = False
) -> Iterator[SyncOperator]:
    """The records of the kernel that runs, or of one that is down; errors inside as above."""
    with exits.errors(as_json=as_json):
        from llmos.kernel.client import Kernel, SyncOperator
        from llmos.kernel.cluster import ClusterError
        from llmos.kernel.offline import SystemNote, opened

        settings = Settings()
        try:
            kernel = Kernel.connect(system, address=address)
        except ClusterError:
            note = SystemNote.find(settings, system)
            # A cluster that was named and is not there is not this machine's.
            if note is None or address or settings.ray_address:
                raise
        else:
            with kernel:
                yield kernel.operator
            return
        with asyncio.Runner() as runner, opened(settings, note) as operator:
            yield SyncOperator(operator, runner.run)
