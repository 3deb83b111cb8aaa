"""The mail of one host: what it accepts, what it finds in the store, and who is next.

The store holds every message that waits. This is the part of it that this host has in
memory; what is lost with it is found again by whoever owns the shards next.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from llmos.drivers.errors import (
    AlreadyHandled,
    LlmosError,
    StaleEpoch,
    StoreError,
    StoreUnavailable,
)
from llmos.drivers.stores.rows import (
    TURN,
    Append,
    BeginMail,
    BuryMail,
    EndMail,
    JournalRow,
    MailRow,
    Own,
    PutMail,
    Write,
    shard_of,
)
from llmos.kernel import record
from llmos.kernel.activation import Activations, Active
from llmos.kernel.clock import Clock
from llmos.kernel.committer import Committer
from llmos.kernel.core.attempts import Bury, MailPolicy, after_death
from llmos.kernel.core.mailboxes import FIRST, Mailboxes, Turn
from llmos.kernel.dispatch import as_llmos_error
from llmos.kernel.metrics import TURN_WAIT
from llmos.kernel.program import HandlerSpec
from llmos.kernel.remote import MOVE, SHUTDOWN, put_down
from llmos.kernel.services import RemoteServices
from llmos.kernel.turns import (
    STORE_RETRY_S,
    Ending,
    Entry,
    Outcome,
    TurnRunner,
    kept,
)
from llmos.syscalls.errors import (
    Busy,
    Cancelled,
    DeadlineExceeded,
    DeliveryFailed,
    EffectUnknown,
    Quarantined,
    UnhandledMessage,
    UnknownAgent,
)
from llmos.syscalls.messages import Envelope, Message, Reply

log = logging.getLogger("llmos.host")

SHARD_S = 5.0
"""How long a message waits for its shard: who sent it may have heard of a new owner before
this host did."""
PAGE = 1_000
"""Rows of mail read at a time."""
MAX_WAITING = 20_000
"""Messages held in memory; more stay in the store until there is room."""
MAX_RUNNING = 2_000
"""Turns under way at the same time: most of them wait for a model, and cost memory only."""
MAX_REMEMBERED = 1_024
"""Replies kept for askers that ask again; older ones are looked up in the store."""

_FOR_NOW = (StoreUnavailable, DeadlineExceeded, Busy)
"""Errors that say nothing about a message: later it may go well."""
MAX_ENDED = 20_000
"""Messages that are remembered as ended."""

_Told = Callable[[tuple[MailRow, ...]], None]


class Inbox:
    """Mailboxes of the agents of one host. All on one event loop."""

    def __init__(
        self,
        *,
        epoch: int,
        clock: Clock,
        committer: Committer,
        services: RemoteServices,
        activations: Activations,
        runner: TurnRunner,
        policy: MailPolicy,
        sent: _Told,
        timers_set: Callable[[], None],
        held: Callable[[Active, str], None],
    ) -> None:
        self._epoch = epoch
        self._clock = clock
        self._committer = committer
        self._services = services
        self._activations = activations
        self._runner = runner
        self._policy = policy
        self._sent = sent
        self._timers_set = timers_set
        self._held = held
        self.mailboxes = Mailboxes(running_limit=MAX_RUNNING)
        self.entries: dict[str, Entry] = {}
        """What waits or has its turn, by id."""
        self._finished: OrderedDict[str, Reply] = OrderedDict()
        self._shards: dict[int, asyncio.Event] = {}
        """Shards of this host; the event is set once their mail has been read."""
        self._cursor = 0
        """Arrival of the newest mail that was read."""
        self._reading = asyncio.Lock()
        """Mail is taken in by one at a time, so that its order is kept."""
        self._ended_meanwhile: set[str] | None = None
        """Messages that ended while mail was being read: they may be among what was read."""
        self._burials: set[asyncio.Task[None]] = set()
        """Messages that are being given up."""
        self._doors: dict[str, _Door] = {}
        """Agents for which messages wait to be taken in."""
        self._doubtful: set[int] = set()
        """Shards whose mail is to be read once more."""
        self._ended: OrderedDict[str, None] = OrderedDict()
        """Messages that have ended here, the last of them. A message of this host's own may have
        been read in the store, and handled, before the answer to the commit that sent it came."""
        self._unsure: set[str] = set()
        """Agents of which nobody knows what the store has: they are read again."""
        self._behind = self._behind_again = False
        """Whether mail of this host's own was left in the store: what comes after it must then be
        read there, too, or would overtake it. Again: since the last look into the store began."""
        self._local: deque[MailRow] = deque()
        self._local_task: asyncio.Task[None] | None = None
        self._hinted = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._turns = 0
        self._nonce = os.urandom(3).hex()
        """With the time and a counter it makes the ids of this host's turns unique."""
        self.closing = False

    # ---------------------------------------------------------------- shards

    def owns(self, agent: str) -> bool:
        """Whether this host has the agent's shard."""
        return shard_of(agent) in self._shards

    def has(self, shard: int) -> bool:
        """Whether this host has the shard."""
        return shard in self._shards

    def take_shards(self, shards: Iterable[int]) -> None:
        """The host owns exactly these now: read the mail of new ones, let go of old ones."""
        wanted = set(shards)
        lost = set(self._shards) - wanted
        for shard in lost:
            self._shards.pop(shard).set()
        if lost:
            self._let_go(lost)
        gained = wanted - set(self._shards)
        if gained:
            for shard in gained:
                self._shards[shard] = asyncio.Event()
            for agent in self._activations.agents():
                if shard_of(agent) in gained:
                    # Another host may have had it since it was read.
                    self._activations.drop(agent)
            self._spawn(self._recover(frozenset(gained)), "recovering mail")

    def _let_go(self, shards: set[int]) -> None:
        """Another host has these: what runs is refused by the store anyway."""
        for entry in [e for e in self.entries.values() if shard_of(e.mail.receiver) in shards]:
            if entry.task is not None:
                entry.task.cancel(MOVE)
                continue
            self.mailboxes.withdraw(entry.id, entry.mail.receiver)
            stale = self._stale(entry.mail.receiver)
            self._end(entry, Reply("", entry.mail.receiver, error=stale), elsewhere=True)
        for agent in self._activations.agents():
            if shard_of(agent) in shards:
                self._activations.drop(agent)

    async def release(self, shards: set[int], grace_s: float) -> None:
        """Start no more turns on these shards, and give those under way ``grace_s`` seconds."""
        for shard in shards:
            if shard in self._shards:
                self._shards.pop(shard).set()
        running = []
        for entry in [e for e in self.entries.values() if shard_of(e.mail.receiver) in shards]:
            if entry.task is not None:
                running.append(entry.task)
                continue
            self.mailboxes.withdraw(entry.id, entry.mail.receiver)
            stale = self._stale(entry.mail.receiver)
            self._end(entry, Reply("", entry.mail.receiver, error=stale), elsewhere=True)
        if running:
            _, late = await asyncio.wait(running, timeout=grace_s)
            for task in late:
                task.cancel(MOVE)
            if late:
                await asyncio.wait(late, timeout=grace_s)
        await self._committer.close()
        for agent in self._activations.agents():
            if shard_of(agent) in shards:
                self._activations.drop(agent)

    def _stale(self, agent: str) -> StaleEpoch:
        return StaleEpoch(agent, self._epoch, -1)

    async def _shard_ready(self, agent: str) -> None:
        """Wait until the agent's shard is here and what waits in it has been read.

        Raises:
            StaleEpoch: it is not here.
        """
        shard = shard_of(agent)
        event = self._shards.get(shard)
        if event is not None and event.is_set():
            return
        until = self._clock.monotonic() + SHARD_S
        while event is None:
            if self._clock.monotonic() > until or self.closing:
                raise self._stale(agent)
            await asyncio.sleep(0.01)
            event = self._shards.get(shard)
        await event.wait()
        if shard not in self._shards:
            raise self._stale(agent)

    async def _recover(self, gained: frozenset[int]) -> None:
        """Read all the mail of new shards, in the order it came."""
        ending = [
            entry.task
            for entry in self.entries.values()
            if entry.task is not None and shard_of(entry.mail.receiver) in gained
        ]
        if ending:
            # Turns from when they were here before: what they leave behind is to be read, too.
            await asyncio.wait(ending)
        async with self._reading:
            after = 0
            rows: list[MailRow] = []
            while not self.closing:
                self._ended_meanwhile = set()
                try:
                    rows = await self._services.read_store("mail", after=after, limit=PAGE)
                    wanted = gained & self._shards.keys()
                    ready = self._ready()
                    # Also what its new agents have sent to those that were here before: it must
                    # be here before they have another turn, and send more.
                    mine = [
                        r
                        for r in rows
                        if (shard := shard_of(r.receiver)) in wanted
                        or (r.arrival > self._cursor and shard in ready)
                    ]
                    await self._take_in(mine, recovering=True)
                except LlmosError as error:
                    log.warning("recovering mail: %s", error)
                    await self._clock.sleep(STORE_RETRY_S)
                    continue
                if len(rows) < PAGE:
                    break
                after = rows[-1].arrival
                await self._until_room()
            self._cursor = max(self._cursor, rows[-1].arrival if rows else after)
            while self._burials:
                # Who asks again for what is being given up must find that, not begin it anew.
                await asyncio.wait(set(self._burials))
        for shard in gained:
            event = self._shards.get(shard)
            if event is not None:
                event.set()
        self._pump()

    def _look_again(self, shard: int) -> None:
        """Read the mail of a shard once more, a little later."""
        if shard in self._doubtful:
            return
        self._doubtful.add(shard)

        async def later() -> None:
            await self._clock.sleep(STORE_RETRY_S)
            self._doubtful.discard(shard)
            if shard in self._shards and not self.closing:
                await self._recover(frozenset({shard}))

        self._spawn(later(), "reading mail again")

    async def _until_room(self) -> None:
        while len(self.entries) >= MAX_WAITING and not self.closing:
            self._pump()
            await asyncio.sleep(0.05)

    # ---------------------------------------------------------------- mail in the store

    def hint(self) -> None:
        """There is new mail in the store, perhaps for this host."""
        self._hinted.set()

    async def keep_reading(self, sweep_s: float) -> None:
        """Read new mail when hinted to, and every ``sweep_s`` seconds for hints that were lost."""
        while not self.closing:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(sweep_s):
                    await self._hinted.wait()
            self._hinted.clear()
            try:
                await self._fetch()
            except LlmosError as error:
                log.warning("reading mail: %s", error)
                await asyncio.sleep(0.2)

    async def _fetch(self) -> None:
        while len(self.entries) < MAX_WAITING:
            async with self._reading:
                self._ended_meanwhile = set()
                self._behind_again = False
                rows: list[MailRow] = await self._services.read_store(
                    "mail", after=self._cursor, limit=PAGE
                )
                ready = self._ready()
                await self._take_in([r for r in rows if shard_of(r.receiver) in ready])
                if rows:
                    self._cursor = rows[-1].arrival
                if len(rows) < PAGE and not self._behind_again:
                    self._behind = False
            self._pump()
            if len(rows) < PAGE:
                return

    def _ready(self) -> set[int]:
        """Shards whose mail has been read."""
        return {shard for shard, event in self._shards.items() if event.is_set()}

    def deliver_local(self, rows: Iterable[MailRow]) -> None:
        """Mail that this host has just committed, for its own agents: no need to read it."""
        if self._behind:
            self._leave()
            return
        self._local.extend(rows)
        if self._local and (self._local_task is None or self._local_task.done()):
            self._local_task = self._spawn(self._take_local(), "local mail")

    async def _take_local(self) -> None:
        while self._local:
            async with self._reading:
                rows, self._local = list(self._local), deque()
                self._ended_meanwhile = set()
                # Of other shards all is still to be read, this among it.
                ready = self._ready()
                rows = [
                    r
                    for r in rows
                    if shard_of(r.receiver) in ready and _id(*r.key) not in self._ended
                ]
                if len(self.entries) >= MAX_WAITING:
                    self._leave()
                    return
                try:
                    await self._take_in(rows)
                except LlmosError as error:
                    log.warning("taking in mail: %s", error)
                    self._leave()
                    return
            self._pump()

    def _leave(self) -> None:
        """Leave mail of this host's own in the store, from where it is read later."""
        self._behind = self._behind_again = True
        self._local.clear()
        self._hinted.set()

    async def _take_in(self, rows: list[MailRow], *, recovering: bool = False) -> None:
        """Make entries of mail that is in the store. Holds the lock ``_reading``."""
        rows = [r for r in rows if self._is_new(r)]
        if not rows:
            self._ended_meanwhile = None
            return
        loaded = await self._activations.load(r.receiver for r in rows)
        for unknown in loaded.values():
            if isinstance(unknown, _FOR_NOW):
                raise unknown
        started = [r.turn for r in rows if r.turn]
        recorded: dict[str, list[JournalRow]] = {}
        for start in range(0, len(started), 200):
            recorded |= await self._services.read_store("turns_rows", started[start : start + 200])
        for row in rows:
            if not self._is_new(row) or not self.owns(row.receiver):
                continue
            active = loaded[row.receiver]
            if isinstance(active, LlmosError):
                reason = f"its agent cannot be loaded: {active}"
                self._give_up(row, None, Own(row.receiver, self._epoch), reason)
                continue
            self._enter(row, active, recorded.get(row.turn, []), careful=recovering)
        self._ended_meanwhile = None

    def _is_new(self, row: MailRow) -> bool:
        found = _id(row.receiver, row.stream, row.seq)
        return found not in self.entries and found not in (self._ended_meanwhile or ())

    def _enter(
        self, row: MailRow, active: Active, recorded: list[JournalRow], *, careful: bool
    ) -> None:
        own = Own(row.receiver, self._epoch, active.prepared.launch.id)
        deaths = row.deaths
        if row.turn and row.epoch not in (0, self._epoch):
            # A host was lost while this had its turn; it may be what brought it down.
            row = row._replace(deaths=row.deaths + 1, epoch=0)
        envelope: Envelope | None = None
        try:
            envelope = Envelope.unpack(row.receiver, row.stream, row.seq, row.envelope)
            if row.deaths > deaths:
                decision = after_death(self._policy, row.deaths, envelope.asked)
                if isinstance(decision, Bury):
                    self._give_up(row, envelope, own, decision.reason, recorded)
                    return
                begin = BeginMail(*row.key, row.attempts, row.deaths, row.turn, 0)
                self._committer.put([own, begin])
            spec, message = self._handler(active, envelope)
        except LlmosError as error:
            self._give_up(row, None, own, str(error))
            return
        entry = self._entry(envelope, row, spec, message)
        entry.rows, entry.careful = recorded, careful
        self._offer(entry, force=True)

    def _give_up(
        self,
        row: MailRow,
        envelope: Envelope | None,
        own: Own,
        reason: str,
        recorded: Sequence[JournalRow] = (),
    ) -> None:
        burial = self._spawn(self._bury(row, envelope, own, reason, recorded), "burying")
        self._burials.add(burial)
        burial.add_done_callback(self._burials.discard)

    async def _bury(
        self,
        row: MailRow,
        envelope: Envelope | None,
        own: Own,
        reason: str,
        recorded: Sequence[JournalRow],
    ) -> None:
        log.error("message %s#%d to %s: %s", row.stream, row.seq, row.receiver, reason)
        part: list[Write] = [own]
        if envelope is not None and envelope.asked:
            # Who asks again is told; a dead letter would be for those that nobody waits for.
            error = DeliveryFailed(row.receiver, envelope.id, row.deaths, reason)
            part += _interrupted(recorded)
            part.append(_refusal(row, envelope, error, self._epoch, self._clock.time()))
            part.append(EndMail(*row.key))
        else:
            part.append(BeginMail(*row.key, row.attempts, row.deaths, row.turn, 0))
            part.append(BuryMail(*row.key, reason, _story(row), self._clock.time()))
        while True:
            try:
                await self._committer.commit(list(part))
            except _FOR_NOW as later:
                log.warning("it cannot be buried yet: %s", later)
                await self._clock.sleep(STORE_RETRY_S)
            except LlmosError as refused:
                log.error("it is not buried: %s", refused)
                return
            else:
                return

    # ---------------------------------------------------------------- mail from outside

    async def accept(self, envelope: Envelope) -> Entry | Reply:
        """Take a message in; its reply if it has been handled already.

        One that nobody waits for counts as taken when its ``ticket`` is done. Nothing is kept
        if this raises.

        Raises:
            Busy: the mailbox is full.
            StaleEpoch: the agent is not here.
            UnknownAgent, UnhandledMessage, InvalidMessage, Quarantined, ProgramError.
        """
        agent = envelope.receiver
        found = self._known(envelope)
        if found is not None:
            return found
        door = self._doors.get(agent)
        if door is None:
            event = self._shards.get(shard_of(agent))
            here = event is not None and event.is_set() and self._activations.here(agent)
            if here and not envelope.again:
                return await self._take(envelope)
            door = self._doors[agent] = _Door()
        # What has to wait for something is not overtaken by what comes after it.
        door.users += 1
        try:
            async with door.lock:
                return await self._take(envelope)
        finally:
            door.users -= 1
            if not door.users:
                del self._doors[agent]

    async def _take(self, envelope: Envelope) -> Entry | Reply:
        agent = envelope.receiver
        if self.closing and self.owns(agent):
            # If it does not: it was drained, and another host has the agent.
            raise Cancelled(f"The message to {agent}", SHUTDOWN)
        await self._shard_ready(agent)
        # Looked for before the store is: what has its turn now may have ended when it answers.
        found = self._known(envelope)
        if found is not None:
            return found
        if envelope.again:
            row: JournalRow | None = await self._services.read_store("handled", agent, envelope.id)
            if row is not None:
                return record.reply_of(row)
        active = await self._activations.get(agent)
        found = self._known(envelope)
        if found is not None:
            return found
        if active.hold == "quarantined":
            raise Quarantined(agent, active.story)
        spec, message = self._handler(active, envelope)
        if not envelope.sent_at:
            envelope = envelope._replace(sent_at=self._clock.time())
        row_ = MailRow(
            agent, envelope.stream, envelope.seq, envelope.pack(), priority=envelope.priority
        )
        if not self.owns(agent):
            raise self._stale(agent)
        if envelope.again and not envelope.asked:
            return await self._take_again(envelope, row_, active)
        entry = self._entry(envelope, row_, spec, message)
        if not self._offer(entry, force=False):
            raise Busy(f"The mailbox of {agent}", self.mailboxes.waiting(agent), 0.5)
        if envelope.asked:
            entry.stored = False
        else:
            try:
                own = Own(agent, self._epoch, active.prepared.launch.id)
                entry.ticket = self._committer.put([own, PutMail(row_)])
            except LlmosError:
                self.mailboxes.withdraw(entry.id, agent)
                self.entries.pop(entry.id, None)
                raise
        self._pump()
        return entry

    async def _take_again(self, envelope: Envelope, row: MailRow, active: Active) -> Entry | Reply:
        """A message that may have come before: the store says whether it waits now, or was
        given up since, which only the store knows."""
        agent = row.receiver
        waiting = self.mailboxes.waiting(agent)
        if waiting >= active.prepared.manifest.limits.mailbox:
            raise Busy(f"The mailbox of {agent}", waiting, 0.5)
        own = Own(agent, self._epoch, active.prepared.launch.id)
        await self._committer.commit([own, PutMail(row)])
        async with self._reading:
            self._ended_meanwhile = set()
            rows: list[MailRow] = await self._services.read_store("waiting", agent)
            await self._take_in([r for r in rows if r.key == row.key])
        self._pump()
        return self._known(envelope) or Reply("", agent)

    def _known(self, envelope: Envelope) -> Entry | Reply | None:
        found = _id(*envelope.key)
        entry = self.entries.get(found)
        if entry is not None:
            if entry.reply is not None and entry.reply.done():
                entry.reply = None
            if entry.ticket is not None and entry.ticket.done.done() and not kept(entry.ticket):
                # The store could not keep it when it came, and is asked again.
                active = self._activations.here(envelope.receiver)
                launch = active.prepared.launch.id if active is not None else ""
                own = Own(envelope.receiver, self._epoch, launch)
                with contextlib.suppress(Busy):
                    entry.ticket = self._committer.put([own, PutMail(entry.mail)])
            return entry
        return self._finished.get(found)

    async def ask(self, envelope: Envelope) -> Reply:
        """Take a message in and wait for the end of its turn; every error is in the reply."""
        agent = envelope.receiver
        until = self._clock.monotonic() + envelope.deadline_s
        try:
            async with asyncio.timeout(envelope.deadline_s):
                taken = await self.accept(envelope)
        except TimeoutError:
            late = DeadlineExceeded(f"waiting for a turn of {agent}", envelope.deadline_s)
            return Reply("", agent, error=late)
        except LlmosError as error:
            return Reply("", agent, error=error.with_traceback(None))
        if isinstance(taken, Reply):
            return taken
        if taken.reply is None:
            taken.reply = asyncio.get_running_loop().create_future()
        answered = taken.reply
        try:
            left = max(until - self._clock.monotonic(), 0.0)
            await asyncio.wait([answered], timeout=left)
            interrupted = taken.task is None and taken.mail.turn
            if not answered.done() and (interrupted or self._withdraw(taken)):
                late = DeadlineExceeded(f"waiting for a turn of {agent}", envelope.deadline_s)
                return Reply("", agent, error=late)
            # Its turn has begun: it has the deadline itself, and its commit is seen through.
            return await asyncio.shield(answered)
        except asyncio.CancelledError as cancelled:
            if put_down(cancelled):
                raise
            if not self._withdraw(taken) and taken.task is not None:
                by = str(cancelled.args[0]) if cancelled.args else "its asker"
                taken.abandoned = True
                taken.task.cancel(by)
            raise

    def _withdraw(self, entry: Entry) -> bool:
        """Take back what waits and nobody waits for; False: its turn has begun.

        Also one that was cut off and waits to run again: it may have had effects, and is seen
        through.
        """
        agent = entry.mail.receiver
        if entry.task is not None or entry.mail.turn:
            return False
        if not self.mailboxes.withdraw(entry.id, agent):
            return False
        reply = Reply("", agent, error=Cancelled(f"The message to {agent}", "its asker"))
        self._end(entry, reply)
        if entry.stored:
            active = self._activations.here(agent)
            launch = active.prepared.launch.id if active is not None else ""
            self._committer.put([Own(agent, self._epoch, launch), EndMail(*entry.mail.key)])
        self._pump()
        return True

    def _handler(self, active: Active, envelope: Envelope) -> tuple[HandlerSpec, Message]:
        handlers = active.prepared.program.handlers
        spec = handlers.get(envelope.wire.kind)
        if spec is None:
            raise UnhandledMessage(envelope.receiver, envelope.wire.kind, handlers)
        return spec, envelope.wire.decode(spec.message, envelope.receiver)

    # ---------------------------------------------------------------- turns

    def _entry(
        self, envelope: Envelope, row: MailRow, spec: HandlerSpec, message: Message
    ) -> Entry:
        return Entry(_id(*envelope.key), envelope, row, spec, message, self._clock.monotonic())

    def _offer(self, entry: Entry, *, force: bool) -> bool:
        mail = entry.mail
        turn = Turn(
            entry.id,
            mail.receiver,
            mail.receiver.split("/", 1)[0],
            entry.spec.read_only,
            mail.stream,
            mail.seq,
            # One that was cut off goes on with the state that it began with.
            FIRST if mail.turn else mail.priority,
            mail.not_before,
        )
        if not self.mailboxes.offer(turn, force=force):
            return False
        self.entries[entry.id] = entry
        return True

    def _pump(self) -> None:
        """Begin what may begin."""
        if self.closing:
            return
        now = self._clock.time()
        loop = asyncio.get_running_loop()
        for turn in self.mailboxes.take(now):
            entry = self.entries[turn.id]
            self._begin(entry)
            entry.task = task = loop.create_task(self._run(entry))
            self._tasks.add(task)
            task.add_done_callback(self._ended_turn)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        wake = self.mailboxes.next_wake()
        if wake is not None:
            # At least once a second: the wall clock may be set.
            delay = min(max(wake - now, 0.0), 1.0)
            self._timer = loop.call_later(delay, self._pump)

    def _begin(self, entry: Entry) -> None:
        """An attempt begins: its turn gets a number, which it keeps if it is cut off."""
        mail = entry.mail
        entry.again = bool(mail.turn)
        if entry.again:
            # An earlier attempt was cut off: this is the same turn.
            mail = mail._replace(epoch=self._epoch)
        else:
            self._turns += 1
            number = self._turns & 0xFFFF
            turn = f"{int(self._clock.time() * 1000):011x}{number:04x}{self._nonce}"
            # What _replace does, in a third of its time.
            rest = (mail.attempts + 1, mail.deaths, turn, self._epoch, mail.arrival)
            mail = tuple.__new__(MailRow, (*mail[:6], *rest))
        entry.mail = mail
        if entry.ticket is not None and not entry.ticket.sent:
            entry.ticket.part[-1] = PutMail(mail)
            entry.begun = True

    async def _run(self, entry: Entry) -> None:
        agent, mail = entry.mail.receiver, entry.mail
        active: Active | None = None
        try:
            if agent in self._unsure:
                # What left before this is kept or refused when this has been answered.
                await self._committer.commit([Own(agent, self._epoch)])
                if agent in self._unsure:
                    self._unsure.discard(agent)
                    self._activations.drop(agent)
            active = self._activations.here(agent) or await self._activations.get(agent)
            if entry.careful:
                own = Own(agent, self._epoch, active.prepared.launch.id)
                begin = BeginMail(*mail.key, mail.attempts, mail.deaths, mail.turn, mail.epoch)
                await self._committer.commit([own, begin])
                entry.begun = True
            if entry.store_failed:
                rows = await self._services.read_store("turns_rows", [mail.turn])
                entry.rows = rows.get(mail.turn, [])
                if any(row.seq == 0 and row.kind == TURN for row in entry.rows):
                    # Its commit was kept; only the word of it did not come back.
                    self._hinted.set()
                    self._timers_set()
                    ((_, kept),) = await self._services.stored([agent])
                    if kept is not None:
                        active.refresh(kept)
                    mail = await self._next_attempt(entry)
                entry.store_failed = False  # Last: each of these may fail, and is done again.
            if mail.attempts > 1 and _calls_outside(active):
                entry.carried = await self._earlier_effects(entry)
            active.used_at = self._clock.monotonic()
            TURN_WAIT.labels(active.prepared.name).observe(active.used_at - entry.arrived)
            outcome = await self._runner.run(entry, active)
        except asyncio.CancelledError as cancelled:
            by = str(cancelled.args[0]) if cancelled.args else "?"
            error: LlmosError = Cancelled(f"The turn of {agent}", by)
            if by == MOVE:
                # Who asks is to ask the new owner.
                error = self._stale(agent)
            # Not within its handler. Nobody waits for it any more, but the store has it, and
            # its turn may have had effects: it is seen through.
            seen_through = entry.abandoned and entry.stored and by not in (MOVE, SHUTDOWN)
            ending = Ending.AGAIN if seen_through else Ending.KEPT
            outcome = Outcome(ending, Reply("", agent, error=error))
        except UnknownAgent as killed:
            outcome = Outcome(Ending.KEPT, Reply("", agent, error=killed.with_traceback(None)))
        except (StaleEpoch, AlreadyHandled) as ended:
            outcome = Outcome(Ending.LOST, Reply("", agent, error=ended.with_traceback(None)))
        except LlmosError as unloadable:
            # The store or the program cannot be read now: the message stays.
            reply = Reply("", agent, error=unloadable.with_traceback(None))
            again_at = self._clock.time() + STORE_RETRY_S
            outcome = Outcome(Ending.AGAIN, reply, not_before=again_at)
        except Exception as bug:
            log.exception("a turn of %s", agent)
            error = as_llmos_error(bug, agent, entry.mail.turn)
            outcome = Outcome(Ending.KEPT, Reply(entry.mail.turn, agent, error=error))
        entry.task = None
        if outcome.ending is Ending.DONE:
            self._services.shown.end(mail.turn)
        await self._after(entry, active, outcome)
        self._pump()

    async def _next_attempt(self, entry: Entry) -> MailRow:
        """The message as the store has it after a turn that failed: it waits to be tried again.

        Raises:
            AlreadyHandled: it was handled, or given up.
        """
        agent = entry.mail.receiver
        waiting: list[MailRow] = await self._services.read_store("waiting", agent)
        found = next((m for m in waiting if m.key == entry.mail.key), None)
        if found is None:
            raise AlreadyHandled(agent, entry.envelope.id)
        entry.mail, entry.rows, entry.begun, entry.ticket = found, [], False, None
        self._begin(entry)
        return entry.mail

    async def _earlier_effects(self, entry: Entry) -> dict[str, JournalRow]:
        """What earlier attempts at a message have done outside: it is not done again."""
        agent, found = entry.mail.receiver, {}
        for attempt in range(1, entry.mail.attempts):
            end: JournalRow | None = await self._services.read_store(
                "handled", agent, f"{entry.envelope.id}!{attempt}"
            )
            if end is None:
                continue
            rows = await self._services.read_store("turns_rows", [end.turn])
            for row in rows.get(end.turn, []):
                if row.idem_key and row.kind != TURN:
                    found[row.idem_key] = row
        return found

    async def _after(self, entry: Entry, active: Active | None, outcome: Outcome) -> None:
        agent, reply = entry.mail.receiver, outcome.reply
        if entry.unsure:
            # The store may have what it has sent, and its state: both are read there before
            # the agent has another turn, which would send more and save another state.
            self._leave()
            if not entry.spec.read_only:
                self._unsure.add(agent)
        match outcome.ending:
            case Ending.AGAIN:
                # Of what is not durable only the error is told; whoever asks again finds the
                # message.
                self._answer(entry, reply)
                if not entry.mail.turn:
                    self.mailboxes.again(entry.id, outcome.not_before)
                else:
                    # It is the same turn that runs again, with what it has recorded, and so
                    # must find the state that it began with: no other comes between.
                    late_s = outcome.not_before - self._clock.time()
                    await self._clock.sleep(min(max(late_s, 0.0), STORE_RETRY_S))
                    if entry.id in self.entries:
                        self.mailboxes.again(entry.id, 0.0, first=True)
                    else:
                        self.mailboxes.done(entry.id)
            case Ending.HELD:
                # The agent is held before the message waits again, or it would begin at once.
                self.mailboxes.hold(agent)
                self.mailboxes.again(entry.id, 0.0, first=True)
                entry.store_failed = True
                self._answer(entry, reply)
            case Ending.LOST if isinstance(reply.error, AlreadyHandled):
                self.mailboxes.done(entry.id)
                with contextlib.suppress(LlmosError):
                    row = await self._services.read_store("handled", agent, entry.envelope.id)
                    if row is not None:
                        reply = record.reply_of(row)
                self._end(entry, reply)
            case _:
                self.mailboxes.done(entry.id)
                self._end(entry, reply, elsewhere=outcome.ending is not Ending.DONE)
                if isinstance(reply.error, StaleEpoch) and self.owns(agent):
                    # The store knows another owner than the kernel says: one of them will change.
                    self._look_again(shard_of(agent))
        if outcome.mail:
            self._sent(outcome.mail)
        if outcome.timers:
            self._timers_set()
        if active is not None and active.hold:
            self.mailboxes.hold(agent)
            if outcome.monitors:
                self._held(active, active.story)

    def _answer(self, entry: Entry, reply: Reply) -> None:
        if entry.reply is not None and not entry.reply.done():
            entry.reply.set_result(reply)

    def _end(self, entry: Entry, reply: Reply, *, elsewhere: bool = False) -> None:
        """The message is no longer this host's business.

        Args:
            entry: The message.
            reply: What whoever waits for it is told.
            elsewhere: It goes on in another host, and may come back with its shard.
        """
        self.entries.pop(entry.id, None)
        if not elsewhere:
            self._ended[entry.id] = None
            while len(self._ended) > MAX_ENDED:
                self._ended.popitem(last=False)
            if self._ended_meanwhile is not None:
                self._ended_meanwhile.add(entry.id)
        self._answer(entry, reply)
        # Of what ended so nothing may be durable: who asks again is to find out how it goes.
        lost = isinstance(reply.error, StoreError | Busy | Cancelled | DeadlineExceeded)
        if entry.envelope.asked and reply.turn and not lost:
            self._finished[entry.id] = reply
            while len(self._finished) > MAX_REMEMBERED:
                self._finished.popitem(last=False)

    def turn_of(self, agent: str, message: str) -> str | None:
        """The turn that a message (``stream#seq``) has or had; None: none that is known."""
        found = f"{agent} {message}"
        entry = self.entries.get(found)
        if entry is not None:
            return entry.mail.turn or None
        reply = self._finished.get(found)
        return reply.turn or None if reply is not None else None

    def hold(self, agent: str, hold: str, story: str) -> None:
        """The store says that the agent is held."""
        active = self._activations.here(agent)
        if active is not None:
            active.hold, active.story = hold, story
        self.mailboxes.hold(agent)

    def go_on(self, agent: str) -> None:
        """A person has looked: the agent is held no more."""
        active = self._activations.here(agent)
        if active is not None:
            active.hold = active.story = ""
        for entry in self.entries.values():
            if entry.mail.receiver == agent and entry.mail.turn:
                entry.store_failed = True  # What was decided stands in the store.
        self.mailboxes.release(agent)
        self._pump()

    def drop(self, agent: str, by: str) -> None:
        """The agent was killed: nothing of it is left."""
        for entry in [e for e in self.entries.values() if e.mail.receiver == agent]:
            if entry.task is not None:
                entry.task.cancel(by)
                continue
            self.mailboxes.withdraw(entry.id, agent)
            error = Cancelled(f"The message to {agent}", by)
            self._end(entry, Reply("", agent, error=error))
        self.mailboxes.release(agent)
        self._activations.drop(agent)

    # ---------------------------------------------------------------- ending

    async def close(self, grace_s: float) -> None:
        """Take nothing new; give what runs ``grace_s`` seconds, then put it down."""
        self.closing = True
        self._hinted.set()
        if self._timer is not None:
            self._timer.cancel()
        for entry in list(self.entries.values()):
            if entry.task is None:
                error = Cancelled(f"The message to {entry.mail.receiver}", SHUTDOWN)
                self._answer(entry, Reply("", entry.mail.receiver, error=error))
        running = [e.task for e in self.entries.values() if e.task is not None]
        if running:
            _, late = await asyncio.wait(running, timeout=grace_s)
            for task in late:
                task.cancel(SHUTDOWN)
            if late:
                await asyncio.wait(late, timeout=4.0)
        await self._committer.close()
        for task in list(self._tasks):
            task.cancel()

    def _ended_turn(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a turn failed", exc_info=task.exception())

    def _spawn(self, work: Coroutine[Any, Any, None], what: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and task.exception() is not None:
                log.error("%s failed", what, exc_info=task.exception())

        task.add_done_callback(ended)
        return task


def _calls_outside(active: Active) -> bool:
    return any(c.partition(":")[0] == "call" for c in active.prepared.manifest.capabilities)


class _Door:
    """Messages to one agent come in one by one, in the order in which they arrived."""

    __slots__ = ("lock", "users")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.users = 0


def _id(receiver: str, stream: str, seq: int) -> str:
    return f"{receiver} {stream}#{seq}"


def _story(row: MailRow) -> str:
    story = f"attempts begun: {row.attempts}; hosts lost with it: {row.deaths}"
    return f"{story}; its last turn: llmos strace {row.turn}" if row.turn else story


def _interrupted(recorded: Sequence[JournalRow]) -> list[Write]:
    """For each call outside that a turn has begun, and of which no end is known: that."""
    ended = {r.seq for r in recorded if r.phase in ("result", "failed", "unknown")}
    return [
        Append(
            row._replace(
                phase="unknown",
                result=record.error_of(
                    EffectUnknown(row.agent, row.turn, row.seq, row.name, row.idem_key)
                ),
            )
        )
        for row in recorded
        if row.phase == "intent" and row.seq not in ended
    ]


def _refusal(row: MailRow, envelope: Envelope, error: LlmosError, epoch: int, now: float) -> Write:
    return Append(
        JournalRow(
            agent=row.receiver,
            turn=row.turn,
            seq=0,
            phase="failed",
            kind=TURN,
            name=envelope.wire.kind,
            args_hash=record.hash_of(row.envelope),
            args=row.envelope,
            result=record.turn_result(None, error, 0, None),
            idem_key=envelope.id,
            epoch=epoch,
            cause=envelope.cause,
            ts=now,
        )
    )
