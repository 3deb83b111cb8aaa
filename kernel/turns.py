"""One turn: handler, syscalls, and the one commit that makes all of it count or nothing."""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pydantic import BaseModel

from llmos.drivers.errors import (
    AlreadyHandled,
    LlmosError,
    MailboxFull,
    StaleEpoch,
    StoreUnavailable,
)
from llmos.drivers.stores.rows import (
    TURN,
    BeginMail,
    BuryMail,
    DropMonitor,
    DropTimer,
    EndMail,
    JournalRow,
    MailRow,
    MonitorRow,
    Own,
    PutMail,
    PutMonitor,
    PutTimer,
    SaveAgent,
    SetHold,
    Subscribe,
    TimerRow,
    Unsubscribe,
    Write,
)
from llmos.kernel import logs, record
from llmos.kernel.activation import Active
from llmos.kernel.clock import Clock
from llmos.kernel.committer import FLUSH_S, Committer, Kept, Ticket
from llmos.kernel.context import Context
from llmos.kernel.core.attempts import Answer, Bury, MailPolicy, Retry, after_failure
from llmos.kernel.core.errors import Nondeterminism
from llmos.kernel.core.supervision import AgentSupervisor
from llmos.kernel.dispatch import TurnDispatcher, as_llmos_error
from llmos.kernel.metrics import TURNS
from llmos.kernel.program import HandlerSpec, pack_state
from llmos.kernel.remote import MOVE, SHUTDOWN, put_down
from llmos.kernel.services import RemoteServices
from llmos.kernel.soon import Call, Soon
from llmos.kernel.turnlog import TurnLog, writes_of
from llmos.syscalls import deferred
from llmos.syscalls.errors import (
    Busy,
    Cancelled,
    DeadlineExceeded,
    EffectUnknown,
    HandlerFailed,
    InvalidMessage,
    Quarantined,
    ReadOnlyTurn,
    UnhandledMessage,
)
from llmos.syscalls.messages import Envelope, Message, Reply, Wire

log = logging.getLogger("llmos.host")

STOP_S = 2.0
"""What a cancelled handler is given to clean up."""
FULL_RETRY_S = 0.05
"""Before a commit whose receivers' mailboxes were full is tried again; doubles to one second."""
STORE_RETRY_S = 1.0
"""Before a commit that the store could not keep is tried again."""
STORE_PATIENCE_S = 30.0
"""How long a commit that the store cannot keep is tried before its turn is run again later."""
MAX_MAILBOX = 100_000
"""Messages that may wait for an agent, whatever its manifest says: what a turn sends is
refused beyond that. The receiver's own limit counts for what comes from outside."""


@dataclass(slots=True, eq=False)
class Entry:
    """A message in this host: waiting, or with its turn under way."""

    id: str
    envelope: Envelope
    mail: MailRow
    spec: HandlerSpec
    message: Message
    arrived: float
    """On the monotonic clock."""
    reply: asyncio.Future[Reply] | None = None
    """What is waited for; None: nobody waits."""
    ticket: Ticket | None = None
    """Of the part that puts it into the store, for a message that nobody waits for."""
    stored: bool = True
    """Whether the store has it, or will before anything else of it. A message that somebody
    waits for goes there only if its turn takes long: if the host is lost before, they ask
    again, and nothing has happened."""
    begun: bool = False
    """Whether the store knows that this attempt has begun."""
    unsure: bool = False
    """Whether nobody knows what the store has of it: a commit failed, or its answer was lost."""
    again: bool = False
    """Whether an earlier run of its turn was cut off."""
    abandoned: bool = False
    """Whether it was given up by who asked, with its turn under way."""
    careful: bool = False
    """Whether a host was lost that had it: its attempt begins when the store knows of it."""
    rows: list[JournalRow] = field(default_factory=list)
    """What an earlier run of its turn has recorded."""
    carried: dict[str, JournalRow] = field(default_factory=dict)
    """How calls outside ended in earlier attempts at it, by idem_key."""
    task: asyncio.Task[None] | None = None
    numbers: list[int] = field(default_factory=list)
    """Of the messages that its turn sends, once they were to be committed."""
    story: list[str] = field(default_factory=list)
    """What happened at each attempt in this host."""
    store_failed: bool = False
    """Whether its turn ran, and the store could not keep it."""
    dispatcher: TurnDispatcher | None = None
    """Of the turn under way; for people who look."""


