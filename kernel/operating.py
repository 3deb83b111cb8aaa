"""What a person does with a system's records: dead letters, unknown effects, held agents,
timers, mail, the audit trail, backups.

The kernel carries it out on the store that it owns; of a system that is down the same is
done on its store, opened directly (:mod:`llmos.kernel.offline`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from llmos.drivers.errors import LlmosError, ToolRefused
from llmos.drivers.stores.rows import (
    TURN,
    AgentRow,
    Append,
    BeginMail,
    DeadLetter,
    DropDead,
    JournalRow,
    LaunchRow,
    MailRow,
    Own,
    Part,
    ReviveDead,
    SetHold,
    TimerRow,
    Write,
    shard_of,
)
from llmos.kernel import record
from llmos.kernel.dispatch import RETRY
from llmos.kernel.recording import Recording
from llmos.syscalls.effects import CallResult
from llmos.syscalls.errors import UnknownAgent
from llmos.syscalls.labels import Labels, Provenance
from llmos.syscalls.messages import Envelope

UNKNOWN_EFFECT = "unknown effect"
"""``hold`` of an agent of which nobody knows whether an effect happened."""
QUARANTINED = "quarantined"
"""``hold`` of an agent that failed too often, or that left the way it had taken before."""

PAGE = 1_000
"""Rows read at a time."""
MAX_ENDS = 5_000
"""Ends of turns among which effects of cancelled questions are looked for."""
MAX_LISTED = 10_000
"""Of anything are listed."""
CHUNK = 200
"""Dead letters changed in one commit."""
FAR_S = 1e12
"""Later than any timer."""


class UnknownRecord(LlmosError):
    """The store has no turn, dead letter or effect of that name."""

    def __init__(self, kind: str, name: str, *, remedy: str = "") -> None:
        self.kind, self.name = kind, name
        super().__init__(f"There is no {kind} {name!r}", remedy=remedy)


class OperationRefused(LlmosError):
    """It would do harm, or makes no sense as things are."""

    def __init__(self, what: str, reason: str, *, remedy: str = "") -> None:
        self.what, self.reason = what, reason
        super().__init__(f"{what}: {reason}", remedy=remedy)


class Held(NamedTuple):
    """An agent that gets no turns."""

    agent: str
    hold: str
    story: str


class UnknownEffect(NamedTuple):
    """A call of a tool of which nobody knows whether it was carried out."""

    agent: str
    turn: str
    seq: int
    tool: str
    args: bytes
    """JSON of the request."""
    idem_key: str
    """What the tool was given to tell repetitions by."""
    error: bytes
    """JSON of why it is not known."""
    ts: float
    """When the call began, seconds since 1970."""
    ended: bool = False
    """Whether its turn has ended: it was cancelled in the middle of the call, and nothing waits
    for what a person says of it."""


class DeadStory(NamedTuple):
    """A dead letter with the slice of the journal: what its attempts did."""

    letter: DeadLetter
    turns: list[list[JournalRow]]
    """The rows of each attempt's turn, the first attempt first."""


class Ledger(Protocol):
    """The store, and who has to be told of changes that no host has made."""

    async def read(self, method: str, *args: Any, **options: Any) -> Any:
        """Call a reading method of the store; references to blobs in turns are resolved."""
        ...

    async def commit(self, parts: Sequence[Part]) -> None:
        """Make parts durable; raises why the first one that was refused was."""
        ...

    async def launch_of(self, agent: str) -> LaunchRow | None:
        """The launch of an agent, or of any key of its program."""
        ...

    async def resolve(self, agent: str) -> str:
        """The full id of an agent named by an unambiguous part; raises UnknownAgent."""
        ...

    async def go_on(self, agent: str) -> None:
        """The agent is held no more."""
        ...

    async def mail_came(self) -> None:
        """There is new mail in the store."""
        ...

    async def backup(self, target: str) -> int:
        """Write a consistent copy; returns its bytes."""
        ...

    async def drain(self, host: str, timeout_s: float) -> None:
        """Empty a host and stop it."""
        ...

    async def rebalance(self) -> int:
        """Spread the shards over the hosts; returns how many move."""
        ...


