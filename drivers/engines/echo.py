"""A causal engine without a model: it answers with the words of the last user turn.

Threads, streaming, cancelling, pausing, the queue's policy, stop strings, bounds and KV
accounting are real, so whatever works with it works with a model. A word with the blanks
before it is a token. A prefix that its answer begins with is left out; after any other the
answer comes whole. What words cannot have it refuses: adapters, grammars, required tool
calls and log-probabilities.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from llmos.drivers.engines.book import Outcomes
from llmos.drivers.engines.checks import check_job, check_prompt
from llmos.drivers.engines.queue import Fifo
from llmos.drivers.engines.textstream import StopFilter
from llmos.drivers.errors import (
    AdapterUnusable,
    EngineBusy,
    EngineFailed,
    InvalidGrammar,
    InvalidParams,
    PromptTooLong,
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
    StepTime,
)

log = logging.getLogger(__name__)

CONTEXT_TOKENS = 8192
STEP_S = 0.0005
"""Seconds of a step: long enough for jobs to overlap, short enough for tests."""
CLOSE_TIMEOUT_S = 10.0
RETRY_S = 0.01
"""When a policy lets nobody in though there is room, it is asked again after this."""

_TOKEN = re.compile(r"\s*\S+|\s+$")


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(text)


class _Echo:
    """One job: the answer's tokens and how far it has come."""

    def __init__(
        self,
        key: str,
        job: GenerationJob,
        prompt_tokens: int,
        deliver: Callable[[GenerationChunk], None],
    ) -> None:
        self.key, self.job = key, job
        self.prompt_tokens, self.deliver = prompt_tokens, deliver
        self.stops = StopFilter(job.params.stop, job.prefix)
        self.submitted = time.monotonic()
        self.paused = False
        self.read = False
        """Whether its prompt was counted; a job that comes back does not pay again."""
        self.started = 0.0
        self.new_tokens = 0
        self.untold = 0
        self.cancelled = False
        said = job.prompt
        if not isinstance(said, str):
            said = next((t.content for t in reversed(said) if t.role == "user"), "")
        self.answer = _tokens(said.strip())
        self.said = 0
        """Tokens of the answer that the prefix holds, and those generated."""
        self.rest = ""
        """What the prefix leaves of a token that it cuts."""
        self._skip(job.prefix)

    @property
    def kv_tokens(self) -> int:
        return self.prompt_tokens + self.job.params.max_new_tokens

    def next_token(self) -> str | None:
        """The next word; None at the end. With ``ignore_eos`` the words come round again."""
        token = self.rest or self._token(self.said)
        self.said += not self.rest
        self.rest = ""
        return token

    def _token(self, index: int) -> str | None:
        if index < len(self.answer):
            return self.answer[index]
        if not self.job.params.ignore_eos:
            return None
        words = self.answer or ["."]
        return " " + words[index % len(words)].lstrip()

    def _skip(self, prefix: str) -> None:
        """Begin after ``prefix``, if the answer begins with it."""
        at = said = 0
        while at < len(prefix):
            token = self._token(said)
            if token is None or not token.startswith(prefix[at : at + len(token)]):
                return
            at, said = at + len(token), said + 1
            if at > len(prefix):
                self.rest = token[len(prefix) - at :]
        self.said = said


