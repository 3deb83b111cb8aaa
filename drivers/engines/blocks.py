"""Which KV blocks are free, and how many hold each of the others.

A job gets every block it may need when it is let in, so a running job can never be
thrown out for lack of memory. (The library would allocate block by block and, when
full, drop a job's cache and compute it again.) A contiguous run lets attention on
the CPU read keys and values in place instead of copying them each step. Full blocks
of equal beginnings are held by several: jobs, and the memory of prefixes.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from itertools import pairwise


class BlockPool:
    """Free blocks as sorted, disjoint, never adjacent extents [start, end)."""

    def __init__(self, first: int, count: int) -> None:
        self.capacity = count
        self.free = count
        self._first = first
        self._extents: list[tuple[int, int]] = [(first, first + count)] if count else []
        self._holders = [0] * count
        """By block, counted from the first: 0 is free."""

    def take(self, count: int) -> list[int] | None:
        """``count`` blocks, one run if there is one (the tightest), else pieces; None: too few."""
        if count > self.free:
            return None
        fitting = [e for e in self._extents if e[1] - e[0] >= count]
        taken: list[int] = []
        # Pieces come from the largest extents, to be few.
        order = (
            [min(fitting, key=lambda e: e[1] - e[0])]
            if fitting
            else sorted(self._extents, key=lambda e: e[0] - e[1])
        )
        for start, end in order:
            if len(taken) == count:
                break
            stop = min(end, start + count - len(taken))
            taken += range(start, stop)
            at = self._extents.index((start, end))
            self._extents[at : at + 1] = [(stop, end)] if stop < end else []
        self.free -= count
        for block in taken:
            self._holders[block - self._first] = 1
        return taken

    def hold(self, block: int) -> None:
        """One more holds a block that is held already."""
        self._holders[block - self._first] += 1

    def give(self, blocks: Sequence[int]) -> None:
        """Hold blocks no longer; those that nobody holds are free."""
        for block in sorted(blocks):
            self._holders[block - self._first] -= 1
            if self._holders[block - self._first]:
                continue
            self.free += 1
            at = bisect.bisect_left(self._extents, (block, block))
            start, end = block, block + 1
            if at < len(self._extents) and self._extents[at][0] == end:
                end = self._extents.pop(at)[1]
            if at and self._extents[at - 1][1] == start:
                at -= 1
                start = self._extents.pop(at)[0]
            self._extents.insert(at, (start, end))

    def holders(self, block: int) -> int:
        """How many hold a block."""
        return self._holders[block - self._first]

    def validate(self) -> None:
        """Check what must always hold; for tests. Raises AssertionError."""
        free = [b for start, end in self._extents for b in range(start, end)]
        assert len(free) == self.free, (len(free), self.free)
        assert all(a[1] < b[0] for a, b in pairwise(self._extents)), self._extents
        held = [b for b in range(self._first, self._first + self.capacity) if self.holders(b)]
        assert sorted(free + held) == list(range(self._first, self._first + self.capacity))
        assert min(self._holders, default=0) >= 0


def run_start(blocks: Sequence[int]) -> int | None:
    """The first block if they follow one another, else None."""
    if blocks[-1] - blocks[0] != len(blocks) - 1:
        return None
    # Pieces are runs themselves, so equal ends do not yet mean one run.
    return blocks[0] if all(b - a == 1 for a, b in pairwise(blocks)) else None
