"""A causal model behind any server of the OpenAI-compatible API: vLLM, SGLang, llama.cpp, Ollama,
``transformers serve``, or a paid one.

One thread per engine runs an event loop with all requests in it. Jobs wait here, where the
kernel's policy decides, until the server may be asked for one more: at most ``max_concurrent`` at
a time, and so many tokens a minute. Nothing is preempted: a server cannot put a request back.

Before the first piece of an answer was delivered, an attempt that failed for a reason that may
pass is repeated, after a pause with exponential backoff and full jitter, or the pause the server
asks for. After five failures in a row the server is left alone for a while, and jobs are refused
at once. Once something was delivered nothing is repeated: the job ends with the error.

**Counts** are the server's where it tells them. Else tokens of the prompt are those of the local
tokenizer, or an estimate (four bytes a token), and each event with text counts as one token.

**Going on** with a broken stream (``prefix``) works for bare prompts, with vLLM and SGLang, and
wherever the folder of the model's tokenizer is given: the conversation is then rendered here. In
all other cases a prefix is refused, since servers differ in what they make of an assistant's turn
at the end: a turn that was cut off in the middle of a *streamed* answer then fails at that point
when it is run again. Answers that are fetched whole are not concerned; they start over.

**Not kept** of what other engines promise: special tokens in texts are refused, not taken as
text. Blanks that a server's template trims are trimmed. ``step_time`` is unknown.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import random
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import httpx2

from llmos.drivers.engines.book import Outcomes
from llmos.drivers.engines.breaker import CircuitBreaker, backoff_s
from llmos.drivers.engines.budget import TokenBudget
from llmos.drivers.engines.checks import check_job
from llmos.drivers.engines.queue import Fifo
from llmos.drivers.engines.remote_answer import Answer, BadEvent, Piece
from llmos.drivers.engines.remote_call import Caller
from llmos.drivers.engines.remote_faults import Fault
from llmos.drivers.engines.remote_prompts import RemotePrompts
from llmos.drivers.engines.remote_servers import check_abilities, mismatch, request_of
from llmos.drivers.engines.textstream import StopFilter
from llmos.drivers.errors import (
    AdaptersFull,
    AdapterUnusable,
    EngineBusy,
    EngineError,
    EngineFailed,
    GrammarIgnored,
    InvalidParams,
    PromptTooLong,
    RemoteBroken,
    RemoteRefused,
    ServerDown,
    UnknownAdapter,
)
from llmos.drivers.protocols import (
    ChatTurn,
    EngineOptions,
    EngineStatistics,
    FinishReason,
    GenerationChunk,
    GenerationJob,
    JobPlace,
    QueuedRequest,
    QueuePolicy,
    RemoteOptions,
    StepTime,
    ToolCall,
)

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 10.0
CHARS_PER_TOKEN = 128
"""No token is longer; a server that sends more text than so many tokens have does not keep to
``max_new_tokens``."""


class _Remote:
    """One job inside the engine; :class:`llmos.drivers.engines.remote_call.Reader` of its answer."""

    def __init__(
        self,
        key: str,
        job: GenerationJob,
        prompt_tokens: int,
        path: str,
        body: dict[str, Any],
        deliver: Callable[[GenerationChunk], None],
        written: Callable[[_Remote, int], None],
    ) -> None:
        self.key, self.job, self.prompt_tokens = key, job, prompt_tokens
        self.path, self.body = path, body
        self.deliver, self._written = deliver, written
        self.submitted = time.monotonic()
        self.started = 0.0
        self.told = 0
        """Tokens in chunks that were delivered."""
        self.delivered = False
        self.task: asyncio.Task[None] | None = None
        self.cancelled = False
        self.entered = False
        """Its task runs; a task that is cancelled before never does, and so would never end it."""
        self._go = asyncio.Event()
        self._go.set()
        self.begin()

    def begin(self) -> None:
        """Before an attempt: what an earlier one brought, and was not delivered, is dropped."""
        params = self.job.params
        self.answer = Answer(wants_logprobs=params.logprobs is not None)
        self.stops = StopFilter(params.stop, self.job.prefix)
        self.text: list[str] = []
        """The answer; kept only where it is checked at the end."""
        self._pieces: deque[Piece] = deque()
        """Those whose text is held back, in the order they came."""
        self._chars = self._events = self.counted = 0
        self._last = ""
        """Text that waits for the last chunk."""

    @property
    def cost(self) -> int:
        """Tokens it may take at most."""
        return self.prompt_tokens + self.job.params.max_new_tokens

    @property
    def complete(self) -> bool:
        """Whether the answer's text is whole."""
        return self.stops.stopped or self.answer.finish is not None

    def _stopped(self) -> bool:
        return self.stops.stopped

    @property
    def paused(self) -> bool:
        """Whether the reader of the chunks does not keep up."""
        return not self._go.is_set()

    async def ready(self) -> None:
        """Returns when it is not paused any more."""
        await self._go.wait()

    def pause(self, paused: bool) -> None:
        """In the engine's loop."""
        if paused:
            self._go.clear()
        else:
            self._go.set()

    def take(self, piece: Piece) -> bool:
        """A piece of the answer; see :class:`Reader`. Raises BadEvent."""
        most = self.job.params.max_new_tokens
        self._events += 1
        self._chars += len(piece.text)
        if self._chars > CHARS_PER_TOKEN * most + 1024 or self._events > 8 * most + 1024:
            raise BadEvent(f"wrote on and on, though {most} tokens were asked for")
        if self._stopped() or not (piece.text or piece.tokens):
            return False
        # A token can come in two events, but there are no more tokens than were asked for.
        tokens = piece.tokens if piece.logprobs else min(piece.tokens, most - self.counted)
        self.counted += tokens
        self._pieces.append(Piece(piece.text, tokens, piece.logprobs))
        if self.job.params.grammar is not None:
            self.text.append(piece.text)
        text = self.stops.push(piece.text)
        self._written(self, tokens)
        if self.stops.stopped or self.counted >= most:
            # For the last chunk: who goes on from all chunks but that one needs a token to spare.
            self._last += text
        elif text:
            self._deliver(text)
        return True

    def _deliver(self, text: str) -> None:
        out = [self._pieces.popleft() for _ in range(len(self._pieces) - self.stops.held_pieces)]
        tokens = sum(p.tokens for p in out)
        self.told += tokens
        self.delivered = True
        logprobs = tuple(lp for p in out for lp in p.logprobs)
        self.tell(GenerationChunk(self.job.id, text, tokens, logprobs=logprobs))

    def rest(self) -> tuple[str, tuple[Any, ...]]:
        """Text and log-probabilities that are in no chunk yet."""
        text = self._last + ("" if self.stops.stopped else self.stops.flush())
        return text, tuple(lp for p in self._pieces for lp in p.logprobs)

    def tell(self, chunk: GenerationChunk) -> None:
        """Deliver; who cannot take it, is cancelled."""
        try:
            self.deliver(chunk)
        except Exception:
            log.exception("deliver of job %s raised; the job is cancelled", self.job.id)
            self.cancelled = True
            if chunk.finish is None and self.task is not None:
                self.task.cancel()


