"""Shards: the pieces in which agents are owned, and how they are spread over hosts.

::

    unreachable ──▶ moving ──▶ served ──▶ (released) ──▶ moving ──▶ …
                       ▲          │
                       └──────────┘  its host was restarted, under another epoch

A shard is moving from the moment it is given to a host until the store holds that host's
epoch, so that ``served`` always means: the store refuses everybody else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from llmos.kernel.core.types import ShardState


@dataclass(slots=True)
class Shard:
    """A part of all agents: see :func:`llmos.drivers.stores.rows.shard_of`."""

    host: str = ""
    """Whom it belongs to; empty while it is unreachable."""
    state: ShardState = ShardState.UNREACHABLE
    to: str = ""
    """Its host was asked to release it for this one."""
    left: frozenset[str] = frozenset()
    """Hosts being drained that it was taken from, until the new one's Fence is answered."""

    def validate(self) -> None:
        """State and fields agree."""
        assert (self.state is ShardState.UNREACHABLE) == (not self.host), self
        assert not self.left or self.state is ShardState.MOVING, self
        assert not self.to or self.host, self
        assert not self.to or self.to != self.host, self


def fewest(loads: Mapping[str, int]) -> str:
    """The host with fewest shards, the first of them."""
    return min(loads, key=lambda name: loads[name])


def balance(
    loads: Mapping[str, int], movable: Mapping[str, Sequence[int]]
) -> list[tuple[int, str, str]]:
    """Even out loads to within one, with as few moves as possible.

    Every move goes from the fullest host to the emptiest, so none is made twice and none
    is undone.

    Args:
        loads: shards of each host, those on their way to it among them.
        movable: which of them may be moved.

    Returns:
        (shard, from, to) of each move.
    """
    loads = dict(loads)
    left = {host: list(numbers) for host, numbers in movable.items()}
    moves: list[tuple[int, str, str]] = []
    while True:
        donors = [host for host in loads if left.get(host)]
        if not donors:
            return moves
        donor = max(donors, key=lambda name: loads[name])
        taker = fewest(loads)
        if loads[donor] - loads[taker] <= 1:
            return moves
        moves.append((left[donor].pop(), donor, taker))
        loads[donor] -= 1
        loads[taker] += 1


def grouped(moves: Iterable[tuple[int, str, str]]) -> list[tuple[str, str, tuple[int, ...]]]:
    """Moves as (from, to, shards): one for each pair."""
    pairs: dict[tuple[str, str], list[int]] = {}
    for number, host, to in moves:
        pairs.setdefault((host, to), []).append(number)
    return [(host, to, tuple(sorted(numbers))) for (host, to), numbers in pairs.items()]
