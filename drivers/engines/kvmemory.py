"""Who gets which part of the KV cache: whole jobs at a time, equal beginnings once."""

from __future__ import annotations

from llmos.drivers.engines.blocks import BlockPool
from llmos.drivers.engines.prefixes import Prefixes
from llmos.drivers.engines.sequence import Sequence
from llmos.drivers.models.footprint import KV_BLOCK_TOKENS

PAGE_TOKENS = KV_BLOCK_TOKENS
"""Tokens per KV block. Runs of blocks are read as one, so small costs nothing but waste less."""


class KvMemory:
    """The blocks of one cache. Used by the engine's thread alone, but for the properties."""

    def __init__(self, first: int, count: int, share: bool) -> None:
        """Blocks ``first`` and on; ``share``: whether equal beginnings are found again."""
        self.pool = BlockPool(first, count)
        self.prefixes = Prefixes(self.pool, PAGE_TOKENS)
        self._share = share

    @property
    def used_tokens(self) -> int:
        """Held by jobs."""
        return (self.pool.capacity - self.pool.free - self.prefixes.idle) * PAGE_TOKENS

    @property
    def cached_tokens(self) -> int:
        """Remembered, and held by no job."""
        return self.prefixes.idle * PAGE_TOKENS

    def reserve(self, sequence: Sequence) -> bool:
        """Give a sequence all the blocks it may need, those of a known beginning filled.

        False: too few are free, and nothing was changed.
        """
        prefixes = self.prefixes
        found = []
        if self._share:
            found = prefixes.find(sequence.tenant, sequence.adapter, sequence.tokens)
        need = -(-sequence.cache_tokens // PAGE_TOKENS) - len(found)
        # What is found idle is used now, so it is no room for the rest.
        if need > self.pool.free + prefixes.idle - sum(not node.users for node in found):
            return False
        prefixes.use(found)
        prefixes.make_room(need)
        own = self.pool.take(need)
        assert own is not None
        sequence.blocks = [node.block for node in found] + own
        sequence.nodes = found
        sequence.read = len(found) * PAGE_TOKENS
        return True

    def written(self, sequence: Sequence) -> None:
        """Remember the blocks that a sequence has filled, for others and for later."""
        nodes = sequence.nodes
        while self._share and (len(nodes) + 1) * PAGE_TOKENS <= sequence.read:
            self.prefixes.add(
                sequence.tenant, sequence.adapter, nodes, sequence.tokens, sequence.blocks
            )

    def release(self, sequence: Sequence, keep_until_s: float) -> None:
        """Take a sequence's blocks back; what is remembered of them is kept until then."""
        self.prefixes.leave(sequence.nodes, keep_until_s)
        self.pool.give(sequence.blocks)
        sequence.blocks, sequence.read = [], 0

    def validate(self) -> None:
        """Check what must always hold; for tests. Raises AssertionError."""
        self.pool.validate()
        self.prefixes.validate()
