"""The history checker: says from what was seen outside what the system did wrong.

It compares four accounts: what the clients were told, what the ledger was asked to do, what
the journal says, and what the agents remember.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from llmos.drivers.protocols import Store
from llmos.drivers.stores.chain import Finding, verify_agent
from llmos.drivers.stores.rows import TURN, AgentRow, DeadLetter, JournalRow, MailRow
from llmos.kernel import record
from llmos.syscalls.messages import Envelope
from tests.chaos import ledger
from tests.chaos.programs import Add, Added, Book, Note, Tick
from tests.chaos.workload import PATIENCE_S, Deed

MAX_LINES = 60
"""Of one story."""


@dataclass(frozen=True, slots=True)
class Handled:
    """A turn that committed."""

    agent: str
    kind: str
    sender: str
    number: int
    """0 for a Tick."""
    turn: str
    message_id: str
    asker_turn: str
    row: JournalRow


@dataclass(frozen=True, slots=True)
class Wrong:
    """Something that must not be."""

    what: str
    """``lost``, ``duplicated``, ``reordered``, ``untrue``, ``orphan``, ``untyped``, ``late``."""
    agent: str
    sender: str
    number: int
    detail: str
    turns: tuple[str, ...] = ()
    message_id: str = ""

    def __str__(self) -> str:
        return f"{self.what}: {self.agent} <- {self.sender} {self.number}: {self.detail}"


@dataclass
class Evidence:
    """All that is known after a run."""

    deeds: list[Deed]
    entries: list[ledger.Entry]
    agents: list[AgentRow]
    journal: dict[str, list[JournalRow]]
    """By agent, in the order of its chain."""
    mail: list[MailRow]
    dead: list[DeadLetter]
    broken: list[Finding] = field(default_factory=list)

    @classmethod
    def of(cls, deeds: list[Deed], entries: list[ledger.Entry], store: Store) -> Evidence:
        """Read a store that nobody writes any more."""
        agents = store.agents(limit=100_000)
        found = cls(deeds, entries, agents, {}, store.mail(limit=100_000), store.dead(limit=10_000))
        for row in agents:
            rows: list[JournalRow] = []
            while page := store.chain(row.agent, after=rows[-1].pos if rows else 0):
                rows += page
            found.journal[row.agent] = rows
            found.broken += verify_agent(store, row.agent)
        return found


_KINDS = {"Note": Note, "Add": Add, "Tick": Tick}


def handled_of(agent: str, rows: list[JournalRow]) -> list[Handled]:
    """An agent's committed turns that changed something, in their order."""
    found = []
    for row in rows:
        if row.kind != TURN or row.seq != 0 or row.phase != "result" or row.name not in _KINDS:
            continue
        stream, _, number = row.idem_key.rpartition("#")
        envelope = Envelope.unpack(agent, stream, int(number), row.args)
        body = envelope.wire.json()
        found.append(
            Handled(
                agent,
                row.name,
                body["sender"],
                body.get("number", 0),
                row.turn,
                row.idem_key,
                body.get("turn", ""),
                row,
            )
        )
    return found


@dataclass
class Verdict:
    """What the checker found."""

    wrong: list[Wrong]
    handled: int
    failed_turn_effects: int
    """Effects of asked turns that failed after them, e.g. at their deadline: the asker got an
    error. Told, for a turn that fails is not taken back outside."""
    repeated: int
    """Calls that the ledger recognised by their key, and did not carry out again."""

    def count(self, what: str) -> int:
        """How many of a kind."""
        return sum(w.what == what for w in self.wrong)


def check(evidence: Evidence) -> Verdict:
    """Compare the four accounts."""
    handled = {a: handled_of(a, rows) for a, rows in evidence.journal.items()}
    books = {
        row.agent: Book.model_validate_json(row.state) if row.state else Book()
        for row in evidence.agents
    }
    wrong = [
        *_notes_of_clients(evidence, handled),
        *_notes_of_agents(evidence, handled, books),
        *_twice(handled),
        *_order(evidence, handled, books),
        *_memory(handled, books),
        *_asks(evidence, handled),
    ]
    effects, failed = _effects(evidence, handled)
    return Verdict(
        wrong=[*wrong, *effects],
        handled=sum(map(len, handled.values())),
        failed_turn_effects=failed,
        repeated=sum(e.again for e in evidence.entries),
    )


