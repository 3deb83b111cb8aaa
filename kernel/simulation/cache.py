"""The memory of prefixes of a simulated engine."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class Prefixes:
    """Pieces of prompts that are remembered, least recently used first out.

    A piece can be used only if all before it are there too. Tenants share nothing, as in the
    engine.
    """

    def __init__(self) -> None:
        self._pieces: OrderedDict[tuple[str, int], int] = OrderedDict()
        self.tokens = 0
        """Remembered now."""
        self.hit_tokens = 0
        self.asked_tokens = 0

    def hit(self, tenant: str, blocks: Iterable[tuple[int, int]]) -> int:
        """Tokens that need not be read."""
        found = 0
        for number, tokens in blocks:
            if (tenant, number) not in self._pieces:
                break
            found += tokens
        return found

    def use(self, tenant: str, blocks: Iterable[tuple[int, int]]) -> None:
        """Remember pieces, as used now."""
        for number, tokens in blocks:
            key = (tenant, number)
            if key in self._pieces:
                self._pieces.move_to_end(key)
            else:
                self._pieces[key] = tokens
                self.tokens += tokens

    def shrink(self, room_tokens: int) -> None:
        """Forget until no more than this is remembered."""
        while self.tokens > room_tokens and self._pieces:
            _, tokens = self._pieces.popitem(last=False)
            self.tokens -= tokens
