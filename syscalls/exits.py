"""``monitor``: be told when another agent ends, or end with it."""

from __future__ import annotations

from typing import ClassVar, Literal

from llmos.syscalls.base import Caller, Request, Response, Services, handles
from llmos.syscalls.deferred import Watch
from llmos.syscalls.errors import InvalidRequest, UnknownAgent
from llmos.syscalls.messages import Message


class Exited(Message):
    """Sent to those that monitor an agent: it was killed or quarantined."""

    agent: str
    reason: str
    """``killed``, ``quarantined``."""
    story: str = ""
    """What led to it, for people."""


class Watched(Response):
    """The watch begins or ends when the turn has committed."""


class Monitor(Request[Watched]):
    """Get :class:`Exited` when an agent of the same tenant is killed or quarantined."""

    syscall: ClassVar[str] = "monitor"
    reach: ClassVar[Literal["deferred"]] = "deferred"

    agent: str
    """``tenant/program/key``."""

    @property
    def resource(self) -> str:
        """The agent."""
        return self.agent


class Demonitor(Request[Watched]):
    """Watch an agent no more, linked or not; nothing happens without a watch."""

    syscall: ClassVar[str] = "monitor"
    reach: ClassVar[Literal["deferred"]] = "deferred"

    agent: str
    """``tenant/program/key``."""

    @property
    def resource(self) -> str:
        """The agent."""
        return self.agent


class Link(Request[Watched]):
    """Be ended with an agent of the same tenant, when that is killed or quarantined."""

    syscall: ClassVar[str] = "monitor"
    reach: ClassVar[Literal["deferred"]] = "deferred"

    agent: str
    """``tenant/program/key``."""

    @property
    def resource(self) -> str:
        """The agent."""
        return self.agent


def _watch(action: Watch, caller: Caller, services: Services) -> Watched:
    parts = action.agent.split("/")
    if len(parts) != 3 or not all(parts) or parts[0] != caller.tenant:
        # As with corpora: what belongs to another tenant is not there.
        raise UnknownAgent(action.agent)
    if action.agent == caller.agent:
        raise InvalidRequest("monitor", "agent", "an agent cannot watch itself")
    services.defer(action)
    return Watched()


@handles(Monitor)
async def monitor(request: Monitor, caller: Caller, services: Services) -> Watched:
    """Leave it to the commit.

    Raises:
        UnknownAgent: not ``tenant/program/key`` of the caller's tenant.
        InvalidRequest: it is the caller itself.
    """
    return _watch(Watch(request.agent, on=True), caller, services)


@handles(Demonitor)
async def demonitor(request: Demonitor, caller: Caller, services: Services) -> Watched:
    """Leave it to the commit; raises as :func:`monitor`."""
    return _watch(Watch(request.agent, on=False), caller, services)


@handles(Link)
async def link(request: Link, caller: Caller, services: Services) -> Watched:
    """Leave it to the commit; raises as :func:`monitor`."""
    return _watch(Watch(request.agent, on=True, linked=True), caller, services)
