"""Run one step of a pull in a process of its own.

Converting loads torch and a few hundred megabytes, downloading may hang in a library
that takes no deadline: as a child both can be killed, and what they loaded is gone
when they end. A child that lost its parent ends by itself (see ``watch`` in the
scripts): it reads its standard input, which closes with the parent.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parent / "scripts"
POLL_S = 0.1
TAIL_BYTES = 16_384


class ChildTimeout(Exception):
    """The child was killed at its deadline."""


@dataclass(frozen=True, slots=True)
class ChildResult:
    """How a child ended."""

    returncode: int
    out: str
    """The last 16 KiB of its standard output."""
    err: str
    """The last 16 KiB of its standard error."""

    def last_json(self) -> dict[str, Any]:
        """The object that the script printed last; empty if it printed none."""
        for line in reversed(self.out.splitlines()):
            if line.startswith("{"):
                try:
                    value = json.loads(line)
                except ValueError:
                    continue
                return value if isinstance(value, dict) else {}
        return {}


def run_child(
    argv: Sequence[str],
    *,
    scratch: Path,
    deadline_s: float,
    env: Mapping[str, str] | None = None,
    tick: Callable[[str], None] | None = None,
) -> ChildResult:
    """Run a command to its end; ``tick`` gets the tail of its output ten times a second.

    Output goes to files in ``scratch``: pipes would block a child whose parent is
    busy, and hold its output without a bound.

    Raises:
        ChildTimeout: still running after ``deadline_s``; it was killed.
    """
    out_path, err_path = scratch / "child.out", scratch / "child.err"
    with out_path.open("wb") as out, err_path.open("wb") as err:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=err,
            env={**os.environ, **(env or {})},
            cwd=scratch,
        )
        ends_at = time.monotonic() + deadline_s
        try:
            while process.poll() is None:
                if time.monotonic() > ends_at:
                    raise ChildTimeout(f"still running after {deadline_s:.0f} s")
                if tick is not None:
                    tick(_tail(out_path))
                time.sleep(POLL_S)
        finally:
            # Also the way out of KeyboardInterrupt and of a tick that raises.
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
    if tick is not None:
        tick(_tail(out_path))
    return ChildResult(process.returncode, _tail(out_path), _tail(err_path))


def script(name: str, request: Mapping[str, Any]) -> list[str]:
    """The command line of a script of this package with its request.

    The file is run by path under ``-P``: it imports nothing of LLM OS, so it works
    whatever way the caller found the package, and its folder shadows no module.
    """
    return [sys.executable, "-P", str(SCRIPTS / f"{name}.py"), json.dumps(request)]


def thread_limits(threads: int) -> dict[str, str]:
    """Environment that holds numeric libraries to so many threads."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
    return dict.fromkeys(names, str(threads))


def folder_bytes(folder: Path) -> int:
    """Bytes of the files below a folder that something else is writing to."""
    total = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        return file.read().decode("utf-8", "replace")
