"""Who has used a device in the last minute, and whose requests it has now."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

from llmos.drivers.protocols import GenerationChunk, GenerationJob

WINDOW_S = 60
"""How far back is looked; kept in cells of one second."""
RATE_S = 5
"""Tokens per second are those of the last so many seconds."""
MAX_USERS = 500
"""Models times agents that one cell tells apart; the others of a tenant are one."""
OTHERS = "(others)"
MAX_LISTED = 50
"""Agents in a summary: those that have used most."""


class User(NamedTuple):
    """Whose tokens, and of which model."""

    slot: str
    tenant: str
    agent: str


@dataclass(frozen=True, slots=True)
class UnderWay:
    """A request in an engine: waiting, or being answered."""

    slot: str
    job_id: str
    tenant: str
    agent: str
    turn: str
    at_s: float
    """When it was handed in, on the monotonic clock."""


class Usage:
    """Tokens of the last minute, and the requests under way. For one thread.

    A prompt counts when its request ends: only then an engine tells how much of it was read.
    """

    def __init__(self) -> None:
        self._cells: deque[tuple[int, dict[User, list[int]]]] = deque()
        """(second, tokens read and written by user), the newest last."""
        self.requests: dict[str, UnderWay] = {}
        """By the caller's key. As many as the engines hold."""

    def begins(self, key: str, slot: str, job: GenerationJob, now_s: float) -> None:
        """A request is handed to an engine."""
        self.requests[key] = UnderWay(slot, job.id, job.tenant, job.agent, job.turn, now_s)

    def ends(self, key: str) -> UnderWay | None:
        """It is there no more, however it went. Idempotent."""
        return self.requests.pop(key, None)

    def told(self, key: str, chunk: GenerationChunk, now_s: float) -> None:
        """News of a request under way."""
        request = self.requests.get(key)
        read = max(0, chunk.prompt_tokens - chunk.cached_tokens)
        if request is None or not (read or chunk.tokens):
            return
        second = int(now_s)
        self._forget(second)
        if not self._cells or self._cells[-1][0] != second:
            self._cells.append((second, {}))
        cell = self._cells[-1][1]
        user = User(request.slot, request.tenant, request.agent)
        if user not in cell and len(cell) >= MAX_USERS:
            user = user._replace(agent=OTHERS)
        counts = cell.setdefault(user, [0, 0])
        counts[0] += read
        counts[1] += chunk.tokens

    def _forget(self, second: int) -> None:
        while self._cells and self._cells[0][0] <= second - WINDOW_S:
            self._cells.popleft()

    def summary(self, now_s: float) -> dict[str, Any]:
        """Plain data: tokens of the last minute by tenant and agent, and tokens per second by
        slot over the last ``RATE_S`` whole seconds."""
        second = int(now_s)
        self._forget(second)
        tenants: dict[str, dict[str, int]] = {}
        agents: dict[tuple[str, str], list[int]] = {}
        rates: dict[str, list[float]] = {}
        for at, cell in self._cells:
            for (slot, tenant, agent), (read, written) in cell.items():
                of = tenants.setdefault(tenant, {"read": 0, "written": 0, "under_way": 0})
                of["read"] += read
                of["written"] += written
                sums = agents.setdefault((tenant, agent), [0, 0])
                sums[0] += read
                sums[1] += written
                # Not the second that has only begun: the figure would jump with every look.
                if second - RATE_S <= at < second:
                    rate = rates.setdefault(slot, [0.0, 0.0])
                    rate[0] += read / RATE_S
                    rate[1] += written / RATE_S
        for request in self.requests.values():
            none = {"read": 0, "written": 0, "under_way": 0}
            tenants.setdefault(request.tenant, none)["under_way"] += 1
        most = sorted(agents.items(), key=lambda item: (-sum(item[1]), item[0]))[:MAX_LISTED]
        return {
            "tenants": tenants,
            "agents": [
                {"agent": agent, "tenant": tenant, "read": read, "written": written}
                for (tenant, agent), (read, written) in most
            ],
            "rates": {s: {"read_per_s": r, "written_per_s": w} for s, (r, w) in rates.items()},
        }


def joined(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """The summaries of several devices as one."""
    tenants: dict[str, dict[str, int]] = {}
    agents: dict[tuple[str, str], dict[str, Any]] = {}
    rates: dict[str, dict[str, float]] = {}
    for summary in summaries:
        for tenant, counts in summary["tenants"].items():
            of = tenants.setdefault(tenant, dict.fromkeys(counts, 0))
            for name, count in counts.items():
                of[name] += count
        for row in summary["agents"]:
            known = agents.setdefault(
                (row["tenant"], row["agent"]), {**row, "read": 0, "written": 0}
            )
            known["read"] += row["read"]
            known["written"] += row["written"]
        rates |= summary["rates"]
    most = sorted(agents.values(), key=lambda row: (-row["read"] - row["written"], row["agent"]))
    return {"tenants": tenants, "agents": most[:MAX_LISTED], "rates": rates}
