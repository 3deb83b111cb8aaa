"""``ask`` and ``send``: messages between agents, and their form on the wire."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import msgpack
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import core_schema, to_json

from llmos.drivers.errors import LlmosError
from llmos.syscalls.base import Caller, Request, Response, Services, handles
from llmos.syscalls.deferred import Post
from llmos.syscalls.errors import InvalidMessage, InvalidRequest, MessageTooLarge
from llmos.syscalls.labels import NO_LABELS, Labels, Provenance, Sensitivity

MAX_MESSAGE_BYTES = 1 << 20
"""Largest body on the wire."""

_BYTES = (b"\xc4", b"\xc5", b"\xc6")
"""What bytes begin with in msgpack. Text may have them, too."""

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
    def of_json(cls, kind: str, body: dict[str, Any], module: str = "") -> Wire:
        """Encode a message whose class is not at hand."""
        return cls(kind, module, _pack(body))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """In JSON the body is plain data, which people can read."""

        def read(value: Any) -> Wire:
            return cls(value["kind"], value["module"], _pack(value["body"]))

        def write(wire: Wire) -> dict[str, Any]:
            return {"kind": wire.kind, "module": wire.module, "body": wire.json()}

        return core_schema.json_or_python_schema(
            json_schema=core_schema.no_info_plain_validator_function(read),
            python_schema=core_schema.is_instance_schema(cls),
            serialization=core_schema.plain_serializer_function_ser_schema(write, when_used="json"),
        )

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
            return as_type.model_validate_json(self._text())
        except ValidationError as error:
            reason = "; ".join(
                f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in error.errors()
            )
            raise InvalidMessage(receiver, self.kind, reason) from None
        except TypeError as error:
            # msgpack carries bytes, JSON does not.
            raise InvalidMessage(receiver, self.kind, str(error)) from None

    def _text(self) -> bytes | str:
        """The body as JSON."""
        content = self.json()
        if not any(mark in self.body for mark in _BYTES):
            try:
                return to_json(content, inf_nan_mode="constants")
            except ValueError:
                pass  # Nested too deeply for it, not for the other.
        return json.dumps(content)

    def message(self) -> Message:
        """Make it a message of the class of that kind, or a RawMessage if there is none."""
        classes = _KINDS.get(self.kind, [])
        fitting = [c for c in classes if c.__module__ == self.module] or classes
        if len(fitting) == 1:
            return self.decode(fitting[0], "?")
        return RawMessage(of_kind=self.kind, body=self.json())


@lru_cache(maxsize=256)
def _labels(tenants: tuple[str, ...], sensitivity: int, trusted: bool) -> Labels:
    """Made once: nearly all messages carry one of few."""
    labels = Labels(
        tenants=frozenset(tenants), sensitivity=Sensitivity(sensitivity), trusted=trusted
    )
    return NO_LABELS if labels == NO_LABELS else labels


def _pack(body: dict[str, Any]) -> bytes:
    try:
        packed = msgpack.packb(body)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest("message", "body", str(error)) from None
    assert isinstance(packed, bytes)
    if len(packed) > MAX_MESSAGE_BYTES:
        raise MessageTooLarge(len(packed), MAX_MESSAGE_BYTES)
    return packed


class Envelope(NamedTuple):
    """A message on its way. (receiver, stream, seq) names it for ever."""

    receiver: str
    sender: str
    """An agent, ``client:<name>``, ``timer`` or ``exit``."""
    wire: Wire
    stream: str
    """Who numbers it. Messages of one stream to one receiver are handled in their order."""
    seq: int
    asked: bool = False
    """Whether somebody waits for the reply: an error then goes to them, instead of the
    message being tried again."""
    deadline_s: float = 60.0
    """Seconds left when it was handed over. Counts only where somebody waits."""
    priority: int = 0
    chain: tuple[str, ...] = ()
    """Agents waiting for the reply, outermost first."""
    labels: Labels = NO_LABELS
    cause: str = ""
    """``turn/seq`` of the syscall that sent it; empty from outside."""
    again: bool = False
    """Whether it may have been delivered before."""
    sent_at: float = 0.0
    """When it was sent, or came from outside, seconds since 1970; 0: not known. For people."""

    @property
    def key(self) -> tuple[str, str, int]:
        """What it is deduplicated by."""
        return self.receiver, self.stream, self.seq

    @property
    def id(self) -> str:
        """``stream#seq``: the receiver's turn keeps it as its ``idem_key``."""
        return f"{self.stream}#{self.seq}"

    def pack(self) -> bytes:
        """As msgpack, for the store. How long somebody waits is not kept."""
        labels = self.labels
        packed = msgpack.packb(
            (
                2,
                self.sender,
                (self.wire.kind, self.wire.module, self.wire.body),
                self.asked,
                self.priority,
                self.chain,
                (sorted(labels.tenants), int(labels.sensitivity), labels.trusted),
                self.cause,
                self.sent_at,
            )
        )
        assert isinstance(packed, bytes)
        return packed

    @classmethod
    def unpack(cls, receiver: str, stream: str, seq: int, packed: bytes) -> Envelope:
        """Out of the store.

        Raises:
            InvalidMessage: a newer LLM OS wrote it, or it is no envelope.
        """
        try:
            version, *fields = msgpack.unpackb(packed)
        except (ValueError, TypeError) as error:
            raise InvalidMessage(receiver, "?", f"its envelope is broken: {error!r}") from None
        if version not in (1, 2):
            raise InvalidMessage(receiver, "?", f"its envelope has version {version}")
        # Version 1 did not know when it was sent.
        sender, wire, asked, priority, chain, labels, cause, *sent_at = fields
        return cls(
            receiver,
            sender,
            Wire(*wire),
            stream,
            seq,
            asked,
            priority=priority,
            chain=tuple(chain),
            labels=_labels(tuple(labels[0]), labels[1], labels[2]),
            cause=cause,
            again=True,
            sent_at=sent_at[0] if sent_at else 0.0,
        )


