"""The audit of hash chains, by whoever looks: the rows travel, the hashes are made here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

from llmos.drivers.stores.chain import ChainStore, Finding, verify_agent
from llmos.drivers.stores.rows import AgentRow

LOOKS = 4
"""A wrong end is believed after so many looks: the agent may be at work."""
PAGE = 1_000
"""Agents read at a time."""


class AuditStore(ChainStore, Protocol):
    """What an audit reads."""

    def agents(self, after: str = "", limit: int = PAGE) -> list[AgentRow]:
        """Rows of agents ordered by name, after one."""
        ...


class Head(NamedTuple):
    """The end of an agent's chain. Kept elsewhere, it shows a chain that was forged as a whole."""

    agent: str
    pos: int
    hash: str
    """Hex digits."""


class Audit(NamedTuple):
    """What was found."""

    agents: int
    rows: int
    findings: list[Finding]


def names(store: AuditStore) -> Iterator[str]:
    """All agents that are launched or were and have a row, by name."""
    after = ""
    while page := store.agents(after, PAGE):
        for row in page:
            yield row.agent
        after = page[-1].agent


def heads(store: AuditStore, agents: Iterable[str]) -> Iterator[Head]:
    """The ends of chains; an agent that never wrote a row is left out."""
    for agent in agents:
        end = store.chain_end(agent)
        if end is not None and end.pos:
            yield Head(agent, end.pos, end.head.hex())


def audit(
    store: AuditStore,
    agents: Iterable[str],
    kept: Iterable[Head] = (),
    progress: Callable[[str], None] = lambda agent: None,
) -> Audit:
    """Verify the chains of agents, and that ends that were kept elsewhere are still in them."""
    count = rows = 0
    findings: list[Finding] = []
    for agent in agents:
        progress(agent)
        for _ in range(LOOKS):
            found = verify_agent(store, agent)
            if all(f.problem != "tail" for f in found):
                break
        end = store.chain_end(agent)
        count, rows = count + 1, rows + (end.pos if end is not None else 0)
        findings += found
    for head in kept:
        page = store.chain(head.agent, after=head.pos - 1, limit=1)
        if not page or page[0].pos != head.pos:
            detail = "the end that was kept elsewhere is not in the chain"
            findings.append(Finding(head.agent, head.pos, "missing", detail))
        elif page[0].hash.hex() != head.hash:
            detail = "the end that was kept elsewhere has another hash"
            findings.append(Finding(head.agent, head.pos, "edited", detail))
    return Audit(count, rows, findings)
