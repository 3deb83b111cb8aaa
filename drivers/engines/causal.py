"""A causal language model with continuous batching, on the CPU or a CUDA GPU.

One thread per engine generates; callers only tokenize, queue and cancel. Jobs wait
in a queue of this engine until all the KV memory they may need is free, in order of
arrival. Prefixes are not shared between jobs at all: the library finds cached blocks
by their tokens alone, across tenants.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig

from llmos.drivers.devices.cpu import set_torch_threads
from llmos.drivers.engines.book import Outcomes
from llmos.drivers.engines.checks import check_job
from llmos.drivers.engines.prompts import PromptEncoder
from llmos.drivers.engines.stepper import NewToken, Stepper
from llmos.drivers.engines.textstream import Detokenizer, StopFilter
from llmos.drivers.errors import EngineBusy, EngineFailed, InvalidParams, PromptTooLong
from llmos.drivers.protocols import (
    ChatTurn,
    EngineOptions,
    EngineStatistics,
    FinishReason,
    GenerationChunk,
    GenerationJob,
    SamplingParams,
)

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 60.0
"""A step is never interrupted, so closing may take as long as the longest one."""


class _Running:
    """One job inside the engine."""

    __slots__ = (
        "cancelled",
        "deliver",
        "detokenizer",
        "eos",
        "job",
        "key",
        "new_tokens",
        "prompt_ids",
        "started",
        "stops",
        "submitted",
        "untold",
    )

    def __init__(
        self,
        key: str,
        job: GenerationJob,
        prompt_ids: list[int],
        eos: list[int],
        detokenizer: Detokenizer,
        deliver: Callable[[GenerationChunk], None],
    ) -> None:
        self.key, self.job, self.prompt_ids, self.eos = key, job, prompt_ids, eos
        self.detokenizer, self.deliver = detokenizer, deliver
        self.stops = StopFilter(job.params.stop, job.prefix)
        self.submitted = time.perf_counter()
        self.started = 0.0
        self.new_tokens = 0
        self.untold = 0
        """Tokens whose text is in no chunk yet."""
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
        self._eos = _end_tokens(options, self._stepper.model)
        self._context = self._stepper.context_tokens
        self._kv_tokens = self._stepper.kv_tokens
        self._wake = threading.Condition()
        self._inside: dict[str, _Running] = {}
        """By job id: everything submitted and not yet ended."""
        self._waiting: deque[_Running] = deque()
        self._running: dict[str, _Running] = {}
        """By key. Changed by the generation thread only."""
        self._params: dict[str, SamplingParams] = {}
        self._cancels: list[_Running] = []
        self._outcomes = Outcomes()
        self._prompt_tokens = self._new_tokens = self._serial = 0
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
        prompt_ids, prefix_ids = self._encode_within_limits(job)
        eos = [] if job.params.ignore_eos else self._eos
        with self._wake:
            self._check_alive()
            self._check_room(job)
            self._serial += 1
            running = _Running(
                # Not the job's id: that may come again while an old cancel is on its way.
                str(self._serial),
                job,
                prompt_ids + prefix_ids,
                eos,
                Detokenizer(self._encoder.backend, prefix_ids),
                deliver,
            )
            self._inside[job.id] = running
            self._waiting.append(running)
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

    def statistics(self) -> EngineStatistics:
        """Counters and queue lengths now."""
        with self._wake:
            return EngineStatistics(
                running=len(self._inside) - len(self._waiting),
                waiting=len(self._waiting),
                prompt_tokens=self._prompt_tokens,
                new_tokens=self._new_tokens,
                finished=self._outcomes.finished,
                failed=self._outcomes.failed,
                cancelled=self._outcomes.cancelled,
                kv_tokens=self._kv_tokens,
                kv_tokens_used=0 if self._broken else self._stepper.kv_tokens_used,
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
                self._outcomes.retry_after_s(time.perf_counter()),
            )

    def _encode_within_limits(self, job: GenerationJob) -> tuple[list[int], list[int]]:
        """Token ids of the prompt and of the prefix."""
        new = job.params.max_new_tokens
        limits = ((self._context, "context"), (self._kv_tokens, "KV budget"))
        limit, name = min(limits)
        texts = [job.prompt] if isinstance(job.prompt, str) else [t.content for t in job.prompt]
        # A megabyte of text is refused by its length, before the tokenizer spends a second on it.
        tokens = sum(map(len, [*texts, job.prefix])) // self._encoder.longest_token
        prompt: list[int] = []
        prefix: list[int] = []
        if tokens + new <= limit:
            prompt, prefix = self._encoder.encode(job.prompt), self._encoder.encode_text(job.prefix)
            tokens = len(prompt) + len(prefix)
            if not tokens:
                raise InvalidParams("prompt", job.prompt, "it has no tokens")
        if tokens + new > limit:
            raise PromptTooLong(self._options.model, tokens, new, limit, name)
        return prompt, prefix

    # ------------------------------------------------------------ generation thread

    def _run(self) -> None:
        reason = "its thread ended"
        try:
            set_torch_threads(self._options.threads)
            if self._stepper.device.type == "cuda":
                torch.cuda.set_device(self._stepper.device)
            while self._admit():
                self._spread(self._stepper.step(self._params))
            reason = "it was closed"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            log.exception("engine %s broke", self._options.model)
        finally:
            self._fail_all(reason)
            self._stepper.close()

    def _admit(self) -> bool:
        """Wait for work, take cancelled jobs out and waiting jobs in. False: the end."""
        with self._wake:
            while not (self._closing or self._cancels or self._waiting or self._running):
                self._wake.wait()
            if self._closing:
                return False
            cancels, self._cancels = self._cancels, []
            for gone in cancels:
                if gone.key in self._running:
                    self._stepper.drop(gone.key)
                elif gone in self._waiting:
                    self._waiting.remove(gone)
            while self._waiting:
                first = self._waiting[0]
                params = first.job.params
                if not self._stepper.admit(
                    first.key, first.prompt_ids, params.max_new_tokens, first.eos
                ):
                    break
                self._running[first.key] = self._waiting.popleft()
                self._params[first.key] = params
        for gone in cancels:
            if self._inside.get(gone.job.id) is gone:
                self._end(gone, "cancelled")
        return True

    def _spread(self, news: list[NewToken]) -> None:
        """Give each job the token of this step."""
        for new in news:
            running = self._running[new.key]
            if not running.new_tokens:
                running.started = new.started_s
                self._prompt_tokens += len(running.prompt_ids)
            running.new_tokens += 1
            running.untold += 1
            self._new_tokens += 1
            is_eos = new.ended and new.token in running.eos
            text = running.stops.push("" if is_eos else running.detokenizer.push(new.token))
            if new.ended and not running.stops.stopped:
                text += running.stops.push(running.detokenizer.flush())
                if not running.stops.stopped:
                    text += running.stops.flush()
            if running.stops.stopped and not new.ended:
                self._stepper.drop(new.key)
            if running.stops.stopped or is_eos:
                self._end(running, "stop", text)
            elif new.ended:
                self._end(running, "length", text)
            elif text:
                held = running.stops.held_pieces
                tokens, running.untold = running.untold - held, held
                self._tell(running, GenerationChunk(running.job.id, text, tokens))

    def _end(
        self,
        running: _Running,
        finish: FinishReason,
        text: str = "",
        error: Exception | None = None,
    ) -> None:
        """The job's last chunk; its memory is free by now."""
        now = time.perf_counter()
        with self._wake:
            self._running.pop(running.key, None)
            self._params.pop(running.key, None)
            self._inside.pop(running.job.id, None)
            self._outcomes.count(finish, now)
        started = running.started or now
        self._tell(
            running,
            GenerationChunk(
                running.job.id,
                text,
                running.untold,
                finish,
                error,
                prompt_tokens=len(running.prompt_ids),
                new_tokens=running.new_tokens,
                queued_s=started - running.submitted,
                run_s=now - started,
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
            self._waiting.clear()
            self._cancels.clear()
        for running in left:
            self._end(running, "error", error=EngineFailed(self._options.model, reason))


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