@dataclass(frozen=True, slots=True)
class Reply:
    """The end of a turn, as the asker sees it."""

    turn: str
    agent: str
    wire: Wire | None = None
    """None: the handler returned nothing."""
    error: LlmosError | None = None
    labels: Labels = NO_LABELS
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
    """``turn/seq`` of this syscall: the receiver's turn has it as its cause."""


class Ask(Request[Asked]):
    """Send a message and wait for the reply."""

    syscall: ClassVar[str] = "ask"
    reach: ClassVar[Literal["visible"]] = "visible"

    agent: str
    message: Wire
    deadline_s: float = Field(default=60.0, exclude=True)
    """Not part of the record: when the turn runs again, less is left of it."""

    @property
    def resource(self) -> str:
        """The receiver."""
        return self.agent


class Send(Request[Sent]):
    """Send a message and go on."""

    syscall: ClassVar[str] = "send"
    reach: ClassVar[Literal["deferred"]] = "deferred"
    immediate: ClassVar[bool] = True

    agent: str
    message: Wire
    priority: int = Field(default=0, ge=-100, le=100)
    """Higher is handled first, but never before what this agent sent it earlier."""

    @property
    def resource(self) -> str:
        """The receiver."""
        return self.agent


@handles(Ask)
async def ask(request: Ask, caller: Caller, services: Services) -> Asked:
    """Deliver and wait."""
    envelope = Envelope(
        receiver=request.agent,
        sender=caller.agent,
        wire=request.message,
        # A stream for each turn: when the turn runs again, the same question is known again.
        stream=f"{caller.agent}#{caller.turn}",
        seq=caller.seq,
        asked=True,
        deadline_s=request.deadline_s,
        chain=(*caller.chain, caller.agent),
        labels=caller.labels,
        cause=f"{caller.turn}/{caller.seq}",
        again=caller.again,
    )
    reply = await services.ask(envelope)
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
    cause = f"{caller.turn}/{caller.seq}"
    services.defer(Post(request.agent, request.message, cause, request.priority, caller.labels))
    return Sent(message_id=cause)
