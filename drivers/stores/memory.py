"""A store in memory: for tests, and for a system that may forget everything at exit."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from llmos.drivers.errors import StaleEpoch, StoreUnavailable
from llmos.drivers.protocols import (
    AgentDelete,
    AgentRow,
    AgentWrite,
    StateWrite,
    StoreWrite,
    SyscallRow,
    TurnRow,
)

NO_OWNER = -1
"""``StaleEpoch.current`` for a state of an agent that is not registered (any more)."""


class MemoryStore:
    """Rows in dictionaries, with the same rules as a durable store."""

    def __init__(self, path: Path | str = "memory") -> None:
        """An empty store; ``path`` is only what errors call it, nothing is written there."""
        self._path = str(path)
        self._lock = threading.Lock()
        self._closed = False
        self._agents: dict[str, AgentRow] = {}
        self._states: dict[str, bytes] = {}
        self._turns: dict[str, TurnRow] = {}
        self._syscalls: dict[str, dict[int, SyscallRow]] = {}

    def commit(self, writes: Sequence[StoreWrite]) -> None:
        """Apply all writes, in order. Rows with the same key are replaced.

        Raises:
            StaleEpoch: a StateWrite or TurnRow of another epoch than the agent's, or a
                StateWrite of an agent that is not registered; nothing was kept.
            StoreUnavailable: closed.
        """
        with self._lock:
            self._check_open()
            self._check_epochs(writes)
            for write in writes:
                self._apply(write)

    def agents(self) -> list[AgentRow]:
        """All agents, ordered by id."""
        with self._lock:
            self._check_open()
            return [self._agents[agent] for agent in sorted(self._agents)]

    def agent(self, agent: str) -> AgentRow | None:
        """One agent."""
        with self._lock:
            self._check_open()
            return self._agents.get(agent)

    def state(self, agent: str) -> bytes | None:
        """Last committed state."""
        with self._lock:
            self._check_open()
            return self._states.get(agent)

    def turns(self, *, agent: str | None = None, limit: int = 50) -> list[TurnRow]:
        """Newest turns first."""
        with self._lock:
            self._check_open()
            rows = [t for t in self._turns.values() if agent is None or t.agent == agent]
        rows.sort(key=lambda t: (t.started_at, t.turn), reverse=True)
        return rows[: max(limit, 0)]

    def turn(self, turn: str) -> tuple[TurnRow, list[SyscallRow]] | None:
        """A turn and its syscalls by seq. A unique prefix of the id will do."""
        with self._lock:
            self._check_open()
            if turn not in self._turns:
                found = [t for t in self._turns if turn and t.startswith(turn)]
                if len(found) != 1:
                    return None
                turn = found[0]
            syscalls = self._syscalls.get(turn, {})
            return self._turns[turn], [syscalls[seq] for seq in sorted(syscalls)]

    def close(self) -> None:
        """Let go of everything. Idempotent."""
        with self._lock:
            self._closed = True
            for table in (self._agents, self._states, self._turns, self._syscalls):
                table.clear()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreUnavailable(self._path, "it is closed", remedy="Open it again")

    def _check_epochs(self, writes: Sequence[StoreWrite]) -> None:
        """The only check that can fail, so it is made before anything is changed."""
        changed: dict[str, int | None] = {}
        for write in writes:
            if isinstance(write, AgentWrite):
                changed[write.row.agent] = write.row.epoch
            elif isinstance(write, AgentDelete):
                changed[write.agent] = None
            elif isinstance(write, StateWrite | TurnRow):
                known = self._agents.get(write.agent)
                current = changed.get(write.agent, known.epoch if known else None)
                if current is None and isinstance(write, StateWrite):
                    raise StaleEpoch(write.agent, write.epoch, NO_OWNER)
                if current is not None and write.epoch != current:
                    raise StaleEpoch(write.agent, write.epoch, current)

    def _apply(self, write: StoreWrite) -> None:
        if isinstance(write, AgentWrite):
            self._agents[write.row.agent] = write.row
        elif isinstance(write, AgentDelete):
            self._agents.pop(write.agent, None)
            self._states.pop(write.agent, None)
        elif isinstance(write, StateWrite):
            self._states[write.agent] = write.state
        elif isinstance(write, TurnRow):
            self._turns[write.turn] = write
        else:
            self._syscalls.setdefault(write.turn, {})[write.seq] = write
