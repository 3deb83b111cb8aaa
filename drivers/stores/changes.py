"""What a transaction is going to change: the rules of the writes, the same for every store.

:class:`Changes` stands between the parts of a commit and a database. It takes one part after
another, looks at what is committed through a few point reads (:class:`Committed`), and keeps
what would be different in dictionaries. In the end the store writes those, table by table,
each row once, however often it changed: a message that came and was handled in the same
commit never reaches the database. A part that is refused is undone in the dictionaries, so
that the database needs no savepoints. The alternative, one SQL statement for each write,
needs the rules once per database and four times as many statements.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple, Protocol, TypeAlias

from llmos.drivers.errors import (
    AlreadyHandled,
    MailboxFull,
    StaleEpoch,
    StoreError,
    StoreUnavailable,
)
from llmos.drivers.stores import rows
from llmos.drivers.stores.chain import seal
from llmos.drivers.stores.rows import DeadLetter, JournalRow, LaunchRow, MailRow, TimerRow
from llmos.drivers.stores.values import unfit

NO_OWNER = -1
"""``StaleEpoch.current`` where nobody owns the shard, or the launch no longer stands."""

CACHED_AGENTS = 32_768
"""Ends of chains that are remembered, some 400 bytes each."""

CACHED_TURNS = 8_192
"""Turns under way whose rows' keys are remembered."""

CACHED_MAIL = 8_192
"""Messages that wait and are remembered: those that came or were begun last."""

CACHED_ENVELOPE_BYTES = 2_048
"""Messages with longer envelopes are not."""

Key: TypeAlias = tuple[str, str, int]
"""(receiver, stream, seq) of a message."""

RowKey: TypeAlias = tuple[int, str, int]
"""(seq, phase, part) of a journal row in its turn."""


class Entry:
    """An agent's row as a transaction sees it."""

    __slots__ = (
        "changes",
        "dropped",
        "head",
        "hold",
        "owner",
        "pos",
        "sent",
        "state",
        "state_version",
        "story",
    )

    def __init__(
        self,
        state_version: int = 0,
        changes: int = 0,
        sent: int = 0,
        pos: int = 0,
        head: bytes = rows.NO_HASH,
        hold: str = "",
        story: str = "",
        dropped: int = 0,
    ) -> None:
        self.state: bytes | None = None
        """A new state; None: it stays as it is."""
        self.state_version, self.changes, self.sent = state_version, changes, sent
        self.pos, self.head, self.hold, self.story = pos, head, hold, story
        self.dropped = dropped
        """1: only the chain and ``sent`` are left of it."""
        self.owner: object = None
        """The part that may change this very object; others copy it first."""

    def copy(self) -> Entry:
        """Another object with the same values."""
        other = Entry(
            self.state_version,
            self.changes,
            self.sent,
            self.pos,
            self.head,
            self.hold,
            self.story,
            self.dropped,
        )
        other.state = self.state
        return other

    def reset(self) -> None:
        """What is left after its launch was dropped."""
        self.state, self.state_version, self.changes = None, 0, 0
        self.hold, self.story, self.dropped = "", "", 1


class Tombstone(NamedTuple):
    """A launch that was dropped: rows of its agents that are committed count as gone."""

    agent: str
    """Of one agent, or ``tenant/program/*``."""
    spared: frozenset[str]
    """Agents of that program with a launch of their own."""

    @property
    def pattern(self) -> bool:
        """Whether it is of all agents of a program."""
        return self.agent.endswith("/*")

    @property
    def prefix(self) -> str:
        """What names of its agents begin with, if it is of all."""
        return self.agent[:-1]

    def covers(self, agent: str) -> bool:
        """Whether that agent is one of its."""
        if not self.pattern:
            return agent == self.agent
        prefix = self.agent[:-1]
        return (
            agent.startswith(prefix)
            and "/" not in agent[len(prefix) :]
            and agent not in self.spared
        )


