"""The base of all agent programs.

A program is a class with a state, a configuration, a manifest and handlers::

    class Librarian(Agent):
        manifest = Manifest(
            models=("chat",),
            stores=("corpus:handbook",),
            capabilities=("generate:chat", "retrieve:handbook"),
        )

        @on(Question, read_only=True)
        async def answer(self, question: Question, os: Context) -> Answer:
            found = await os.retrieve("handbook", question.text, k=3)
            ...

One message is one turn. Turns of one agent run one after the other, in the order the
messages came; read-only turns, which may not change the state, run beside them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict

from llmos.kernel.manifest import Manifest
from llmos.kernel.program import HandlerSpec, Migration
from llmos.syscalls.exits import Exited
from llmos.syscalls.messages import Message

MigrationT = TypeVar("MigrationT", bound=Callable[..., dict[str, Any]])
Method = TypeVar("Method", bound=Callable[..., Awaitable[Message | None]])


class Empty(BaseModel):
    """No state, or no configuration."""

    model_config = ConfigDict(extra="forbid")


class Agent:
    """Derive from it, set ``manifest``, and mark handlers with :func:`on`."""

    manifest: ClassVar[Manifest] = Manifest()
    State: ClassVar[type[BaseModel]] = Empty
    """What the agent remembers between turns; every field needs a default."""
    state_version: ClassVar[int] = 1
    """Schema version of ``State``. Raise it when stored states would not fit any more, and
    write a :func:`migration` from the version before."""
    migrations: ClassVar[dict[int, Migration]] = {}
    """Version → what brings a state from it to the next; filled from the methods marked with
    :func:`migration`."""
    Config: ClassVar[type[BaseModel]] = Empty
    """What a launch may set; a manifest's ``$name`` refers to its fields."""
    handlers: ClassVar[dict[str, HandlerSpec]] = {}
    """Message kind → handler; filled from the methods marked with :func:`on`."""

    state: Any
    """The current state, an instance of ``State``."""
    config: Any
    """The configuration, an instance of ``Config``."""

    def __init__(self, state: BaseModel, config: BaseModel) -> None:
        self.state = state
        self.config = config

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.handlers = dict(cls.handlers)
        own: dict[str, str] = {}
        for name, value in vars(cls).items():
            for message, read_only in getattr(value, "_llmos_on", ()):
                kind = message.kind()
                if kind in own:
                    raise TypeError(
                        f"{cls.__qualname__}: both {own[kind]} and {name} handle {kind}"
                    )
                own[kind] = name
                cls.handlers[kind] = HandlerSpec(name, message, read_only)
        _collect_migrations(cls)


def _collect_migrations(cls: type[Agent]) -> None:
    """Find the class's own migrations, beside inherited ones, and check that none is missing."""
    cls.migrations = dict(cls.migrations)
    own: dict[int, str] = {}
    for name, value in vars(cls).items():
        marks = getattr(value, "_llmos_migration", ())
        if isinstance(value, staticmethod | classmethod):
            marks = {*marks, *getattr(value.__func__, "_llmos_migration", ())}
        elif marks:
            raise TypeError(
                f"{cls.__qualname__}: migration {name} must be a static or class method"
            )
        for version in marks:
            if version in own:
                raise TypeError(
                    f"{cls.__qualname__}: both {own[version]} and {name} migrate from {version}"
                )
            own[version] = name
            cls.migrations[version] = getattr(cls, name)
    if cls.state_version < 1:
        raise TypeError(f"{cls.__qualname__}: state_version is {cls.state_version}, at least 1")
    beyond = [v for v in cls.migrations if v >= cls.state_version]
    if beyond:
        raise TypeError(
            f"{cls.__qualname__}: a migration from version {max(beyond)}, but state_version is "
            f"{cls.state_version}"
        )
    # Migrations from versions that nobody has any more may be dropped, but only the oldest.
    needed = range(min(cls.migrations, default=cls.state_version - 1), cls.state_version)
    missing = [v for v in needed if v >= 1 and v not in cls.migrations]
    if missing:
        raise TypeError(
            f"{cls.__qualname__}: state_version is {cls.state_version}, but there is no migration "
            f"from version {missing[0]}"
        )


def on(message: type[Message], *, read_only: bool = False) -> Callable[[Method], Method]:
    """Mark a method ``async def (self, message, context) -> Message | None`` as handler.

    Args:
        message: The class of messages it handles.
        read_only: It leaves the state as it is, and so may run beside other turns of the
            same agent. A change of state makes the turn fail with ReadOnlyTurn.
    """

    def mark(method: Method) -> Method:
        marks = getattr(method, "_llmos_on", ())
        method._llmos_on = (*marks, (message, read_only))  # type: ignore[attr-defined]
        return method

    return mark


def on_exit(method: Method) -> Method:
    """Mark a method as handler of :class:`~llmos.syscalls.exits.Exited`: an agent that this one
    monitors or is linked to was killed or quarantined."""
    return on(Exited)(method)


def migration(from_version: int) -> Callable[[MigrationT], MigrationT]:
    """Mark a static or class method ``dict -> dict`` that brings states to the next version.

    It is given a state of ``from_version`` as plain JSON data, and returns one of
    ``from_version + 1``. It runs when an agent with such a state gets its next message; the
    new form is stored with the next change. What it raises keeps the agent from running, and
    leaves the stored state as it is::

        state_version = 2

        @migration(1)
        @staticmethod
        def split_name(state: dict[str, Any]) -> dict[str, Any]:
            first, _, last = state.pop("name").partition(" ")
            return {**state, "first": first, "last": last}

    Args:
        from_version: The version it begins with, from 1.
    """
    if from_version < 1:
        raise TypeError(f"a migration from version {from_version}; versions begin with 1")

    def mark(method: MigrationT) -> MigrationT:
        marks = getattr(method, "_llmos_migration", ())
        method._llmos_migration = (*marks, from_version)  # type: ignore[attr-defined]
        return method

    return mark
