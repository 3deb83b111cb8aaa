"""What must be true after a run, whatever happened in it.

Fed from outside the system: what clients were told, what tools did, and what stands in the
store at the end.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from typing import Any, NamedTuple

from llmos.drivers.stores.chain import verify_agent
from llmos.drivers.stores.memory import MemoryStore
from llmos.drivers.stores.rows import TURN
from llmos.syscalls.messages import Envelope
from tests.simulation.programs import ACCOUNTS, PROGRAMS, START, TILL
from tests.simulation.world import Act


class Told(NamedTuple):
    """What a client knows of one of its messages."""

    agent: str
    about: str
    kind: str
    ordered: bool
    """Whether it was sent only after those before it on its line were taken."""


class History:
    """What the clients have seen."""

    def __init__(self) -> None:
        self.sent: dict[str, Told] = {}
        self.taken: list[str] = []
        """Names of messages that were acknowledged."""
        self.replies: dict[str, tuple[str, int, str]] = {}
        """Name of an asked message to (agent, place, value) of its reply."""
        self.errors: dict[str, str] = {}
        """Of asked messages that ended with an error."""


class Violation(NamedTuple):
    """Something that must not be."""

    kind: str
    """lost, duplicated, reordered, money, effect, reply, chain, left, intent, held"""
    detail: str


def check(
    history: History,
    acts: list[Act],
    store: MemoryStore,
    *,
    uncertain: bool,
    zombies: bool,
    quiet: bool,
) -> list[Violation]:
    """All that is wrong.

    Args:
        history: of the clients.
        acts: of the tools.
        store: as it is at the end.
        uncertain: whether answers of tools were lost, so that any agent may be held.
        zombies: whether hosts went on that had been replaced. Then a tool that is not
            idempotent but can be asked may act twice: it can be asked just before the call of
            a zombie arrives, and no kernel can see that.
        quiet: whether the system came to rest.
    """
    found: list[Violation] = []

    def wrong(kind: str, detail: Any) -> None:
        found.append(Violation(kind, str(detail)))

    books: dict[str, dict[str, Any]] = {}
    for agent in PROGRAMS:
        kept = store.agent(agent)
        state = json.loads(kept.state) if kept is not None and kept.state else {}
        books[agent] = {"balance": START, "seen": [], "out": {}, "charged": [], **state}
        if (
            kept is not None
            and kept.hold
            and not (kept.hold == "unknown effect" and (uncertain or agent == TILL))
        ):
            wrong("held", f"{agent}: {kept.story}")
        for finding in verify_agent(store, agent):
            wrong("chain", finding)
    held = {row.agent for row in store.agents(held=True)}
    dead = {}
    for letter in store.dead(limit=1000):
        dead[_about(letter.mail)] = letter
    waiting = {}
    for mail in store.mail():
        waiting[_about(mail)] = mail
        if mail.receiver not in held:
            wrong("left", mail[:3])
    if not quiet:
        wrong("left", "it does not come to rest")
    seen = {agent: Counter(book["seen"]) for agent, book in books.items()}
    handled = Counter[str]()
    for agent, counts in seen.items():
        for about, times in counts.items():
            if times > 1:
                wrong("duplicated", f"{agent} has handled {about} {times} times")
            handled[about] += times

    # What was acknowledged is handled, dead or held.
    for about in history.taken:
        agent = history.sent[about].agent
        if not seen[agent][about] and about not in dead and about not in waiting:
            wrong("lost", f"{about} was acknowledged, and {agent} has not handled it")

    # What agents have sent, and in which order it came.
    lines: dict[tuple[str, str], list[int]] = defaultdict(list)
    for agent, book in books.items():
        for about in book["seen"]:
            line, _, n = about.rpartition("#")
            lines[agent, line].append(int(n))
    unordered = {t.about.rpartition("#")[0] for t in history.sent.values() if not t.ordered}
    for (agent, line), numbers in lines.items():
        if line.startswith(("ring ", "take ", "give ")) or line in unordered:
            continue
        once = list(dict.fromkeys(numbers))
        if once != sorted(once):
            wrong("reordered", f"{agent} has {line} in the order {numbers}")
    for book in books.values():
        for line, count in book["out"].items():
            receivers = [a for a in PROGRAMS if line.endswith(f">{a.rsplit('/', 1)[1]}")]
            if line == "bell*":
                listening = [history.replies[a][0] for a in history.replies if a[:8] == "client0>"]
                receivers = [a for a in ACCOUNTS if a in listening]
            for receiver in receivers:
                for n in range(count):
                    about = f"{line}#{n}"
                    if not seen[receiver][about] and about not in dead and about not in waiting:
                        wrong("lost", f"{about} was sent, and {receiver} has not handled it")
    for agent, line in lines:
        if line.startswith("client") and line.endswith("arm"):
            for n in lines[agent, line]:
                about = f"ring {line}#{n}"
                if not seen[agent][about] and about not in dead and about not in waiting:
                    wrong("lost", f"the timer {about} did not come")

    # Turns, effects, intents.
    ends: dict[str, Any] = {}
    failed = Counter[str]()
    by_turn: dict[str, list[Any]] = defaultdict(list)
    for agent in PROGRAMS:
        for row in store.chain(agent, limit=100_000):
            by_turn[row.turn].append(row)
            if row.seq == 0 and row.kind == TURN:
                if row.turn in ends:
                    wrong("duplicated", f"turn {row.turn} has two ends")
                ends[row.turn] = row
                if row.phase == "failed":
                    envelope = Envelope.unpack(row.agent, "", 0, row.args)
                    body = envelope.wire.json()
                    failed[f"{body['line']}#{body['n']}"] += 1
    pending = {mail.turn for mail in store.mail()} | {d.mail.turn for d in store.dead(limit=1000)}
    intents: dict[str, set[str]] = defaultdict(set)
    for turn, rows in by_turn.items():
        for row in rows:
            if row.phase == "intent":
                intents[row.idem_key].add(turn)
        if turn not in ends and turn not in pending and any(r.phase == "intent" for r in rows):
            names = [(r.agent, r.seq, r.phase, r.kind, r.name) for r in rows]
            wrong("effect", f"turn {turn} was begun, acted and has no end: {names}")
    for (tool, key), times in Counter((a.tool, a.key) for a in acts).items():
        if times > 1 and not (tool == "query" and zombies):
            wrong("effect", f"{tool} has done {key} {times} times: {_by_key(acts)[key]}")
        if key not in intents:
            wrong("effect", f"{tool} has done {_by_key(acts)[key]}, and no intent is recorded")
    for about, keys in _by_about(acts).items():
        root = about
        for prefix in ("take ", "give "):
            root = root.removeprefix(prefix)
        if len(keys) > 1 + failed[about] + failed[root]:
            wrong("effect", f"{about} was done outside under {sorted(keys)}")
    for turn, rows in by_turn.items():
        if turn not in ends:
            continue
        outcomes = {r.seq for r in rows if r.phase in ("result", "failed", "unknown")}
        for row in rows:
            if row.phase == "intent" and row.seq not in outcomes:
                wrong("intent", f"turn {turn} has ended, call {row.seq} has no outcome")
        twice = Counter(r.seq for r in rows if r.phase in ("result", "failed") and r.seq)
        if any(times > 1 for times in twice.values()):
            wrong("intent", f"turn {turn} has two outcomes of one call: {twice}")

    # Replies and money.
    for about, (agent, place, _) in history.replies.items():
        book = books[agent]["seen"]
        if place >= len(book) or book[place] != about:
            wrong("reply", f"{agent} said that {about} is its number {place}, it has {book}")
    _money(books, waiting, dead, failed, wrong)
    # A charge that is in the state was done, with that very outcome.
    done = {f"{a.tool} {a.about}" for a in acts}
    for agent, book in books.items():
        for text in book["charged"]:
            if text.rpartition(" ")[0] not in done:
                wrong("effect", f"{agent} believes that {text!r} was done")
        if agent != TILL and len(book["charged"]) != len(set(book["charged"])):
            wrong("effect", f"{agent} has one outcome twice: {book['charged']}")
    return found


def _about(mail: Any) -> str:
    body = Envelope.unpack(mail.receiver, mail.stream, mail.seq, mail.envelope).wire.json()
    return f"{body['line']}#{body['n']}"


def _by_key(acts: list[Act]) -> dict[str, set[str]]:
    out: dict[str, set[str]] = defaultdict(set)
    for act in acts:
        out[act.key].add(act.about)
    return out


def _by_about(acts: list[Act]) -> dict[str, set[str]]:
    out: dict[str, set[str]] = defaultdict(set)
    for act in acts:
        out[act.about].add(act.key)
    return out


def _money(
    books: dict[str, dict[str, Any]],
    waiting: dict[str, Any],
    dead: dict[str, Any],
    failed: Counter[str],
    wrong: Any,
) -> None:
    """No money comes or goes but what is on its way."""
    total = sum(books[agent]["balance"] for agent in ACCOUNTS)
    on_way = 0
    for mail in [*waiting.values(), *(d.mail for d in dead.values())]:
        wire = Envelope.unpack(mail.receiver, mail.stream, mail.seq, mail.envelope).wire
        if wire.kind == "Credit":
            on_way += wire.json()["amount"]
    # Swaps ask: what was taken by a turn that failed stays taken, as documented.
    half = 0
    takes = Counter[str]()
    for agent in ACCOUNTS:
        for about in books[agent]["seen"]:
            if about.startswith(("take ", "give ")):
                takes[about] += 1
    for about, times in takes.items():
        if about.startswith("take "):
            half += 0 if takes["give " + about[5:]] == times else 1
    if half and not failed:
        wrong("money", f"swaps are half done: {takes}")
    if not half and total + on_way != START * len(ACCOUNTS):
        wrong("money", f"{total} on accounts and {on_way} on the way, of {START * len(ACCOUNTS)}")