class Known:
    """What a store's process remembers of the rows, because it alone writes them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        """Held for moments: while a commit's changes are taken over, and by reads."""
        self.launches: dict[str, LaunchRow] = {}
        self.shards: dict[int, int] = {}
        self.waiting: dict[str, int] = {}
        """Receiver to how much waits for it; nobody at 0."""
        self.arrival = 0
        """The last one given out."""
        self.dead = 0
        """The last id of a dead letter given out."""
        self.entries: dict[str, Entry] = {}
        """Some agents' rows: the latest ones."""
        self.turns: dict[str, set[RowKey]] = {}
        """Some turns that have not ended, with the keys of all their rows."""
        self.mail: dict[Key, MailRow] = {}
        """Some messages that wait: most are acknowledged soon after they came."""

    def launch_of(self, agent: str) -> LaunchRow | None:
        """The launch of that very name, else the one of any key."""
        with self.lock:
            return self.launches.get(agent) or self.launches.get(rows.pattern_of(agent))


class Committed(Protocol):
    """Point reads of what is committed."""

    def entry(self, agent: str) -> Entry | None:
        """An agent's row, dropped or not."""
        ...

    def turn_keys(self, turn: str) -> set[RowKey]:
        """Keys of all rows of a turn."""
        ...

    def fate(self, receiver: str, stream: str, seq: int) -> tuple[Any, Any, Any]:
        """Whether a message waits, is a dead letter, was handled; as truth values."""
        ...

    def mail_row(self, receiver: str, stream: str, seq: int) -> MailRow | None:
        """A message that waits."""
        ...

    def dead_letter(self, id: int) -> DeadLetter | None:
        """A dead letter."""
        ...

    def timer_due(self, agent: str, name: str) -> float | None:
        """When a timer is due; None: there is none."""
        ...


_MISSING: Any = object()


