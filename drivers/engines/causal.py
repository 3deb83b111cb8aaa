"""A causal language model with continuous batching, on the CPU or a CUDA GPU.

One thread per engine generates; callers only tokenize, queue and cancel. Jobs wait
until all the KV memory they may need is free, in the order of a policy that the kernel
hands in. A job that gives way to another loses its keys and values and reads its tokens
again later. Keeping them in host memory was the alternative. On the CPU that is the same
memory. On CUDA it would pay for long contexts; it is not built, because dropped blocks stay
remembered (see prefixes.py) as long as nobody needs the room, and such jobs read only the
rest again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoTokenizer, GenerationConfig

from llmos.drivers.devices.cpu import set_torch_threads
from llmos.drivers.engines.adapters import AdapterShelf
from llmos.drivers.engines.book import Outcomes
from llmos.drivers.engines.calibration import calibrate
from llmos.drivers.engines.checks import check_job
from llmos.drivers.engines.lora import ResidentAdapter
from llmos.drivers.engines.place import Need, entry_s
from llmos.drivers.engines.prefixes import KEEP_S, Pauses
from llmos.drivers.engines.prompts import PromptEncoder
from llmos.drivers.engines.queue import Fifo
from llmos.drivers.engines.sampling import Chances, Row
from llmos.drivers.engines.sequence import Sequence
from llmos.drivers.engines.stepper import NewToken, Stepper, StepResult
from llmos.drivers.engines.steptime import StepTimes
from llmos.drivers.engines.structured import Bound, Grammars
from llmos.drivers.engines.textstream import Detokenizer, StopFilter
from llmos.drivers.engines.toolcalls import ToolSyntax, with_ids
from llmos.drivers.errors import (
    EngineBusy,
    EngineFailed,
    InvalidParams,
    PromptTooLong,
)
from llmos.drivers.protocols import (
    ChatTurn,
    EngineOptions,
    EngineStatistics,
    FinishReason,
    GenerationChunk,
    GenerationJob,
    Grammar,
    JobPlace,
    QueuedRequest,
    QueuePolicy,
    StepTime,
    TokenLogprob,
    ToolCall,
)

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 60.0
"""A step is never interrupted, so closing may take as long as the longest one."""
BETWEEN_STEPS_TIMEOUT_S = 60.0
"""What waits for the end of a step waits so long at most."""
RETRY_S = 0.05
"""When a policy lets nobody in though there is room, it is asked again after this."""
CALIBRATION_S = 2.0
"""Longest time for measuring steps at the start; a job ends it sooner. 0: none (in tests)."""


class _Running:
    """One job inside the engine: waiting, in the batch, or paused without memory."""

    __slots__ = (
        "cancelled",
        "charged",
        "deliver",
        "detokenizer",
        "job",
        "logprobs",
        "sequence",
        "stops",
        "submitted_s",
        "syntax",
        "untold",
    )

    def __init__(
        self,
        sequence: Sequence,
        job: GenerationJob,
        detokenizer: Detokenizer,
        deliver: Callable[[GenerationChunk], None],
        syntax: ToolSyntax | None,
    ) -> None:
        self.sequence, self.job = sequence, job
        self.syntax = syntax
        """How calls of tools are read out of the answer; None: there are none."""
        self.detokenizer, self.deliver = detokenizer, deliver
        self.stops = StopFilter(
            job.params.stop,
            job.prefix,
            marks=syntax.marks if syntax else (),
            hold_all=syntax is not None and not syntax.marks,
        )
        self.submitted_s = time.monotonic()
        self.untold = 0
        """Tokens whose text is in no chunk yet."""
        self.logprobs: list[TokenLogprob] = []
        """Of those tokens, where asked for."""
        self.charged = -1
        """Prompt tokens that were found or read; reading them again is nobody's debt.
        Below 0: it was not inside yet."""
        self.cancelled = False


class TransformersCausalEngine:
    """See :class:`llmos.drivers.protocols.CausalEngine`."""

    def __init__(self, options: EngineOptions) -> None:
        """Load the model and start its thread; takes as long as reading the weights.

        Raises:
            EngineFailed: the folder cannot be loaded or the cache does not fit.
        """
        self._options = options
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                options.path, local_files_only=True, trust_remote_code=False
            )
            self._encoder = PromptEncoder(options.model, tokenizer)
            self._stepper = Stepper(options)
        except (OSError, ValueError, RuntimeError, MemoryError, KeyError, ImportError) as error:
            raise EngineFailed(
                options.model, f"loading {options.path}: {type(error).__name__}: {error}"
            ) from error
        self._eos = frozenset(_end_tokens(options, self._stepper.model))
        self._grammars = Grammars(
            self._encoder.backend, self._stepper.vocabulary, sorted(self._eos)
        )
        self._context = self._stepper.context_tokens
        self._kv_tokens = self._stepper.kv_tokens
        self._wake = threading.Condition()
        self._inside: dict[str, _Running] = {}
        """By job id: everything submitted and not yet ended."""
        self._policy: QueuePolicy = Fifo()
        self._queued: dict[str, _Running] = {}
        """By key: those that the policy knows of."""
        self._running: dict[str, _Running] = {}
        """By key: those in the batch. Changed by the generation thread only."""
        self._cancels: list[_Running] = []
        self._shelf = AdapterShelf(options.model, self._stepper.bank, options.max_adapters)
        self._chores: list[tuple[Callable[[], None], Future[None]]] = []
        """To be done by the generation thread between two steps."""
        self._outcomes = Outcomes()
        self._pauses = Pauses()
        self._times = StepTimes()
        self._prompt_tokens = self._new_tokens = self._cached_tokens = 0
        self._serial = self._preempted = self._steps = 0
        self._broken = ""
        self._closing = False
        self._thread = threading.Thread(
            target=self._run, name=f"llmos-engine-{options.model}", daemon=True
        )
        self._thread.start()

    @property
    def context_tokens(self) -> int:
        """Longest prompt plus answer."""
        return self._context

    # ------------------------------------------------------------ callers' side

    def count_tokens(self, prompt: str | tuple[ChatTurn, ...]) -> int:
        """Tokens the prompt would take, chat template included. Raises InvalidParams."""
        return len(self._encoder.encode(prompt))

    def submit(self, job: GenerationJob, deliver: Callable[[GenerationChunk], None]) -> None:
        """Queue a job; see the protocol for what it raises."""
        self._check_alive()
        check_job(job)
        with self._wake:
            # Before tokenizing: a full engine must refuse cheaply.
            self._check_room(job)
        resident = self._shelf.acquire(job.adapter) if job.adapter else None
        try:
            self._take(job, resident, deliver)
        except BaseException:
            if resident is not None:
                self._shelf.release(resident)
            raise

    def _take(
        self,
        job: GenerationJob,
        resident: ResidentAdapter | None,
        deliver: Callable[[GenerationChunk], None],
    ) -> None:
        syntax = self._syntax(job)
        prompt_ids, prefix_ids = self._encode_within_limits(job)
        binding = self._bind(job, syntax, prefix_ids)
        with self._wake:
            self._check_alive()
            self._check_room(job)
            self._serial += 1
            sequence = Sequence(
                # Not the job's id: that may come again while an old cancel is on its way.
                str(self._serial),
                prompt_ids + prefix_ids,
                job.params,
                eos=frozenset() if job.params.ignore_eos else self._eos,
                tenant=job.tenant,
                agent=job.agent,
                resident=resident,
                row=Row(job.params, place=len(prefix_ids), binding=binding),
            )
            shown = self._encoder.shown_controls if syntax else {}
            detokenizer = Detokenizer(self._encoder.backend, prefix_ids, shown)
            running = _Running(sequence, job, detokenizer, deliver, syntax)
            self._enqueue(running)
            self._inside[job.id] = running
            self._pauses.begins(job.tenant, job.agent, running.submitted_s)
            self._wake.notify()

    def cancel(self, job_id: str) -> bool:
        """Stop a job within one step. A job that ends in that same step ends as it would have."""
        with self._wake:
            running = self._inside.get(job_id)
            if running is None:
                return False
            if not running.cancelled:
                running.cancelled = True
                self._cancels.append(running)
                self._wake.notify()
            return True

    def pause(self, job_id: str) -> bool:
        """Write no more for a job from the next step on. It keeps its memory until somebody
        who waits would otherwise have to wait for it."""
        with self._wake:
            running = self._inside.get(job_id)
            if running is None:
                return False
            running.sequence.paused = True
            if self._queued.pop(running.sequence.key, None) is not None:
                self._policy.remove(running.sequence.key, time.monotonic())
            return True

    def resume(self, job_id: str) -> bool:
        """Go on with a paused job; one that lost its memory waits for it like others."""
        with self._wake:
            running = self._inside.get(job_id)
            if running is None:
                return False
            sequence = running.sequence
            if sequence.paused:
                sequence.paused = False
                if sequence.key not in self._running:
                    self._enqueue(running)
                self._wake.notify()
            return True

    def use_policy(self, policy: QueuePolicy) -> None:
        """From now on this policy decides who enters; those that wait are told to it."""
        with self._wake:
            now = time.monotonic()
            for running in sorted(self._queued.values(), key=lambda r: r.submitted_s):
                policy.add(self._request(running), now)
            self._policy = policy
            self._wake.notify()

    def load_adapter(self, name: str, path: Path) -> int:
        """Make an adapter resident between two steps; see the protocol."""
        self._check_alive()
        try:
            return self._shelf.load(name, path, self._between_steps)
        except (RuntimeError, MemoryError) as error:
            reason = f"loading adapter {name!r}: {type(error).__name__}: {error}"
            raise EngineFailed(self._options.model, reason) from error

    def unload_adapter(self, name: str) -> None:
        """Refuse new jobs for an adapter at once, and drop it when its last job has ended."""
        self._shelf.unload(name)

    def _between_steps(self, work: Callable[[], None]) -> None:
        """Have the generation thread do something that no step may see half done.

        Raises:
            EngineFailed: it is closed, or its step does not end.
        """
        if threading.current_thread() is self._thread:
            work()  # From inside ``deliver``: no step is under way.
            return
        done: Future[None] = Future()
        with self._wake:
            self._check_alive()
            self._chores.append((work, done))
            self._wake.notify()
        try:
            done.result(BETWEEN_STEPS_TIMEOUT_S)
        except TimeoutError:
            if done.cancel():
                raise EngineFailed(self._options.model, "its step does not end") from None
            done.result(BETWEEN_STEPS_TIMEOUT_S)  # It had just begun.

    def place(self, job_id: str) -> JobPlace | None:
        """Where a job is and what it waits for; None: it is not here."""
        with self._wake:
            running = self._inside.get(job_id)
            if running is None or self._broken:
                return None
            now = time.monotonic()
            sequence, key = running.sequence, running.sequence.key
            free = self._kv_tokens - self._stepper.cache.used_tokens
            state: Literal["waiting", "running", "paused"] = "running"
            position, reason, estimate = 0, "", None
            if sequence.paused:
                state = "paused"
            elif key in self._queued:
                standing = self._policy.standing(key, now)
                state, position = "waiting", len(standing.before) + 1
                reason = standing.reason
                estimate = entry_s(
                    free,
                    [_need(self._queued[k]) for k in (*standing.before, key)],
                    [_need(r) for r in self._running.values()],
                    self._times.fit(),
                    self._stepper.cache.used_tokens,
                )
            return JobPlace(
                state,
                position,
                reason,
                waited_s=now - running.submitted_s,
                running=len(self._running),
                new_tokens=sequence.new_tokens,
                max_new_tokens=sequence.max_new_tokens,
                kv_needed=sequence.cache_tokens,
                kv_free=free,
                estimate_s=estimate,
            )

    def step_time(self) -> StepTime | None:
        """How long steps take, as measured so far; None: nothing was measured yet."""
        with self._wake:
            return self._times.fit()

    def memory_bytes(self) -> dict[str, int]:
        """Weights, KV cache and places for adapters; see the protocol."""
        return {} if self._broken else self._stepper.memory_bytes()

    def statistics(self) -> EngineStatistics:
        """Counters and queue lengths now."""
        with self._wake:
            memory = None if self._broken else self._stepper.cache.memory
            return EngineStatistics(
                running=len(self._running),
                waiting=len(self._inside) - len(self._running),
                prompt_tokens=self._prompt_tokens,
                new_tokens=self._new_tokens,
                finished=self._outcomes.finished,
                failed=self._outcomes.failed,
                cancelled=self._outcomes.cancelled,
                kv_tokens=self._kv_tokens,
                kv_tokens_used=0 if self._broken else self._stepper.cache.used_tokens,
                kv_tokens_cached=memory.cached_tokens if memory else 0,
                cached_prompt_tokens=self._cached_tokens,
                preempted=self._preempted,
                steps=self._steps,
                adapters=self._shelf.names,
            )

    def close(self) -> None:
        """Fail what is inside with EngineFailed, stop the thread and free the memory."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        # From inside ``deliver`` the thread cannot wait for itself; it ends after this step.
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_TIMEOUT_S)
            if self._thread.is_alive():
                log.error("engine %s is still in a step after close", self._options.model)

    def _check_alive(self) -> None:
        if self._broken or self._closing:
            raise EngineFailed(self._options.model, self._broken or "it is closed")

    def _check_room(self, job: GenerationJob) -> None:
        if job.id in self._inside:
            raise InvalidParams("id", job.id, "a job with this id is in the engine")
        if len(self._inside) >= self._options.max_waiting:
            raise EngineBusy(
                self._options.model,
                len(self._inside),
                self._outcomes.retry_after_s(time.monotonic()),
            )

    def _syntax(self, job: GenerationJob) -> ToolSyntax | None:
        """How this job's calls of tools are written; None: it can make none."""
        if not job.tools:
            return None
        if self._encoder.syntax is None:
            raise InvalidParams("tools", len(job.tools), "how this model calls them is not known")
        # An answer that a grammar binds is what the grammar says.
        return None if job.params.grammar else self._encoder.syntax

    def _bind(
        self, job: GenerationJob, syntax: ToolSyntax | None, prefix_ids: list[int]
    ) -> Bound | None:
        """What binds this job's answer. Compiled here, in the caller's thread."""
        grammar = job.params.grammar
        if syntax is not None and job.tool_choice == "required":
            source = syntax.grammar(job.tools)
            if source is None:
                reason = "this model's way to call tools cannot be bound"
                raise InvalidParams("tool_choice", job.tool_choice, reason)
            grammar = Grammar("lark", source)
        return None if grammar is None else self._grammars.bind(grammar, job.prefix, prefix_ids)

    def _encode_within_limits(self, job: GenerationJob) -> tuple[list[int], list[int]]:
        """Token ids of the prompt and of the prefix."""
        new = job.params.max_new_tokens
        limits = ((self._context, "context"), (self._kv_tokens, "KV budget"))
        limit, name = min(limits)
        texts = [job.prompt] if isinstance(job.prompt, str) else [t.content for t in job.prompt]
        texts += [tool.description + tool.parameters for tool in job.tools]
        if not isinstance(job.prompt, str):
            texts += [call.arguments for turn in job.prompt for call in turn.tool_calls]
        # A megabyte of text is refused by its length, before the tokenizer spends a second on it.
        tokens = sum(map(len, [*texts, job.prefix])) // self._encoder.longest_token
        prompt: list[int] = []
        prefix: list[int] = []
        if tokens + new <= limit:
            prompt = self._encoder.encode(job.prompt, job.tools)
            prefix = self._encoder.encode_text(job.prefix)
            tokens = len(prompt) + len(prefix)
            if not tokens:
                raise InvalidParams("prompt", job.prompt, "it has no tokens")
        if tokens + new > limit:
            raise PromptTooLong(self._options.model, tokens, new, limit, name)
        return prompt, prefix

    # ------------------------------------------------------------ the queue, under the lock

    def _enqueue(self, running: _Running) -> None:
        self._policy.add(self._request(running), time.monotonic())
        self._queued[running.sequence.key] = running

    def _request(self, running: _Running) -> QueuedRequest:
        """What a policy is told of a job."""
        sequence, job = running.sequence, running.job
        memory = self._stepper.cache.memory
        found = sequence.read
        if not found and memory is not None:
            found = memory.prefixes.peek(job.tenant, sequence.adapter, sequence.tokens)
        return QueuedRequest(
            sequence.key,
            job.tenant,
            job.agent,
            prompt_tokens=max(0, len(sequence.tokens) - found),
            max_new_tokens=sequence.max_new_tokens,
            priority=job.priority,
            deadline_s=job.deadline_s,
            submitted_s=running.submitted_s,
            new_tokens=sequence.new_tokens,
            turn=job.turn,
        )

    def _let_in(self, now: float) -> list[_Running]:
        """Let in whom the policy names, as long as there is room or somebody gives way.

        Returns:
            Those that no room will ever be enough for.
        """
        impossible: list[_Running] = []
        # Who has just come in gives way to nobody yet, or two could change places for ever.
        fresh: set[str] = set()
        while self._queued:
            key = self._policy.first(now)
            if key is None:
                break
            running = self._queued[key]
            sequence = running.sequence
            if self._stepper.admit(sequence):
                fresh.add(key)
                self._running[key] = running
                if running.charged < 0:
                    running.charged = sequence.cached_tokens = sequence.read
                    self._cached_tokens += sequence.read
            elif self._stepper.inside:
                victim = self._victim(fresh, now)
                if victim is None:
                    break
                self._put_back(victim, now)
                continue
            else:
                impossible.append(running)
            del self._queued[key]
            self._policy.remove(key, now)
        return impossible

    def _victim(self, fresh: set[str], now: float) -> _Running | None:
        """Who gives way to the first that waits: a paused one before all others."""
        old = [r for key, r in self._running.items() if key not in fresh]
        paused = next((r for r in reversed(old) if r.sequence.paused), None)
        if paused is not None or not old:
            return paused
        key = self._policy.victim([self._request(r) for r in old], now)
        return None if key is None else self._running[key]

    def _put_back(self, running: _Running, now: float) -> None:
        """Take a job out of the batch and let it wait."""
        self._preempted += 1
        del self._running[running.sequence.key]
        self._stepper.drop(running.sequence, now + KEEP_S)
        if not running.sequence.paused:
            self._enqueue(running)

    # ------------------------------------------------------------ generation thread

    def _run(self) -> None:
        reason = "its thread ended"
        try:
            set_torch_threads(self._options.threads)
            if self._stepper.device.type == "cuda":
                torch.cuda.set_device(self._stepper.device)
            calibrate(self._stepper, self._times, CALIBRATION_S, self._wanted)
            while self._admit():
                result = self._stepper.step()
                if result is not None:
                    self._account(result)
                    self._spread(result.new)
            reason = "it was closed"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            log.exception("engine %s broke", self._options.model)
        finally:
            self._fail_all(reason)
            self._shelf.close()
            self._stepper.close()

    def _wanted(self) -> bool:
        """Whether somebody wants something of the thread."""
        return bool(self._inside or self._chores or self._closing)

    def _admit(self) -> bool:
        """Wait for work, take cancelled jobs out and waiting jobs in. False: the end."""
        with self._wake:
            while not self._closing:
                now = time.monotonic()
                cancels, self._cancels = self._cancels, []
                chores, self._chores = self._chores, []
                for gone in cancels:
                    if self._queued.pop(gone.sequence.key, None) is not None:
                        self._policy.remove(gone.sequence.key, now)
                memory = self._stepper.cache.memory
                expires = memory.prefixes.expire(now) if memory else None
                impossible = self._let_in(now)
                if cancels or impossible or chores:
                    break
                if any(not r.sequence.paused for r in self._running.values()):
                    return True
                if self._queued:
                    self._wake.wait(RETRY_S)
                else:
                    self._wake.wait(None if expires is None else max(0.0, expires - now))
            else:
                return False
        for work, done in chores:
            if not done.set_running_or_notify_cancel():
                continue
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - it is raised where it is awaited
                done.set_exception(error)
            else:
                done.set_result(None)
        for gone in cancels:
            if self._inside.get(gone.job.id) is gone:
                self._end(gone, "cancelled")
        for gone in impossible:
            reason = f"{gone.sequence.cache_tokens} tokens never fit into its KV cache"
            self._end(gone, "error", error=EngineFailed(self._options.model, reason))
        return True

    def _account(self, result: StepResult) -> None:
        """Who was served how much, and how long it took."""
        served: dict[tuple[str, str], list[int]] = {}
        for sequence, _ in result.parts:
            running = self._running[sequence.key]
            owed = served.setdefault((sequence.tenant, sequence.agent), [0, 0])
            fresh = min(sequence.read, sequence.prompt_tokens) - running.charged
            if fresh > 0:
                running.charged += fresh
                owed[0] += fresh
        for new in result.new:
            served[new.sequence.tenant, new.sequence.agent][1] += 1
        prompt = sum(tokens for _, tokens in result.parts) - result.decoding
        with self._wake:
            now = time.monotonic()
            for (tenant, agent), (read, written) in served.items():
                self._prompt_tokens += read
                self._policy.served(tenant, agent, read, written, now)
            self._new_tokens += len(result.new)
            self._steps += 1
            self._times.add(result.decoding, result.context, prompt, result.seconds)

    def _spread(self, news: list[NewToken]) -> None:
        """Give each job the token of this step."""
        for new in news:
            running = self._running[new.sequence.key]
            row = new.sequence.row
            if row.failed is not None:
                self._end(running, "error", error=row.failed)
                continue
            running.untold += 1
            if row.chances is not None:
                running.logprobs.append(self._logprob(row.chances))
            is_eos = new.token in new.sequence.eos
            text = running.stops.push("" if is_eos else running.detokenizer.push(new.token))
            if new.ended and not running.stops.stopped:
                text += running.stops.push(running.detokenizer.flush())
                if not running.stops.stopped:
                    text += running.stops.flush()
            if running.stops.stopped or is_eos or row.done:
                self._end(running, "stop", text)
            elif new.ended:
                self._end(running, "length", text)
            elif text:
                held = running.stops.held_pieces
                tokens, running.untold = running.untold - held, held
                logprobs = tuple(running.logprobs[:tokens])
                del running.logprobs[:tokens]
                chunk = GenerationChunk(
                    running.job.id,
                    text,
                    tokens,
                    logprobs=logprobs,
                    adapter_digest=new.sequence.adapter_digest,
                )
                self._tell(running, chunk)

    def _logprob(self, chances: Chances) -> TokenLogprob:
        """The chances of a token, in text."""

        def text(token: int) -> str:
            return str(self._encoder.backend.decode([token], skip_special_tokens=False))

        return TokenLogprob(
            text(chances.token), chances.logprob, tuple((text(t), p) for t, p in chances.likeliest)
        )

    def _end(
        self,
        running: _Running,
        finish: FinishReason,
        text: str = "",
        error: Exception | None = None,
    ) -> None:
        """Free a job's memory and send its last chunk."""
        sequence, job = running.sequence, running.job
        with self._wake:
            now = time.monotonic()
            keep_until = self._pauses.ends(job.tenant, job.agent, now)
            if self._running.pop(sequence.key, None) is not None:
                self._stepper.drop(sequence, keep_until)
            # It may have been resumed between its cancel and now.
            if self._queued.pop(sequence.key, None) is not None:
                self._policy.remove(sequence.key, now)
            self._inside.pop(job.id, None)
            if sequence.resident is not None:
                self._shelf.release(sequence.resident)
            self._outcomes.count(finish, now)
        started = sequence.started_s or now
        calls: tuple[ToolCall, ...] = ()
        if running.syntax is not None:
            text, calls = running.syntax.read(text, job.tools)
        self._tell(
            running,
            GenerationChunk(
                job.id,
                text,
                running.untold,
                finish,
                error,
                prompt_tokens=sequence.prompt_tokens,
                new_tokens=sequence.new_tokens,
                queued_s=started - running.submitted_s,
                run_s=now - started,
                cached_tokens=sequence.cached_tokens,
                logprobs=tuple(running.logprobs),
                tool_calls=with_ids(job.id, calls),
                adapter_digest=sequence.adapter_digest,
            ),
        )

    def _tell(self, running: _Running, chunk: GenerationChunk) -> None:
        try:
            running.deliver(chunk)
        except Exception:
            # One caller's broken callback must not end everybody's jobs; its own job is stopped.
            log.exception("deliver of job %s raised; the job is cancelled", running.job.id)
            if chunk.finish is None:
                self.cancel(running.job.id)

    def _fail_all(self, reason: str) -> None:
        with self._wake:
            self._broken = reason
            left = list(self._inside.values())
            # The batch may be in any state; its memory goes as a whole.
            self._running.clear()
            self._queued.clear()
            self._cancels.clear()
            chores, self._chores = self._chores, []
        for _, done in chores:
            if done.set_running_or_notify_cancel():
                done.set_exception(EngineFailed(self._options.model, reason))
        for running in left:
            self._end(running, "error", error=EngineFailed(self._options.model, reason))


def _need(running: _Running) -> Need:
    """What a job holds or needs of the cache, and the steps that it may still take."""
    sequence = running.sequence
    return Need(
        sequence.cache_tokens,
        max(0, len(sequence.tokens) - sequence.read),
        max(0, sequence.max_new_tokens - sequence.new_tokens),
    )


def _end_tokens(options: EngineOptions, model: Any) -> list[int]:
    """Tokens that end an answer, from the folder's generation config or the model's."""
    try:
        found = GenerationConfig.from_pretrained(options.path, local_files_only=True).eos_token_id
    except OSError:
        found = None
    if found is None:
        found = model.config.get_text_config().eos_token_id
    if found is None:
        return []
    return [found] if isinstance(found, int) else list(found)
