"""One lock per model, with the name of its holder, and a folder to build in."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from llmos.drivers.errors import ModelBusy

LOCKS = ".locks"
INCOMING = ".incoming"
"""Folders being built: ``.incoming/NAME/RANDOM``. On the store's own file system, so
that the last step is a rename."""


@contextmanager
def model_lock(
    root: Path,
    model: str,
    *,
    timeout_s: float,
    waiting: Callable[[float], None] | None = None,
) -> Iterator[None]:
    """Hold a model. The operating system frees it when the holder dies.

    ``waiting`` is told the seconds waited so far, about once a second.

    Raises:
        ModelBusy: somebody else held it for ``timeout_s``.
    """
    folder = root / LOCKS
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(folder / f"{model}.lock"), folder / f"{model}.holder"
    started = time.monotonic()
    while True:
        waited = time.monotonic() - started
        try:
            lock.acquire(timeout=min(1.0, max(0.0, timeout_s - waited)))
            break
        except Timeout:
            waited = time.monotonic() - started
            if waited >= timeout_s:
                raise ModelBusy(model, _read_holder(holder), waited) from None
            if waiting is not None:
                waiting(waited)
    try:
        # Only told to people; who holds the model is decided by the lock alone.
        facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": int(time.time())}
        holder.write_text(json.dumps(facts))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _read_holder(holder: Path) -> str:
    try:
        facts = json.loads(holder.read_text())
        since = time.strftime("%H:%M:%S", time.localtime(facts["since"]))
        return f"process {facts['pid']} on {facts['host']} since {since}"
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that did not leave its name"


@contextmanager
def building(root: Path, model: str) -> Iterator[Path]:
    """A fresh folder for the holder of the lock; gone afterwards, whatever happens.

    What other folders of this model are there was left by dead processes: nobody but
    the holder of the lock builds here. Cheaper and surer than asking whether a process
    id still lives, which may be reused or on another host.
    """
    sweep(root, model)
    parent = root / INCOMING / model
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=parent))
    try:
        yield folder
    finally:
        sweep(root, model)


def sweep(root: Path, model: str) -> None:
    """Remove everything that was being built for a model. For the holder of its lock."""
    shutil.rmtree(root / INCOMING / model, ignore_errors=True)


def sweep_others(root: Path, model: str) -> None:
    """Remove what dead processes left of other models."""
    with suppress(FileNotFoundError):
        for folder in list((root / INCOMING).iterdir()):
            if folder.name != model:
                with suppress(ModelBusy), model_lock(root, folder.name, timeout_s=0):
                    sweep(root, folder.name)
