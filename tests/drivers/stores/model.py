"""The rules of the writes once more, as plainly as they can be put: slow, and sure.

Every part is carried out on a copy of everything, which is thrown away if it is refused.
"""

from __future__ import annotations

import copy
from typing import Any

from llmos.drivers.stores.rows import (
    NO_HASH,
    AgentRow,
    Append,
    BeginMail,
    BuryMail,
    DeadLetter,
    DropDead,
    DropLaunch,
    DropMonitor,
    DropTimer,
    EndMail,
    MonitorRow,
    Own,
    PutBlob,
    PutLaunch,
    PutMail,
    PutMonitor,
    PutTimer,
    ReviveDead,
    SaveAgent,
    SetHold,
    Subscribe,
    TakeShards,
    TakeTimer,
    Unsubscribe,
    shard_of,
)


class Refused(Exception):
    pass


class Model:
    """Lists of rows. Chains are counted, not hashed."""

    def __init__(self) -> None:
        self.launches: dict[str, Any] = {}
        self.shards: dict[int, int] = {}
        self.agents: dict[str, AgentRow] = {}
        self.dropped: set[str] = set()
        self.journal: list[Any] = []
        self.blobs: dict[str, bytes] = {}
        self.mail: list[Any] = []
        self.letters: list[DeadLetter] = []
        self.timers: dict[tuple[str, str], Any] = {}
        self.topics: set[tuple[str, str]] = set()
        self.monitors: dict[tuple[str, str], bool] = {}
        self.arrival = self.dead_id = 0

    def commit(self, parts: Any) -> list[str | None]:
        return [self.part(part) for part in parts]

    def part(self, part: Any) -> str | None:
        before = copy.copy(vars(self))
        for name, value in before.items():
            setattr(self, name, copy.copy(value))
        ended = {r.turn for r in self.journal if r.seq == 0 and r.kind == "turn"}
        again = any(
            isinstance(w, Append)
            and w.row.seq == 0
            and w.row.kind == "turn"
            and w.row.turn in ended
            for w in part
        ) and any(isinstance(w, EndMail) and self.find(w) is None for w in part)
        try:
            for write in part:
                if again and not isinstance(write, Own):
                    break
                self.write(write)
        except Refused as refused:
            vars(self).update(before)
            return str(refused)
        return None

    def find(self, key: Any) -> Any:
        wanted = (key.receiver, key.stream, key.seq)
        return next((m for m in self.mail if m[:3] == wanted), None)

    def touch(self, agent: str, **values: Any) -> None:
        self.dropped.discard(agent)
        self.agents[agent] = self.agents.get(agent, AgentRow(agent))._replace(**values)

    def arrive(self, row: Any) -> None:
        self.arrival += 1
        self.mail.append(row._replace(arrival=self.arrival))

    def covered(self, launch: str, agent: str) -> bool:
        if not launch.endswith("/*"):
            return launch == agent
        return agent.rsplit("/", 1)[0] + "/*" == launch and agent not in self.launches

    def write(self, w: Any) -> None:
        match w:
            case Own():
                launch = self.launches.get(w.agent) or self.launches.get(
                    w.agent.rsplit("/", 1)[0] + "/*"
                )
                if self.shards.get(shard_of(w.agent), -1) != w.epoch or w.epoch == -1:
                    raise Refused("StaleEpoch")
                if w.launch and (launch is None or launch.id != w.launch):
                    raise Refused("StaleEpoch")
            case TakeShards():
                self.shards.update(dict.fromkeys(w.shards, w.epoch))
            case PutLaunch():
                self.launches[w.row.agent] = w.row
            case DropLaunch():
                self.launches.pop(w.agent, None)
                gone = [a for a in self.agents if self.covered(w.agent, a)]
                for agent in gone:
                    row = self.agents[agent]
                    self.agents[agent] = AgentRow(agent, sent=row.sent, pos=row.pos, head=row.head)
                    self.dropped.add(agent)

                def off(agent: str) -> bool:
                    return self.covered(w.agent, agent)

                self.mail = [m for m in self.mail if not off(m.receiver)]
                self.timers = {k: t for k, t in self.timers.items() if not off(k[0])}
                self.topics = {t for t in self.topics if not off(t[1])}
                self.monitors = {
                    k: v for k, v in self.monitors.items() if not off(k[0]) and not off(k[1])
                }
            case Append():
                key = (*w.row[1:4], w.row.part)
                if not any((*r[1:4], r.part) == key for r in self.journal):
                    pos = self.agents.get(w.row.agent, AgentRow("")).pos + 1
                    self.touch(w.row.agent, pos=pos)
                    self.journal.append(w.row._replace(pos=pos))
            case PutBlob():
                self.blobs.setdefault(w.sha256, w.data)
            case SaveAgent():
                sent = max(w.sent, self.agents.get(w.agent, AgentRow("")).sent)
                self.touch(w.agent, sent=sent)
                if w.state is not None:
                    self.touch(
                        w.agent, state=w.state, state_version=w.state_version, changes=w.changes
                    )
            case SetHold():
                if w.hold or (w.agent in self.agents and w.agent not in self.dropped):
                    self.touch(w.agent, hold=w.hold, story=w.story)
            case PutMail():
                handled = any(
                    r.agent == w.row.receiver
                    and r.seq == 0
                    and r.kind == "turn"
                    and r.idem_key == f"{w.row.stream}#{w.row.seq}"
                    for r in self.journal
                )
                dead = any(d.mail[:3] == w.row[:3] for d in self.letters)
                if not handled and not dead and self.find(w.row) is None:
                    waiting = sum(m.receiver == w.row.receiver for m in self.mail)
                    if w.limit and waiting >= w.limit:
                        raise Refused("MailboxFull")
                    self.arrive(w.row)
            case BeginMail():
                if row := self.find(w):
                    self.mail[self.mail.index(row)] = row._replace(
                        attempts=w.attempts,
                        deaths=w.deaths,
                        turn=w.turn,
                        epoch=w.epoch,
                        not_before=w.not_before,
                    )
            case EndMail():
                row = self.find(w)
                if row is None:
                    raise Refused("AlreadyHandled")
                self.mail.remove(row)
            case BuryMail():
                if row := self.find(w):
                    self.mail.remove(row)
                    self.dead_id += 1
                    self.letters.append(DeadLetter(self.dead_id, row, w.reason, w.story, w.died_at))
            case ReviveDead() | DropDead():
                for letter in [d for d in self.letters if d.id == w.id]:
                    self.letters.remove(letter)
                    if isinstance(w, ReviveDead):
                        self.arrive(letter.mail._replace(deaths=0, not_before=0.0))
            case PutTimer():
                self.timers[w.row.agent, w.row.name] = w.row
            case DropTimer():
                timer = self.timers.get((w.agent, w.name))
                if timer and (w.due is None or w.due == timer.due):
                    del self.timers[w.agent, w.name]
            case TakeTimer():
                timer = self.timers.get((w.agent, w.name))
                if timer is None or timer.due != w.due:
                    raise Refused("AlreadyHandled")
                del self.timers[w.agent, w.name]
            case Subscribe():
                self.topics.add((w.topic, w.agent))
            case Unsubscribe():
                self.topics.discard((w.topic, w.agent))
            case PutMonitor():
                self.monitors[w.row.watched, w.row.watcher] = w.row.linked
            case DropMonitor():
                self.monitors.pop((w.watched, w.watcher), None)
            case _:
                raise TypeError(w)

    def visible(self) -> dict[str, Any]:
        return {
            "launches": sorted(self.launches.values()),
            "shards": self.shards,
            "agents": [self.agents[a] for a in sorted(self.agents) if a not in self.dropped],
            "ends": {a: self.agents[a] for a in self.agents},
            "journal": sorted(self.journal, key=lambda r: (r.agent, r.pos)),
            "mail": self.mail,
            "dead": self.letters[::-1],
            "timers": sorted(self.timers.values(), key=lambda t: (t.due, t.agent, t.name)),
            "topics": sorted(self.topics),
            "monitors": [MonitorRow(*k, v) for k, v in sorted(self.monitors.items())],
            "blobs": self.blobs,
        }


def seen(store: Any, agents: list[str], topics: list[str], blobs: list[str]) -> dict[str, Any]:
    """The same of a store, without its hashes."""
    plain = {"head": NO_HASH}
    ends = {a: store.chain_end(a) for a in agents}
    journal = [r for a in sorted(agents) for r in store.chain(a, limit=10**6)]
    return {
        "launches": store.launches(),
        "shards": store.shards(),
        "agents": [r._replace(**plain) for r in store.agents()],
        "ends": {a: r._replace(**plain) for a, r in ends.items() if r is not None},
        "journal": [r._replace(prev_hash=b"", hash=b"") for r in journal],
        "mail": store.mail(),
        "dead": store.dead(),
        "timers": store.timers(before=1e12),
        "topics": sorted((t, a) for t in topics for a in store.subscribers(t)),
        "monitors": [m for a in sorted(agents) for m in store.monitors(a)],
        "blobs": {b: d for b in blobs if (d := store.blob(b)) is not None},
    }
