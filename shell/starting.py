"""Starting the background process of ``llmos up``: one at a time, with its own word for it."""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmos.kernel.settings import Settings, SettingsError
from llmos.shell import exits

SILENCE_S = 180.0
"""Longest wait without any progress."""
END_S = 60.0
"""Longest wait for a process that was told to end, before it is killed."""
TAIL_CHARS = 2000
"""Of the output of a process that ended without a word."""


@contextmanager
def lock(settings: Settings, system: str) -> Iterator[int]:
    """Be the only one that starts a system; yields the lock's descriptor.

    It may be handed to a child: the lock is held until all that have it have closed it, so a
    background process keeps it also when the ``llmos up`` that started it is killed.

    Raises:
        SettingsError: the run folder cannot be written.
        typer.Exit: another process is starting this system.
    """
    path = settings.make_folders(system) / "starting.lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise SettingsError("LLMOS_HOME", str(error)) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            exits.fail(f"system {system!r} is just being started by another process")
        # The file stays: one that is removed would be locked by two, under two inodes.
        yield descriptor
    finally:
        os.close(descriptor)


def start(
    file: Path, data: list[str], run: Path, held: int, progress: Callable[[str], None]
) -> None:
    """Start the background process and wait until it serves.

    Args:
        file: The system file.
        data: ``NAME=PATH`` of corpora and graphs.
        run: Folder of the system's runs.
        held: Descriptor of :func:`lock`.
        progress: Is told in words what is being waited for.

    Raises:
        SettingsError: its output cannot be written.
        typer.Exit: it did not start; it was told why on standard error.
        KeyboardInterrupt: a signal came; the process has ended.
    """
    out = run / "logs" / "daemon.out"
    try:
        sink = out.open("wb")
    except OSError as error:
        raise SettingsError("LLMOS_HOME", str(error)) from None
    ours, theirs = os.pipe()
    with sink, os.fdopen(ours, "rb", buffering=0) as pipe, exits.signals():
        try:
            command = [sys.executable, "-m", "llmos.shell.daemon"]
            command += ["--report", str(theirs), "--lock", str(held)]
            process = subprocess.Popen(
                [*command, "--", str(file), *data],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(theirs, held),
            )
        finally:
            os.close(theirs)  # So that the pipe ends with the process.
        try:
            _wait(process, pipe.fileno(), out, progress)
        except BaseException:
            end(process)
            raise


def _wait(
    process: subprocess.Popen[bytes], pipe: int, out: Path, progress: Callable[[str], None]
) -> None:
    rest = b""
    while True:
        if not select.select([pipe], [], [], SILENCE_S)[0]:
            exits.fail(f"nothing has happened for {SILENCE_S:.0f} s; see {out}", exits.DEADLINE)
        chunk = os.read(pipe, 65536)
        if not chunk:
            _last_word(process)
            code = process.returncode
            text = out.read_text(errors="replace")[-TAIL_CHARS:].strip()
            exits.fail(text or f"the kernel ended with {code}")
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            told = json.loads(line)
            if "ready" in told:
                return
            if "error" in told:
                _last_word(process)
                exits.fail(told["error"], told["exit"])
            progress(f"{told['progress']} …")


def _last_word(process: subprocess.Popen[bytes]) -> None:
    """Wait for a process that has said its last word, and has only to exit."""
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a background process that leads its own group: it is asked first, then killed."""
    process.terminate()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        # With what it started: nobody else knows of it.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
