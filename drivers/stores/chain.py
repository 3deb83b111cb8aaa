"""The hash chain of an agent's journal: every row seals the one before it.

A row's hash is SHA-256 over the hash before it and the row's canonical bytes, the msgpack of
all its fields but the hash itself. The agent's own row keeps the length of the chain and its
last hash, so that a tail that was cut off is missed as well. Whoever can write the database
can also forge all of a chain: it shows changes to those who kept a hash elsewhere, and
accidents to everybody.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import sha256
from typing import Literal, NamedTuple, Protocol

import msgpack

from llmos.drivers.stores.rows import NO_HASH, AgentRow, JournalRow

_TS = JournalRow._fields.index("ts")
_PART = JournalRow._fields.index("part")


def seal(row: JournalRow, pos: int, prev_hash: bytes) -> JournalRow:
    """The row at its place in the chain, with its hash."""
    # Floats, always: a database gives a whole number back as 1.0, and msgpack tells it from 1.
    # Adding zero makes -0.0 positive, which databases do too.
    body = (
        *row[:_TS],
        float(row.ts) + 0.0,
        float(row.elapsed_s) + 0.0,
        row.part,
        pos,
        prev_hash,
    )
    digest = sha256(prev_hash + msgpack.packb(body)).digest()
    return tuple.__new__(JournalRow, (*body, digest))


def digest(row: JournalRow) -> bytes:
    """The hash that the row must have, from its other fields."""
    return seal(row, row.pos, row.prev_hash).hash


class Finding(NamedTuple):
    """Something that is wrong with a chain."""

    agent: str
    pos: int
    """Where, in the chain."""
    problem: Literal["edited", "missing", "order", "tail"]
    """``edited``: a row's fields do not give its hash. ``missing``: rows are not there, or
    others stand in their place. ``order``: rows do not come by pos. ``tail``: the end is
    not the one that the agent's row knows."""
    detail: str
    """For people."""


def verify(rows: Iterable[JournalRow], agent_row: AgentRow | None) -> list[Finding]:
    """What is wrong with one agent's chain; nothing: it is whole.

    ``rows`` are all of it by pos, and may come from a generator: they are looked at one by
    one. ``agent_row`` is None where the agent has none.
    """
    findings: list[Finding] = []
    agent = agent_row.agent if agent_row else ""
    pos, head = 0, NO_HASH
    for row in rows:
        agent = agent or row.agent
        if row.agent != agent:
            findings.append(
                Finding(agent, row.pos, "edited", f"the row names another agent, {row.agent}")
            )
        if row.pos <= pos:
            findings.append(Finding(agent, row.pos, "order", f"it comes after row {pos}"))
        elif row.pos > pos + 1:
            gone = f"row {pos + 1}" if row.pos == pos + 2 else f"rows {pos + 1} to {row.pos - 1}"
            findings.append(
                Finding(agent, pos + 1, "missing", f"{gone} of turn {row.turn} or before")
            )
        elif row.prev_hash != head:
            findings.append(
                Finding(agent, row.pos, "missing", f"row {pos} is not the one that it follows")
            )
        if digest(row) != row.hash:
            findings.append(
                Finding(
                    agent,
                    row.pos,
                    "edited",
                    f"turn {row.turn}, seq {row.seq}, {row.phase}: its fields do not give its hash",
                )
            )
        pos, head = row.pos, row.hash
    if agent_row is None:
        if pos:
            findings.append(Finding(agent, pos, "tail", "the agent's row is gone"))
    elif (agent_row.pos, agent_row.head) != (pos, head):
        findings.append(
            Finding(
                agent,
                pos + 1,
                "tail",
                f"the agent's row knows {agent_row.pos} rows and another last hash, there are {pos}"
                if agent_row.pos != pos
                else "its last hash is not the one that the agent's row knows",
            )
        )
    return findings


class ChainStore(Protocol):
    """The two reads of a store that its chains are verified by."""

    def chain(self, agent: str, *, after: int = 0, limit: int = 1000) -> list[JournalRow]:
        """An agent's journal by pos."""
        ...

    def chain_end(self, agent: str) -> AgentRow | None:
        """Its row, dropped or not."""
        ...


def verify_agent(store: ChainStore, agent: str) -> list[Finding]:
    """What is wrong with an agent's chain in a store, page by page; it may be at work."""
    end = store.chain_end(agent)
    return verify(_rows_up_to(store, agent, end.pos if end else 0), end)


def _rows_up_to(store: ChainStore, agent: str, last: int) -> Iterator[JournalRow]:
    """The chain's rows up to one, and those after it that the agent's row never came to know."""
    after = 0
    while page := store.chain(agent, after=after):
        for row in page:
            if row.pos > last:
                end = store.chain_end(agent)
                if end is not None and end.pos >= row.pos:
                    return  # Added since the look began.
            yield row
        after = page[-1].pos
