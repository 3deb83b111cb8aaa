"""Runs CLIPS programs of one's own, unchanged: files, modules, questions to a person.

Unlike a rule base, such a program may do everything that CLIPS can: it is trusted as
any script that one starts. It runs in a child process with a deadline, in the folder
of its first file, and its firings are read from the engine's trace.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from llmos.drivers.errors import RuleFailed, RulesError, RuleSyntaxError, RuleTimeout
from llmos.drivers.protocols import Fact, Firing
from llmos.drivers.rules.isolated import Child, ChildGone

MAX_TRACE = 100_000
"""Firings that are told one by one; further ones are counted."""

_GRACE_S = 10.0
"""Time for a child to start and to send what it has."""

SUFFIXES = {".clp": "constructs", ".bat": "commands", ".tst": "commands", ".fct": "facts"}
"""What a file holds, by its suffix; any other file holds constructs."""


Ending: TypeAlias = Literal["rest", "halt", "time", "input"]
"""``rest``: no rule is left to fire; ``halt``: at the limit of firings, or by itself;
``time``: stopped at its time; ``input``: stopped, since it asks on and on where no
answers are left."""


@dataclass(frozen=True, slots=True)
class RunRequest:
    """What is to be run."""

    files: tuple[Path, ...]
    """Constructs are loaded in this order, facts after the reset. A file of commands
    (``.bat``) does all of this itself, and stands alone."""
    max_firings: int
    echo: bool
    """Whether what the program prints goes to standard output at once."""
    timeout_s: float


@dataclass(frozen=True, slots=True)
class ProgramRun:
    """What a program did."""

    version: str
    """First 16 hex digits of the sha256 of its files, one after the other."""
    firings: int
    trace: tuple[Firing, ...]
    """In the order they fired, the first ``MAX_TRACE``."""
    facts: tuple[Fact, ...] | None
    """All facts at the end; None where the program was stopped."""
    output: str
    """What it printed, the first 20,000 characters."""
    errors: str
    """What CLIPS complained about while it ran."""
    ended: Ending
    """How it ended."""


def run_program(
    files: Sequence[Path],
    *,
    max_firings: int = 1_000_000,
    timeout_s: float = 60.0,
    stdin: Any = None,
    echo: bool = False,
) -> ProgramRun:
    """Load files, reset, run. What is stopped still tells what fired until then.

    ``stdin`` is where the program's questions are answered from: a file object or
    descriptor, by default this process's own.

    Raises:
        RuleSyntaxError: a file that is not there or is not CLIPS.
        RuleTimeout: not even stopping it worked.
        RuleFailed: the program ended the engine, for instance with ``(exit)``.
        ValueError: no file, or commands beside other files.
    """
    if not files:
        raise ValueError("no file to run")
    kinds = [kind_of(file) for file in files]
    if "commands" in kinds and len(kinds) > 1:
        raise ValueError("a file of commands loads what it needs itself, and stands alone")
    digest = hashlib.sha256()
    for file in files:
        try:
            digest.update(file.read_bytes())
        except OSError as error:
            raise RuleSyntaxError(str(file), error.strerror or str(error)) from error
    request = RunRequest(tuple(f.resolve() for f in files), max_firings, echo, timeout_s)
    name = files[0].name
    child = Child("llmos.drivers.rules.clips_run_child", stdin=stdin, stdout=1 if echo else None)
    try:
        reply = child.ask((name, digest.hexdigest()[:16], request), timeout_s + _GRACE_S)
    except ChildGone as gone:
        if gone.late:
            raise RuleTimeout(name, timeout_s) from None
        raise RuleFailed(name, "", f"the engine's process ended with {gone.code}") from None
    finally:
        child.close()
    if isinstance(reply, RulesError | ValueError):
        raise reply
    assert isinstance(reply, ProgramRun)
    return reply


def kind_of(file: Path) -> str:
    """What a file holds."""
    return SUFFIXES.get(file.suffix.lower(), "constructs")
