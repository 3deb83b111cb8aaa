"""What the sections of the engine's benchmark share: prompts, rounds, and the three ways to generate.

Imports torch, transformers and :mod:`llmos.drivers` alone, so that a bare GPU machine can
run the same sections (see :mod:`benchmarks.gpu`).

- *ours*: :class:`TransformersCausalEngine`, one process, no kernel around it;
- *stock*: the library's own continuous batching, one persistent manager with the same
  number of tokens per step and enough blocks for everybody, so that it never waits;
- *static*: the library's ``generate`` on all prompts in one padded batch.
"""

from __future__ import annotations

import gc
import statistics
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from llmos.drivers.engines.causal import TransformersCausalEngine
from llmos.drivers.protocols import (
    EngineOptions,
    GenerationChunk,
    GenerationJob,
    Grammar,
    SamplingParams,
)

T = TypeVar("T")
Dtype = Literal["float32", "bfloat16"]

WAIT_S = 600.0
"""Longest time that anything measured here may take before the benchmark gives up."""
PAGE_TOKENS = 16
STEP_TOKENS = 512
"""Tokens in one step at most, ours and stock."""

TEXT = """
The night shift at the harbour office began with a list of ships and ended with a list of
questions. Whoever kept the ledger wrote down what each captain owed, what had been paid, and
which crates were still waiting for a signature. Nobody trusted memory, since memory had once
lost a whole cargo of oranges. A clerk who could not find a number was told to ask, and one who
had found it was told to say where. Letters came in five languages; the answers went out in
one. When the fog was thick the bells were rung by hand, three strokes for a ship that might
enter and one for a ship that had to wait. In spring the river brought wood and in autumn it
brought mud, so the depth was measured every morning and painted on a board by the gate. The
pilot read the board, the harbour master read the pilot's face, and the merchants read the
newspapers. A fee that was charged twice had to be returned within a week; a fee that was never
charged was argued about for years. There were rules for fire, rules for animals, and one rule
about singing that no one had ever explained. Visitors were shown the old crane, which still
worked, and the new crane, which often did not. What the office was proud of was simple: every
ship that left had been counted, every promise had a page, and every page could be found again.
"""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text and the tokens that every way of generating reads it as."""

    text: str
    ids: tuple[int, ...]


def make_prompts(tokenizer: Any, lengths: Sequence[int]) -> list[Prompt]:
    """One prompt for each length in tokens, the same in every run, and no two alike.

    A length may be missed by a token or two where a cut is not a place at which the
    tokenizer would cut.
    """
    ids: list[int] = tokenizer(TEXT.replace("\n", " ").strip(), add_special_tokens=False).input_ids
    found = []
    for i, length in enumerate(lengths):
        begin = 53 * i % len(ids)
        piece = [ids[(begin + k) % len(ids)] for k in range(length)]
        text = tokenizer.decode(piece, clean_up_tokenization_spaces=False)
        found.append(Prompt(text, tuple(tokenizer(text).input_ids)))
    return found


def spread(count: int, shortest: int, longest: int) -> list[int]:
    """So many lengths between the two, evenly spread and mixed, the same in every run."""
    if count == 1:
        return [(shortest + longest) // 2]
    even = [shortest + (longest - shortest) * i // (count - 1) for i in range(count)]
    stride = next(s for s in (37, 29, 23, 19, 1) if count % s)
    return [even[stride * i % count] for i in range(count)]


# ---------------------------------------------------------------- rounds


@dataclass(frozen=True, slots=True)
class Took:
    """What a piece of work took."""

    wall_s: float
    cpu_s: float
    """Of this process, all threads."""


def timed(work: Callable[[], T]) -> tuple[T, Took]:
    """Run work once; its result and what it took. Garbage of earlier work is no part of it."""
    gc.collect()
    cpu, wall = time.process_time(), time.perf_counter()
    result = work()
    return result, Took(time.perf_counter() - wall, time.process_time() - cpu)


def took(work: Callable[[], object]) -> Took:
    """Run work once; what it took."""
    return timed(work)[1]


def alternate(pairs: int, ways: Mapping[str, Callable[[], T]]) -> dict[str, list[T]]:
    """Every way once per round (A, B, A, B, …); the results by way, one per round."""
    found: dict[str, list[T]] = {name: [] for name in ways}
    for _ in range(pairs):
        for name, way in ways.items():
            found[name].append(way())
    return found


@dataclass(frozen=True, slots=True)
class Stamp:
    """When a sequence had so many tokens."""

    wall_s: float
    cpu_s: float
    """CPU-seconds of this process until then."""
    tokens: int
    """Of this sequence so far."""


def decode_rates(sequences: Sequence[Sequence[Stamp]]) -> tuple[float, float]:
    """Tokens per second and per CPU-second while all of the sequences were decoding.

    That is from when the last one has its first token until the first one has its last.
    Each sequence is measured between its own first and last stamp in that time, a whole
    number of steps, and the rates are added up: no step is counted by half.

    Raises:
        RuntimeError: they were not all decoding for two steps together.
    """
    begin = max(s[0].wall_s for s in sequences)
    end = min(s[-1].wall_s for s in sequences)
    wall = cpu = 0.0
    for stamps in sequences:
        inside = [s for s in stamps if begin <= s.wall_s <= end]
        if len(inside) < 2:
            raise RuntimeError("too few tokens to measure decoding by; ask for more")
        tokens = inside[-1].tokens - inside[0].tokens
        wall += tokens / (inside[-1].wall_s - inside[0].wall_s)
        cpu += tokens / max(inside[-1].cpu_s - inside[0].cpu_s, 1e-9)
    return wall, cpu


def median_ratio(upper: Iterable[float], lower: Iterable[float]) -> float:
    """Median of the quotients, round by round."""
    return statistics.median(a / b for a, b in zip(upper, lower, strict=True))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least that share of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1000 * len(ordered)) // 1000) - 1))]


# ---------------------------------------------------------------- ours


@dataclass(slots=True)
class Answer:
    """What became of one job."""

    text: str = ""
    tokens: int = 0
    stamps: list[Stamp] = field(default_factory=list)
    """One for each chunk with tokens. A few tokens come with a later one, blanks for instance."""
    ended_s: float = 0.0
    error: Exception | None = None


def kv_tokens(prompts: Sequence[Prompt], new_tokens: int) -> int:
    """KV cache for all of them at once, whole blocks each."""
    return sum(-(-(len(p.ids) + new_tokens) // PAGE_TOKENS) * PAGE_TOKENS for p in prompts)


def options(path: Path, dtype: Dtype, kv: int, device: str = "cpu", **more: Any) -> EngineOptions:
    """One thread, and no memory of earlier rounds: each has to read its prompts again."""
    settings: dict[str, Any] = {
        "torch_device": device,
        "threads": 1,
        "kv_tokens": kv,
        "max_batch_tokens": STEP_TOKENS,
        "share_prefixes": False,
    }
    return EngineOptions(model=path.name, path=path, dtype=dtype, **(settings | more))


class Ours:
    """Our engine, and jobs that are handed in together."""

    def __init__(self, settings: EngineOptions) -> None:
        self.engine = TransformersCausalEngine(settings)
        self._serial = 0

    def __enter__(self) -> Ours:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()

    def submit(
        self,
        prompt: Any,
        params: SamplingParams,
        ended: Callable[[], object],
        adapter: str = "",
        agent: str = "",
    ) -> Answer:
        """Hand in one job; ``ended`` is called, in the engine's thread, after its last chunk."""
        self._serial += 1
        answer = Answer()

        def deliver(chunk: GenerationChunk) -> None:
            now = time.perf_counter()
            answer.text += chunk.text
            if chunk.tokens:
                told = answer.stamps[-1].tokens if answer.stamps else 0
                answer.stamps.append(Stamp(now, time.process_time(), told + chunk.tokens))
            if chunk.finish:
                answer.tokens, answer.ended_s, answer.error = chunk.new_tokens, now, chunk.error
                ended()

        job = GenerationJob(
            f"bench-{self._serial}", prompt, params, tenant="bench", agent=agent, adapter=adapter
        )
        self.engine.submit(job, deliver)
        return answer

    def run(
        self,
        texts: Sequence[Any],
        new_tokens: int,
        *,
        adapters: Sequence[str] = (),
        agents: Sequence[str] = (),
        grammar: Grammar | None = None,
    ) -> list[Answer]:
        """Answers to prompts handed in at once: exactly so many tokens each, greedy, unless a
        grammar ends them earlier.

        Raises:
            TimeoutError: not all ended within ``WAIT_S``.
            LlmosError: what a job failed with.
        """
        left = threading.Semaphore(0)
        params = SamplingParams(
            max_new_tokens=new_tokens, ignore_eos=grammar is None, grammar=grammar
        )
        nobody = [""] * len(texts)
        answers = [
            self.submit(text, params, left.release, adapter, agent)
            for text, adapter, agent in zip(
                texts, adapters or nobody, agents or nobody, strict=True
            )
        ]
        for _ in answers:
            if not left.acquire(timeout=WAIT_S):
                raise TimeoutError(f"not all of {len(answers)} jobs ended within {WAIT_S} s")
        for answer in answers:
            if answer.error is not None:
                raise answer.error
            if grammar is None and answer.tokens != new_tokens:
                raise RuntimeError(f"{answer.tokens} tokens came, {new_tokens} were asked for")
        return answers