_AllHandled = dict[str, list[Handled]]


def _where(evidence: Evidence, agent: str, message_id: str) -> str:
    """What became of a message that was not handled."""
    for row in evidence.mail:
        if row.receiver == agent and f"{row.stream}#{row.seq}" == message_id:
            return (
                f"it still waits: turn {row.turn!r}, {row.attempts} attempts, {row.deaths} deaths"
            )
    return "it is nowhere"


def _dead(evidence: Evidence) -> set[tuple[str, str]]:
    return {(d.mail.receiver, f"{d.mail.stream}#{d.mail.seq}") for d in evidence.dead}


def _notes_of_clients(evidence: Evidence, handled: _AllHandled) -> Iterator[Wrong]:
    seen = {
        (h.agent, h.sender, h.number) for hs in handled.values() for h in hs if h.kind == "Note"
    }
    dead = _dead(evidence)
    for deed in evidence.deeds:
        if deed.kind != "tell":
            continue
        key = deed.receiver, deed.client, deed.number
        if deed.outcome == "acked" and key not in seen:
            if (deed.receiver, deed.message_id) in dead:
                continue  # Not lost: a person sees it among the dead letters, and so does ours.
            detail = f"acknowledged at {deed.ended_at:.3f}, {_where(evidence, deed.receiver, deed.message_id)}"
            yield Wrong("lost", *key, detail, (), deed.message_id)
        if deed.outcome == "pending":
            yield Wrong("late", *key, "the tell never ended")
        if deed.outcome.startswith("untyped"):
            yield Wrong("untyped", *key, f"{deed.outcome}: {deed.error}")


def _notes_of_agents(
    evidence: Evidence, handled: _AllHandled, books: dict[str, Book]
) -> Iterator[Wrong]:
    got: dict[tuple[str, str], list[Handled]] = defaultdict(list)
    for hs in handled.values():
        for h in hs:
            if h.kind == "Note" and h.sender in books:
                got[h.agent, h.sender].append(h)
    buried = Counter((d.mail.receiver, d.mail.stream) for d in evidence.dead)
    for sender, book in books.items():
        for receiver, count in book.sent.items():
            numbers = [h.number for h in got.pop((receiver, sender), [])]
            missing = sorted(set(range(1, count + 1)) - set(numbers))
            if len(missing) > buried[receiver, sender]:
                for number in missing:
                    yield Wrong(
                        "lost", receiver, sender, number, f"{count} were sent in committed turns"
                    )
            for number in sorted(set(numbers) - set(range(1, count + 1))):
                yield Wrong("orphan", receiver, sender, number, "no committed turn has sent it")
    for (receiver, sender), hs in got.items():
        for h in hs:
            yield Wrong("orphan", receiver, sender, h.number, "no committed turn has sent it")


def _twice(handled: _AllHandled) -> Iterator[Wrong]:
    for agent, hs in handled.items():
        by: dict[tuple[str, str, int, str], list[Handled]] = defaultdict(list)
        for h in hs:
            by[h.kind, h.sender, h.number, h.asker_turn].append(h)
        for (kind, sender, number, _), same in by.items():
            if len(same) > 1:
                turns = tuple(h.turn for h in same)
                detail = f"{kind} committed by {len(same)} turns: {', '.join(turns)}"
                yield Wrong("duplicated", agent, sender, number, detail, turns, same[0].message_id)


def _order(evidence: Evidence, handled: _AllHandled, books: dict[str, Book]) -> Iterator[Wrong]:
    for agent, hs in handled.items():
        pairs: dict[str, list[Handled]] = defaultdict(list)
        for h in hs:
            if h.kind == "Note":
                pairs[h.sender].append(h)
        for sender, of_pair in pairs.items():
            for one, other in pairwise(of_pair):
                if other.number < one.number:
                    yield Wrong(
                        "reordered",
                        agent,
                        sender,
                        other.number,
                        f"committed after {one.number}",
                        (one.turn, other.turn),
                        other.message_id,
                    )
    for agent, book in books.items():
        for text in book.disorder:
            sender, number, *_ = text.split(" ")
            yield Wrong("reordered", agent, sender, int(number), f"the agent saw: {text}")
    last: dict[tuple[str, str], int] = {}
    for entry in evidence.entries:
        if entry.again or not entry.id.startswith("note "):
            continue
        place = int(entry.id.rpartition(" ")[2])
        before = last.get((entry.receiver, entry.sender), 0)
        if place < before:
            yield Wrong(
                "reordered",
                entry.receiver,
                entry.sender,
                place,
                f"the ledger saw it after {before}",
            )
        last[entry.receiver, entry.sender] = max(before, place)


