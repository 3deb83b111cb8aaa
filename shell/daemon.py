"""The background process of ``llmos up``: owns Ray and the kernel until it is told to stop."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from types import FrameType

from llmos.drivers.errors import LlmosError
from llmos.kernel.client import Kernel
from llmos.kernel.system import SystemConfig

READY = "ready"
"""The last line before it serves; the lines before say what is being waited for."""


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def serve(system: SystemConfig, address: str | None = None) -> int:
    """Boot, wait for SIGTERM or SIGINT, shut down. Returns the exit code."""
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    try:
        kernel = Kernel.boot(system, address=address, detached=True, progress=_say)
    except LlmosError as error:
        sys.stderr.write(f"error: {error} [{error.code}]\n")
        return 1
    _say(READY)
    stop.wait()
    kernel.shutdown()
    return 0


def main() -> int:
    """``python -m llmos.shell.daemon FILE [NAME=PATH …]``."""
    overrides = dict(pair.split("=", 1) for pair in sys.argv[2:])
    system = SystemConfig.read(Path(sys.argv[1]))
    return serve(system.with_data({name: Path(path) for name, path in overrides.items()}))


if __name__ == "__main__":
    sys.exit(main())
