"""A store in memory: for tests, and for a system that may forget everything at exit."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from llmos.drivers.errors import StoreError, StoreUnavailable
from llmos.drivers.stores import copies, rows
from llmos.drivers.stores.changes import Changes, Entry, Key, Known, RowKey, mailroom
from llmos.drivers.stores.schema import TABLES, dead_letter, dead_values


class MemoryStore:
    """Rows in dictionaries, with the same rules as a durable store.

    What is committed outlives a crash that is only played: :meth:`reopen`.
    """

    def __init__(self, path: Path | str = "memory", *, _tables: _Tables | None = None) -> None:
        """An empty store; ``path`` is only what errors call it, nothing is written there."""
        self._path = str(path)
        self._lock = threading.Lock()
        self._closed = False
        self._tables = _tables or _Tables()

    def reopen(self) -> MemoryStore:
        """What a new process finds after this one died: the same rows; this object is closed."""
        with self._lock:
            self._closed = True
            return MemoryStore(self._path, _tables=self._tables)

    def snapshot(self) -> MemoryStore:
        """Another open store with the rows of this moment; the two go separate ways."""
        with self._lock:
            self._check_open()
            return MemoryStore(self._path, _tables=self._tables.copy())

    def commit(self, parts: Sequence[rows.Part]) -> list[StoreError | None]:
        """Apply parts, in order; what each was refused for, or None.

        Raises:
            StoreUnavailable: closed.
        """
        with self._lock:
            self._check_open()
            tables = self._tables
            changes = Changes(tables, tables.known, self._path)
            errors = changes.add(parts)
            if not changes.empty():
                tables.apply(changes)
            changes.keep()
            return errors

    def launches(self) -> list[rows.LaunchRow]:
        """All launches, ordered by name."""
        with self._lock:
            self._check_open()
            launches = self._tables.known.launches
            return [launches[name] for name in sorted(launches)]

    def launch_of(self, agent: str) -> rows.LaunchRow | None:
        """The launch of that very name, else the one of any key of its program."""
        with self._lock:
            self._check_open()
            return self._tables.known.launch_of(agent)

    def shards(self) -> dict[int, int]:
        """Shard to the epoch that owns it."""
        with self._lock:
            self._check_open()
            return dict(sorted(self._tables.known.shards.items()))

    def agent(self, agent: str) -> rows.AgentRow | None:
        """One agent's row."""
        with self._lock:
            self._check_open()
            entry = self._tables.entries.get(agent)
            return None if entry is None or entry.dropped else self._tables.agent_row(agent)

    def chain_end(self, agent: str) -> rows.AgentRow | None:
        """One agent's row, also if it was dropped: then its chain's end and ``sent`` are left."""
        with self._lock:
            self._check_open()
            return self._tables.agent_row(agent) if agent in self._tables.entries else None

    def agents(
        self, *, after: str = "", limit: int = 1000, held: bool = False
    ) -> list[rows.AgentRow]:
        """Rows ordered by name, after one; with ``held`` only those that are held."""
        with self._lock:
            self._check_open()
            names, entries = self._tables.names(), self._tables.entries
            found = (
                name
                for name in islice(names, bisect_right(names, after), None)
                if not entries[name].dropped and (entries[name].hold or not held)
            )
            return [self._tables.agent_row(name) for name in islice(found, max(limit, 0))]

    def count_agents(self) -> int:
        """How many agents have a row."""
        with self._lock:
            self._check_open()
            return sum(not entry.dropped for entry in self._tables.entries.values())

    def mail(self, *, after: int = 0, limit: int = 1000) -> list[rows.MailRow]:
        """What waits, in the order of arrival, after one."""
        with self._lock:
            self._check_open()
            arrivals, mail = self._tables.arrivals(), self._tables.mail
            start = bisect_right(arrivals, after)
            found = (mail[a] for a in islice(arrivals, start, None) if a in mail)
            return list(islice(found, max(limit, 0)))

    def waiting(self, receiver: str) -> list[rows.MailRow]:
        """What waits for one agent, in the order of arrival."""
        with self._lock:
            self._check_open()
            found = self._tables.boxes.get(receiver, {}).values()
            return [self._tables.mail[arrival] for arrival in sorted(found)]

    def dead(self, *, limit: int = 100) -> list[rows.DeadLetter]:
        """Dead letters, newest first."""
        with self._lock:
            self._check_open()
            dead = self._tables.dead
            return [dead[id] for id in sorted(dead, reverse=True)[: max(limit, 0)]]

    def timers(self, *, before: float, limit: int = 1000) -> list[rows.TimerRow]:
        """Timers due before a time, the earliest first."""
        with self._lock:
            self._check_open()
            found = [t for t in self._tables.timers.values() if t.due < before]
        found.sort(key=lambda t: (t.due, t.agent, t.name))
        return found[: max(limit, 0)]

    def timers_of(self, agent: str) -> list[rows.TimerRow]:
        """An agent's timers by name."""
        with self._lock:
            self._check_open()
            found = [t for t in self._tables.timers.values() if t.agent == agent]
        return sorted(found, key=lambda t: t.name)

    def subscribers(self, topic: str) -> list[str]:
        """Agents that want a topic, ordered by name."""
        with self._lock:
            self._check_open()
            return sorted(agent for t, agent in self._tables.topics if t == topic)

    def monitors(self, watched: str) -> list[rows.MonitorRow]:
        """Who watches an agent, ordered by name."""
        with self._lock:
            self._check_open()
            found = [
                rows.MonitorRow(*key, linked)
                for key, linked in self._tables.monitors.items()
                if key[0] == watched
            ]
        return sorted(found)

    def turns(
        self, *, agent: str | None = None, limit: int = 50, before: float | None = None
    ) -> list[rows.JournalRow]:
        """Ends of turns, those that began last first."""
        with self._lock:
            self._check_open()
            journal = self._tables.journal
            rows_ = self._tables.chains.get(agent, []) if agent is not None else journal.values()
            found = [r for r in rows_ if r.seq == 0 and r.kind == rows.TURN and r.phase != "mark"]
        if before is not None:
            found = [r for r in found if r.ts < before]
        if agent is not None:
            found.reverse()
        else:
            found.sort(key=lambda r: (r.ts, r.turn), reverse=True)
        return found[: max(limit, 0)]

    def turn(self, turn: str) -> list[rows.JournalRow]:
        """All rows of a turn by pos. A unique prefix of the id will do."""
        with self._lock:
            self._check_open()
            turns = self._tables.turns
            if turn not in turns:
                found = [t for t in turns if turn and t.startswith(turn)]
                if len(found) != 1:
                    return []
                turn = found[0]
            return self._tables.turn_rows(turn)

    def turns_rows(self, turns: Sequence[str]) -> dict[str, list[rows.JournalRow]]:
        """The rows of several turns by pos; turns without rows are left out."""
        with self._lock:
            self._check_open()
            known = self._tables.turns
            return {t: self._tables.turn_rows(t) for t in dict.fromkeys(turns) if t in known}

    def handled(self, agent: str, idem_key: str) -> rows.JournalRow | None:
        """The end of the turn in which the agent handled a message."""
        with self._lock:
            self._check_open()
            return self._tables.handled.get((agent, idem_key))

    def chain(self, agent: str, *, after: int = 0, limit: int = 1000) -> list[rows.JournalRow]:
        """An agent's journal by pos."""
        with self._lock:
            self._check_open()
            start = max(after, 0)
            return self._tables.chains.get(agent, [])[start : start + max(limit, 0)]

    def blob(self, sha256: str) -> bytes | None:
        """A blob's bytes."""
        with self._lock:
            self._check_open()
            return self._tables.blobs.get(sha256)

    def backup(self, target: Path) -> int:
        """Write everything as a SQLite store; returns its bytes.

        Raises:
            StoreUnavailable: it exists already, or cannot be written.
        """
        copy = self.snapshot()
        return copies.write(Path(target), copy._tables.dump())

    def load(self, tables: Iterable[tuple[str, Iterator[tuple[Any, ...]]]]) -> None:
        """Take whole tables in, as a backup has them. Only into a store without rows.

        Raises:
            StoreUnavailable: it is not empty.
        """
        with self._lock:
            self._check_open()
            if any(
                True for name, values in self._tables.dump() if name != "counters" for _ in values
            ):
                raise StoreUnavailable(
                    self._path, "it is not empty", remedy="Restore into a new one"
                )
            loaded = _Tables()
            for name, values in tables:
                loaded.take(name, values)
            self._tables = loaded

    def close(self) -> None:
        """Nothing more can be read or written through this object. Idempotent."""
        with self._lock:
            self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise StoreUnavailable(self._path, "it is closed", remedy="Open it again")