def _memory(handled: _AllHandled, books: dict[str, Book]) -> Iterator[Wrong]:
    for agent, book in books.items():
        kinds = Counter(h.kind for h in handled[agent])
        notes = Counter(h.sender for h in handled[agent] if h.kind == "Note")
        pairs = [(s, book.notes.get(s, 0), notes[s]) for s in {*notes, *book.notes}]
        pairs += [("(asks)", book.total, kinds["Add"]), ("(ticks)", book.ticks, kinds["Tick"])]
        for sender, remembers, committed in pairs:
            if remembers != committed:
                what = "duplicated" if remembers > committed else "lost"
                detail = f"the agent remembers {remembers}, its journal has {committed}"
                yield Wrong(what, agent, sender, 0, detail)


def _asks(evidence: Evidence, handled: _AllHandled) -> Iterator[Wrong]:
    by_turn = {h.turn: h for hs in handled.values() for h in hs}
    for deed in evidence.deeds:
        if deed.kind != "ask":
            continue
        key = deed.receiver, deed.client, deed.number
        if deed.outcome == "pending" or deed.late:
            detail = f"an ask that ended {PATIENCE_S} s late or never: {deed}"
            yield Wrong("late", *key, detail, (deed.turn,))
        if deed.outcome.startswith("untyped"):
            yield Wrong("untyped", *key, f"{deed.outcome}: {deed.error}", (deed.turn,))
        if deed.outcome != "replied":
            continue
        h = by_turn.get(deed.turn)
        if h is None or (h.agent, h.sender, h.number) != key:
            detail = (
                f"replied from turn {deed.turn}, which did not commit"
                if h is None
                else (f"replied from turn {deed.turn}, which handled {h.sender} {h.number}")
            )
            yield Wrong("untrue", *key, detail, (deed.turn,))
            continue
        wire = record.reply_of(h.row).wire
        total = wire.decode(Added, "checker").total if wire is not None else None
        if total != deed.total:
            detail = f"replied {deed.total}, the journal has {total}"
            yield Wrong("untrue", *key, detail, (deed.turn,))
    for agent, hs in handled.items():
        totals = [record.reply_of(h.row).wire for h in hs if h.kind == "Add"]
        numbers = [w.decode(Added, "checker").total for w in totals if w is not None]
        if numbers != list(range(1, len(numbers) + 1)):
            yield Wrong("untrue", agent, "*", 0, f"totals in the order of commits: {numbers}")


def _turns_of_keys(evidence: Evidence) -> dict[str, str]:
    """The turn that an effect's key belongs to, by whatever row of the journal has it."""
    return {
        row.idem_key: row.turn
        for rows in evidence.journal.values()
        for row in rows
        if row.kind == "Call" and row.idem_key
    }


def _effects(evidence: Evidence, handled: _AllHandled) -> tuple[list[Wrong], int]:
    out: list[Wrong] = []
    failed = 0
    committed = {h.turn: h for hs in handled.values() for h in hs}
    ends = {
        row.turn
        for rows in evidence.journal.values()
        for row in rows
        if row.kind == TURN and row.seq == 0
    }
    turn_of = _turns_of_keys(evidence)
    calls = {
        row.idem_key: row
        for rows in evidence.journal.values()
        for row in rows
        if row.kind == "Call" and row.phase == "result"
    }
    done: dict[tuple[str, str], list[ledger.Entry]] = defaultdict(list)
    keys = set()
    for entry in evidence.entries:
        keys.add(entry.key)
        if entry.again:
            continue
        turn = turn_of.get(entry.key, "")
        number = entry.id.rpartition(" ")[2]
        name = (entry.receiver, entry.sender, int(number) if number.isdigit() else 0)
        if turn in committed:
            if entry.key not in calls:
                out.append(Wrong("orphan", *name, f"{entry} is not in the journal", (turn,)))
            done[entry.receiver, entry.id].append(entry)
        elif turn in ends and not entry.id.startswith("note "):
            failed += 1
        else:
            detail = f"an effect of a turn that did not commit: {entry}"
            out.append(Wrong("orphan", *name, detail, (turn,)))
            done[entry.receiver, entry.id].append(entry)
    for (receiver, id_), same in done.items():
        if len(same) > 1:
            number = id_.rpartition(" ")[2]
            out.append(
                Wrong(
                    "duplicated",
                    receiver,
                    same[0].sender,
                    int(number) if number.isdigit() else 0,
                    f"the ledger did it {len(same)} times: {same}",
                    tuple(turn_of.get(e.key, "") for e in same),
                )
            )
    for key, row in calls.items():
        if key not in keys:
            detail = f"{row.turn} says that {key} was done; the ledger knows nothing of it"
            out.append(Wrong("orphan", row.agent, "", 0, detail, (row.turn,)))
    turns_with_calls = {row.turn for row in calls.values()}
    out += [
        Wrong("orphan", h.agent, h.sender, h.number, "committed without its call", (h.turn,))
        for h in committed.values()
        if h.turn not in turns_with_calls
    ]
    return out, failed


