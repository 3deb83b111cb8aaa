"""Exit codes of ``llmos``, and how an error becomes one.

====  =====================================================
0     done
1     failed; the error's own words are on standard error
2     wrong usage, or a system file that cannot be used
3     no such kernel, agent, turn or model
4     refused: a capability, a label, or no memory for it
5     busy: try again later
124   a deadline passed
130   interrupted
====  =====================================================
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console

from llmos.drivers.errors import EngineBusy, LlmosError, UnknownModel
from llmos.kernel.core.errors import DoesNotFit
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

_CODES: tuple[tuple[type[LlmosError] | tuple[type[LlmosError], ...], int], ...] = (
    (SystemFileError, USAGE),
    ((UnknownAgent, UnknownModel, UnknownResource), NOT_FOUND),
    ((CapabilityDenied, LabelViolation, DoesNotFit), REFUSED),
    ((Busy, EngineBusy), BUSY),
    (DeadlineExceeded, DEADLINE),
)


def code_of(error: LlmosError) -> int:
    """The exit code of an error."""
    # By name, since the class stands in a module that imports Ray.
    if error.code == "ClusterError" and "No kernel" in str(error):
        return NOT_FOUND
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
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)
