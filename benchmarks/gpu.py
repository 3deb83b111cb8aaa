"""Check and measure the causal engine on a CUDA GPU, without Ray.

    python -m benchmarks.gpu [--json] [--model FOLDER] [--batches 1,8,32,64]

Compared in one run on the same prompts: our engine, static ``generate`` of the whole
batch, and serial ``generate`` one prompt after another. All generate exactly the same
number of tokens. Without ``--model`` a small random Llama is made first, so that it
runs on a bare machine. Exit code 3: no CUDA; 1: a check failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmos.drivers.engines.causal import TransformersCausalEngine
from llmos.drivers.models.footprint import predict_footprint
from llmos.drivers.protocols import EngineOptions, GenerationChunk, GenerationJob, SamplingParams

NO_CUDA = 3
SERIAL_PROMPTS = 4
"""Serial generation does not depend on the batch; more prompts would only take longer."""


@dataclass
class Report:
    """What one run found."""

    device: str
    model: str
    dtype: str
    new_tokens: int
    equal_fp32: int = 0
    """Prompts whose float32 tokens are those of static generate."""
    compared_fp32: int = 0
    predicted_bytes: int = 0
    measured_bytes: int = 0
    """Peak of torch's allocator over a full batch, beside what was there before."""
    rates: dict[str, dict[str, float]] = field(default_factory=dict)
    """Batch size → kind → tokens per second."""

    @property
    def passed(self) -> bool:
        """Whether tokens were right and memory within its prediction."""
        within = not self.measured_bytes or self.measured_bytes <= self.predicted_bytes
        return self.equal_fp32 == self.compared_fp32 and within


def make_model(folder: Path) -> Path:
    """Save a small random Llama with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=True,
        # Wide enough for distinct logits: ties would make equal tokens a matter of luck.
        initializer_range=0.08,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def prompts(count: int) -> list[str]:
    """Prompts of different lengths, the same in every run."""
    words = [
        "the",
        "kernel",
        "lends",
        "memory",
        "to",
        "agents",
        "that",
        "ask",
        "for",
        "it",
        "and",
        "waits",
        "when",
        "there",
        "is",
        "none",
    ]
    return [
        f"Case {i}: " + " ".join(words[(i + k) % len(words)] for k in range(8 + 5 * i % 60))
        for i in range(count)
    ]


class Static:
    """The library's own ``generate``."""

    def __init__(self, path: Path, device: str, dtype: torch.dtype) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path, padding_side="left")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        self.model: Any = model.to(device).eval()
        self.device = device

    def __call__(self, texts: Sequence[str], new_tokens: int) -> list[str]:
        """Greedy answers of exactly ``new_tokens`` each."""
        batch = self.tokenizer(list(texts), return_tensors="pt", padding=True).to(self.device)
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        answers = out[:, batch["input_ids"].shape[1] :]
        return [str(self.tokenizer.decode(a, skip_special_tokens=True)) for a in answers]


def ours(
    engine: TransformersCausalEngine, texts: Sequence[str], new_tokens: int, timeout_s: float = 300
) -> list[str]:
    """Answers of our engine to jobs submitted at once."""
    answers = ["" for _ in texts]
    left = threading.Semaphore(0)
    failures: list[Exception] = []

    def listen(at: int) -> Callable[[GenerationChunk], None]:
        def deliver(chunk: GenerationChunk) -> None:
            answers[at] += chunk.text
            if chunk.finish:
                if chunk.error:
                    failures.append(chunk.error)
                left.release()

        return deliver

    stamp = time.monotonic_ns()
    for at, text in enumerate(texts):
        params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
        engine.submit(GenerationJob(f"{stamp}-{at}", text, params), listen(at))
    for _ in texts:
        if not left.acquire(timeout=timeout_s):
            raise TimeoutError(f"no answer within {timeout_s} s")
    if failures:
        raise failures[0]
    return answers


def rate(tokens: int, work: Callable[[], object], repeats: int = 2) -> float:
    """Tokens per second, the best of some repeats after one to warm up."""
    best = float("inf")
    for run in range(repeats + 1):
        began = time.perf_counter()
        work()
        if run:
            best = min(best, time.perf_counter() - began)
    return tokens / best