class Ending(enum.Enum):
    """What becomes of a message after a turn."""

    DONE = "done"
    """It is handled, or a dead letter."""
    AGAIN = "again"
    """It waits for its next attempt."""
    HELD = "held"
    """Its agent gets no turns until a person has looked."""
    LOST = "lost"
    """Another host has its agent now."""
    KEPT = "kept"
    """It stays as it is: the host closes."""


class Outcome(NamedTuple):
    """The end of an attempt."""

    ending: Ending
    reply: Reply
    not_before: float = 0.0
    mail: tuple[MailRow, ...] = ()
    """Messages that the turn has sent, durable now."""
    timers: bool = False
    """Whether it has set timers."""
    monitors: bool = False
    """Whether those who watch the agent are to be told that it is held."""


class TurnRunner:
    """Runs the turns of one host."""

    def __init__(
        self,
        epoch: int,
        clock: Clock,
        committer: Committer,
        services: RemoteServices,
        policy: MailPolicy,
        supervisor: AgentSupervisor,
    ) -> None:
        self._epoch = epoch
        self._clock = clock
        self._committer = committer
        self._services = services
        self._policy = policy
        self._supervisor = supervisor
        self._lasting = Soon(lambda: FLUSH_S)
        """For turns that last so long that they need a timer for their deadline."""

    async def run(self, entry: Entry, active: Active) -> Outcome:
        """One attempt at a message. Never raises but for a bug."""
        envelope, agent, turn = entry.envelope, entry.envelope.receiver, entry.mail.turn
        prepared = active.prepared
        limits = prepared.manifest.limits
        began, began_at = self._clock.monotonic(), self._clock.time()
        deadline_s = limits.turn_deadline_s
        if envelope.asked and not entry.rows:
            # What has begun is seen through, whoever still waits.
            left = envelope.deadline_s - (began - entry.arrived)
            deadline_s = min(deadline_s, max(left, 0.001))
        own = Own(agent, self._epoch, prepared.launch.id)
        turn_log = TurnLog(own, self._committer, _opening(entry))
        outbox: list[deferred.Deferred] = []
        dispatcher = TurnDispatcher(
            agent=agent,
            turn=turn,
            chain=envelope.chain,
            manifest=prepared.manifest,
            services=self._services.for_turn(outbox),
            clock=self._clock,
            deadline_s=deadline_s,
            labels=envelope.labels,
            log=turn_log,
            epoch=self._epoch,
            code_version=prepared.code_version,
            recorded=entry.rows,
            message_id=entry.id,
            carried=entry.carried,
            began_at=began_at,
            again=entry.again,
        )
        entry.dispatcher = dispatcher
        base = active.changes
        reply, error, state = await self._handle(active, entry, dispatcher)
        whole = error is None or not isinstance(error, Cancelled | DeadlineExceeded)
        stopped = dispatcher.finish(whole=whole)
        if stopped is not None:
            try:
                return await self._hold(entry, active, stopped, own, turn_log)
            except asyncio.CancelledError:
                entry.stored = entry.stored or turn_log.opened
                entry.store_failed = entry.unsure = True
                raise
        wire: Wire | None = None
        if error is None:
            try:
                wire = Wire.of(reply) if reply is not None else None
            except (LlmosError, ValueError, TypeError, OverflowError, RecursionError) as unfit:
                # Too large, or holds what has no form outside this process.
                error = as_llmos_error(unfit, agent, turn)
        mine = isinstance(error, Cancelled) and error.what == _what(agent)
        if mine and isinstance(error, Cancelled) and error.by in (SHUTDOWN, MOVE):
            # Not where that became of the turn of an agent that it asked.
            return await self._put_down(entry, error, own, turn_log)
        elapsed = self._clock.monotonic() - began
        if error is not None:
            outbox.clear()

        def turn_row(wire: Wire | None, error: LlmosError | None, idem_key: str = "") -> JournalRow:
            args = entry.mail.envelope
            return JournalRow(
                agent=agent,
                turn=turn,
                seq=0,
                phase="result" if error is None else "failed",
                kind=TURN,
                name=envelope.wire.kind,
                args_hash=record.hash_of(args),
                args=args,
                result=record.turn_result(wire, error, base, state if error is None else None),
                labels=record.pack_labels(dispatcher.labels),
                provenance=record.pack_provenance(tuple(dispatcher.provenance)),
                idem_key=idem_key,
                epoch=self._epoch,
                code_version=prepared.code_version,
                cause=envelope.cause,
                ts=began_at,
                elapsed_s=elapsed,
            )

        def the_reply(wire: Wire | None, error: LlmosError | None) -> Reply:
            return Reply(
                turn,
                agent,
                wire=wire,
                error=error,
                labels=dispatcher.labels,
                provenance=tuple(dispatcher.provenance),
                elapsed_s=elapsed,
            )

        try:
            rest = await turn_log.rest()
            entry.stored = entry.stored or turn_log.opened
            if error is None:
                row = turn_row(wire, None, envelope.id)
                sent = await self._succeed(entry, active, own, rest, row, state, outbox)
                if isinstance(sent, Busy):
                    error, wire = sent, None
                    outbox.clear()
                else:
                    if state is not None:
                        active.packed, active.changes = state, base + 1
                    TURNS.labels(prepared.name, "ok").observe(elapsed)
                    timers = any(isinstance(a, deferred.Timer) for a in outbox)
                    return Outcome(Ending.DONE, the_reply(wire, None), mail=sent, timers=timers)
            assert error is not None
            TURNS.labels(prepared.name, error.code).observe(elapsed)
            return await self._fail(
                entry, active, own, rest, turn_row(None, error), error, the_reply(None, error)
            )
        except asyncio.CancelledError:
            # Between two attempts to commit it: the first may have been kept.
            entry.stored = entry.stored or turn_log.opened
            entry.store_failed = entry.unsure = True
            raise
        except (StaleEpoch, AlreadyHandled) as refused:
            log.warning("turn %s of %s is not committed: %s", turn, agent, refused)
            return Outcome(Ending.LOST, Reply(turn, agent, error=refused))
        except LlmosError as refused:
            return self._not_kept(entry, turn_log, refused)

    # ---------------------------------------------------------------- endings

    def _not_kept(self, entry: Entry, turn_log: TurnLog, refused: LlmosError) -> Outcome:
        """The end of a turn is not durable, so nobody may see it: not the state, the messages
        or the reply. The turn runs again later, if the store may know of it."""
        agent, turn = entry.envelope.receiver, entry.mail.turn
        log.error("turn %s of %s could not be committed: %s", turn, agent, refused)
        entry.unsure = True
        reply = Reply(turn, agent, error=refused)
        if not (entry.stored or turn_log.opened):
            return Outcome(Ending.DONE, reply)
        entry.stored = entry.store_failed = True
        entry.story.append(f"turn {turn} could not be committed: {refused}")
        return Outcome(Ending.AGAIN, reply, not_before=self._clock.time() + STORE_RETRY_S)

    async def _succeed(
        self,
        entry: Entry,
        active: Active,
        own: Own,
        rest: list[Write],
        row: JournalRow,
        state: bytes | None,
        outbox: list[deferred.Deferred],
    ) -> tuple[MailRow, ...] | Busy:
        """Commit all of a turn; returns the messages it has sent, or Busy if one finds no room."""
        mail = self._number(entry, active, outbox)
        others = self._changes(entry.envelope.receiver, outbox)
        delay, until = FULL_RETRY_S, self._clock.monotonic() + STORE_PATIENCE_S
        while True:
            part: list[Write] = [own, *_mail_itself(entry), *rest, *writes_of([row])]
            if state is not None or mail:
                part.append(
                    SaveAgent(
                        own.agent,
                        active.sent,
                        state,
                        active.prepared.program.state_version if state is not None else 0,
                        active.changes + 1 if state is not None else active.changes,
                    )
                )
            part += [PutMail(m, MAX_MAILBOX) for m in mail]
            part += others
            part.append(EndMail(*entry.envelope.key))
            try:
                await self._see_through(self._committer.put(part).done)
            except MailboxFull as full:
                if self._clock.monotonic() > until:
                    return Busy(f"The mailbox of {full.agent}", full.waiting, 1.0)
                await self._clock.sleep(delay)
                delay = min(delay * 2, 1.0)
            except StoreUnavailable:
                if self._clock.monotonic() > until:
                    raise
                await self._clock.sleep(STORE_RETRY_S)
            else:
                return mail

    def _number(
        self, entry: Entry, active: Active, outbox: list[deferred.Deferred]
    ) -> tuple[MailRow, ...]:
        """The messages of a turn, numbered in the order they were sent.

        A turn that runs again because nobody knows whether its commit was kept gives them the
        same numbers: under new ones they would be new messages.
        """
        rows: list[MailRow] = []
        now = self._clock.time() if outbox else 0.0
        for action in outbox:
            if not isinstance(action, deferred.Post):
                continue
            if len(rows) == len(entry.numbers):
                active.sent += 1
                entry.numbers.append(active.sent)
            number = entry.numbers[len(rows)]
            # The agent may have been read again meanwhile, without them.
            active.sent = max(active.sent, number)
            envelope = Envelope(
                receiver=action.receiver,
                sender=active.agent,
                wire=action.wire,
                stream=active.agent,
                seq=number,
                priority=action.priority,
                labels=action.labels,
                cause=action.cause,
                sent_at=now,
            )
            rows.append(
                MailRow(
                    action.receiver,
                    active.agent,
                    number,
                    envelope.pack(),
                    priority=action.priority,
                )
            )
        return tuple(rows)

    def _changes(self, agent: str, outbox: list[deferred.Deferred]) -> list[Write]:
        """What else a turn has left to its end."""
        out: list[Write] = []
        for action in outbox:
            match action:
                case deferred.Timer():
                    envelope = Envelope(
                        receiver=agent,
                        sender="timer",
                        wire=action.wire,
                        stream=f"timer:{action.name}",
                        seq=int(action.due * 1000),
                        labels=action.labels,
                        cause=f"timer {action.name}",
                    )
                    out.append(
                        PutTimer(
                            TimerRow(
                                agent,
                                action.name,
                                action.due,
                                envelope.pack(),
                                action.cron,
                                action.tz,
                            )
                        )
                    )
                case deferred.NoTimer():
                    out.append(DropTimer(agent, action.name))
                case deferred.Subscription():
                    out.append(
                        Subscribe(action.topic, agent)
                        if action.on
                        else Unsubscribe(action.topic, agent)
                    )
                case deferred.Watch():
                    out.append(
                        PutMonitor(MonitorRow(action.agent, agent, action.linked))
                        if action.on
                        else DropMonitor(action.agent, agent)
                    )
                    if action.on and action.linked:
                        out.append(PutMonitor(MonitorRow(agent, action.agent, True)))
                case deferred.Post():
                    pass  # See _number.
        return out

    async def _fail(
        self,
        entry: Entry,
        active: Active,
        own: Own,
        rest: list[Write],
        row: JournalRow,
        error: LlmosError,
        reply: Reply,
    ) -> Outcome:
        """The turn failed: the asker is told; what nobody waits for is tried again or buried."""
        envelope, mail = entry.envelope, entry.mail
        now = self._clock.time()
        retryable = not isinstance(error, UnhandledMessage | InvalidMessage)
        decision = after_failure(
            self._policy, mail.attempts, envelope.asked, retryable, self._clock.random()
        )
        entry.story.append(f"attempt {mail.attempts}: turn {mail.turn} failed: {error}")
        part: list[Write] = [own, *_mail_itself(entry), *rest]
        outcome = Outcome(Ending.DONE, reply)
        match decision:
            case Retry(delay_s=delay_s):
                # The message is not handled: its key must not find this turn.
                part += writes_of([row._replace(idem_key=f"{envelope.id}!{mail.attempts}")])
                part.append(
                    BeginMail(*envelope.key, mail.attempts, mail.deaths, "", 0, now + delay_s)
                )
                outcome = Outcome(Ending.AGAIN, reply, not_before=now + delay_s)
            case Bury(reason=reason):
                part += writes_of([row._replace(idem_key=f"{envelope.id}!{mail.attempts}")])
                story = "\n".join(entry.story)
                # The attempt may have been too short for the store to hear of it.
                part.append(
                    BeginMail(*envelope.key, mail.attempts, mail.deaths, mail.turn, mail.epoch)
                )
                part.append(BuryMail(*envelope.key, reason, story, now))
                log.error("message %s to %s is a dead letter: %s", envelope.id, own.agent, reason)
            case Answer():
                part += writes_of([row._replace(idem_key=envelope.id)])
                part.append(EndMail(*envelope.key))
        story_of_agent = None
        # Not what an agent that it asked has failed with.
        own_failure = isinstance(error, HandlerFailed) and error.agent == own.agent
        if own_failure and not envelope.asked:
            story_of_agent = self._supervisor.failed(
                own.agent, envelope.id, str(error), mail.turn, now
            )
        if story_of_agent is not None:
            part.append(SetHold(own.agent, "quarantined", story_of_agent.text))
        until = self._clock.monotonic() + STORE_PATIENCE_S
        while True:
            try:
                await self._see_through(self._committer.put(part).done)
            except StoreUnavailable:
                # It may have been kept: the same part again does no harm.
                if self._clock.monotonic() > until:
                    raise
                await self._clock.sleep(STORE_RETRY_S)
            else:
                break
        if isinstance(decision, Retry):
            entry.mail = mail._replace(turn="", epoch=0)
            entry.rows, entry.begun, entry.ticket = [], False, None
        if story_of_agent is not None:
            active.hold, active.story = "quarantined", story_of_agent.text
            log.error("%s", story_of_agent.text)
            return Outcome(outcome.ending, reply, not_before=outcome.not_before, monitors=True)
        return outcome

    async def _hold(
        self, entry: Entry, active: Active, why: LlmosError, own: Own, turn_log: TurnLog
    ) -> Outcome:
        """The turn cannot go on until a person has looked: its message stays as it is.

        If the store cannot keep that within ``STORE_PATIENCE_S`` seconds, the turn runs again
        later, and finds the same.
        """
        kind = "unknown effect" if isinstance(why, EffectUnknown) else "quarantined"
        story = f"turn {entry.mail.turn} of {own.agent}, message {entry.envelope.id}:\n{why}"
        error: LlmosError = why
        if isinstance(why, Nondeterminism):
            error = Quarantined(own.agent, story)
        log.error("%s is held (%s): %s", own.agent, kind, story)
        reply = Reply(entry.mail.turn, own.agent, error=error)
        # Epoch 0: a host that is lost while it waits is not lost with this turn.
        mail = entry.mail
        begin = BeginMail(*entry.envelope.key, mail.attempts, mail.deaths, mail.turn, 0)
        rest: list[Write] | None = None
        until = self._clock.monotonic() + STORE_PATIENCE_S
        while True:
            try:
                if rest is None:
                    await turn_log.barrier()
                    entry.stored, entry.begun = True, False
                    rest = await turn_log.rest()
                part = [own, *rest, begin, SetHold(own.agent, kind, story)]
                await self._see_through(self._committer.put(part).done)
            except StaleEpoch as stale:
                return Outcome(Ending.LOST, Reply(entry.mail.turn, own.agent, error=stale))
            except (StoreUnavailable, DeadlineExceeded, Busy) as later:
                # Until the store knows, nobody is asked.
                log.error("that %s is held is not recorded yet: %s", own.agent, later)
                if self._clock.monotonic() > until:
                    return self._not_kept(entry, turn_log, later)
                await self._clock.sleep(STORE_RETRY_S)
            except LlmosError as refused:
                # It stays held in this host; the next one finds the same.
                log.error("that %s is held could not be recorded: %s", own.agent, refused)
                break
            else:
                break
        active.hold, active.story = kind, story
        return Outcome(Ending.HELD, reply, monitors=kind == "quarantined")

    async def _put_down(
        self, entry: Entry, error: LlmosError, own: Own, turn_log: TurnLog
    ) -> Outcome:
        """The host closes, or gives the agent away: whoever has the message next goes on with
        its turn. Epoch 0 says that no host was lost with it."""
        mail = entry.mail
        if isinstance(error, Cancelled) and error.by == MOVE:
            # Who asks is to ask the new owner, where the turn goes on.
            error = StaleEpoch(own.agent, self._epoch, -1)
        try:
            rest = await turn_log.rest()
            # What the store has not heard of yet has not happened: it is asked again.
            if entry.stored or turn_log.opened:
                begin = BeginMail(*entry.envelope.key, mail.attempts, mail.deaths, mail.turn, 0)
                part = [own, *_mail_itself(entry), *rest, begin]
                await self._see_through(self._committer.put(part).done)
        except LlmosError as refused:
            log.debug("put down: %s", refused)
        return Outcome(Ending.KEPT, Reply(mail.turn, own.agent, error=error))

    @staticmethod
    async def _see_through(done: Kept) -> None:
        """Wait for a commit to the end: a turn that is cancelled here may be in the store
        already, and then its state and its messages must follow."""
        while True:
            try:
                await done
            except asyncio.CancelledError:
                if done.cancelled():
                    raise
                log.info("cancelled while it was being committed: too late")
            else:
                return

    # ---------------------------------------------------------------- the handler

    async def _handle(
        self, active: Active, entry: Entry, dispatcher: TurnDispatcher
    ) -> tuple[Message | None, LlmosError | None, bytes | None]:
        """Run the handler: its reply, its error, and the new state if there is one."""
        agent, turn, spec = dispatcher.agent, dispatcher.turn, entry.spec
        with logs.turn_context(agent, turn):
            try:
                instance = active.prepared.program(active.state(), active.prepared.config)
                handler = getattr(instance, spec.method)(entry.message, Context(dispatcher))
                reply = await self._run(handler, dispatcher)
                if reply is not None and not isinstance(reply, Message):
                    raise TypeError(
                        f"{spec.method} returned {type(reply).__name__}, not a Message or None"
                    )
                packed = _pack(instance.state, agent, turn)
                if packed == active.packed:
                    return reply, None, None
                if spec.read_only:
                    raise ReadOnlyTurn(agent, spec.method, "changed the state")
            except asyncio.CancelledError as cancelled:
                by = str(cancelled.args[0]) if cancelled.args else "its asker"
                return None, Cancelled(_what(agent), by), None
            except LlmosError as error:
                if dispatcher.stopped is None:
                    log.warning("turn failed: %s", error)
                return None, error.with_traceback(None), None
            except (Exception, SystemExit) as error:
                log.exception("handler %s failed", spec.method)
                return None, as_llmos_error(error, agent, turn), None
        return reply, None, packed

    async def _run(
        self, handler: Coroutine[Any, Any, Message | None], dispatcher: TurnDispatcher
    ) -> Message | None:
        """Run a handler to its end, its deadline, or where the turn cannot go on.

        In a task of its own: one that swallows its cancellation is left behind, since it
        would otherwise keep its agent from ever having another turn.
        """
        agent, turn, deadline_s = dispatcher.agent, dispatcher.turn, dispatcher.remaining_s

        async def guarded() -> Message | None:
            try:
                return await handler
            except SystemExit as error:
                # Out of a task it would end the whole process.
                raise as_llmos_error(error, agent, turn) from None

        loop = asyncio.get_running_loop()
        task = loop.create_task(guarded())
        # What asyncio.wait does with a timeout, in a third of its time.
        over: asyncio.Future[None] = loop.create_future()

        def wake(*_: object) -> None:
            if not over.done():
                over.set_result(None)

        task.add_done_callback(wake)
        dispatcher.on_stop = wake
        timer: asyncio.TimerHandle | Call
        if deadline_s < FLUSH_S:
            timer = loop.call_later(deadline_s, wake)
        else:

            def lasts() -> None:
                # It is one of the turns that take long enough to need a timer of their own.
                nonlocal timer
                timer = loop.call_later(max(dispatcher.remaining_s, 0.0), wake)

            timer = self._lasting.call(lasts)
        try:
            await over
        except asyncio.CancelledError as cancelled:
            if put_down(cancelled):
                dispatcher.put_down()
                # So that whom it has asked is not cancelled with it.
                await self._stop(task, agent, str(cancelled.args[0]))
            else:
                await self._stop(task, agent)
            raise
        finally:
            timer.cancel()
        if dispatcher.stopped is not None:
            await self._stop(task, agent)
            raise dispatcher.stopped
        if not task.done():
            await self._stop(task, agent)
            raise DeadlineExceeded(f"the turn of {agent}", deadline_s)
        return task.result()

    @staticmethod
    async def _stop(
        task: asyncio.Task[Message | None], agent: str, why: str = "the end of the turn"
    ) -> None:
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        task.cancel(why)
        await asyncio.wait({task}, timeout=STOP_S)
        if not task.done():
            log.error("the handler of %s ignores its cancellation and is left behind", agent)


