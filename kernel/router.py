"""Finding the host of an agent, and delivering messages to it."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

from llmos.drivers.errors import LlmosError, StaleEpoch
from llmos.drivers.stores.rows import shard_of
from llmos.kernel.directory import DirectoryHolder
from llmos.kernel.remote import Handle, ProcessGone, call
from llmos.kernel.shown import Piece
from llmos.syscalls.errors import Busy, DeadlineExceeded
from llmos.syscalls.messages import Envelope, Reply

log = logging.getLogger("llmos.router")

RETRY_S = 0.2
"""Pause before a kernel or a host that is being restarted is asked again."""
SHOWN_S = 10.0
"""Longest wait for a host to say what a turn has shown."""
LAST_PIECES_S = 1.0
"""How long the last pieces of text are waited for when the reply is there."""
MAX_BATCH = 256
"""Messages posted in one call."""


@dataclass(frozen=True, slots=True)
class Location:
    """Where an agent is."""

    host: str
    epoch: int
    handle: Handle


class Locator(Protocol):
    """Knows where agents are."""

    async def locate(
        self, agent: str, not_at: tuple[str, int] | None, timeout_s: float
    ) -> Location:
        """Where the agent is, but for a host and epoch found lost; waits while it is nowhere.

        Raises:
            UnknownAgent, HostUnavailable; DeadlineExceeded after ``timeout_s``.
        """
        ...

    def forget(self, agent: str) -> None:
        """What was known of the agent's place is wrong."""
        ...


class KernelLocator:
    """Asks the kernel, for processes that it does not tell by itself."""

    def __init__(self, kernel: Handle) -> None:
        self._kernel = kernel
        self._known: dict[int, Location] = {}
        """By shard."""

    def forget(self, agent: str) -> None:
        """What was known of the agent's place is wrong."""
        self._known.pop(shard_of(agent), None)

    async def locate(
        self, agent: str, not_at: tuple[str, int] | None, timeout_s: float
    ) -> Location:
        """Where the agent is."""
        known = self._known.get(shard_of(agent))
        if known is not None and (known.host, known.epoch) != not_at:
            return known
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout_s
        while True:
            left = max(until - loop.time(), 0.001)
            try:
                found: Location = await call(
                    self._kernel.locate.remote(agent, not_at, left),
                    f"the kernel (for {agent})",
                    left + 5.0,
                )
            except ProcessGone as gone:
                # A detached kernel comes back and knows from the store who is launched.
                if gone.final or loop.time() > until:
                    raise
                await asyncio.sleep(RETRY_S)
            else:
                self._known[shard_of(agent)] = found
                return found


class DirectoryLocator:
    """Reads the directory that the kernel pushes to hosts."""

    def __init__(self, directory: DirectoryHolder) -> None:
        self._directory = directory

    def forget(self, agent: str) -> None:
        """Nothing: the directory is the kernel's."""

    async def locate(
        self, agent: str, not_at: tuple[str, int] | None, timeout_s: float
    ) -> Location:
        """Where the agent is."""
        shard = shard_of(agent)
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    directory = self._directory.current
                    if directory.shards:
                        host, epoch = directory.shards[shard]
                        handle = directory.hosts.get(host)
                        if handle is not None and (host, epoch) != not_at:
                            return Location(host, epoch, handle)
                    await self._directory.newer(directory.version)
        except TimeoutError:
            raise DeadlineExceeded(f"finding a host for {agent}", timeout_s) from None


@dataclass(slots=True, eq=False)
class _Post:
    """A message on its way into a mailbox."""

    envelope: Envelope
    until: float
    """On the loop's clock."""
    done: asyncio.Future[None]
    refused: Busy | None = None
    """Why it was not taken so far."""