class _Tables:
    """The rows, and the indexes by which they are found."""

    def __init__(self) -> None:
        self.known = Known()
        self.entries: dict[str, Entry] = {}
        self.states: dict[str, bytes] = {}
        self.journal: dict[tuple[str, int, str, int], rows.JournalRow] = {}
        self.chains: dict[str, list[rows.JournalRow]] = {}
        self.turns: dict[str, list[rows.JournalRow]] = {}
        self.handled: dict[tuple[str, str], rows.JournalRow] = {}
        self.blobs: dict[str, bytes] = {}
        self.mail: dict[int, rows.MailRow] = {}
        self.boxes: dict[str, dict[Key, int]] = {}
        self.dead: dict[int, rows.DeadLetter] = {}
        self.dead_keys: dict[Key, int] = {}
        self.timers: dict[tuple[str, str], rows.TimerRow] = {}
        self.topics: dict[tuple[str, str], bool] = {}
        self.monitors: dict[tuple[str, str], bool] = {}
        self._names: list[str] | None = None
        self._arrivals: list[int] = []

    def copy(self) -> _Tables:
        """The same rows; no dictionary or list is shared."""
        other = _Tables()
        for name, table in vars(self).items():
            if isinstance(table, dict):
                setattr(other, name, table.copy())
        for name in ("chains", "turns", "boxes"):
            table = getattr(other, name)
            for key, value in table.items():
                table[key] = value.copy()
        other._arrivals = self._arrivals.copy()
        known = other.known
        known.launches, known.shards = self.known.launches.copy(), self.known.shards.copy()
        known.waiting = self.known.waiting.copy()
        known.arrival, known.dead = self.known.arrival, self.known.dead
        # The caches of ends and turns are left empty: they fill themselves.
        return other

    # ------------------------------------------------------------ Committed

    def entry(self, agent: str) -> Entry | None:
        return self.entries.get(agent)

    def turn_keys(self, turn: str) -> set[RowKey]:
        return {(r.seq, r.phase, r.part) for r in self.turns.get(turn, ())}

    def fate(self, receiver: str, stream: str, seq: int) -> tuple[Any, Any, Any]:
        key = (receiver, stream, seq)
        return (
            key in self.boxes.get(receiver, ()),
            key in self.dead_keys,
            (receiver, f"{stream}#{seq}") in self.handled,
        )

    def mail_row(self, receiver: str, stream: str, seq: int) -> rows.MailRow | None:
        arrival = self.boxes.get(receiver, {}).get((receiver, stream, seq))
        return None if arrival is None else self.mail[arrival]

    def dead_letter(self, id: int) -> rows.DeadLetter | None:
        return self.dead.get(id)

    def timer_due(self, agent: str, name: str) -> float | None:
        row = self.timers.get((agent, name))
        return row.due if row else None

    # ------------------------------------------------------------ reads

    def agent_row(self, agent: str) -> rows.AgentRow:
        e = self.entries[agent]
        state = self.states.get(agent)
        return rows.AgentRow(
            agent, state, e.state_version, e.changes, e.sent, e.pos, e.head, e.hold, e.story
        )

    def names(self) -> list[str]:
        """Of all agents, sorted."""
        if self._names is None:
            self._names = sorted(self.entries)
        return self._names

    def arrivals(self) -> list[int]:
        """Of all that waits, and some that do no more, sorted."""
        if len(self._arrivals) > 2 * len(self.mail) + 100:
            self._arrivals = sorted(self.mail)
        return self._arrivals

    def turn_rows(self, turn: str) -> list[rows.JournalRow]:
        return sorted(self.turns.get(turn, ()), key=lambda r: (r.pos, r.agent))

    # ------------------------------------------------------------ writes

    def apply(self, changes: Changes) -> None:
        for tombstone in changes.tombstones.values():
            covers = tombstone.covers
            for agent in [a for a in self.entries if covers(a)]:
                entry = self.entries[agent] = self.entries[agent].copy()
                entry.reset()
                self.states.pop(agent, None)
            for receiver in [r for r in self.boxes if covers(r)]:
                for arrival in self.boxes.pop(receiver).values():
                    del self.mail[arrival]
            _drop(self.timers, lambda key: covers(key[0]))  # noqa: B023
            _drop(self.topics, lambda key: covers(key[1]))  # noqa: B023
            _drop(self.monitors, lambda key: covers(key[0]) or covers(key[1]))  # noqa: B023
        for agent, entry in changes.entries.items():
            if agent not in self.entries:
                self._names = None
            if entry.state is not None:
                self.states[agent] = entry.state
            self.entries[agent] = entry
        for row in changes.journal.values():
            self._journal(row)
        for sha256, data in changes.blobs.items():
            self.blobs.setdefault(sha256, data)
        for id, letter in changes.dead.items():
            old = self.dead.pop(id, None)
            if old is not None:
                del self.dead_keys[old.mail.key]
            if letter is not None:
                self._bury(letter)
        deletes, updates, inserts = mailroom(changes)
        for arrival in deletes:
            gone = self.mail.pop(arrival, None)
            if gone is not None:
                box = self.boxes[gone.receiver]
                del box[gone.key]
                if not box:
                    del self.boxes[gone.receiver]
        for *_, arrival in updates:
            if arrival in self.mail:
                changed = changes.mail[self.mail[arrival].key]
                assert changed is not None
                self.mail[arrival] = changed
        for mail in inserts:
            self._mail(mail)
        _merge(self.timers, changes.timers)
        _merge(self.topics, {key: wanted or None for key, wanted in changes.topics.items()})
        _merge(self.monitors, changes.monitors)

    def _journal(self, row: rows.JournalRow) -> None:
        self.journal[row.turn, row.seq, row.phase, row.part] = row
        self.chains.setdefault(row.agent, []).append(row)
        self.turns.setdefault(row.turn, []).append(row)
        if row.seq == 0 and row.kind == rows.TURN:
            self.handled.setdefault((row.agent, row.idem_key), row)

    def _mail(self, row: rows.MailRow) -> None:
        self.mail[row.arrival] = row
        self.boxes.setdefault(row.receiver, {})[row.key] = row.arrival
        self._arrivals.append(row.arrival)

    def _bury(self, letter: rows.DeadLetter) -> None:
        self.dead[letter.id] = letter
        self.dead_keys[letter.mail.key] = letter.id

    # ------------------------------------------------------------ copies

    def dump(self) -> copies.Tables:
        """All rows in the columns of the SQL tables."""
        known = self.known
        counters = [("arrival", known.arrival), ("dead", known.dead)]
        agents = ((*self.agent_row(a), self.entries[a].dropped) for a in self.names())
        found: dict[str, Iterable[tuple[Any, ...]]] = {
            "counters": counters,
            "launches": known.launches.values(),
            "shards": known.shards.items(),
            "agents": agents,
            "journal": (row for agent in sorted(self.chains) for row in self.chains[agent]),
            "blobs": self.blobs.items(),
            "mail": (self.mail[arrival] for arrival in sorted(self.mail)),
            "dead": (dead_values(self.dead[id]) for id in sorted(self.dead)),
            "timers": self.timers.values(),
            "topics": self.topics.keys(),
            "monitors": ((*key, int(linked)) for key, linked in self.monitors.items()),
        }
        for table in TABLES:
            yield table.name, iter(found[table.name])

    def take(self, name: str, values: Iterator[tuple[Any, ...]]) -> None:
        """Take in the rows of one table."""
        known = self.known
        for v in values:
            match name:
                case "counters":
                    setattr(known, v[0], v[1])
                case "launches":
                    known.launches[v[0]] = rows.LaunchRow(*v)
                case "shards":
                    known.shards[v[0]] = v[1]
                case "agents":
                    agent, state, version, changes, sent, pos, head, hold, story, dropped = v
                    self.entries[agent] = Entry(
                        version, changes, sent, pos, head, hold, story, dropped
                    )
                    if state is not None:
                        self.states[agent] = state
                case "journal":
                    self._journal(rows.JournalRow(*v))
                case "blobs":
                    self.blobs[v[0]] = v[1]
                case "mail":
                    self._mail(rows.MailRow(*v))
                    known.waiting[v[0]] = known.waiting.get(v[0], 0) + 1
                case "dead":
                    self._bury(dead_letter(v))
                case "timers":
                    self.timers[v[0], v[1]] = rows.TimerRow(*v)
                case "topics":
                    self.topics[v[0], v[1]] = True
                case "monitors":
                    self.monitors[v[0], v[1]] = bool(v[2])
                case _:
                    raise ValueError(f"no table {name}")


def _merge(table: dict[Any, Any], changed: dict[Any, Any]) -> None:
    for key, value in changed.items():
        if value is None:
            table.pop(key, None)
        else:
            table[key] = value


def _drop(table: dict[Any, Any], covered: Any) -> None:
    for key in [key for key in table if covered(key)]:
        del table[key]
