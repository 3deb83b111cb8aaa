"""Which KV blocks belong to whom: contiguous where possible, all of a job's at once.

A job gets every block it may need when it is let in, so a running job can never be
thrown out for lack of memory. (The library would allocate block by block and, when
full, drop a job's cache and compute it again.) A contiguous run lets attention on
the CPU read keys and values in place instead of copying them each step.
"""

from __future__ import annotations

import bisect
from itertools import pairwise


class BlockPool:
    """Free blocks as sorted, disjoint, never adjacent extents [start, end)."""

    def __init__(self, first: int, count: int) -> None:
        self.capacity = count
        self.free = count
        self._extents: list[tuple[int, int]] = [(first, first + count)] if count else []

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
        return taken

    def give(self, blocks: list[int]) -> None:
        """Return blocks that were taken."""
        self.free += len(blocks)
        for block in sorted(blocks):
            at = bisect.bisect_left(self._extents, (block, block))
            start, end = block, block + 1
            if at < len(self._extents) and self._extents[at][0] == end:
                end = self._extents.pop(at)[1]
            if at and self._extents[at - 1][1] == start:
                at -= 1
                start = self._extents.pop(at)[0]
            self._extents.insert(at, (start, end))


def run_start(blocks: list[int]) -> int | None:
    """The first block if they follow one another, else None."""
    if blocks[-1] - blocks[0] != len(blocks) - 1:
        return None
    # Pieces are runs themselves, so equal ends do not yet mean one run.
    return blocks[0] if all(b - a == 1 for a, b in pairwise(blocks)) else None
