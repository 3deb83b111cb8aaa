"""Convert a GGUF file once, so that loading takes under a second from then on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from llmos.drivers.errors import ModelUnusable
from llmos.drivers.models.child import ChildTimeout, run_child, script, thread_limits


def convert_gguf(
    model: str,
    gguf: Path,
    folder: Path,
    *,
    scratch: Path,
    threads: int,
    deadline_s: float,
    report: Callable[[str, int, int], None],
) -> str:
    """Write safetensors, config and tokenizer into ``folder``; returns what converted it.

    Causal weights become bfloat16, those of an encoder float32. The work is done in a
    child: the caller neither loads torch nor keeps the memory.

    Raises:
        ModelUnusable: transformers cannot read it, or the result is not faithful.
    """

    def tick(out: str) -> None:
        for line in reversed(out.splitlines()):
            if line.startswith('{"step"'):
                step = json.loads(line)
                report(f"convert: {step['step']}", step["done"], step["total"])
                return

    request = {"gguf": str(gguf), "out": str(folder), "threads": threads}
    env = thread_limits(threads) | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    try:
        result = run_child(
            script("convert_gguf", request),
            scratch=scratch,
            deadline_s=deadline_s,
            env=env,
            tick=tick,
        )
    except ChildTimeout as error:
        raise ModelUnusable(model, gguf.name, f"conversion {error}") from error
    answer = result.last_json()
    if result.returncode or not answer.get("ok"):
        reason = str(answer.get("error") or result.err.strip()[-800:] or "conversion died")
        missing = "gguf" in reason and "No module named" in reason
        raise ModelUnusable(
            model,
            gguf.name,
            f"cannot be converted ({reason})",
            remedy="Run: pip install 'llmos[demo]'"
            if missing
            else "Use a safetensors version of the model",
        )
    return str(answer["converter"])