def options_for(path: Path, device: str, dtype: str, batch: int, new_tokens: int) -> EngineOptions:
    """Room for the whole batch at once."""
    return EngineOptions(
        model=path.name,
        path=path,
        torch_device=device,
        dtype="float32" if dtype == "float32" else "bfloat16",
        threads=1,
        kv_tokens=max(2048, batch * (new_tokens + 512)),
        max_batch_tokens=512,
        max_waiting=max(64, batch),
    )


def check_tokens(report: Report, path: Path, device: str, new_tokens: int) -> None:
    """Compare float32 answers with static generate, one prompt at a time there."""
    texts = prompts(8)
    engine = TransformersCausalEngine(options_for(path, device, "float32", 8, new_tokens))
    try:
        got = ours(engine, texts, new_tokens)
    finally:
        engine.close()
    static = Static(path, device, torch.float32)
    report.compared_fp32 = len(texts)
    for text, answer in zip(texts, got, strict=True):
        report.equal_fp32 += static([text], new_tokens)[0].rstrip("\ufffd") == answer


def measure_static(report: Report, static: Static, batches: Sequence[int], new_tokens: int) -> None:
    """Throughput of the library's ``generate``, whole batches and one by one."""
    few = prompts(SERIAL_PROMPTS)

    def serially() -> None:
        for text in few:
            static([text], new_tokens)

    serial = rate(len(few) * new_tokens, serially, repeats=1)
    for batch in batches:
        work = partial(static, prompts(batch), new_tokens)
        report.rates[str(batch)] = {"serial": serial, "static": rate(batch * new_tokens, work)}


def measure(
    report: Report, path: Path, device: str, dtype: str, batches: Sequence[int], new_tokens: int
) -> None:
    """Fill in throughput and, on CUDA, memory."""
    cuda = device.startswith("cuda")
    chosen = torch.float32 if dtype == "float32" else torch.bfloat16
    measure_static(report, Static(path, device, chosen), batches, new_tokens)
    options = options_for(path, device, dtype, max(batches), new_tokens)
    report.predicted_bytes = predict_footprint(
        path,
        kind="causal",
        dtype="float32" if dtype == "float32" else "bfloat16",
        kv_tokens=options.kv_tokens,
        max_batch_tokens=options.max_batch_tokens,
        max_batch_texts=options.max_batch_texts,
    ).total_bytes
    before = 0
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    engine = TransformersCausalEngine(options)
    try:
        for batch in batches:
            work = partial(ours, engine, prompts(batch), new_tokens)
            report.rates[str(batch)]["ours"] = rate(batch * new_tokens, work)
        if cuda:
            report.measured_bytes = torch.cuda.max_memory_allocated() - before
    finally:
        engine.close()


def render(report: Report) -> str:
    """The report for people."""
    lines = [
        f"{report.model} on {report.device}, {report.dtype}, {report.new_tokens} new tokens each",
        f"float32 tokens equal to static generate: {report.equal_fp32}/{report.compared_fp32}",
    ]
    if report.measured_bytes:
        lines.append(
            f"memory: predicted {report.predicted_bytes / 2**20:.0f} MiB, "
            f"measured {report.measured_bytes / 2**20:.0f} MiB"
        )
    lines.append(f"{'batch':>6} {'ours':>10} {'static':>10} {'serial':>10}   tokens/s")
    for batch, r in report.rates.items():
        lines.append(f"{batch:>6} {r['ours']:>10.1f} {r['static']:>10.1f} {r['serial']:>10.1f}")
    return "\n".join([*lines, "passed" if report.passed else "FAILED"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--model", type=Path, help="folder of a causal model")
    parser.add_argument("--batches", default="1,8,32,64", help="batch sizes")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "No CUDA GPU is visible to this process (or torch was built without CUDA): "
            "nothing was checked.",
            file=sys.stderr,
        )
        return NO_CUDA
    batches = [int(b) for b in given.batches.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        path = given.model or make_model(Path(folder) / "random-llama")
        report = Report(torch.cuda.get_device_name(0), path.name, given.dtype, given.new_tokens)
        check_tokens(report, path, "cuda:0", min(32, given.new_tokens))
        measure(report, path, "cuda:0", given.dtype, batches, given.new_tokens)
    print(json.dumps({**asdict(report), "passed": report.passed}) if given.json else render(report))
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
