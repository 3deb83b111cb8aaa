"""The journal of one turn under way: written behind in groups, waited for where it must be."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from llmos.drivers.errors import LlmosError, StaleEpoch
from llmos.drivers.stores.rows import Append, JournalRow, Own, PutBlob, Write
from llmos.kernel import record
from llmos.kernel.committer import Committer, Ticket
from llmos.kernel.soon import Call
from llmos.syscalls.errors import Busy


class TurnLog:
    """Rows of one turn, in the order in which things ended."""

    def __init__(self, own: Own, committer: Committer, opening: Sequence[Write] = ()) -> None:
        """Begin a turn's log.

        Args:
            own: First of every part.
            committer: The way to the store.
            opening: What has to stand in the store before the first row does: the message,
                and that its turn has begun. It leaves when the turn has lasted ``committer.FLUSH_S``
                seconds, or with the first rows; a turn that is over before never needs it.
        """
        self._own = own
        self._opening = list(opening)
        self.opened = not opening
        """Whether the opening is in the store, or on its way."""
        self._committer = committer
        self._rows: list[JournalRow] = []
        self._tickets: list[tuple[Ticket, list[Write], list[JournalRow]]] = []
        self._timer: Call | None = None
        self._ended = False
        self.pieces: list[Callable[[], JournalRow | None]] = []
        """Streams under way: each gives what it has handed out since it was last asked."""
        if opening:
            self.soon()

    def add(self, row: JournalRow) -> None:
        """A row; it leaves within ``committer.FLUSH_S`` seconds, or with the commit of the turn."""
        self._rows.append(row)
        self.soon()

    def soon(self) -> None:
        """Flush within ``committer.FLUSH_S`` seconds."""
        if self._timer is None and not self._ended:
            self._timer = self._committer.soon.call(self._flush)

    def _gather(self) -> list[JournalRow]:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        rows, self._rows = self._rows, []
        rows += [row for piece in self.pieces if (row := piece()) is not None]
        return rows

    def _flush(self) -> None:
        self._timer = None
        self._reclaim()
        if self._tickets:
            # One at a time: if the one under way cannot be kept, and this one were, the journal
            # would have a hole, and a turn that runs again could not find its way.
            self.soon()
            return
        rows = self._gather()
        if self._ended or not (rows or self._opening):
            self._rows = rows
            return
        opening = self._opening
        try:
            ticket = self._committer.put([self._own, *opening, *writes_of(rows)])
        except LlmosError:
            # No room now: they leave later, at the latest with the commit of the turn.
            self._rows = rows
            self.soon()
        else:
            self._opening, self.opened = [], True
            self._tickets.append((ticket, opening, rows))

    async def barrier(self) -> None:
        """Wait until every row so far is durable.

        Raises:
            StoreError, DeadlineExceeded, Busy: one of them could not be kept.
        """
        await self._settle()
        while self._tickets:
            await self._settle()  # Calls side by side: another one's rows have left meanwhile.
        if self._rows or self.pieces or self._opening:
            self._flush()
        if self._rows or self._opening:
            raise Busy("The way to the journal", len(self._rows), 0.5)
        await self._settle()

    async def _settle(self) -> None:
        """Wait for what is on its way; what could not be kept is a row to be written again."""
        failed: LlmosError | None = None
        # They stay in the list meanwhile: calls side by side wait for the same ones.
        for ticket, _, _ in list(self._tickets):
            try:
                await asyncio.shield(ticket.done)
            except LlmosError as error:
                failed = failed or error
        self._reclaim()
        if failed is not None:
            raise failed

    def _reclaim(self) -> None:
        """Forget what is durable; what could not be kept is to be written again."""
        tickets, self._tickets = self._tickets, []
        opening: list[Write] = []
        rows: list[JournalRow] = []
        for ticket in tickets:
            done = ticket[0].done
            if not done.done():
                self._tickets.append(ticket)
            elif done.cancelled() or done.exception() is not None:
                opening += ticket[1]
                rows += ticket[2]
        self._opening = opening + self._opening
        self._rows = rows + self._rows

    async def rest(self) -> list[Write]:
        """Rows that are not durable yet, for the commit of the turn; nothing leaves by itself
        after. With them the opening, if it had left and could not be kept.

        Raises:
            StaleEpoch: the agent has another owner.
        """
        self._ended = True
        rows = self._gather()
        while True:
            try:
                await self._settle()
            except StaleEpoch:
                raise
            except LlmosError:
                pass  # They are among the rows again, and the commit has its own say.
            except asyncio.CancelledError:
                if any(ticket.done.cancelled() for ticket, *_ in self._tickets):
                    raise
                # Too late: what is on its way must be followed by the end of the turn.
                continue
            break
        rows = self._rows + rows
        self._rows = []
        opening = self._opening if self.opened else []
        return [*opening, *writes_of(rows)]

    def discard(self) -> None:
        """The turn will not be committed."""
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def writes_of(rows: list[JournalRow]) -> list[Write]:
    """Rows as writes; what is long goes apart."""
    out: list[Write] = []
    for row in rows:
        if len(row.args) > record.MAX_INLINE_BYTES or len(row.result) > record.MAX_INLINE_BYTES:
            changes: dict[str, Any] = {}
            for column in ("args", "result"):
                data: bytes = getattr(row, column)
                if len(data) > record.MAX_INLINE_BYTES:
                    digest, reference = record.blob_of(data)
                    out.append(PutBlob(digest, data))
                    changes[column] = reference
            row = row._replace(**changes)
        out.append(Append(row))
    return out
