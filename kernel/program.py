"""What the kernel knows of an agent program, and how it loads one.

The kernel stands below :mod:`llmos.agents`, so it names what it needs of a program
instead of importing the base class.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import importlib
import inspect
import json
import math
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticSerializationError

from llmos.drivers.errors import LlmosError
from llmos.kernel.manifest import Manifest
from llmos.syscalls.errors import Busy
from llmos.syscalls.messages import Message


class HandlerSpec(NamedTuple):
    """A handler of a program."""

    method: str
    message: type[Message]
    read_only: bool


Migration: TypeAlias = Callable[[dict[str, Any]], dict[str, Any]]
"""Brings a state, as plain JSON data, from one version to the next."""


class Program(Protocol):
    """An agent program: a class, called with (state, config) to make an agent."""

    manifest: ClassVar[Manifest]
    State: ClassVar[type[BaseModel]]
    state_version: ClassVar[int]
    """Schema version of ``State``, from 1."""
    migrations: ClassVar[dict[int, Migration]]
    """Version → what brings a state from it to the next."""
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


class StateError(LlmosError):
    """A stored state cannot be made one of the program; it stays in the store as it is."""

    def __init__(self, program: str, version: int, reason: str) -> None:
        self.program, self.version, self.reason = program, version, reason
        super().__init__(
            f"A state of version {version} does not fit program {program!r}: {reason}",
            remedy="Nothing is lost: correct the program or its migrations, and try again",
        )


class UnstorableState(LlmosError):
    """A handler left a state that would not come back from the store as it is."""

    def __init__(self, state: str, reason: str) -> None:
        self.state, self.reason = state, reason
        super().__init__(
            f"A state {state} cannot be stored: {reason}",
            remedy="Keep what has a form in JSON and fits the field's type",
        )


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


def load_state(name: str, program: Program, data: bytes | None, version: int) -> BaseModel:
    """Make a state of what was stored, through the program's migrations.

    Args:
        name: ``module:Class``, for errors.
        program: The program.
        data: What :func:`pack_state` made; None for an agent that has none yet.
        version: The ``state_version`` that it was stored with; without data it says nothing.

    Raises:
        StateError: a newer program wrote it, a migration is missing or fails, it does not fit
            ``State``, or ``State`` has no default for a field. Nothing is changed.
    """
    if data is None:
        try:
            return program.State()
        except ValidationError as error:
            reason = f"a new one needs defaults: {_first(error)}"
            raise StateError(name, program.state_version, reason) from None
        except Exception as error:
            # Default factories and validators are the program's code, and may raise anything.
            reason = f"making a new one raised {error!r}"
            raise StateError(name, program.state_version, reason) from error
    if version > program.state_version:
        raise StateError(name, version, f"the program knows versions up to {program.state_version}")
    try:
        if version < program.state_version:
            data = _migrated(name, program, data, version)
        return program.State.model_validate_json(data)
    except ValidationError as error:
        raise StateError(name, version, _first(error)) from None


def _migrated(name: str, program: Program, data: bytes, version: int) -> bytes:
    try:
        state = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StateError(name, version, f"it is no JSON: {error}") from None
    for at in range(version, program.state_version):
        migration = program.migrations.get(at)
        if migration is None:
            raise StateError(name, version, f"no migration from version {at}")
        try:
            state = migration(state)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise StateError(
                name,
                version,
                f"the migration from version {at} raised {error!r} "
                f"at {last.filename}:{last.lineno}",
            ) from error
        if not isinstance(state, dict):
            raise StateError(
                name,
                version,
                f"the migration from version {at} returned {type(state).__name__}, not dict",
            )
    try:
        return json.dumps(state).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise StateError(name, version, f"the migrations made no JSON: {error}") from None


def pack_state(state: BaseModel) -> bytes:
    """A state as JSON, for the store.

    It is read back and compared: a state that is stored must be one that can be loaded.

    Raises:
        UnstorableState: a value has no form in JSON (NaN, lone surrogates, objects), or does
            not fit its field.
    """
    name = type(state).__qualname__
    try:
        packed = state.model_dump_json(warnings=False).encode()
        back = type(state).model_validate_json(packed)
        # Unlike, but of one form: a tuple where the field says list. Only NaN and infinity have
        # the form of something else, null.
        same = back == state or (
            _finite(state.model_dump(warnings=False))
            and back.model_dump(mode="json") == state.model_dump(mode="json", warnings=False)
        )
    except ValidationError as error:
        raise UnstorableState(name, _first(error)) from None
    except (PydanticSerializationError, TypeError, ValueError, RecursionError) as error:
        raise UnstorableState(name, str(error)) from None
    if not same:
        changed = [
            field
            for field in type(state).model_fields
            if getattr(back, field, None) != getattr(state, field, None)
        ]
        raise UnstorableState(name, f"it comes back otherwise: {', '.join(changed) or 'extra'}")
    return packed


def _finite(value: Any) -> bool:
    """Whether there is no NaN and no infinity in it."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(_finite(v) for v in value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return all(_finite(v) for v in value)
    return True


def _first(error: ValidationError) -> str:
    """The first mistake, in one line."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the state'}: {first['msg']}"


@functools.lru_cache(maxsize=1024)
def code_version(program: type[Any] | Program) -> str:
    """What names the code of a program: 16 hex digits.

    The beginning of the sha256 of its module's source file as it was when this was first
    asked in this process, so ask when the program is loaded; without such a file, of the
    class's qualified name.
    """
    module = sys.modules.get(program.__module__)
    source = f"{program.__module__}:{getattr(program, '__qualname__', program.__name__)}".encode()
    with contextlib.suppress(TypeError, OSError):
        file = inspect.getsourcefile(module) if module is not None else None
        if file is not None:
            source = Path(file).read_bytes()
    return hashlib.sha256(source).hexdigest()[:16]


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
