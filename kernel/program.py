"""What the kernel knows of an agent program, and how it loads one.

The kernel stands below :mod:`llmos.agents`, so it names what it needs of a program
instead of importing the base class.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from pydantic import BaseModel, ValidationError

from llmos.drivers.errors import LlmosError
from llmos.kernel.manifest import Manifest
from llmos.syscalls.errors import Busy
from llmos.syscalls.messages import Message


class HandlerSpec(NamedTuple):
    """A handler of a program."""

    method: str
    message: type[Message]
    read_only: bool


class Program(Protocol):
    """An agent program: a class, called with (state, config) to make an agent."""

    manifest: ClassVar[Manifest]
    State: ClassVar[type[BaseModel]]
    Config: ClassVar[type[BaseModel]]
    handlers: ClassVar[dict[str, HandlerSpec]]
    __name__: str

    def __call__(self, state: BaseModel, config: BaseModel) -> Any:
        """Make an agent."""
        ...


class ProgramError(LlmosError):
    """A program cannot be loaded or does not accept its configuration."""

    def __init__(self, program: str, reason: str, *, remedy: str = "") -> None:
        self.program, self.reason = program, reason
        super().__init__(f"Program {program!r}: {reason}", remedy=remedy)


_NEEDED = ("manifest", "State", "Config", "handlers")


def load_program(program: str, search: Path | None = None) -> Program:
    """Import ``module:Class``.

    Args:
        program: Where it is.
        search: A folder that is put on the import path first, for programs that stand
            beside their ``system.toml``.

    Raises:
        ProgramError: no such module or class, the module raised, or it is no program.
    """
    module_name, _, class_name = program.partition(":")
    if not module_name or not class_name:
        raise ProgramError(program, "a program is written module:Class")
    if search is not None and str(search) not in sys.path:
        sys.path.insert(0, str(search))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ProgramError(
            program,
            f"no module {error.name!r}",
            remedy="Install it, or put it beside system.toml",
        ) from None
    except (Exception, SystemExit) as error:
        # SystemExit too: a script that ends itself on import would end the whole host.
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise ProgramError(
            program, f"its module raised {error!r} at {last.filename}:{last.lineno}"
        ) from error
    found = getattr(module, class_name, None)
    if found is None:
        raise ProgramError(program, f"module {module_name} has no {class_name}")
    if not isinstance(found, type) or not all(hasattr(found, name) for name in _NEEDED):
        raise ProgramError(program, f"{class_name} does not derive from llmos.Agent")
    if not found.handlers:  # type: ignore[attr-defined]
        raise ProgramError(program, f"{class_name} has no handler; mark one with @on(Message)")
    return found  # type: ignore[return-value]


def make_config(program: str, loaded: Program, config: Mapping[str, Any]) -> BaseModel:
    """Check a configuration against the program's Config.

    Raises:
        ProgramError: naming the field.
    """
    fields = ", ".join(loaded.Config.model_fields) or "none"
    unknown = sorted(set(config) - set(loaded.Config.model_fields))
    if unknown and loaded.Config.model_config.get("extra") != "allow":
        # pydantic ignores them by default, and a misspelt setting would do nothing.
        raise ProgramError(
            program, f"config.{unknown[0]}: unknown field", remedy=f"Its fields: {fields}"
        )
    try:
        return loaded.Config.model_validate(dict(config))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "config"
        raise ProgramError(
            program, f"config.{where}: {first['msg']}", remedy=f"Its fields: {fields}"
        ) from None


MAX_IMPORTS = 8
"""Modules that may be on their way in at the same time."""


class ProgramLoader:
    """Loads programs without holding up the event loop.

    An import runs the user's code and may never come back. Each has a thread of its own:
    in a shared pool a few such modules would stop everything else that needs the pool.
    """

    def __init__(self, search: Path | None) -> None:
        self._search = search
        self._loading: dict[str, asyncio.Future[Program]] = {}
        self._loaded: dict[str, Program] = {}

    async def load(self, program: str) -> Program:
        """Import ``module:Class``; the caller sets the deadline.

        Raises:
            ProgramError: see :func:`load_program`.
            Busy: too many imports have not come back.
        """
        loaded = self._loaded.get(program)
        if loaded is not None:
            return loaded
        future = self._loading.get(program)
        if future is None:
            if len(self._loading) >= MAX_IMPORTS:
                raise Busy("Importing programs", len(self._loading), 5.0)
            loop = asyncio.get_running_loop()
            future = self._loading[program] = loop.create_future()
            # Whether or not anybody still waits for it, its error has been seen.
            future.add_done_callback(lambda done: done.cancelled() or done.exception())
            thread = threading.Thread(
                target=self._run,
                args=(program, loop, future),
                name=f"import {program}",
                daemon=True,
            )
            thread.start()
        return await asyncio.shield(future)

    def _run(
        self, program: str, loop: asyncio.AbstractEventLoop, future: asyncio.Future[Program]
    ) -> None:
        result: Program | LlmosError
        try:
            result = load_program(program, self._search)
        except LlmosError as error:
            result = error
        with contextlib.suppress(RuntimeError):  # The loop is closed: nobody waits.
            loop.call_soon_threadsafe(self._done, program, future, result)

    def _done(
        self, program: str, future: asyncio.Future[Program], result: Program | LlmosError
    ) -> None:
        del self._loading[program]
        if isinstance(result, LlmosError):
            if not future.cancelled():
                future.set_exception(result)
            return
        self._loaded[program] = result
        if not future.cancelled():
            future.set_result(result)