class Changes:
    """One transaction in the making. Not thread-safe; of use once."""

    def __init__(self, committed: Committed, known: Known, store: str) -> None:
        """``store`` is what errors call the store."""
        self._committed, self._known, self._store = committed, known, store
        self.arrival, self.dead_id = known.arrival, known.dead
        self.tombstones: dict[int, Tombstone] = {}
        """To be carried out before all else: they are of committed rows only."""
        self.launches: dict[str, LaunchRow | None] = {}
        self.shards: dict[int, int] = {}
        self.entries: dict[str, Entry] = {}
        self.journal: dict[tuple[str, int, str, int], JournalRow] = {}
        """New rows, sealed, in the order of appending."""
        self.blobs: dict[str, bytes] = {}
        self.mail: dict[Key, MailRow | None] = {}
        """None: it waits no more."""
        self.was: dict[Key, int] = {}
        """Arrivals of committed messages that ``mail`` changes."""
        self.dead: dict[int, DeadLetter | None] = {}
        self.timers: dict[tuple[str, str], TimerRow | None] = {}
        self.topics: dict[tuple[str, str], bool] = {}
        self.monitors: dict[tuple[str, str], bool | None] = {}
        """(watched, watcher) to linked; None: watched no more."""
        self._waiting: dict[str, int] = {}
        self._buried: dict[Key, bool] = {}
        self._handled: dict[tuple[str, str], bool] = {}
        self._ends: dict[str, bool] = {}
        self._turns: dict[str, set[RowKey]] = {}
        self._undo: list[tuple[dict[Any, Any], Any, Any]] = []
        self._part: object = None
        self._do: dict[type[Any], Callable[[Any], None]] = {
            rows.Own: self._own,
            rows.TakeShards: self._take_shards,
            rows.PutLaunch: self._put_launch,
            rows.DropLaunch: self._drop_launch,
            rows.Append: self._append,
            rows.PutBlob: self._put_blob,
            rows.SaveAgent: self._save_agent,
            rows.SetHold: self._set_hold,
            rows.PutMail: self._put_mail,
            rows.BeginMail: self._begin_mail,
            rows.EndMail: self._end_mail,
            rows.BuryMail: self._bury_mail,
            rows.ReviveDead: self._revive_dead,
            rows.DropDead: self._drop_dead,
            rows.PutTimer: self._put_timer,
            rows.DropTimer: self._drop_timer,
            rows.TakeTimer: self._take_timer,
            rows.Subscribe: self._subscribe,
            rows.Unsubscribe: self._unsubscribe,
            rows.PutMonitor: self._put_monitor,
            rows.DropMonitor: self._drop_monitor,
        }

    def add(
        self, parts: Sequence[rows.Part], faults: Sequence[str] | None = None
    ) -> list[StoreError | None]:
        """Take parts in, one after another; why each was refused, or None.

        ``faults`` are what :func:`faults_of` found, if the store asked before.
        """
        if faults is None:
            faults = faults_of(parts)
        return [self._add(part, fault) for part, fault in zip(parts, faults, strict=True)]

    def empty(self) -> bool:
        """Whether there is nothing to write."""
        return not (
            self.journal
            or self.entries
            or self.mail
            or self.tombstones
            or self.launches
            or self.shards
            or self.blobs
            or self.dead
            or self.timers
            or self.topics
            or self.monitors
        )

    def keep(self) -> None:
        """They are committed: remember what there is to remember."""
        known = self._known
        with known.lock:
            known.arrival, known.dead = self.arrival, self.dead_id
            for name, launch in self.launches.items():
                if launch is None:
                    known.launches.pop(name, None)
                else:
                    known.launches[name] = launch
            known.shards.update(self.shards)
        for tombstone in self.tombstones.values():
            for table in (known.waiting, known.entries):
                for agent in [a for a in table if tombstone.covers(a)]:
                    del table[agent]
            for key in [k for k in known.mail if tombstone.covers(k[0])]:
                del known.mail[key]
        for receiver, count in self._waiting.items():
            if count:
                known.waiting[receiver] = count
            else:
                known.waiting.pop(receiver, None)
        mail = known.mail
        for key, row in self.mail.items():
            mail.pop(key, None)
            if row is not None and len(row.envelope) <= CACHED_ENVELOPE_BYTES:
                mail[key] = row
        while len(mail) > CACHED_MAIL:
            del mail[next(iter(mail))]
        entries = known.entries
        for agent, entry in self.entries.items():
            entry.state = None
            entries.pop(agent, None)
            entries[agent] = entry
        while len(entries) > CACHED_AGENTS:
            del entries[next(iter(entries))]
        turns = known.turns
        ended = set()
        for turn, seq, phase, part in self.journal:
            if seq == 0 and phase != "mark":
                ended.add(turn)
            else:
                self._turns[turn].add((seq, phase, part))
        for turn, keys in self._turns.items():
            turns.pop(turn, None)
            if turn not in ended:
                turns[turn] = keys
        while len(turns) > CACHED_TURNS:
            del turns[next(iter(turns))]

    # ------------------------------------------------------------ parts

    def _add(self, part: rows.Part, fault: str) -> StoreError | None:
        if fault:
            return StoreUnavailable(
                self._store, fault, remedy="Correct the value; it fits no store"
            )
        self._part = object()
        self._undo.clear()
        counters = self.arrival, self.dead_id
        do = self._do
        try:
            rest = iter(part)
            for write in rest:
                if type(write) is not rows.Own:
                    if self._repeated(part):
                        return None
                    do[type(write)](write)
                    break
                self._own(write)
            for write in rest:
                do[type(write)](write)
        except StoreError as error:
            for table, key, value in reversed(self._undo):
                if value is _MISSING:
                    del table[key]
                else:
                    table[key] = value
            self.arrival, self.dead_id = counters
            return error
        return None

    def _repeated(self, part: rows.Part) -> bool:
        """Whether this is the end of a turn that is in the journal already.

        Looked at before the part's other writes, because those could be refused for reasons
        that did not hold when it came first.
        """
        ended = False
        ends: list[Key] = []
        for write in part:
            if type(write) is rows.EndMail:
                ends.append(write[:])
            elif type(write) is rows.Append:
                row = write.row
                if row.seq == 0 and row.kind == rows.TURN and self._ended(row.turn):
                    ended = True
        return ended and any(self._waits(key) is None for key in ends)

    def _put(self, table: dict[Any, Any], key: Any, value: Any) -> None:
        self._undo.append((table, key, table.get(key, _MISSING)))
        table[key] = value

    # ------------------------------------------------------------ owners and launches

    def _own(self, write: rows.Own) -> None:
        agent, epoch, launch = write
        shard = rows.shard_of(agent)
        current = self.shards.get(shard)
        if current is None:
            current = self._known.shards.get(shard, NO_OWNER)
        if current != epoch or current == NO_OWNER:
            raise StaleEpoch(agent, epoch, current)
        if launch:
            row = self._launch(agent) or self._launch(rows.pattern_of(agent))
            if row is None or row.id != launch:
                raise StaleEpoch(agent, epoch, NO_OWNER)

    def _launch(self, name: str) -> LaunchRow | None:
        if name in self.launches:
            return self.launches[name]
        return self._known.launches.get(name)

    def _take_shards(self, write: rows.TakeShards) -> None:
        for shard in write.shards:
            self._put(self.shards, shard, write.epoch)

    def _put_launch(self, write: rows.PutLaunch) -> None:
        self._put(self.launches, write.row.agent, write.row)

    def _drop_launch(self, write: rows.DropLaunch) -> None:
        spared: frozenset[str] = frozenset()
        if write.agent.endswith("/*"):
            prefix = write.agent[:-1]
            names = {*self._known.launches, *self.launches}
            spared = frozenset(
                n
                for n in names
                if n != write.agent and n.startswith(prefix) and self._launch(n) is not None
            )
        tombstone = Tombstone(write.agent, spared)
        covers = tombstone.covers
        self._put(self.launches, write.agent, None)
        # What this transaction has put so far goes too; what it puts later stays.
        for agent in [a for a in self.entries if covers(a)]:
            self._touch(agent).reset()
        for key in [k for k in self.mail if covers(k[0])]:
            self._put(self.mail, key, None)
        for name in [k for k in self.timers if covers(k[0])]:
            self._put(self.timers, name, None)
        for topic in [k for k in self.topics if covers(k[1])]:
            self._put(self.topics, topic, False)
        for pair in [k for k in self.monitors if covers(k[0]) or covers(k[1])]:
            self._put(self.monitors, pair, None)
        for receiver in [r for r in self._waiting if covers(r)]:
            self._put(self._waiting, receiver, 0)
        self._put(self.tombstones, len(self.tombstones), tombstone)

    def _gone(self, agent: str) -> bool:
        """Whether committed rows of that agent were dropped in this transaction."""
        return any(t.covers(agent) for t in self.tombstones.values())

    # ------------------------------------------------------------ journal and agents

    def _append(self, write: rows.Append) -> None:
        row = write.row
        turn = row.turn
        key = (turn, row.seq, row.phase, row.part)
        if key in self.journal:
            return
        keys = self._turns.get(turn)
        if keys is None:
            keys = self._keys(turn)
        if keys and key[1:] in keys:
            return
        entry = self._touch(row.agent)
        sealed = seal(row, entry.pos + 1, entry.head)
        entry.pos, entry.head, entry.dropped = sealed.pos, sealed.hash, 0
        self._undo.append((self.journal, key, _MISSING))
        self.journal[key] = sealed
        if row.seq == 0 and row.kind == rows.TURN:
            self._put(self._handled, (row.agent, row.idem_key), True)
            self._put(self._ends, turn, True)

    def _keys(self, turn: str) -> set[RowKey]:
        """Keys of the turn's committed rows."""
        keys = self._turns.get(turn)
        if keys is None:
            keys = self._known.turns.get(turn)
            if keys is None:
                keys = self._committed.turn_keys(turn)
            # No undo: it is what is committed, whatever becomes of this part. `keep` adds
            # to it only once the new rows are, too.
            self._turns[turn] = keys
        return keys

    def _ended(self, turn: str) -> bool:
        if turn in self._ends:
            return True
        keys = self._keys(turn)
        return bool(keys) and any(seq == 0 and phase != "mark" for seq, phase, _ in keys)

    def _touch(self, agent: str) -> Entry:
        """The agent's entry, to be changed by this part; a new one if there is none."""
        entry = self.entries.get(agent)
        if entry is not None and entry.owner is self._part:
            return entry
        changed = self._entry(agent, entry).copy()
        changed.owner = self._part
        self._undo.append((self.entries, agent, _MISSING if entry is None else entry))
        self.entries[agent] = changed
        return changed

    def _entry(self, agent: str, entry: Entry | None) -> Entry:
        if entry is None:
            entry = self._known.entries.get(agent) or self._committed.entry(agent)
            if entry is None:
                return Entry(dropped=1)
            if self.tombstones and self._gone(agent):
                entry = entry.copy()
                entry.reset()
        return entry

    def _put_blob(self, write: rows.PutBlob) -> None:
        if write.sha256 not in self.blobs:
            self._put(self.blobs, write.sha256, write.data)

    def _save_agent(self, write: rows.SaveAgent) -> None:
        entry = self._touch(write.agent)
        entry.dropped = 0
        # Never down, also after a drop: receivers would take new messages for old ones.
        if write.sent > entry.sent:
            entry.sent = write.sent
        if write.state is not None:
            entry.state = write.state
            entry.state_version, entry.changes = write.state_version, write.changes

    def _set_hold(self, write: rows.SetHold) -> None:
        if not write.hold:
            entry = self._entry(write.agent, self.entries.get(write.agent))
            if entry.dropped:
                return
        entry = self._touch(write.agent)
        entry.hold, entry.story, entry.dropped = write.hold, write.story, 0

    # ------------------------------------------------------------ mail

    def _count(self, receiver: str) -> int:
        count = self._waiting.get(receiver)
        if count is None:
            if self.tombstones and self._gone(receiver):
                return 0
            return self._known.waiting.get(receiver, 0)
        return count

    def _waits(self, key: Key) -> MailRow | None:
        """The message as it waits now."""
        if key in self.mail:
            return self.mail[key]
        if self.tombstones and self._gone(key[0]):
            return None
        row = self._known.mail.get(key) or self._committed.mail_row(*key)
        if row is not None:
            self.was[key] = row.arrival
        return row

    def _put_mail(self, write: rows.PutMail) -> None:
        row, limit = write
        receiver, stream, seq = key = row[:3]
        if self.mail.get(key) is not None:
            return
        waits, dead, handled = self._committed.fate(receiver, stream, seq)
        if waits and key not in self.mail and not (self.tombstones and self._gone(receiver)):
            return
        if (
            handled
            or self._buried.get(key, dead)
            or (self._handled and (receiver, f"{stream}#{seq}") in self._handled)
        ):
            return
        count = self._count(receiver)
        if 0 < limit <= count:
            raise MailboxFull(receiver, count)
        self.arrival += 1
        self._put(self.mail, key, tuple.__new__(MailRow, (*row[:10], self.arrival)))
        self._put(self._waiting, receiver, count + 1)

    def _take_out(self, key: Key) -> None:
        count = self._count(key[0])
        self._put(self.mail, key, None)
        self._put(self._waiting, key[0], count - 1)

    def _begin_mail(self, write: rows.BeginMail) -> None:
        key = write[:3]
        row = self._waits(key)
        if row is not None:
            self._put(
                self.mail,
                key,
                row._replace(
                    attempts=write.attempts,
                    deaths=write.deaths,
                    turn=write.turn,
                    epoch=write.epoch,
                    not_before=write.not_before,
                ),
            )

    def _end_mail(self, write: rows.EndMail) -> None:
        if self._waits(write[:]) is None:
            raise AlreadyHandled(write.receiver, f"{write.stream}#{write.seq}")
        self._take_out(write[:])

    def _bury_mail(self, write: rows.BuryMail) -> None:
        key = write[:3]
        row = self._waits(key)
        if row is None:
            return
        self._take_out(key)
        self.dead_id += 1
        letter = DeadLetter(self.dead_id, row, write.reason, write.story, write.died_at)
        self._put(self.dead, self.dead_id, letter)
        self._put(self._buried, key, True)

    def _dead_letter(self, id: int) -> DeadLetter | None:
        if id in self.dead:
            return self.dead[id]
        return self._committed.dead_letter(id)

    def _revive_dead(self, write: rows.ReviveDead) -> None:
        letter = self._dead_letter(write.id)
        if letter is None:
            return
        self._put(self.dead, write.id, None)
        row = letter.mail
        self._put(self._buried, row.key, False)
        if self._waits(row.key) is None:
            self.arrival += 1
            count = self._count(row.receiver)
            # Turn and attempts stay: by them what it did outside is found in the journal, and
            # is not done again.
            again = row._replace(deaths=0, not_before=0.0, arrival=self.arrival)
            self._put(self.mail, row.key, again)
            self._put(self._waiting, row.receiver, count + 1)

    def _drop_dead(self, write: rows.DropDead) -> None:
        letter = self._dead_letter(write.id)
        if letter is not None:
            self._put(self.dead, write.id, None)
            self._put(self._buried, letter.mail.key, False)

    # ------------------------------------------------------------ timers, topics, monitors

    def _put_timer(self, write: rows.PutTimer) -> None:
        self._put(self.timers, (write.row.agent, write.row.name), write.row)

    def _drop_timer(self, write: rows.DropTimer) -> None:
        key = (write.agent, write.name)
        if write.due is None or self._timer_due(key) == write.due:
            self._put(self.timers, key, None)

    def _take_timer(self, write: rows.TakeTimer) -> None:
        key = (write.agent, write.name)
        if self._timer_due(key) != write.due:
            raise AlreadyHandled(write.agent, f"timer:{write.name}")
        self._put(self.timers, key, None)

    def _timer_due(self, key: tuple[str, str]) -> float | None:
        if key in self.timers:
            row = self.timers[key]
            return row.due if row else None
        if self.tombstones and self._gone(key[0]):
            return None
        return self._committed.timer_due(*key)

    def _subscribe(self, write: rows.Subscribe) -> None:
        self._put(self.topics, (write.topic, write.agent), True)

    def _unsubscribe(self, write: rows.Unsubscribe) -> None:
        self._put(self.topics, (write.topic, write.agent), False)

    def _put_monitor(self, write: rows.PutMonitor) -> None:
        watched, watcher, linked = write.row
        self._put(self.monitors, (watched, watcher), bool(linked))

    def _drop_monitor(self, write: rows.DropMonitor) -> None:
        self._put(self.monitors, (write.watched, write.watcher), None)


