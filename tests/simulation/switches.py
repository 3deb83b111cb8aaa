"""Parts of the design, switched off: without each of them the checker must find something."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from llmos.drivers.stores import memory
from llmos.drivers.stores.changes import Changes
from llmos.drivers.stores.rows import EndMail, MailRow, PutMail
from llmos.kernel.inbox import Inbox
from llmos.kernel.services import RemoteServices
from llmos.kernel.turnlog import TurnLog
from llmos.kernel.turns import TurnRunner
from llmos.syscalls.deferred import Deferred, Post
from llmos.syscalls.messages import Envelope

GAP_S = 0.01
"""Between messages that leave first and the commit of their turn."""


class _Forgetful(Changes):
    """Takes a message in however often it comes, and lets it be ended however often."""

    def _repeated(self, part: Any) -> bool:
        return False

    def _put_mail(self, write: PutMail) -> None:
        row = write.row
        if self._waits(row.key) is not None:
            return
        self.arrival += 1
        self._put(self.mail, row.key, tuple.__new__(MailRow, (*row[:10], self.arrival)))
        self._put(self._waiting, row.receiver, self._count(row.receiver) + 1)

    def _end_mail(self, write: EndMail) -> None:
        if self._waits(write[:]) is not None:
            self._take_out(write[:])


@contextmanager
def no_dedup() -> Iterator[None]:
    """Neither the store nor the hosts know what they have handled."""
    read = RemoteServices.read_store

    async def read_store(self: RemoteServices, method: str, *args: Any, **options: Any) -> Any:
        return None if method == "handled" else await read(self, method, *args, **options)

    with (
        mock.patch.object(memory, "Changes", _Forgetful),
        mock.patch.object(RemoteServices, "read_store", read_store),
        mock.patch.object(Inbox, "_known", return_value=None),
    ):
        yield


@contextmanager
def no_barrier() -> Iterator[None]:
    """What is visible outside waits for nothing."""

    async def barrier(self: TurnLog) -> None:
        return None

    with mock.patch.object(TurnLog, "barrier", barrier):
        yield


@contextmanager
def messages_first() -> Iterator[None]:
    """Messages leave when they are sent, and not with the commit of their turn."""
    defer, end, numbers = RemoteServices.defer, TurnRunner._succeed, itertools.count(1)

    def leave(self: RemoteServices, action: Deferred) -> None:
        if not isinstance(action, Post):
            defer(self, action)
            return
        stream, number = "early", next(numbers)
        envelope = Envelope(action.receiver, stream, action.wire, stream, number)
        row = MailRow(action.receiver, stream, number, envelope.pack())
        task = asyncio.ensure_future(self._service("journal", "commit", [[PutMail(row)]]))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def succeed(self: TurnRunner, *args: Any) -> Any:
        await asyncio.sleep(GAP_S)
        return await end(self, *args)

    with (
        mock.patch.object(RemoteServices, "defer", leave),
        mock.patch.object(TurnRunner, "_succeed", succeed),
    ):
        yield
