"""The background process of ``llmos up``: owns Ray and the kernel until it is told to stop."""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from llmos.drivers.errors import LlmosError
from llmos.kernel.client import Kernel
from llmos.kernel.system import SystemConfig
from llmos.shell import exits


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def serve(
    system: SystemConfig,
    address: str | None = None,
    *,
    progress: Callable[[str], None] = _say,
    ready: Callable[[], None] = lambda: _say("ready"),
) -> int:
    """Boot, wait for SIGTERM or SIGINT, shut down. Returns the exit code.

    Args:
        system: What to boot.
        address: A Ray cluster to boot in; None starts a Ray.
        progress: Is told what is being waited for.
        ready: Is called once when the kernel serves.

    Raises:
        LlmosError: it could not boot; nothing is left running.
        KeyboardInterrupt: a signal came before it served; nothing is left running. A second
            signal does not wait for that.
    """
    stop = threading.Event()
    serving = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        if not serving:
            exits.interrupt(number, frame)
        stop.set()

    with exits.signals(on_signal):
        kernel = Kernel.boot(system, address=address, detached=True, progress=progress)
        serving = True
        ready()
        stop.wait()
        kernel.shutdown()
    return 0


class Report:
    """What a background process tells the ``llmos up`` that started it: JSON lines in a pipe.

    Not its output, which libraries and an earlier process write to as well.
    """

    def __init__(self, descriptor: int) -> None:
        # It came through an exec; what is started from here must not hold it open.
        os.set_inheritable(descriptor, False)
        self._pipe = os.fdopen(descriptor, "w", encoding="utf-8", buffering=1)

    def send(self, **facts: Any) -> None:
        """``progress``, ``ready`` or ``error`` with ``exit``."""
        # If whoever started us is gone, the kernel is wanted all the same.
        with suppress(BrokenPipeError):
            self._pipe.write(json.dumps(facts) + "\n")

    def close(self) -> None:
        """The last word has been said. Idempotent."""
        # Closing writes what an earlier line left behind.
        with suppress(BrokenPipeError):
            self._pipe.close()


def main(arguments: list[str] | None = None) -> int:
    """``python -m llmos.shell.daemon --report FD --lock FD FILE [NAME=PATH …]``."""
    parser = argparse.ArgumentParser(prog="llmos.shell.daemon")
    parser.add_argument("--report", type=int, required=True, help="a pipe: see Report")
    parser.add_argument("--lock", type=int, required=True, help="held until it serves")
    parser.add_argument("file", type=Path)
    parser.add_argument("data", nargs="*")
    given = parser.parse_args(arguments)
    os.set_inheritable(given.lock, False)
    report = Report(given.report)

    def progress(text: str) -> None:
        _say(text)
        report.send(progress=text)

    def ready() -> None:
        _say("ready")
        os.close(given.lock)
        report.send(ready=True)
        report.close()

    try:
        paths = dict(pair.split("=", 1) for pair in given.data)
        system = SystemConfig.read(given.file).with_data({n: Path(p) for n, p in paths.items()})
        return serve(system, progress=progress, ready=ready)
    except LlmosError as error:
        text, code = f"{error} [{error.code}]", exits.code_of(error)
    except KeyboardInterrupt as interrupt:
        text, code = exits.of_interrupt(interrupt)
    sys.stderr.write(f"error: {text}\n")
    report.send(error=text, exit=code)
    report.close()
    return code


if __name__ == "__main__":
    sys.exit(main())