# ---------------------------------------------------------------- for people


def story(wrong: Wrong, evidence: Evidence, logs: Path) -> str:
    """All that is known about one message, in the order in which it happened."""
    name = (wrong.sender, wrong.agent, wrong.number)
    lines = [
        (deed.begun_at, f"client: {deed}")
        for deed in evidence.deeds
        if (deed.client, deed.receiver, deed.number) == name
    ]
    turns = {t for t in wrong.turns if t}
    ids = {wrong.message_id} - {""}
    turn_of = _turns_of_keys(evidence)
    for row in evidence.journal.get(wrong.agent, ()):
        if row.kind != TURN or row.name not in _KINDS:
            continue
        try:
            stream, _, number = row.idem_key.partition("!")[0].rpartition("#")
            body = Envelope.unpack(wrong.agent, stream, int(number), row.args).wire.json()
        except ValueError:
            continue
        if (body["sender"], body.get("number", 0)) == (wrong.sender, wrong.number):
            turns.add(row.turn)
            ids.add(f"{stream}#{number}")
    for entry in evidence.entries:
        mine = (entry.receiver, entry.sender) == (wrong.agent, wrong.sender)
        turn = turn_of.get(entry.key, "")
        if (mine and entry.id.endswith(f" {wrong.number}")) or turn in turns:
            lines.append((entry.at, f"ledger: {entry}"))
            if turn:
                turns.add(turn)
    for rows in evidence.journal.values():
        for row in rows:
            if row.turn in turns:
                short = row._replace(args=row.args[:200], result=row.result[:300])
                text = (
                    f"journal: {short.agent} pos {short.pos} turn {short.turn} seq {short.seq} "
                    f"{short.phase} {short.kind} {short.name} epoch {short.epoch} "
                    f"key {short.idem_key!r} {short.result!r}"
                )
                lines.append((row.ts, text))
    lines += [
        (0.0, f"mail: {mail._replace(envelope=b'')}")
        for mail in evidence.mail
        if mail.receiver == wrong.agent and f"{mail.stream}#{mail.seq}" in ids
    ]
    lines += [
        (0.0, f"{held.agent} is held ({held.hold}): {held.story}")
        for held in evidence.agents
        if held.agent == wrong.agent and held.hold
    ]
    needles = {*turns, *ids}
    for file in sorted(logs.glob("*")):
        if not file.is_file() or not needles:
            continue
        lines += [
            (_time_of(line), f"{file.name}: {line[:600]}")
            for line in file.read_text(errors="replace").splitlines()
            if any(needle in line for needle in needles)
        ]
    lines.sort(key=lambda line: line[0])
    if len(lines) > MAX_LINES:
        lines[MAX_LINES:] = [(lines[-1][0], f"… and {len(lines) - MAX_LINES} lines more")]
    return "\n".join([str(wrong), *(f"    {at:.3f} {text}" for at, text in lines)])


def _time_of(line: str) -> float:
    try:
        found: Any = json.loads(line)
        value = found.get("ts", found.get("time", 0.0))
        if isinstance(value, str):
            from datetime import datetime

            return datetime.fromisoformat(value).timestamp()
        return float(value)
    except (ValueError, AttributeError, TypeError):
        return 0.0
