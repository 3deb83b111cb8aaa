"""The reads of a store that speaks SQL: the same for SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmos.drivers.stores import rows
from llmos.drivers.stores.changes import Known
from llmos.drivers.stores.schema import (
    HANDLED,
    SELECT,
    SELECT_AGENT,
    TURN_ENDS,
    dead_letter,
    journal_row,
)

_AGENT = f"{SELECT_AGENT} WHERE agent = ? AND dropped = 0"
_CHAIN_END = f"{SELECT_AGENT} WHERE agent = ?"
_AGENTS = f"{SELECT_AGENT} WHERE agent > ? AND dropped = 0 ORDER BY agent LIMIT ?"
_HELD = f"{SELECT_AGENT} WHERE agent > ? AND hold <> '' AND dropped = 0 ORDER BY agent LIMIT ?"
_MAIL = f"{SELECT['mail']} WHERE arrival > ? ORDER BY arrival LIMIT ?"
_WAITING = f"{SELECT['mail']} WHERE receiver = ? ORDER BY arrival"
_DEAD = f"{SELECT['dead']} ORDER BY id DESC LIMIT ?"
_TIMERS = f"{SELECT['timers']} WHERE due < ? ORDER BY due, agent, name LIMIT ?"
_TIMERS_OF = f"{SELECT['timers']} WHERE agent = ? ORDER BY name"
_MONITORS = f"{SELECT['monitors']} WHERE watched = ? ORDER BY watcher"
_TURN = f"{SELECT['journal']} WHERE turn = ? ORDER BY pos, agent"
_HANDLED = f"{SELECT['journal']} WHERE agent = ? AND idem_key = ? AND {HANDLED}"
_CHAIN = f"{SELECT['journal']} WHERE agent = ? AND pos > ? ORDER BY pos LIMIT ?"

_TURNS_AT_ONCE = 100
"""How many turns one statement asks for."""


class SqlReads:
    """Reads in SQL. Whoever derives from it says how a statement is carried out."""

    _known: Known

    def _rows(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Carry out a statement with ``?`` for its values.

        Raises:
            StoreUnavailable: it cannot be carried out.
        """
        raise NotImplementedError

    def _check_open(self) -> None:
        """Raise StoreUnavailable if the store is closed."""
        raise NotImplementedError

    def launches(self) -> list[rows.LaunchRow]:
        """All launches, ordered by name."""
        self._check_open()
        with self._known.lock:
            found = list(self._known.launches.values())
        found.sort(key=lambda row: row.agent)
        return found

    def launch_of(self, agent: str) -> rows.LaunchRow | None:
        """The launch of that very name, else the one of any key of its program."""
        self._check_open()
        return self._known.launch_of(agent)

    def shards(self) -> dict[int, int]:
        """Shard to the epoch that owns it."""
        self._check_open()
        with self._known.lock:
            return dict(sorted(self._known.shards.items()))

    def agent(self, agent: str) -> rows.AgentRow | None:
        """One agent's row."""
        found = self._rows(_AGENT, (agent,))
        return rows.AgentRow(*found[0]) if found else None

    def chain_end(self, agent: str) -> rows.AgentRow | None:
        """One agent's row, also if it was dropped: then its chain's end and ``sent`` are left."""
        found = self._rows(_CHAIN_END, (agent,))
        return rows.AgentRow(*found[0]) if found else None

    def agents(
        self, *, after: str = "", limit: int = 1000, held: bool = False
    ) -> list[rows.AgentRow]:
        """Rows ordered by name, after one; with ``held`` only those that are held."""
        found = self._rows(_HELD if held else _AGENTS, (after, max(limit, 0)))
        return [rows.AgentRow(*values) for values in found]

    def count_agents(self) -> int:
        """How many agents have a row."""
        return int(self._rows("SELECT count(*) FROM agents WHERE dropped = 0")[0][0])

    def mail(self, *, after: int = 0, limit: int = 1000) -> list[rows.MailRow]:
        """What waits, in the order of arrival, after one."""
        return [rows.MailRow(*v) for v in self._rows(_MAIL, (after, max(limit, 0)))]

    def waiting(self, receiver: str) -> list[rows.MailRow]:
        """What waits for one agent, in the order of arrival."""
        return [rows.MailRow(*v) for v in self._rows(_WAITING, (receiver,))]

    def dead(self, *, limit: int = 100) -> list[rows.DeadLetter]:
        """Dead letters, newest first."""
        return [dead_letter(v) for v in self._rows(_DEAD, (max(limit, 0),))]

    def timers(self, *, before: float, limit: int = 1000) -> list[rows.TimerRow]:
        """Timers due before a time, the earliest first."""
        return [rows.TimerRow(*v) for v in self._rows(_TIMERS, (float(before), max(limit, 0)))]

    def timers_of(self, agent: str) -> list[rows.TimerRow]:
        """An agent's timers by name."""
        return [rows.TimerRow(*v) for v in self._rows(_TIMERS_OF, (agent,))]

    def subscribers(self, topic: str) -> list[str]:
        """Agents that want a topic, ordered by name."""
        found = self._rows("SELECT agent FROM topics WHERE topic = ? ORDER BY agent", (topic,))
        return [values[0] for values in found]

    def monitors(self, watched: str) -> list[rows.MonitorRow]:
        """Who watches an agent, ordered by name."""
        return [rows.MonitorRow(v[0], v[1], bool(v[2])) for v in self._rows(_MONITORS, (watched,))]

    def turns(
        self, *, agent: str | None = None, limit: int = 50, before: float | None = None
    ) -> list[rows.JournalRow]:
        """Ends of turns, those that began last first."""
        values: list[Any] = []
        where, order = TURN_ENDS, "ts DESC, turn DESC"
        if agent is not None:
            # An agent's turns run one after another, so its chain has them in order. The plus
            # keeps the index of handled messages out, which has them in none.
            where, order = (
                "agent = ? AND +seq = 0 AND kind = 'turn' AND phase <> 'mark'",
                "pos DESC",
            )
            values.append(agent)
        if before is not None:
            where += " AND ts < ?"
            values.append(float(before))
        sql = f"{SELECT['journal']} WHERE {where} ORDER BY {order} LIMIT ?"
        return [journal_row(v) for v in self._rows(sql, (*values, max(limit, 0)))]

    def turn(self, turn: str) -> list[rows.JournalRow]:
        """All rows of a turn by pos. A unique prefix of the id will do."""
        if not turn:
            return []
        found = [journal_row(v) for v in self._rows(_TURN, (turn,))]
        if found:
            return found
        first = self._next_turn(turn, ">=")
        if first is None or not first.startswith(turn):
            return []
        second = self._next_turn(first, ">")
        if second is not None and second.startswith(turn):
            return []
        return [journal_row(v) for v in self._rows(_TURN, (first,))]

    def _next_turn(self, turn: str, than: str) -> str | None:
        # Two steps in an index; DISTINCT would read all rows of the first turn.
        sql = f"SELECT turn FROM journal WHERE turn {than} ? ORDER BY turn LIMIT 1"
        found = self._rows(sql, (turn,))
        return found[0][0] if found else None

    def turns_rows(self, turns: Sequence[str]) -> dict[str, list[rows.JournalRow]]:
        """The rows of several turns by pos; turns without rows are left out."""
        self._check_open()
        wanted = list(dict.fromkeys(turns))
        found: dict[str, list[rows.JournalRow]] = {}
        for start in range(0, len(wanted), _TURNS_AT_ONCE):
            some = wanted[start : start + _TURNS_AT_ONCE]
            marks = ", ".join("?" * len(some))
            sql = f"{SELECT['journal']} WHERE turn IN ({marks}) ORDER BY pos, agent"
            for values in self._rows(sql, some):
                found.setdefault(values[1], []).append(journal_row(values))
        return {turn: found[turn] for turn in wanted if turn in found}

    def handled(self, agent: str, idem_key: str) -> rows.JournalRow | None:
        """The end of the turn in which the agent handled a message."""
        # The first, of what is one row in all sane journals: to ask the database for an order
        # makes it go through the chain.
        found = [journal_row(v) for v in self._rows(_HANDLED, (agent, idem_key))]
        return min(found, key=lambda row: row.pos, default=None)

    def chain(self, agent: str, *, after: int = 0, limit: int = 1000) -> list[rows.JournalRow]:
        """An agent's journal by pos."""
        return [journal_row(v) for v in self._rows(_CHAIN, (agent, after, max(limit, 0)))]

    def blob(self, sha256: str) -> bytes | None:
        """A blob's bytes."""
        found = self._rows("SELECT data FROM blobs WHERE sha256 = ?", (sha256,))
        return found[0][0] if found else None