def faults_of(parts: Iterable[rows.Part]) -> list[str]:
    """For each part why no store could hold it, or nothing."""
    return [next((fault for write in part if (fault := unfit(write))), "") for part in parts]


class Mailroom(NamedTuple):
    """How the messages of a transaction are written."""

    deletes: list[int]
    """Arrivals."""
    updates: list[tuple[float, int, int, str, int, int]]
    """not_before, attempts, deaths, turn, epoch, arrival."""
    inserts: list[MailRow]
    """In the order of arrival."""


def mailroom(changes: Changes) -> Mailroom:
    """Sort the messages that changed by what a database has to do."""
    deletes: list[int] = []
    updates: list[tuple[float, int, int, str, int, int]] = []
    inserts: list[MailRow] = []
    was = changes.was
    for key, row in changes.mail.items():
        before = was.get(key, 0)
        if row is not None and row.arrival == before:
            updates.append(
                (row.not_before, row.attempts, row.deaths, row.turn, row.epoch, row.arrival)
            )
            continue
        if before:
            deletes.append(before)
        if row is not None:
            inserts.append(row)
    # Not yet in order: one that went and came back has its old place in the dictionary.
    inserts.sort(key=attrgetter("arrival"))
    return Mailroom(deletes, updates, inserts)


def agent_values(changes: Changes) -> list[tuple[Any, ...]]:
    """Rows of the table ``agents`` in the order of its columns."""
    return [
        (
            agent,
            e.state,
            e.state_version,
            e.changes,
            e.sent,
            e.pos,
            e.head,
            e.hold,
            e.story,
            e.dropped,
        )
        for agent, e in changes.entries.items()
    ]