class RemoteEngine:
    """See :class:`llmos.drivers.protocols.CausalEngine`, and this module for what differs."""

    BREAKER_FAILURES = 5
    BREAKER_PAUSE_S = 1.0
    BACKOFF_S = 0.25
    """Bound of the first pause before an attempt is repeated; it doubles up to 20 s."""

    def __init__(self, options: EngineOptions) -> None:
        """Starts its thread; the server is not asked yet, and may be down.

        ``options.path`` may be a folder with the model's tokenizer; nothing else in it is read.

        Raises:
            EngineFailed: no server is named, or its address or the tokenizer cannot be used.
        """
        if options.remote is None:
            raise EngineFailed(options.model, "no remote server is named")
        self._options = options
        self._remote: RemoteOptions = options.remote
        _check_url(options.model, self._remote.url)
        folder = options.path if options.path != Path() else None
        self._prompts = RemotePrompts(options.model, folder)
        self._lock = threading.RLock()
        self._policy: QueuePolicy = Fifo()
        self._inside: dict[str, _Remote] = {}
        """By job id: everything submitted and not yet ended."""
        self._waiting: dict[str, _Remote] = {}
        """By key."""
        self._running: dict[str, _Remote] = {}
        self._adapters: set[str] = set()
        self._outcomes = Outcomes()
        self._breaker = CircuitBreaker(self.BREAKER_FAILURES, self.BREAKER_PAUSE_S)
        self._budget = TokenBudget(self._remote.tokens_per_minute, time.monotonic())
        self._chance = random.Random()
        self._salt = secrets.token_bytes(32)
        self._prompt_tokens = self._new_tokens = self._cached = self._serial = 0
        self._broken = ""
        self._closing = False
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._caller = Caller(options.model, self._remote)
        self._thread = threading.Thread(
            target=self._run, name=f"llmos-remote-{options.model}", daemon=True
        )
        self._thread.start()

    # ------------------------------------------------------------ callers' side

    @property
    def context_tokens(self) -> int:
        """As the options say; servers do not tell."""
        return self._remote.context_tokens

    def count_tokens(self, prompt: str | tuple[ChatTurn, ...]) -> int:
        """Exact with the folder of a tokenizer, else an estimate: four bytes a token, and four
        tokens more per turn. Raises InvalidParams."""
        return self._prompts.count(prompt)

    def submit(self, job: GenerationJob, deliver: Callable[[GenerationChunk], None]) -> None:
        """Queue a job; see the protocol for what it raises, and ServerDown (an EngineBusy) while
        the server is left alone. What this kind of server cannot do is InvalidParams."""
        self._check_alive()
        check_job(job)
        self._prompts.refuse_controls(job)
        check_abilities(self._remote.server, job, renders=self._prompts.exact)
        with self._lock:
            # Before tokenizing: a full engine must refuse cheaply.
            self._check_room(job)
        prompt_tokens = self._count_within_limits(job)
        path, body = request_of(
            self._remote.server,
            job.adapter or self._remote.model,
            job,
            rendered=self._prompts.rendered(job),
            salt=hmac.digest(self._salt, job.tenant.encode(), "sha256").hex(),
        )
        with self._lock:
            self._check_alive()
            self._check_room(job)
            self._serial += 1
            entry = _Remote(
                # Not the job's id: that may come again while an old cancel is on its way.
                str(self._serial),
                job,
                prompt_tokens,
                path,
                body,
                deliver,
                self._written,
            )
            self._inside[job.id] = self._waiting[entry.key] = entry
            self._policy.add(_queued(entry), time.monotonic())
            self._loop.call_soon_threadsafe(self._admit)

    def cancel(self, job_id: str) -> bool:
        """Close the request's connection, by which the server knows."""
        with self._lock:
            entry = self._inside.get(job_id)
            if entry is None:
                return False
            entry.cancelled = True
            self._loop.call_soon_threadsafe(self._drop, entry)
            return True

    def use_policy(self, policy: QueuePolicy) -> None:
        """Let ``policy`` decide who is sent next; ``victim`` is never asked."""
        with self._lock:
            now = time.monotonic()
            for entry in self._waiting.values():
                policy.add(_queued(entry), now)
            self._policy = policy
            if not self._closing:
                self._loop.call_soon_threadsafe(self._admit)

    def pause(self, job_id: str) -> bool:
        """Read no more of its answer: the connection fills up, and the server has to wait."""
        return self._pause(job_id, True)

    def resume(self, job_id: str) -> bool:
        """Read on."""
        return self._pause(job_id, False)

    def _pause(self, job_id: str, paused: bool) -> bool:
        with self._lock:
            entry = self._inside.get(job_id)
            if entry is None:
                return False
            self._loop.call_soon_threadsafe(entry.pause, paused)
            return True

    def load_adapter(self, name: str, path: Path) -> int:
        """Ask the server whether it serves an adapter of that name on this very model, as vLLM
        does under the adapter's own name; returns 0 bytes. ``path`` is not read: the server has
        the weights already, and whether they are those nobody here can tell.

        Raises:
            AdapterUnusable: the server does not list it, or not as one of this model.
            AdaptersFull, EngineFailed
        """
        with self._lock:
            self._check_alive()
            if name not in self._adapters and len(self._adapters) >= self._options.max_adapters:
                raise AdaptersFull(self._options.model, self._options.max_adapters)
            asked = asyncio.run_coroutine_threadsafe(self._caller.models(), self._loop)
        try:
            # It has a time limit of its own; this one is for an engine that is closed meanwhile.
            listed = asked.result(self._remote.connect_timeout_s + CLOSE_TIMEOUT_S)
        except Fault as fault:
            raise fault.error from None
        except TimeoutError:
            raise EngineFailed(self._options.model, "the list of models did not come") from None
        parents = [m.get("parent") for m in listed if m.get("id") == name]
        if self._remote.model not in parents:
            reason = "the server lists no such model"
            if parents:
                reason = f"the server does not list it as an adapter of {self._remote.model!r}"
            raise AdapterUnusable(self._options.model, name, reason)
        with self._lock:
            self._adapters.add(name)
        return 0

    def unload_adapter(self, name: str) -> None:
        """Refuse it from now on; the server keeps it."""
        with self._lock:
            if name not in self._adapters:
                raise UnknownAdapter(self._options.model, name, self._adapters)
            self._adapters.remove(name)

    def place(self, job_id: str) -> JobPlace | None:
        """Where a job is and what it waits for: what the server does with it is not known."""
        with self._lock:
            entry = self._inside.get(job_id)
            if entry is None:
                return None
            now = time.monotonic()
            state: Literal["waiting", "running", "paused"] = "running"
            position, reason = 0, ""
            if entry.key in self._waiting:
                standing = self._policy.standing(entry.key, now)
                state, position = "waiting", len(standing.before) + 1
                reason = f"{standing.reason}; the server is asked for "
                reason += f"{self._remote.max_concurrent} answers at a time"
            elif entry.paused:
                state = "paused"
            return JobPlace(
                state,
                position,
                reason,
                waited_s=now - entry.submitted,
                running=len(self._running),
                new_tokens=entry.counted,
                max_new_tokens=entry.job.params.max_new_tokens,
            )

    def step_time(self) -> StepTime | None:
        """None: what a server does in a step is not seen from here."""
        return None

    def memory_bytes(self) -> dict[str, int]:
        """Nothing: its weights are elsewhere."""
        return {}

    def statistics(self) -> EngineStatistics:
        """Counters and queue lengths now; a remote model has no KV memory here."""
        with self._lock:
            return EngineStatistics(
                running=len(self._running),
                waiting=len(self._waiting),
                prompt_tokens=self._prompt_tokens,
                new_tokens=self._new_tokens,
                finished=self._outcomes.finished,
                failed=self._outcomes.failed,
                cancelled=self._outcomes.cancelled,
                cached_prompt_tokens=self._cached,
                adapters=tuple(sorted(self._adapters)),
            )

    def close(self) -> None:
        """Fail what is inside with EngineFailed, close all connections and stop the thread."""
        with self._lock:
            if not self._closing:
                self._closing = True
                self._loop.call_soon_threadsafe(self._stop.set)
        # From inside ``deliver`` the thread cannot wait for itself; it ends by itself.
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_TIMEOUT_S + 1)
            if self._thread.is_alive():
                log.error("engine %s still runs after close", self._options.model)

    def _check_alive(self) -> None:
        if self._broken or self._closing:
            raise EngineFailed(self._options.model, self._broken or "it is closed")

    def _check_room(self, job: GenerationJob) -> None:
        if job.id in self._inside:
            raise InvalidParams("id", job.id, "a job with this id is in the engine")
        if job.adapter and job.adapter not in self._adapters:
            raise UnknownAdapter(self._options.model, job.adapter, self._adapters)
        now = time.monotonic()
        if self._breaker.retry_after_s(now):
            raise self._down(now)
        if len(self._inside) >= self._options.max_waiting:
            raise EngineBusy(
                self._options.model, len(self._inside), self._outcomes.retry_after_s(now)
            )

    def _down(self, now: float) -> ServerDown:
        wait_s = max(self._breaker.retry_after_s(now), 0.05)
        return ServerDown(self._options.model, self._remote.url, self._breaker.failures, wait_s)

    def _count_within_limits(self, job: GenerationJob) -> int:
        new, context = job.params.max_new_tokens, self._remote.context_tokens
        tokens = self._prompts.at_least(job)
        if tokens + new <= context:
            tokens = self._prompts.count(job.prompt, job.prefix)
            # An estimate does not refuse what may fit; the server will, if it must.
            if not self._prompts.exact:
                tokens = min(tokens, context - new)
        if tokens + new > context:
            raise PromptTooLong(self._options.model, tokens, new, context, "context")
        most = self._budget.capacity
        if most and tokens + new > most:
            raise PromptTooLong(
                self._options.model, tokens, new, most, "budget of tokens_per_minute"
            )
        return tokens

    # ------------------------------------------------------------ the engine's thread

    def _run(self) -> None:
        reason = "its thread ended"
        try:
            asyncio.set_event_loop(self._loop)
            self._loop.run_until_complete(self._main())
            reason = "it was closed"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            log.exception("engine %s broke", self._options.model)
        finally:
            with self._lock:
                self._broken, self._closing = reason, True
                left = list(self._inside.values())
            for entry in left:
                self._end(entry, "error", error=EngineFailed(self._options.model, reason))
            self._loop.close()

    async def _main(self) -> None:
        await self._stop.wait()
        if self._timer is not None:
            self._timer.cancel()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        if others:
            await asyncio.wait(others, timeout=CLOSE_TIMEOUT_S)
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._caller.close()
        except TimeoutError:
            log.warning("engine %s: connections did not close in time", self._options.model)

    def _admit(self) -> None:
        """Send those that may be sent."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            while not self._closing and len(self._running) < self._remote.max_concurrent:
                now = time.monotonic()
                key = self._policy.first(now)
                if key is None:
                    return
                entry = self._waiting[key]
                wait_s = self._budget.wait_s(entry.cost, now)
                if wait_s > 0:
                    # The first waits for its tokens; letting small ones by would starve it.
                    self._timer = self._loop.call_later(wait_s + 0.001, self._admit)
                    return
                self._policy.remove(key, now)
                del self._waiting[key]
                self._budget.take(entry.cost, now)
                entry.started = now
                self._running[key] = entry
                entry.task = self._loop.create_task(self._answer(entry))

    def _drop(self, entry: _Remote) -> None:
        """Carry out a cancel."""
        with self._lock:
            if self._inside.get(entry.job.id) is not entry:
                return
            waiting = self._waiting.pop(entry.key, None) is not None
            if waiting:
                self._policy.remove(entry.key, time.monotonic())
        if waiting:
            self._end(entry, "cancelled")
        elif entry.task is not None and entry.entered:
            entry.task.cancel()

    async def _answer(self, entry: _Remote) -> None:
        """One job from its first attempt to its last chunk."""
        finish: FinishReason = "error"
        error: Exception | None = None
        calls: tuple[ToolCall, ...] = ()
        entry.entered = True
        try:
            if not entry.cancelled:
                await entry.ready()
                await self._attempts(entry)
                finish, calls = self._finish(entry)
            else:
                finish = "cancelled"
        except asyncio.CancelledError:
            finish = "error" if self._closing and not entry.cancelled else "cancelled"
            if finish == "error":
                error = EngineFailed(self._options.model, "it was closed")
        except EngineError as found:
            error = found
        except Exception as found:
            log.exception("job %s", entry.job.id)
            error = EngineFailed(self._options.model, f"{type(found).__name__}: {found}")
        self._end(entry, finish, error=error, calls=calls)

    async def _attempts(self, entry: _Remote) -> None:
        """Ask until the answer is whole. Raises EngineError."""
        asked = (entry.prompt_tokens, entry.job.params.max_new_tokens)
        failed = 0
        last: EngineError | None = None
        while True:
            with self._lock:
                now = time.monotonic()
                attempt = self._breaker.begin(now)
                if attempt is None:
                    raise last or self._down(now)
            entry.begin()
            try:
                await self._caller.run(entry.path, entry.body, entry, asked)
            except Fault as fault:
                with self._lock:
                    now = time.monotonic()
                    if fault.servers:
                        self._breaker.failed(attempt, now)
                    else:
                        self._breaker.succeeded()
                failed += 1
                last = fault.error
                pause_s = fault.pause_s + backoff_s(
                    failed, self._chance.random(), base_s=self.BACKOFF_S
                )
                late = now + pause_s >= (entry.job.deadline_s or math.inf)
                if not fault.again or entry.delivered or failed > self._remote.retries or late:
                    raise fault.error from None
                log.info("job %s is tried again in %.2f s: %s", entry.job.id, pause_s, last)
            except BaseException:
                with self._lock:
                    self._breaker.gave_up(attempt)
                raise
            else:
                with self._lock:
                    self._breaker.succeeded()
                return
            await asyncio.sleep(pause_s)

    def _finish(self, entry: _Remote) -> tuple[FinishReason, tuple[ToolCall, ...]]:
        """How a whole answer ended, and its calls. Raises RemoteError: it is not what was asked for."""
        model, url, answer, job = self._options.model, self._remote.url, entry.answer, entry.job
        if entry.stops.stopped:
            # A call that was cut off is none.
            return "stop", ()
        if answer.finish is None or answer.finish == "error":
            if answer.reason == "content_filter":
                raise RemoteRefused(
                    model, url, "withheld the answer by its content filter", remedy="Ask otherwise"
                )
            raise RemoteBroken(
                model, url, f"ended the answer with {answer.reason!r}", remedy="See its log"
            )
        try:
            calls = answer.tool_calls
        except BadEvent as error:
            raise RemoteBroken(
                model, url, str(error), remedy="Ask again, or bind the call"
            ) from None
        if answer.finish == "stop":
            why = ""
            if job.params.grammar is not None:
                why = mismatch(job.params.grammar, "".join(entry.text))
            elif job.tool_choice == "required" and job.tools and not calls:
                why = "it calls no tool"
            if why:
                raise GrammarIgnored(
                    model,
                    url,
                    f"gave an answer that is not bound as it was asked to be: {why}",
                    remedy="Take a server and model that bind answers, or check them yourself",
                )
        return answer.finish, calls

    def _written(self, entry: _Remote, tokens: int) -> None:
        """The server has written something for a job."""
        with self._lock:
            read = 0 if entry.counted > tokens else entry.prompt_tokens
            self._policy.served(entry.job.tenant, entry.job.agent, read, tokens, time.monotonic())

    def _end(
        self,
        entry: _Remote,
        finish: FinishReason,
        error: Exception | None = None,
        calls: tuple[ToolCall, ...] = (),
    ) -> None:
        """The job's last chunk."""
        now = time.monotonic()
        answer = entry.answer
        prompt_tokens = entry.prompt_tokens
        if answer.prompt_tokens is not None:
            prompt_tokens = answer.prompt_tokens
        counted = entry.counted
        if answer.new_tokens is not None and entry.job.params.logprobs is None:
            counted = max(entry.told, answer.new_tokens)
        text, logprobs = entry.rest() if finish in ("stop", "length") else ("", ())
        if finish not in ("stop", "length"):
            counted = entry.told
        with self._lock:
            self._inside.pop(entry.job.id, None)
            if self._waiting.pop(entry.key, None) is not None:
                self._policy.remove(entry.key, now)
            if self._running.pop(entry.key, None) is not None:
                used = prompt_tokens + counted if entry.counted or answer.new_tokens else 0
                self._budget.take(used - entry.cost, now)
            self._outcomes.count(finish, now)
            self._prompt_tokens += prompt_tokens - answer.cached_tokens
            self._new_tokens += counted
            self._cached += answer.cached_tokens
        started = entry.started or now
        entry.tell(
            GenerationChunk(
                entry.job.id,
                text,
                counted - entry.told,
                finish,
                error,
                prompt_tokens=prompt_tokens,
                new_tokens=counted,
                queued_s=started - entry.submitted,
                run_s=now - started,
                cached_tokens=answer.cached_tokens,
                logprobs=logprobs,
                tool_calls=calls,
            )
        )
        if not self._closing:
            self._admit()


def _queued(entry: _Remote) -> QueuedRequest:
    job = entry.job
    return QueuedRequest(
        key=entry.key,
        tenant=job.tenant,
        agent=job.agent,
        prompt_tokens=entry.prompt_tokens,
        max_new_tokens=job.params.max_new_tokens,
        priority=job.priority,
        deadline_s=job.deadline_s,
        submitted_s=entry.submitted,
        turn=job.turn,
    )


def _check_url(model: str, url: str) -> None:
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise EngineFailed(model, f"the server's url {url!r} is none: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo:
        raise EngineFailed(
            model, f"the server's url {url!r} must begin with http:// or https:// and a host"
        )
