"""``ask`` and ``send``: messages between agents, and their form on the wire."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import msgpack
from pydantic import BaseModel, ConfigDict, ValidationError

from llmos.drivers.errors import LlmosError
from llmos.syscalls.base import Caller, Request, Response, Services, handles
from llmos.syscalls.errors import InvalidMessage, InvalidRequest, MessageTooLarge
from llmos.syscalls.labels import Labels, Provenance

MAX_MESSAGE_BYTES = 1 << 20
"""Largest body on the wire."""

_KINDS: dict[str, list[type[Message]]] = {}


class Message(BaseModel):
    """What agents send each other. Derive from it; the class name is the kind on the wire."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Remember the class, so that a reply from another process becomes one again."""
        super().__pydantic_init_subclass__(**kwargs)
        same = [c for c in _KINDS.get(cls.kind(), ()) if c.__module__ != cls.__module__]
        _KINDS[cls.kind()] = [*same, cls]

    @classmethod
    def kind(cls) -> str:
        """Its name on the wire."""
        return cls.__name__


MessageT = TypeVar("MessageT", bound=Message)


class RawMessage(Message):
    """A message whose class is not imported in this process."""

    of_kind: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Wire:
    """A message as it travels: its kind, the module of its class and a msgpack body."""

    kind: str
    module: str
    body: bytes

    @classmethod
    def of(cls, message: Message) -> Wire:
        """Encode a message.

        Raises:
            MessageTooLarge: the body is over :data:`MAX_MESSAGE_BYTES`.
        """
        if isinstance(message, RawMessage):
            return cls.of_json(message.of_kind, message.body)
        body = _pack(message.model_dump(mode="json"))
        return cls(message.kind(), type(message).__module__, body)

    @classmethod
    def of_json(cls, kind: str, body: dict[str, Any]) -> Wire:
        """Encode a message whose class is not at hand."""
        return cls(kind, "", _pack(body))

    def json(self) -> dict[str, Any]:
        """The body as plain data."""
        decoded = msgpack.unpackb(self.body)
        if not isinstance(decoded, dict):
            raise InvalidMessage("?", self.kind, "the body is not a map")
        return decoded

    def decode(self, as_type: type[MessageT], receiver: str) -> MessageT:
        """Make it a message of that class.

        Raises:
            InvalidMessage: the body does not fit.
        """
        try:
            return as_type.model_validate_json(json.dumps(self.json()))
        except ValidationError as error:
            reason = "; ".join(
                f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in error.errors()
            )
            raise InvalidMessage(receiver, self.kind, reason) from None
        except TypeError as error:
            # msgpack carries bytes, JSON does not.
            raise InvalidMessage(receiver, self.kind, str(error)) from None

    def message(self) -> Message:
        """Make it a message of the class of that kind, or a RawMessage if there is none."""
        classes = _KINDS.get(self.kind, [])
        fitting = [c for c in classes if c.__module__ == self.module] or classes
        if len(fitting) == 1:
            return self.decode(fitting[0], "?")
        return RawMessage(of_kind=self.kind, body=self.json())


def _pack(body: dict[str, Any]) -> bytes:
    try:
        packed = msgpack.packb(body)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest("message", "body", str(error)) from None
    assert isinstance(packed, bytes)
    if len(packed) > MAX_MESSAGE_BYTES:
        raise MessageTooLarge(len(packed), MAX_MESSAGE_BYTES)
    return packed


@dataclass(frozen=True, slots=True)
class Envelope:
    """A message on its way."""

    receiver: str
    sender: str
    """An agent, or ``client:<name>``."""
    wire: Wire
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """The same for every attempt to deliver it."""
    deadline_s: float = 60.0
    """Seconds left when it was handed over."""
    chain: tuple[str, ...] = ()
    """Agents waiting for the reply, outermost first."""
    labels: Labels = Labels()
    cause: str = ""
    """``turn/seq`` of the syscall that sent it; empty from outside."""

    def with_deadline(self, seconds: float) -> Envelope:
        """The same envelope with less time."""
        return replace(self, deadline_s=seconds)


@dataclass(frozen=True, slots=True)
class Reply:
    """The end of a turn, as the asker sees it."""

    turn: str
    agent: str
    wire: Wire | None = None
    """None: the handler returned nothing."""
    error: LlmosError | None = None
    labels: Labels = Labels()
    provenance: tuple[Provenance, ...] = ()
    elapsed_s: float = 0.0

    def message(self) -> Message | None:
        """The answer; raises the error instead if there is one."""
        if self.error is not None:
            raise self.error
        return self.wire.message() if self.wire is not None else None


class Asked(Response):
    """The reply of another agent."""

    reply: Wire | None
    turn: str
    """The turn in which it was made; ``llmos strace`` shows it."""


class Sent(Response):
    """The message will leave when the turn commits."""

    message_id: str


class Ask(Request[Asked]):
    """Send a message and wait for the reply."""

    syscall: ClassVar[str] = "ask"
    effect: ClassVar[bool] = True

    agent: str
    message: Wire
    deadline_s: float = 60.0

    @property
    def resource(self) -> str:
        """The receiver."""
        return self.agent


class Send(Request[Sent]):
    """Send a message and go on."""

    syscall: ClassVar[str] = "send"
    effect: ClassVar[bool] = True

    agent: str
    message: Wire

    @property
    def resource(self) -> str:
        """The receiver."""
        return self.agent


def _envelope(request: Ask | Send, caller: Caller, deadline_s: float) -> Envelope:
    return Envelope(
        receiver=request.agent,
        sender=caller.agent,
        wire=request.message,
        deadline_s=deadline_s,
        chain=(*caller.chain, caller.agent),
        labels=caller.labels,
        cause=caller.turn,
    )


@handles(Ask)
async def ask(request: Ask, caller: Caller, services: Services) -> Asked:
    """Deliver and wait."""
    reply = await services.ask(_envelope(request, caller, request.deadline_s))
    if reply.error is not None:
        raise reply.error
    return Asked(
        reply=reply.wire,
        turn=reply.turn,
        provenance=(
            Provenance(kind="agent", source=reply.agent, version=reply.turn),
            *reply.provenance,
        ),
        labels=reply.labels,
    )


@handles(Send)
async def send(request: Send, caller: Caller, services: Services) -> Sent:
    """Put it into the turn's outbox."""
    envelope = _envelope(request, caller, 60.0)
    services.post(replace(envelope, chain=()))
    return Sent(message_id=envelope.id)
