"""``publish`` and ``subscribe``: messages to whoever of a tenant wants them."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from llmos.syscalls.base import Caller, Request, Response, Services, handles
from llmos.syscalls.deferred import Post, Subscription
from llmos.syscalls.errors import InvalidRequest
from llmos.syscalls.messages import Wire

MAX_SUBSCRIBERS = 10_000
"""Receivers of one publication: all of them are messages of one commit."""

Topic = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
"""1 to 63 of a-z, 0-9, ``.``, ``_`` and ``-``; each tenant has topics of its own."""


class Subscribed(Response):
    """The subscription begins or ends when the turn has committed."""


class Published(Response):
    """The messages will leave when the turn commits."""

    receivers: int
    """Agents that will get it."""


class Subscribe(Request[Subscribed]):
    """Get what is published under a topic, until :class:`Unsubscribe`."""

    syscall: ClassVar[str] = "subscribe"
    reach: ClassVar[Literal["deferred"]] = "deferred"

    topic: Topic

    @property
    def resource(self) -> str:
        """The topic."""
        return self.topic


class Unsubscribe(Request[Subscribed]):
    """Get no more of a topic; nothing happens without a subscription."""

    syscall: ClassVar[str] = "subscribe"
    reach: ClassVar[Literal["deferred"]] = "deferred"

    topic: Topic

    @property
    def resource(self) -> str:
        """The topic."""
        return self.topic


class Publish(Request[Published]):
    """Send a message to all who want a topic, but not to oneself."""

    syscall: ClassVar[str] = "publish"
    reach: ClassVar[Literal["deferred"]] = "deferred"

    topic: Topic
    message: Wire
    priority: int = Field(default=0, ge=-100, le=100)
    """As with ``send``."""

    @property
    def resource(self) -> str:
        """The topic."""
        return self.topic


@handles(Subscribe)
async def subscribe(request: Subscribe, caller: Caller, services: Services) -> Subscribed:
    """Leave it to the commit."""
    services.defer(Subscription(f"{caller.tenant}/{request.topic}", on=True))
    return Subscribed()


@handles(Unsubscribe)
async def unsubscribe(request: Unsubscribe, caller: Caller, services: Services) -> Subscribed:
    """Leave it to the commit."""
    services.defer(Subscription(f"{caller.tenant}/{request.topic}", on=False))
    return Subscribed()


@handles(Publish)
async def publish(request: Publish, caller: Caller, services: Services) -> Published:
    """Put a message for each subscriber into the turn's outbox.

    Raises:
        InvalidRequest: the topic has more than :data:`MAX_SUBSCRIBERS` subscribers; nothing
            is sent.
    """
    found = await services.subscribers(f"{caller.tenant}/{request.topic}")
    receivers = [agent for agent in found if agent != caller.agent]
    if len(receivers) > MAX_SUBSCRIBERS:
        raise InvalidRequest(
            "publish",
            "topic",
            f"{request.topic} has {len(receivers)} subscribers, at most {MAX_SUBSCRIBERS} can be "
            "reached; split it into several topics",
        )
    cause = f"{caller.turn}/{caller.seq}"
    for agent in receivers:
        services.defer(Post(agent, request.message, cause, request.priority, caller.labels))
    return Published(receivers=len(receivers))