# ---------------------------------------------------------------- the library's own


def load_tokenizer(path: Path) -> Any:
    """The folder's tokenizer, padding on the left as generation wants it."""
    tokenizer: Any = AutoTokenizer.from_pretrained(path, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(path: Path, dtype: Dtype, device: str = "cpu") -> Any:
    """The folder's model as a script would load it. Nothing ends an answer before its length."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    model = model.to(device).eval()
    model.generation_config.eos_token_id = None
    return model


@dataclass(slots=True)
class Tokens:
    """What the library made of one prompt."""

    ids: list[int]
    stamps: list[Stamp]


class _Watch(StoppingCriteria):  # type: ignore[misc]
    """Notes the time of every token of a static batch, and stops nothing."""

    def __init__(self) -> None:
        self.stamps: list[Stamp] = []

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        self.stamps.append(Stamp(time.perf_counter(), time.process_time(), len(self.stamps) + 1))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Static:
    """``generate`` on one padded batch."""

    def __init__(self, model: Any, pad_token: int) -> None:
        self._model, self._pad = model, pad_token

    def run(self, prompts: Sequence[Prompt], new_tokens: int, **more: Any) -> list[Tokens]:
        """The answers; ``more`` goes to ``generate``."""
        longest = max(len(p.ids) for p in prompts)
        rows = [[self._pad] * (longest - len(p.ids)) + list(p.ids) for p in prompts]
        seen = [[0] * (longest - len(p.ids)) + [1] * len(p.ids) for p in prompts]
        device = self._model.device
        watch = _Watch()
        with torch.inference_mode():
            out = self._model.generate(
                input_ids=torch.tensor(rows, device=device),
                attention_mask=torch.tensor(seen, device=device),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=self._pad,
                stopping_criteria=StoppingCriteriaList([watch]),
                **more,
            )[:, longest:].tolist()
        if len(out[0]) != new_tokens:
            raise RuntimeError(f"{len(out[0])} tokens came, {new_tokens} were asked for")
        return [Tokens(ids, watch.stamps) for ids in out]


class Stock:
    """The library's continuous batching, kept running between rounds."""

    def __init__(
        self,
        model: Any,
        kv: int,
        requests: int,
        step_tokens: int = STEP_TOKENS,
        page_tokens: int = PAGE_TOKENS,
    ) -> None:
        """Start its thread.

        Args:
            model: shared with :class:`Static`; both leave it as it is.
            kv: tokens of cache that are needed at once.
            requests: how many sequences there are at most.
            step_tokens: tokens in one step at most.
            page_tokens: tokens in one block.
        """
        self._manager: Any = model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=page_tokens,
                # Half as much again: it keeps a margin before it lets new sequences in.
                num_blocks=-(-3 * kv // (2 * page_tokens)) + requests,
                max_batch_tokens=step_tokens,
                max_requests_per_batch=requests,
                # Rounds repeat their prompts, and none may profit from that.
                allow_block_sharing=False,
                # What the library fits to a GPU by itself (graphs, asynchrony, flash) is left to it.
            ),
        )
        self._manager.warmup()
        self._steps: list[tuple[float, float]] = []
        self._watch_steps()
        self._manager.start()

    def _watch_steps(self) -> None:
        """Note the CPU-seconds at the end of each step; the library notes wall time by itself."""
        processor = self._manager.batch_processor
        update = processor.update_batch

        def update_and_note() -> None:
            update()
            self._steps.append((time.perf_counter(), time.process_time()))

        processor.update_batch = update_and_note

    def __enter__(self) -> Stock:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.stop(block=True, timeout=WAIT_S)
        self._manager.destroy()

    def run(self, prompts: Sequence[Prompt], new_tokens: int) -> list[Tokens]:
        """The answers to prompts handed in at once."""
        self._steps.clear()
        order = {
            self._manager.add_request(
                list(p.ids), max_new_tokens=new_tokens, eos_token_id=-1, record_timestamps=True
            ): i
            for i, p in enumerate(prompts)
        }
        results: list[Any] = [None] * len(prompts)
        until = time.perf_counter() + WAIT_S
        while order:
            result = self._manager.get_result(timeout=1.0)
            if result is None:
                if not self._manager.is_running() or time.perf_counter() > until:
                    raise TimeoutError("the library's manager gives no results")
            elif result.is_finished():
                if result.error is not None or len(result.generated_tokens) != new_tokens:
                    raise RuntimeError(
                        f"{result.error or ''} {len(result.generated_tokens)} tokens came"
                    )
                results[order.pop(result.request_id)] = result
        # The last results are handed over before their step's end is noted.
        self._steps.append((time.perf_counter(), time.process_time()))
        return [Tokens(list(r.generated_tokens), self._stamps(r.timestamps)) for r in results]

    def _stamps(self, times: Sequence[float]) -> list[Stamp]:
        ends = [wall for wall, _ in self._steps]
        return [
            Stamp(wall, self._steps[min(bisect_left(ends, wall), len(ends) - 1)][1], n + 1)
            for n, wall in enumerate(times)
        ]