def _what(agent: str) -> str:
    """What is cancelled, where an agent's own turn is."""
    return f"The turn of {agent}"


def _opening(entry: Entry) -> list[Write]:
    """What has to stand in the store before anything of this attempt does."""
    mail = entry.mail
    if not entry.stored:
        return [PutMail(mail)]
    begin = BeginMail(*mail.key, mail.attempts, mail.deaths, mail.turn, mail.epoch)
    if entry.unsure or not kept(entry.ticket):
        # Both, in the part of the turn's first rows: rows of a turn that the message does not
        # name would be of no use after a crash, and what they tell of would be done again.
        return [PutMail(mail), begin]
    return [] if entry.begun else [begin]


def kept(ticket: Ticket | None) -> bool:
    """Whether the message's own part is known to be durable; no part: it was found there."""
    if ticket is None:
        return True
    done = ticket.done
    return done.done() and not done.cancelled() and done.exception() is None


def _mail_itself(entry: Entry) -> list[Write]:
    """The message, where it is not known to be in the store: the end of a turn ends it, too."""
    if not entry.stored or entry.unsure or not kept(entry.ticket):
        # Also where it comes and goes in one commit: so a message that was handled before, here
        # or by another host, is found out, and its turn refused.
        return [PutMail(entry.mail)]
    return []


def _pack(state: BaseModel, agent: str, turn: str) -> bytes:
    try:
        return pack_state(state)
    except LlmosError:
        raise
    except (ValueError, TypeError, OverflowError, RecursionError) as unfit:
        raise as_llmos_error(unfit, agent, turn) from None