class Operator:
    """The operations. Every method raises StoreUnavailable where the store cannot be used."""

    def __init__(self, ledger: Ledger, time: Callable[[], float]) -> None:
        self._ledger = ledger
        self._time = time

    async def _agent(self, agent: str) -> str:
        # A full id is taken as it is: who was killed has a journal, too.
        return agent if agent.count("/") == 2 else await self._ledger.resolve(agent)

    # ---------------------------------------------------------------- turns

    async def turns(self, agent: str | None = None, limit: int = 50) -> list[JournalRow]:
        """Ends of turns, those that began last first."""
        if agent is not None:
            try:
                agent = await self._agent(agent)
            except UnknownAgent:
                return []
        found: list[JournalRow] = await self._ledger.read("turns", agent=agent, limit=limit)
        return found

    async def turn(self, turn: str) -> list[JournalRow]:
        """All rows of a turn by pos, ended or not; a unique prefix of the id will do."""
        found: list[JournalRow] = await self._ledger.read("turn", turn)
        return found

    async def recording(self, turn: str) -> Recording:
        """A turn with all that it takes to run it again.

        Raises:
            UnknownRecord: no such turn.
            OperationRefused: its agent is not launched any more, or the message or the state
                that it began with is not there any more.
        """
        rows = await self.turn(turn)
        if not rows:
            raise UnknownRecord("turn", turn, remedy="See: llmos strace")
        agent, turn = rows[0].agent, rows[0].turn
        launch = await self._ledger.launch_of(agent)
        if launch is None:
            raise OperationRefused(
                f"Turn {turn} cannot be run again",
                f"{agent} is not launched any more",
                remedy="Launch it again; its journal is still there",
            )
        row: AgentRow | None = await self._ledger.read("agent", agent)
        version = row.state_version if row is not None and row.state is not None else 0
        end = next((r for r in rows if r.kind == TURN), None)
        if end is not None:
            stream, _, seq = end.idem_key.rpartition("#")
            # A failed attempt has its number behind: ``stream#seq!2``.
            number = int(seq.partition("!")[0] or 0)
            envelope = Envelope.unpack(agent, stream, number, end.args)
            base = int(json.loads(end.result)["base"])
            state = await self._state(end, base)
            return Recording(launch, envelope, base, state, version, rows)
        waiting: list[MailRow] = await self._ledger.read("waiting", agent)
        mail = next((m for m in waiting if m.turn == turn), None)
        if mail is None:
            raise OperationRefused(
                f"Turn {turn} cannot be run again", "it has no end, and its message is gone"
            )
        envelope = Envelope.unpack(agent, mail.stream, mail.seq, mail.envelope)
        row = row or AgentRow(agent)
        return Recording(launch, envelope, row.changes, row.state, version, rows)

    async def _state(self, end: JournalRow, base: int) -> bytes | None:
        """The state that a turn began with: what the last turn before it with this number left."""
        before: float | None = end.ts
        while base:
            page: list[JournalRow] = await self._ledger.read(
                "turns", agent=end.agent, limit=PAGE, before=before
            )
            for row in page:
                result = json.loads(row.result) if row.result else {}
                if row.pos < end.pos and "state" in result and result["base"] + 1 == base:
                    return json.dumps(result["state"], separators=(",", ":")).encode()
            if len(page) < PAGE:
                raise OperationRefused(
                    f"Turn {end.turn} cannot be run again",
                    f"the turn that left state {base} of {end.agent} is not in the journal",
                )
            before = page[-1].ts
        return None

    # ---------------------------------------------------------------- audit

    async def agents(self, after: str = "", limit: int = PAGE) -> list[AgentRow]:
        """Rows of agents ordered by name, after one."""
        found: list[AgentRow] = await self._ledger.read("agents", after=after, limit=limit)
        return found

    async def chain(self, agent: str, after: int = 0, limit: int = PAGE) -> list[JournalRow]:
        """An agent's journal by pos, as its hashes were made: blobs are references."""
        found: list[JournalRow] = await self._ledger.read("chain", agent, after=after, limit=limit)
        return found

    async def chain_end(self, agent: str) -> AgentRow | None:
        """An agent's row, dropped or not: it knows the end of the chain."""
        found: AgentRow | None = await self._ledger.read("chain_end", agent)
        return found

    async def full_id(self, agent: str) -> str:
        """The id of an agent named by an unambiguous part.

        Raises:
            UnknownAgent
        """
        return await self._agent(agent)

    # ---------------------------------------------------------------- dead letters

    async def dead_letters(self, limit: int = 100) -> list[DeadLetter]:
        """Dead letters, newest first."""
        found: list[DeadLetter] = await self._ledger.read("dead", limit=limit)
        return found

    async def _dead(self, ids: Sequence[int] | None) -> list[DeadLetter]:
        """Those of these ids; None is all.

        Raises:
            UnknownRecord
        """
        wanted = set(ids) if ids is not None else None
        limit = PAGE
        while True:
            found = await self.dead_letters(limit)
            if len(found) < limit or (wanted is not None and wanted <= {d.id for d in found}):
                break
            limit *= 10
        if wanted is None:
            return found
        missing = sorted(wanted - {d.id for d in found})
        if missing:
            raise UnknownRecord("dead letter", str(missing[0]), remedy="See: llmos dlq list")
        return [d for d in found if d.id in wanted]

    async def dead_letter(self, id: int) -> DeadStory:
        """One, with what its attempts did.

        Raises:
            UnknownRecord
        """
        (letter,) = await self._dead([id])
        mail = letter.mail
        turns: list[str] = []
        for attempt in range(1, mail.attempts + 1):
            key = f"{mail.stream}#{mail.seq}!{attempt}"
            row: JournalRow | None = await self._ledger.read("handled", mail.receiver, key)
            if row is not None:
                turns.append(row.turn)
        if mail.turn:
            turns.append(mail.turn)  # The last one may have no end: its host was lost.
        turns = list(dict.fromkeys(turns))
        rows: dict[str, list[JournalRow]] = await self._ledger.read("turns_rows", turns)
        return DeadStory(letter, [rows[t] for t in turns if t in rows])

    async def retry_dead(self, ids: Sequence[int] | None = None) -> list[int]:
        """Put dead letters back into their mailboxes, at the end, for one more attempt each;
        returns their ids.

        One whose last turn has ended begins a new turn, as any attempt does. One whose hosts
        were lost goes on with its turn: what is recorded of it is not done again.

        Args:
            ids: Which; None is all.

        Raises:
            UnknownRecord: one of them is none; nothing was changed.
        """
        letters = sorted(await self._dead(ids))
        for start in range(0, len(letters), CHUNK):
            some = letters[start : start + CHUNK]
            begun = [d.mail.turn for d in some if d.mail.turn]
            rows: dict[str, list[JournalRow]] = await self._ledger.read("turns_rows", begun)
            parts: list[Part] = []
            for letter in some:
                part: list[Write] = [ReviveDead(letter.id)]
                if any(row.kind == TURN for row in rows.get(letter.mail.turn, ())):
                    # Its results, handed back, would only fail again.
                    part.append(BeginMail(*letter.mail.key, letter.mail.attempts, 0, "", 0))
                parts.append(part)
            await self._ledger.commit(parts)
        if letters:
            await self._ledger.mail_came()
        return [letter.id for letter in letters]

    async def drop_dead(self, ids: Sequence[int]) -> list[int]:
        """Throw dead letters away; returns their ids.

        Raises:
            UnknownRecord: one of them is none; nothing was changed.
        """
        letters = sorted(await self._dead(ids))
        await self._ledger.commit([[DropDead(letter.id)] for letter in letters])
        return [letter.id for letter in letters]

    # ---------------------------------------------------------------- held agents, effects

    async def held(self) -> list[Held]:
        """Agents that get no turns, by name."""
        out: list[Held] = []
        after = ""
        while len(out) < MAX_LISTED:
            rows: list[AgentRow] = await self._ledger.read(
                "agents", after=after, limit=PAGE, held=True
            )
            out += [Held(row.agent, row.hold, row.story) for row in rows]
            if len(rows) < PAGE:
                break
            after = rows[-1].agent
        return out

    async def unknown_effects(self) -> list[UnknownEffect]:
        """Calls of tools that nobody knows the outcome of: of agents that are held for it, and
        of questions that were cancelled in the middle of the call, among the last
        ``MAX_ENDS`` turns."""
        out: list[UnknownEffect] = []
        for held in await self.held():
            if held.hold == UNKNOWN_EFFECT:
                out += await self._effects_of(held)
        of = {
            row.turn: row.agent
            for row in await self.turns(None, MAX_ENDS)
            # Not attempts at a message that was told: the next one has looked into it.
            if row.phase == "failed" and "!" not in row.idem_key.rpartition("#")[2]
        }
        turns = list(of)
        for start in range(0, len(turns), CHUNK):
            found: dict[str, list[JournalRow]] = await self._ledger.read(
                "turns_rows", turns[start : start + CHUNK]
            )
            for turn, rows in found.items():
                out += [e._replace(ended=True) for e in _unknown(of[turn], rows)]
        return out

    async def _effects_of(self, held: Held) -> list[UnknownEffect]:
        waiting: list[MailRow] = await self._ledger.read("waiting", held.agent)
        turns = [mail.turn for mail in waiting if mail.turn]
        by_turn: dict[str, list[JournalRow]] = await self._ledger.read("turns_rows", turns)
        return [effect for turn in turns for effect in _unknown(held.agent, by_turn.get(turn, []))]

    async def resolve(
        self,
        effect: str,
        how: Literal["result", "failed", "retry"],
        value: Any = None,
    ) -> UnknownEffect:
        """Say what became of an unknown effect; its agent goes on.

        Args:
            effect: ``turn/seq``; a unique beginning of the turn will do.
            how: ``result``: it was carried out. ``failed``: it was not, and will not be.
                ``retry``: it was not, and is to be tried again.
            value: Plain JSON data that the tool would have given back; for ``failed`` the
                reason, for people.

        Raises:
            UnknownRecord: no such effect is unknown.
            OperationRefused: ``retry``, of a turn that has ended.
            StaleEpoch: the agent changed its owner just now; try again.
        """
        found = await self._find_effect(effect)
        if found.ended and how == "retry":
            raise OperationRefused(
                f"{effect} cannot be tried again",
                "its turn has ended, and nobody waits for it",
                remedy="Say whether it was done, and ask the agent again if it was not",
            )
        turns = await self.turn(found.turn)
        rows = [row for row in turns if row.seq == found.seq]
        model = next(row for row in rows if row.kind != RETRY)
        shards: dict[int, int] = await self._ledger.read("shards")
        epoch = shards.get(shard_of(found.agent))
        row = JournalRow(
            agent=found.agent,
            turn=found.turn,
            seq=found.seq,
            phase="result",
            kind=model.kind,
            name=model.name,
            args_hash=model.args_hash,
            args=found.args,
            idem_key=found.idem_key,
            epoch=epoch or 0,
            code_version=model.code_version,
            ts=self._time(),
        )
        match how:
            case "result":
                result = CallResult(output=value, reference="", idem_key=found.idem_key)
                tenant = found.agent.split("/", 1)[0]
                person = Provenance(kind="person", source=model.name, version=found.idem_key)
                row = row._replace(
                    result=record.result_of(result),
                    # As of any answer of a tool: it may repeat what strangers have said.
                    labels=record.pack_labels(Labels(tenants=frozenset({tenant}), trusted=False)),
                    provenance=record.pack_provenance((person,)),
                )
            case "failed":
                refused = ToolRefused(model.name, str(value))
                row = row._replace(phase="failed", result=record.error_of(refused))
            case "retry":
                # The next attempt has its number as its part, so that its rows are new ones.
                attempt = 1 + max(row.part for row in rows)
                row = row._replace(phase="mark", kind=RETRY, part=attempt)
        part: list[Write] = [Append(row)]
        if not found.ended:
            part.append(SetHold(found.agent, ""))
        if epoch is not None:
            part.insert(0, Own(found.agent, epoch))
        await self._ledger.commit([part])
        if not found.ended:
            await self._ledger.go_on(found.agent)
        return found

    async def _find_effect(self, effect: str) -> UnknownEffect:
        turn, slash, seq = effect.rpartition("/")
        unknown = await self.unknown_effects()
        found = [e for e in unknown if e.turn.startswith(turn) and str(e.seq) == seq]
        if not turn or not slash or len(found) != 1:
            known = ", ".join(f"{e.turn}/{e.seq}" for e in unknown[:10]) or "none"
            raise UnknownRecord("unknown effect", effect, remedy=f"Unknown are: {known}")
        return found[0]

    async def release(self, agent: str) -> Held:
        """Lift an agent's quarantine; returns what it was held for.

        Raises:
            UnknownAgent, OperationRefused: it is not held, or for an unknown effect.
        """
        agent = await self._agent(agent)
        row: AgentRow | None = await self._ledger.read("agent", agent)
        if row is None and await self._ledger.launch_of(agent) is None:
            raise UnknownAgent(agent)
        if row is None or not row.hold:
            raise OperationRefused(f"{agent} cannot be released", "it is not held")
        if row.hold == UNKNOWN_EFFECT:
            # To let it go on would be to do the thing again, or to forget that it was done.
            raise OperationRefused(
                f"{agent} cannot be released",
                "nobody knows whether an effect of it happened",
                remedy="See llmos effects list, then llmos effects resolve",
            )
        await self._ledger.commit([[SetHold(agent, "")]])
        await self._ledger.go_on(agent)
        return Held(agent, row.hold, row.story)

    # ---------------------------------------------------------------- timers and mail

    async def timers(self, agent: str | None = None) -> list[TimerRow]:
        """Timers, the earliest first; of one agent by name."""
        if agent is not None:
            mine: list[TimerRow] = await self._ledger.read("timers_of", await self._agent(agent))
            return mine
        found: list[TimerRow] = await self._ledger.read("timers", before=FAR_S, limit=MAX_LISTED)
        return found

    async def mail(self, agent: str) -> list[MailRow]:
        """What waits for an agent, in the order it came."""
        found: list[MailRow] = await self._ledger.read("waiting", await self._agent(agent))
        return found

    # ---------------------------------------------------------------- the system

    async def backup(self, target: str) -> int:
        """Write a consistent copy of the store while it is in use; returns its bytes.

        Args:
            target: A path of the machine that the store is written on, which must not exist.
        """
        return await self._ledger.backup(target)

    async def drain(self, host: str, timeout_s: float = 120.0) -> None:
        """Give a host's agents to the others and stop it.

        Raises:
            UnknownProcess, NoOtherHost, DeadlineExceeded.
        """
        await self._ledger.drain(host, timeout_s)

    async def rebalance(self) -> int:
        """Spread agents evenly over the hosts; returns how many shards move."""
        return await self._ledger.rebalance()


CHANGES = frozenset(
    {"retry_dead", "drop_dead", "resolve", "release", "backup", "drain", "rebalance"}
)
"""Operations that must not be asked twice because an answer was lost."""

OPERATIONS = frozenset(name for name in vars(Operator) if not name.startswith("_"))
"""What the kernel carries out when it is asked."""


def _unknown(agent: str, rows: Sequence[JournalRow]) -> list[UnknownEffect]:
    """Of one turn's rows, the effects of which no outcome is recorded after an ``unknown``."""
    by_seq: dict[int, list[JournalRow]] = {}
    for row in rows:
        if row.kind != TURN and row.idem_key:
            by_seq.setdefault(row.seq, []).append(row)
    out = []
    for seq, some in sorted(by_seq.items()):
        if some[-1].phase != "unknown":
            continue
        first, last = some[0], some[-1]
        args = next((row.args for row in some if row.args), b"")
        out.append(
            UnknownEffect(
                agent, last.turn, seq, last.name, args, last.idem_key, last.result, first.ts
            )
        )
    return out
