"""``state``: what an agent has committed.

An agent's own state is ``self.state``: loaded before the turn, committed at its end.
This syscall reads the committed state of another agent, for those allowed to.
"""

from __future__ import annotations

from typing import Any, ClassVar

from llmos.syscalls.base import Caller, Request, Response, Services, handles
from llmos.syscalls.labels import Labels, Provenance, Sensitivity


class StateSnapshot(Response):
    """The state as of that agent's last committed turn."""

    agent: str
    state: dict[str, Any]


class ReadState(Request[StateSnapshot]):
    """Read the committed state of an agent."""

    syscall: ClassVar[str] = "state"

    agent: str

    @property
    def resource(self) -> str:
        """The agent."""
        return self.agent


@handles(ReadState)
async def read_state(request: ReadState, caller: Caller, services: Services) -> StateSnapshot:
    """Read it from the store."""
    state = await services.state_of(request.agent)
    tenant = request.agent.split("/", 1)[0]
    return StateSnapshot(
        agent=request.agent,
        state=state,
        provenance=(Provenance(kind="agent", source=request.agent),),
        labels=Labels(tenants=frozenset({tenant}), sensitivity=Sensitivity.INTERNAL),
    )
