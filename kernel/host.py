"""The host process: agents' turns run here, many agents in one process."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

from llmos.drivers.errors import LlmosError, StaleEpoch, StoreUnavailable
from llmos.drivers.stores.rows import MailRow, shard_of
from llmos.kernel import logs
from llmos.kernel.activation import Activations, Active, first_state
from llmos.kernel.clock import Clock, SystemClock
from llmos.kernel.committer import Committer
from llmos.kernel.core.attempts import MailPolicy
from llmos.kernel.core.supervision import AgentSupervisor
from llmos.kernel.directory import Directory, DirectoryHolder
from llmos.kernel.inbox import Inbox
from llmos.kernel.manifest import Manifest
from llmos.kernel.metrics import Exported, export
from llmos.kernel.program import ProgramLoader, make_config
from llmos.kernel.remote import Handle, ProcessGone, answers, call
from llmos.kernel.router import DirectoryLocator, Router
from llmos.kernel.services import RemoteServices
from llmos.kernel.shown import Piece
from llmos.kernel.system import SystemConfig
from llmos.kernel.timers import Timers
from llmos.kernel.turns import Entry, TurnRunner
from llmos.kernel.waiting import look
from llmos.syscalls.errors import Busy, DeadlineExceeded
from llmos.syscalls.messages import Envelope, Reply

log = logging.getLogger("llmos.host")

GC_THRESHOLD = 20_000
"""Objects made since the last collection of the youngest."""
POLL_PAUSE_S = 0.05
"""Before who looks for the text of a turn that has not begun looks again."""
SWEEP_S = 2.0
"""How often a host looks for mail and idle agents without being told to."""


class HostServer:
    """Runs turns. A Ray actor; all its work is on one event loop."""

    def __init__(
        self,
        name: str,
        epoch: int,
        kernel: Handle,
        system: SystemConfig,
        log_dir: str,
        log_level: str,
        clock: Clock | None = None,
    ) -> None:
        logs.configure(Path(log_dir), name, log_level)
        self._name = name
        self._epoch = epoch
        self._kernel = kernel
        self._programs = ProgramLoader(system.base)
        self._clock = clock or SystemClock()
        self._directory = DirectoryHolder()
        self._committer = Committer(self._directory, name)
        self._router = _LocalFirst(self)
        self._services = RemoteServices(
            f"{name}@{epoch}", self._directory, self._clock, self._router, system.tools
        )
        self._supervisor = AgentSupervisor()
        policy = MailPolicy(attempts=system.mailboxes.attempts, deaths=system.mailboxes.deaths)
        self._activations = Activations(
            self._programs, self._services.stored, self._loaded, self._dropped
        )
        runner = TurnRunner(
            epoch, self._clock, self._committer, self._services, policy, self._supervisor
        )
        self._inbox = Inbox(
            epoch=epoch,
            clock=self._clock,
            committer=self._committer,
            services=self._services,
            activations=self._activations,
            runner=runner,
            policy=policy,
            sent=self._sent,
            timers_set=lambda: self._timers.changed(),
            held=self._held,
        )
        self._timers = Timers(
            epoch=epoch,
            clock=self._clock,
            committer=self._committer,
            services=self._services,
            owns=self._inbox.owns,
            deliver=self._inbox.deliver_local,
        )
        self._hints: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = asyncio.Event()

    async def ready(self) -> int:
        """Begin to look for mail; returns this process's id."""
        if not self._tasks:
            # What was imported stays: the collector need not look at it again with every
            # generation, which took a fifth of the time of short turns.
            gc.collect()
            gc.freeze()
            gc.set_threshold(GC_THRESHOLD, 20, 20)
            self._spawn(self._inbox.keep_reading(SWEEP_S), "reading mail")
            self._spawn(self._timers.run(), "timers")
            self._spawn(self._keep_passivating(), "passivating")
        return os.getpid()

    async def lifeline(self) -> None:
        """Returns when the process is closed; fails when it is lost, which is how that is seen."""
        await self._ended.wait()

    async def ping(self) -> bool:
        """Answer: the event loop is free."""
        return True

    async def directory(self, directory: Directory) -> None:
        """Take the newest directory, and with it the shards of this host."""
        await self._directory.set(directory)
        current = self._directory.current
        me = (self._name, self._epoch)
        mine = {n for n, owner in enumerate(current.shards) if owner == me}
        # What it has just released it must not take up again: the turns would be cut off.
        self._inbox.take_shards(n for n in mine if n not in current.leaving or self._inbox.has(n))

    # -- programs

    @answers
    async def inspect(self, program: str, tenant: str, config: dict[str, Any]) -> Manifest:
        """Load a program and check that all it names is there; returns its manifest.

        Raises:
            ProgramError: it cannot be loaded or does not take the configuration.
            UnknownResource, RuleSyntaxError, DocumentError: a store is missing or broken.
        """
        loaded = await self._programs.load(program)
        made = make_config(program, loaded, config)
        manifest = loaded.manifest.resolve(made)
        first_state(program, loaded)
        await self._services.check_stores(tenant, manifest.stores)
        for capability in manifest.capabilities:
            syscall, _, name = capability.partition(":")
            if syscall == "call" and name and "*" not in name:
                # Made now, so that a wrong option is told at launch and not in mid-turn.
                await self._services.tool(tenant, name)
        return manifest

    def _loaded(self, active: Active) -> None:
        limits = active.prepared.manifest.limits
        self._inbox.mailboxes.limit(
            active.agent, mailbox=limits.mailbox, concurrent_turns=limits.concurrent_turns
        )
        active.used_at = self._clock.monotonic()
        if active.hold:
            self._inbox.mailboxes.hold(active.agent)

    def _dropped(self, agent: str) -> None:
        self._inbox.mailboxes.forget(agent)

    async def _keep_passivating(self) -> None:
        while True:
            await self._clock.sleep(SWEEP_S)
            self._activations.passivate(
                self._clock.monotonic(), lambda agent: not self._inbox.mailboxes.idle(agent)
            )

    # -- delivery

    async def deliver(self, envelope: Envelope) -> Reply:
        """Handle a message and reply. The same message is handled once."""
        return await self._inbox.ask(envelope)

    async def post(self, envelopes: Sequence[Envelope]) -> list[LlmosError | None]:
        """Put messages into mailboxes; returns when each is durable, or why it is not taken.

        Of a stream, what comes after a message that was refused for now is refused, too: it
        would overtake it.
        """
        taken: list[Entry | LlmosError | None] = []
        refused: dict[tuple[str, str], LlmosError] = {}
        for envelope in envelopes:
            stream = (envelope.receiver, envelope.stream)
            if stream in refused:
                taken.append(refused[stream])
                continue
            try:
                found = await self._inbox.accept(envelope)
            except LlmosError as error:
                if isinstance(error, Busy | StaleEpoch | StoreUnavailable | DeadlineExceeded):
                    refused[stream] = error
                taken.append(error.with_traceback(None))
            else:
                taken.append(found if isinstance(found, Entry) else None)
        results: list[LlmosError | None] = []
        for entry in taken:
            if isinstance(entry, Entry) and entry.ticket is not None:
                try:
                    await asyncio.shield(entry.ticket.done)
                except LlmosError as error:
                    results.append(error.with_traceback(None))
                    continue
                results.append(None)
            else:
                results.append(entry if isinstance(entry, LlmosError) else None)
        return results

    def _sent(self, rows: tuple[MailRow, ...]) -> None:
        """Messages of a turn are durable: their receivers' hosts are told."""
        local = [row for row in rows if self._inbox.owns(row.receiver)]
        if local:
            self._inbox.deliver_local(local)
        if len(local) == len(rows):
            return
        directory = self._directory.current
        if not directory.shards:
            return
        for host in {directory.shards[shard_of(r.receiver)][0] for r in rows} - {"", self._name}:
            self._hint(host)

    def _hint(self, host: str) -> None:
        """Tell a host that there is mail; one call at a time is under way, and one may wait.

        A hint that is lost does no harm: the host looks by itself every ``SWEEP_S`` seconds.
        """
        running = self._hints.get(host)
        if running is not None and not running.done():
            if f"{host}+" not in self._hints or self._hints[f"{host}+"].done():
                self._hints[f"{host}+"] = self._spawn(self._hint_after(host, running), "hint")
            return
        self._hints[host] = self._spawn(self._hint_now(host), "hint")

    async def _hint_after(self, host: str, running: asyncio.Task[None]) -> None:
        await asyncio.wait([running])
        await self._hint_now(host)

    async def _hint_now(self, host: str) -> None:
        handle = self._directory.current.hosts.get(host)
        if handle is None:
            return
        with contextlib.suppress(ProcessGone):
            await call(handle.hint.remote(), host)

    async def shown(self, agent: str, message: str, after: int) -> tuple[list[Piece], bool]:
        """What the turn of a message (``stream#seq``) has shown since piece ``after``, and
        whether that is all; waits a while for something new."""
        turn = self._inbox.turn_of(agent, message)
        if turn is None:
            await self._clock.sleep(POLL_PAUSE_S)
            return [], False
        return await self._services.shown.wait(turn, after)

    async def hint(self) -> None:
        """There is mail in the store for an agent of this host."""
        self._inbox.hint()

    # -- agents

    async def drop(self, agent: str, by: str) -> None:
        """The agent was killed: cancel its turns and forget it."""
        for one in self._named(agent):
            self._inbox.drop(one, by)
            self._supervisor.forgive(one)

    def _named(self, agent: str) -> list[str]:
        """The agents in memory that a name or ``tenant/program/*`` stands for."""
        if not agent.endswith("/*"):
            return [agent]
        known = {
            *self._activations.agents(),
            *(e.mail.receiver for e in self._inbox.entries.values()),
        }
        return [one for one in known if one.startswith(agent[:-1])]

    async def go_on(self, agent: str) -> None:
        """The agent is held no more."""
        self._supervisor.forgive(agent)
        self._inbox.go_on(agent)

    async def hold(self, agent: str, hold: str, story: str) -> None:
        """The store says that the agent is held."""
        self._inbox.hold(agent, hold, story)

    def _held(self, active: Active, story: str) -> None:
        """An agent was quarantined: whoever watches it is told, by the kernel."""

        async def tell() -> None:
            with contextlib.suppress(LlmosError):
                await call(
                    self._kernel.ended.remote(active.agent, "quarantined", story), "the kernel"
                )

        self._spawn(tell(), "telling who watches")

    async def release(self, shards: Sequence[int], grace_s: float) -> bool:
        """End the turns on these shards and start no more; returns when that is so."""
        await self._inbox.release(set(shards), grace_s)
        return True

    # -- looking and ending

    async def statistics(self) -> dict[str, Any]:
        """Agents in memory, turns that run and wait."""
        return {
            "active": len(self._activations),
            "running": len(self._inbox.mailboxes.running),
            "waiting": len(self._inbox.mailboxes),
            "activation": self._activations.statistics(),
            "pid": os.getpid(),
        }

    async def why(self, agent: str) -> dict[str, Any]:
        """What this host has for an agent: turns under way, and what waits, in order."""
        return look(self._inbox, self._clock, agent)

    async def metrics(self) -> Exported:
        """This process's metrics."""
        return export(self._name)

    async def close(self, grace_s: float) -> None:
        """Take nothing new; give what runs ``grace_s`` seconds, then put it down."""
        await self._inbox.close(grace_s)
        await self._committer.close()
        for task in list(self._tasks):
            task.cancel()
        await self._services.close()
        self._ended.set()

    def _spawn(self, work: Coroutine[Any, Any, None], what: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and task.exception() is not None:
                log.error("%s failed", what, exc_info=task.exception())

        task.add_done_callback(ended)
        return task


class _LocalFirst(Router):
    """A router that reaches the agents of its own host without a call between processes."""

    def __init__(self, host: HostServer) -> None:
        super().__init__(DirectoryLocator(host._directory))
        self._host = host

    async def ask(self, envelope: Envelope) -> Reply:
        """Deliver, and wait for the end of the turn."""
        if self._host._inbox.owns(envelope.receiver):
            reply = await self._host._inbox.ask(envelope)
            if not isinstance(reply.error, StaleEpoch):
                return reply
            envelope = envelope._replace(again=True)
        return await super().ask(envelope)
