"""A causal engine without a model: it answers with the words of the last user turn.

Threads, streaming, cancelling, stop strings, bounds and KV accounting are real, so
whatever works with it works with a model. A word with the blanks before it is a token.
A prefix that its answer begins with is left out; after any other the answer comes whole.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import deque
from collections.abc import Callable

from llmos.drivers.engines.book import Outcomes
from llmos.drivers.engines.checks import check_job, check_prompt
from llmos.drivers.engines.textstream import StopFilter
from llmos.drivers.errors import EngineBusy, EngineFailed, InvalidParams, PromptTooLong
from llmos.drivers.protocols import (
    ChatTurn,
    EngineOptions,
    EngineStatistics,
    FinishReason,
    GenerationChunk,
    GenerationJob,
)

log = logging.getLogger(__name__)

CONTEXT_TOKENS = 8192
STEP_S = 0.0005
"""Seconds of a step: long enough for jobs to overlap, short enough for tests."""
CLOSE_TIMEOUT_S = 10.0

_TOKEN = re.compile(r"\s*\S+|\s+$")


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(text)


class _Echo:
    """One job: the answer's tokens and how far it has come."""

    def __init__(
        self, job: GenerationJob, prompt_tokens: int, deliver: Callable[[GenerationChunk], None]
    ) -> None:
        self.job, self.prompt_tokens, self.deliver = job, prompt_tokens, deliver
        self.stops = StopFilter(job.params.stop, job.prefix)
        self.submitted = time.perf_counter()
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
        self._waiting: deque[_Echo] = deque()
        self._running: list[_Echo] = []
        self._outcomes = Outcomes()
        self._prompt_tokens = self._new_tokens = 0
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
                    self._outcomes.retry_after_s(time.perf_counter()),
                )
            echo = _Echo(job, tokens, deliver)
            self._inside[job.id] = echo
            self._waiting.append(echo)
            self._wake.notify()

    def cancel(self, job_id: str) -> bool:
        """Stop a job within one step."""
        with self._wake:
            echo = self._inside.get(job_id)
            if echo is not None:
                echo.cancelled = True
                self._wake.notify()
            return echo is not None

    def statistics(self) -> EngineStatistics:
        """Counters and queue lengths now."""
        with self._wake:
            return EngineStatistics(
                running=len(self._running),
                waiting=len(self._waiting),
                prompt_tokens=self._prompt_tokens,
                new_tokens=self._new_tokens,
                finished=self._outcomes.finished,
                failed=self._outcomes.failed,
                cancelled=self._outcomes.cancelled,
                kv_tokens=self._options.kv_tokens,
                kv_tokens_used=sum(e.kv_tokens for e in self._running),
            )

    def close(self) -> None:
        """Fail what is inside with EngineFailed and stop the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_TIMEOUT_S)

    # ------------------------------------------------------------ engine thread

    def _run(self) -> None:
        reason = "its thread ended"
        try:
            while self._admit():
                for echo in list(self._running):
                    self._advance(echo)
                time.sleep(STEP_S)
            reason = "it was closed"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            log.exception("engine %s broke", self._options.model)
        finally:
            with self._wake:
                self._broken = reason
                left = list(self._inside.values())
                self._waiting.clear()
            for echo in left:
                self._end(echo, "error", error=EngineFailed(self._options.model, reason))

    def _admit(self) -> bool:
        with self._wake:
            while not (self._closing or self._waiting or self._running):
                self._wake.wait()
            if self._closing:
                return False
            gone = [e for e in self._inside.values() if e.cancelled]
            for echo in gone:
                if echo in self._waiting:
                    self._waiting.remove(echo)
            used = sum(e.kv_tokens for e in self._running if not e.cancelled)
            while self._waiting and used + self._waiting[0].kv_tokens <= self._options.kv_tokens:
                echo = self._waiting.popleft()
                used += echo.kv_tokens
                echo.started = time.perf_counter()
                self._prompt_tokens += echo.prompt_tokens
                self._running.append(echo)
        for echo in gone:
            self._end(echo, "cancelled")
        return True

    def _advance(self, echo: _Echo) -> None:
        token = echo.next_token()
        if token is None:
            self._end(echo, "stop", echo.stops.flush())
            return
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

    def _end(
        self, echo: _Echo, finish: FinishReason, text: str = "", error: Exception | None = None
    ) -> None:
        now = time.perf_counter()
        with self._wake:
            if echo in self._running:
                self._running.remove(echo)
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