class Router:
    """Delivers envelopes to hosts directly.

    A host that dies is found again under a newer epoch, and the same envelope goes there: by
    its key a message that was handled already finds its reply.
    """

    def __init__(self, locator: Locator) -> None:
        self._locator = locator
        self._lines: dict[str, deque[_Post]] = {}
        """Posts by receiver, in order."""
        self._batches: dict[
            tuple[str, int], list[tuple[list[_Post], asyncio.Future[list[LlmosError | None]]]]
        ] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def ask(self, envelope: Envelope) -> Reply:
        """Deliver, and wait for the end of the turn.

        Raises:
            DeadlineExceeded: no reply in time, whatever happened meanwhile.
            UnknownAgent, HostUnavailable.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + envelope.deadline_s
        lost: tuple[str, int] | None = None
        while True:
            left = until - loop.time()
            if left <= 0:
                raise DeadlineExceeded(f"the answer of {envelope.receiver}", envelope.deadline_s)
            location = await self._locator.locate(envelope.receiver, lost, left)
            left = max(until - loop.time(), 0.001)
            ref = location.handle.deliver.remote(envelope._replace(deadline_s=left))
            try:
                # The host keeps the deadline itself; the margin is for a host that hangs.
                reply: Reply = await call(ref, f"the answer of {envelope.receiver}", left + 2.0)
            except ProcessGone as error:
                lost = self._lost(envelope.receiver, location, error)
                envelope = envelope._replace(again=True)
                continue
            if isinstance(reply.error, StaleEpoch):
                # It moved, or is just moving.
                self._locator.forget(envelope.receiver)
                envelope = envelope._replace(again=True)
                await asyncio.sleep(RETRY_S)
                continue
            return reply

    async def ask_shown(self, envelope: Envelope) -> AsyncGenerator[str | Reply, None]:
        """Deliver; pieces of text as the turn shows them, and at the end its reply.

        When a host is lost, the pieces go on where they were: none comes twice, and none that
        came is ever another.

        Raises:
            As :meth:`ask`.
        """
        asking = asyncio.ensure_future(self.ask(envelope))
        looking: asyncio.Future[tuple[list[Piece], bool]] | None = None
        after, all_seen = 0, False
        try:
            while not all_seen:
                if asking.done() and asking.exception() is not None:
                    break
                over = asking.done()
                looking = asyncio.ensure_future(self._look(envelope, after))
                await asyncio.wait([looking, asking], return_when=asyncio.FIRST_COMPLETED)
                if not looking.done() and not over:
                    # The answer is there; what was shown last may still be on its way.
                    await asyncio.wait([looking], timeout=LAST_PIECES_S)
                if not looking.done():
                    break
                pieces, all_seen = looking.result()
                for piece in pieces:
                    after = piece.seq
                    yield piece.text
                if over and not pieces:
                    break
            yield await asking
        finally:
            for task in (looking, asking):
                if task is not None and not task.done():
                    task.cancel()

    async def _look(self, envelope: Envelope, after: int) -> tuple[list[Piece], bool]:
        """Pieces that are new; none where the host is being replaced."""
        try:
            location = await self._locator.locate(envelope.receiver, None, RETRY_S * 5)
            found: tuple[list[Piece], bool] = await call(
                location.handle.shown.remote(envelope.receiver, envelope.id, after),
                location.host,
                SHOWN_S,
            )
        except LlmosError:
            await asyncio.sleep(RETRY_S)
            return [], False
        return found

    async def post(self, envelope: Envelope) -> None:
        """Deliver into the mailbox; return when it is durable. Tries again until the deadline.

        Posts to one receiver arrive in the order in which this was called.

        Raises:
            DeadlineExceeded: it may still arrive.
            Busy: the mailbox was full all the time; it was not taken.
            UnknownAgent, UnhandledMessage, InvalidMessage, Quarantined, HostUnavailable.
        """
        loop = asyncio.get_running_loop()
        post = _Post(envelope, loop.time() + envelope.deadline_s, loop.create_future())
        line = self._lines.get(envelope.receiver)
        if line is None:
            self._lines[envelope.receiver] = deque([post])
            self._spawn(self._serve(envelope.receiver))
        else:
            line.append(post)
        await post.done

    async def _serve(self, receiver: str) -> None:
        """Work off the line of one receiver: many in one call, but none before another."""
        loop = asyncio.get_running_loop()
        line = self._lines[receiver]
        lost: tuple[str, int] | None = None
        pause_s = 0.0
        while line:
            now = loop.time()
            for post in [p for p in line if p.done.done() or p.until <= now]:
                line.remove(post)
                if not post.done.done():
                    late = post.refused or DeadlineExceeded(
                        f"delivery to {receiver}", post.envelope.deadline_s
                    )
                    post.done.set_exception(late)
            if not line:
                break
            if pause_s:
                await asyncio.sleep(min(pause_s, max(line[0].until - now, 0.0)))
                pause_s = 0.0
                continue
            group = list(line)[:MAX_BATCH]
            left = max(group[0].until - now, 0.001)
            try:
                location = await self._locator.locate(receiver, lost, left)
                async with asyncio.timeout(left):
                    results = await self._with_others(location, group)
            except TimeoutError:
                for post in group:
                    post.envelope = post.envelope._replace(again=True)
                continue
            except DeadlineExceeded:
                continue
            except ProcessGone as error:
                # The kernel itself is gone for good: nobody can say where the agent is.
                for post in group:
                    self._settle(line, post, error)
                continue
            except LlmosError as error:
                for post in group:
                    self._settle(line, post, error)
                continue
            for post, result in zip(group, results, strict=True):
                if isinstance(result, ProcessGone):
                    lost = self._lost(receiver, location, result)
                    post.envelope = post.envelope._replace(again=True)
                elif isinstance(result, StaleEpoch):
                    self._locator.forget(receiver)
                    post.envelope = post.envelope._replace(again=True)
                    pause_s = RETRY_S
                elif isinstance(result, Busy):
                    post.refused = result
                    pause_s = result.retry_after_s
                else:
                    self._settle(line, post, result)
        del self._lines[receiver]

    @staticmethod
    def _settle(line: deque[_Post], post: _Post, error: LlmosError | None) -> None:
        line.remove(post)
        if post.done.done():
            return
        if error is None:
            post.done.set_result(None)
        else:
            post.done.set_exception(error)

    async def _with_others(self, location: Location, group: list[_Post]) -> list[LlmosError | None]:
        """One call for all that goes to a host at the same time."""
        done: asyncio.Future[list[LlmosError | None]] = asyncio.get_running_loop().create_future()
        key = (location.host, location.epoch)
        waiting = self._batches.get(key)
        if waiting is None:
            self._batches[key] = [(group, done)]
            self._spawn(self._send(key, location.handle))
        else:
            waiting.append((group, done))
        return await done

    async def _send(self, key: tuple[str, int], handle: Handle) -> None:
        while self._batches[key]:
            groups, self._batches[key] = self._batches[key], []
            envelopes = [post.envelope for group, _ in groups for post in group]
            results: list[LlmosError | None]
            try:
                results = await call(handle.post.remote(envelopes), key[0])
            except LlmosError as error:
                results = [error] * len(envelopes)
            start = 0
            for group, done in groups:
                if not done.done():
                    done.set_result(results[start : start + len(group)])
                start += len(group)
        del self._batches[key]

    def _lost(self, receiver: str, location: Location, error: ProcessGone) -> tuple[str, int]:
        """A host was lost with a message in it: look for its successor."""
        self._locator.forget(receiver)
        log.warning("%s was lost (%s); its successor is asked", location.host, error.reason)
        return location.host, location.epoch

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
