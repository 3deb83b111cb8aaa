"""Exit codes of ``llmos``, and how an error becomes one.

====  =====================================================
0     done
1     failed; the error's own words are on standard error
2     wrong usage, or a system file or a setting that cannot be used
3     no such kernel, agent, turn, dead letter, process, model or adapter
4     refused: a capability, a label, no memory for it, or it would do harm
5     busy: try again later
124   a deadline passed
130   interrupted (SIGINT)
143   told to end (SIGTERM)
====  =====================================================
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import typer
from rich.console import Console

from llmos.drivers.errors import (
    AdaptersFull,
    EngineBusy,
    LlmosError,
    UnknownAdapter,
    UnknownModel,
)
from llmos.kernel.core.errors import DoesNotFit, NoOtherHost, UnknownNode, UnknownProcess
from llmos.kernel.settings import SettingsError
from llmos.kernel.system import SystemFileError
from llmos.syscalls.errors import (
    Busy,
    CapabilityDenied,
    DeadlineExceeded,
    LabelViolation,
    UnknownAgent,
    UnknownResource,
)

FAILED, USAGE, NOT_FOUND, REFUSED, BUSY, DEADLINE, INTERRUPTED = 1, 2, 3, 4, 5, 124, 130
TERMINATED = 143


class Terminated(KeyboardInterrupt):
    """SIGTERM: what is under way is undone as at Ctrl-C; only the exit code differs."""


_CODES: tuple[tuple[type[LlmosError] | tuple[type[LlmosError], ...], int], ...] = (
    ((SystemFileError, SettingsError), USAGE),
    (
        (
            UnknownAdapter,
            UnknownAgent,
            UnknownModel,
            UnknownNode,
            UnknownProcess,
            UnknownResource,
        ),
        NOT_FOUND,
    ),
    ((AdaptersFull, CapabilityDenied, LabelViolation, DoesNotFit, NoOtherHost), REFUSED),
    ((Busy, EngineBusy), BUSY),
    (DeadlineExceeded, DEADLINE),
)


def code_of(error: LlmosError) -> int:
    """The exit code of an error."""
    # By name, since these classes stand in modules that import Ray.
    if error.code == "ClusterError" and "No kernel" in str(error):
        return NOT_FOUND
    named = {"InvalidLaunch": USAGE, "UnknownRecord": NOT_FOUND, "OperationRefused": REFUSED}
    if error.code in named:
        return named[error.code]
    return next((code for kinds, code in _CODES if isinstance(error, kinds)), FAILED)


def fail(message: str, code: int = FAILED) -> NoReturn:
    """Say it on standard error and exit."""
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"error: {message}")
    raise typer.Exit(code)


@contextmanager
def errors(*, as_json: bool = False) -> Iterator[None]:
    """Turn errors inside into a message and an exit code."""
    try:
        yield
    except LlmosError as error:
        if as_json:
            out = {"error": error.code, "message": str(error), "facts": error.facts}
            sys.stdout.write(json.dumps(out, default=str, ensure_ascii=False) + "\n")
        fail(f"{error} [{error.code}]", code_of(error))
    except KeyboardInterrupt as interrupt:
        fail(*of_interrupt(interrupt))


def of_interrupt(interrupt: KeyboardInterrupt) -> tuple[str, int]:
    """The words and the exit code of an interrupt."""
    if isinstance(interrupt, Terminated):
        return "told to end", TERMINATED
    return "interrupted", INTERRUPTED


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """A signal handler: raise in the main thread, so that what is under way is undone."""
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


@contextmanager
def signals(handler: Callable[[int, FrameType | None], Any] = interrupt) -> Iterator[None]:
    """Have SIGINT and SIGTERM handled inside, in the main thread; then as before."""
    # SIGINT too: a shell starts what it runs in the background with SIGINT ignored.
    before = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            # None: a handler that was not set from Python, and cannot be set back from here.
            signal.signal(number, signal.SIG_DFL if old is None else old)
