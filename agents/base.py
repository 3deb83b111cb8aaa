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
from llmos.kernel.program import HandlerSpec
from llmos.syscalls.messages import Message

Method = TypeVar("Method", bound=Callable[..., Awaitable[Message | None]])


class Empty(BaseModel):
    """No state, or no configuration."""

    model_config = ConfigDict(extra="forbid")


class Agent:
    """Derive from it, set ``manifest``, and mark handlers with :func:`on`."""

    manifest: ClassVar[Manifest] = Manifest()
    State: ClassVar[type[BaseModel]] = Empty
    """What the agent remembers between turns; every field needs a default."""
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