class EchoEngine:
    """See :class:`llmos.drivers.protocols.CausalEngine`. Sampling changes nothing here."""

    def __init__(self, options: EngineOptions) -> None:
        """``options.path`` is not read."""
        self._options = options
        self._wake = threading.Condition()
        self._inside: dict[str, _Echo] = {}
        self._policy: QueuePolicy = Fifo()
        self._queued: dict[str, _Echo] = {}
        """By key: those that the policy knows of."""
        self._running: dict[str, _Echo] = {}
        self._outcomes = Outcomes()
        self._prompt_tokens = self._new_tokens = 0
        self._serial = self._preempted = self._steps = 0
        self._broken = ""
        self._closing = False
        self._thread = threading.Thread(
            target=self._run, name=f"llmos-echo-{options.model}", daemon=True
        )
        self._thread.start()

    @property
    def context_tokens(self) -> int:
        """Longest prompt plus answer."""
        return CONTEXT_TOKENS

    def count_tokens(self, prompt: str | tuple[ChatTurn, ...]) -> int:
        """Words, and one more per turn. Raises InvalidParams."""
        check_prompt(prompt)
        if isinstance(prompt, str):
            return len(_tokens(prompt))
        return sum(len(_tokens(t.content)) + 1 for t in prompt)

    def submit(self, job: GenerationJob, deliver: Callable[[GenerationChunk], None]) -> None:
        """Queue a job; see the protocol for what it raises."""
        check_job(job)
        self._refuse(job)
        tokens = self.count_tokens(job.prompt) + len(_tokens(job.prefix))
        new = job.params.max_new_tokens
        limit, name = min((CONTEXT_TOKENS, "context"), (self._options.kv_tokens, "KV budget"))
        if tokens + new > limit:
            raise PromptTooLong(self._options.model, tokens, new, limit, name)
        with self._wake:
            if self._broken or self._closing:
                raise EngineFailed(self._options.model, self._broken or "it is closed")
            if job.id in self._inside:
                raise InvalidParams("id", job.id, "a job with this id is in the engine")
            if len(self._inside) >= self._options.max_waiting:
                raise EngineBusy(
                    self._options.model,
                    len(self._inside),
                    self._outcomes.retry_after_s(time.monotonic()),
                )
            self._serial += 1
            echo = _Echo(str(self._serial), job, tokens, deliver)
            self._enqueue(echo)
            self._inside[job.id] = echo
            self._wake.notify()

    def _refuse(self, job: GenerationJob) -> None:
        """What a model could do, and words cannot."""
        if job.adapter:
            raise UnknownAdapter(self._options.model, job.adapter, ())
        if job.params.grammar is not None:
            raise InvalidGrammar(job.params.grammar.kind, "the echo engine says what it was told")
        if job.tool_choice == "required":
            raise InvalidParams("tool_choice", job.tool_choice, "the echo engine calls no tools")
        if job.params.logprobs is not None:
            raise InvalidParams("logprobs", job.params.logprobs, "echoed words have none")

    def cancel(self, job_id: str) -> bool:
        """Stop a job within one step."""
        with self._wake:
            echo = self._inside.get(job_id)
            if echo is not None:
                echo.cancelled = True
                self._wake.notify()
            return echo is not None

    def pause(self, job_id: str) -> bool:
        """Say no more words of a job from the next step on."""
        with self._wake:
            echo = self._inside.get(job_id)
            if echo is None:
                return False
            echo.paused = True
            if self._queued.pop(echo.key, None) is not None:
                self._policy.remove(echo.key, time.monotonic())
            return True

    def resume(self, job_id: str) -> bool:
        """Go on with a paused job."""
        with self._wake:
            echo = self._inside.get(job_id)
            if echo is None:
                return False
            if echo.paused:
                echo.paused = False
                if echo.key not in self._running:
                    self._enqueue(echo)
                self._wake.notify()
            return True

    def use_policy(self, policy: QueuePolicy) -> None:
        """From now on this policy decides who enters; those that wait are told to it."""
        with self._wake:
            now = time.monotonic()
            for echo in sorted(self._queued.values(), key=lambda e: e.submitted):
                policy.add(_request(echo), now)
            self._policy = policy
            self._wake.notify()

    def load_adapter(self, name: str, path: Path) -> int:
        """Raises AdapterUnusable: there are no weights to adapt."""
        raise AdapterUnusable(self._options.model, name, "the echo engine has no weights")

    def unload_adapter(self, name: str) -> None:
        """Raises UnknownAdapter."""
        raise UnknownAdapter(self._options.model, name, ())

    def place(self, job_id: str) -> JobPlace | None:
        """Where a job is and what it waits for; None: it is not here."""
        with self._wake:
            echo = self._inside.get(job_id)
            if echo is None:
                return None
            now = time.monotonic()
            state: Literal["waiting", "running", "paused"] = "running"
            position, reason = 0, ""
            if echo.paused:
                state = "paused"
            elif echo.key in self._queued:
                standing = self._policy.standing(echo.key, now)
                state, position = "waiting", len(standing.before) + 1
                reason = standing.reason
            held = sum(e.kv_tokens for e in self._running.values())
            return JobPlace(
                state,
                position,
                reason,
                waited_s=now - echo.submitted,
                running=len(self._running),
                new_tokens=echo.new_tokens,
                max_new_tokens=echo.job.params.max_new_tokens,
                kv_needed=echo.kv_tokens,
                kv_free=self._options.kv_tokens - held,
            )

    def step_time(self) -> StepTime | None:
        """None: a step takes as long as its pause."""
        return None

    def memory_bytes(self) -> dict[str, int]:
        """Nothing: it has no tensors."""
        return {}

    def statistics(self) -> EngineStatistics:
        """Counters and queue lengths now."""
        with self._wake:
            return EngineStatistics(
                running=len(self._running),
                waiting=len(self._inside) - len(self._running),
                prompt_tokens=self._prompt_tokens,
                new_tokens=self._new_tokens,
                finished=self._outcomes.finished,
                failed=self._outcomes.failed,
                cancelled=self._outcomes.cancelled,
                kv_tokens=self._options.kv_tokens,
                kv_tokens_used=sum(e.kv_tokens for e in self._running.values()),
                preempted=self._preempted,
                steps=self._steps,
            )

    def close(self) -> None:
        """Fail what is inside with EngineFailed and stop the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_TIMEOUT_S)

    # ------------------------------------------------------------ the queue, under the lock

    def _enqueue(self, echo: _Echo) -> None:
        self._policy.add(_request(echo), time.monotonic())
        self._queued[echo.key] = echo

    def _let_in(self, now: float) -> None:
        """Let in whom the policy names, as long as there is room or somebody gives way."""
        # Who has just come in gives way to nobody yet, or two could change places for ever.
        fresh: set[str] = set()
        used = sum(e.kv_tokens for e in self._running.values())
        while (key := self._policy.first(now)) is not None:
            echo = self._queued[key]
            if used + echo.kv_tokens > self._options.kv_tokens:
                victim = self._victim(fresh, now)
                if victim is None:
                    return
                used -= victim.kv_tokens
                self._preempted += 1
                del self._running[victim.key]
                if not victim.paused:
                    self._enqueue(victim)
                continue
            used += echo.kv_tokens
            fresh.add(key)
            del self._queued[key]
            self._policy.remove(key, now)
            self._running[key] = echo

    def _victim(self, fresh: set[str], now: float) -> _Echo | None:
        """Who gives way to the first that waits: a paused one before all others."""
        old = [e for key, e in self._running.items() if key not in fresh]
        paused = next((e for e in reversed(old) if e.paused), None)
        if paused is not None or not old:
            return paused
        key = self._policy.victim([_request(e) for e in old], now)
        return None if key is None else self._running[key]

    # ------------------------------------------------------------ engine thread

    def _run(self) -> None:
        reason = "its thread ended"
        try:
            while self._admit():
                served: dict[tuple[str, str], list[int]] = {}
                for echo in [e for e in self._running.values() if not e.paused]:
                    owed = served.setdefault((echo.job.tenant, echo.job.agent), [0, 0])
                    if not echo.read:
                        echo.read, echo.started = True, time.monotonic()
                        self._prompt_tokens += echo.prompt_tokens
                        owed[0] += echo.prompt_tokens
                    owed[1] += self._advance(echo)
                with self._wake:
                    self._steps += 1
                    now = time.monotonic()
                    for (tenant, agent), (read, written) in served.items():
                        self._policy.served(tenant, agent, read, written, now)
                time.sleep(STEP_S)
            reason = "it was closed"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            log.exception("engine %s broke", self._options.model)
        finally:
            with self._wake:
                self._broken = reason
                left = list(self._inside.values())
                self._queued.clear()
            for echo in left:
                self._end(echo, "error", error=EngineFailed(self._options.model, reason))

    def _admit(self) -> bool:
        """Wait for work, take cancelled jobs out and waiting jobs in. False: the end."""
        with self._wake:
            while not self._closing:
                now = time.monotonic()
                gone = [e for e in self._inside.values() if e.cancelled]
                for echo in gone:
                    if self._queued.pop(echo.key, None) is not None:
                        self._policy.remove(echo.key, now)
                self._let_in(now)
                if gone or any(not e.paused for e in self._running.values()):
                    break
                self._wake.wait(RETRY_S if self._queued else None)
            else:
                return False
        for echo in gone:
            self._end(echo, "cancelled")
        return True

    def _advance(self, echo: _Echo) -> int:
        """Say the next word; how many were said."""
        token = echo.next_token()
        if token is None:
            self._end(echo, "stop", echo.stops.flush())
            return 0
        echo.new_tokens += 1
        echo.untold += 1
        self._new_tokens += 1
        text = echo.stops.push(token)
        if echo.stops.stopped:
            self._end(echo, "stop", text)
        elif echo.new_tokens >= echo.job.params.max_new_tokens:
            self._end(echo, "length", text + echo.stops.flush())
        elif text:
            held = echo.stops.held_pieces
            tokens, echo.untold = echo.untold - held, held
            self._tell(echo, GenerationChunk(echo.job.id, text, tokens))
        return 1

    def _end(
        self, echo: _Echo, finish: FinishReason, text: str = "", error: Exception | None = None
    ) -> None:
        now = time.monotonic()
        with self._wake:
            self._running.pop(echo.key, None)
            # It may have been resumed between its cancel and now.
            if self._queued.pop(echo.key, None) is not None:
                self._policy.remove(echo.key, now)
            self._inside.pop(echo.job.id, None)
            self._outcomes.count(finish, now)
        started = echo.started or now
        self._tell(
            echo,
            GenerationChunk(
                echo.job.id,
                text,
                echo.untold,
                finish,
                error,
                prompt_tokens=echo.prompt_tokens,
                new_tokens=echo.new_tokens,
                queued_s=started - echo.submitted,
                run_s=now - started,
            ),
        )

    def _tell(self, echo: _Echo, chunk: GenerationChunk) -> None:
        try:
            echo.deliver(chunk)
        except Exception:
            log.exception("deliver of job %s raised; the job is cancelled", echo.job.id)
            echo.cancelled = True


def _request(echo: _Echo) -> QueuedRequest:
    """What a policy is told of a job."""
    return QueuedRequest(
        echo.key,
        echo.job.tenant,
        echo.job.agent,
        prompt_tokens=0 if echo.read else echo.prompt_tokens,
        max_new_tokens=echo.job.params.max_new_tokens,
        priority=echo.job.priority,
        deadline_s=echo.job.deadline_s,
        submitted_s=echo.submitted,
        new_tokens=echo.new_tokens,
        turn=echo.job.turn,
    )
