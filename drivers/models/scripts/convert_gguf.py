"""Turn a GGUF file into a folder of safetensors, config and tokenizer.

Run by path with one JSON argument: ``{"gguf", "out", "threads"}``. Prints one JSON
object per step, and last ``{"ok": …}`` or ``{"error": …}``.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

STEPS = ("reading", "tokenizer", "loading", "writing")

# Byte-level vocabularies that transformers cannot tell apart from GPT-2's. It knows
# those with a split expression; for the rest it takes GPT-2's rule, which is wrong for
# the first group: there every digit is a piece of its own, and numbers encoded the
# other way are token sequences the model never saw in training.
SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"})
PLAIN_GPT2 = frozenset({"gpt-2", "gpt2", "phi-2", "olmo"})

PROBES = (
    "def f(x):\n    return x ** 2 + 3.14  # π\n\tif a != b:\r\n",
    "你好,世界!数字 12345",
    "😀👩‍👩‍👧 naïve café",
    " 1234567 + 89 = ?",
    "I 'm sure , it 's ok . don't",
)


class Refused(Exception):
    """The file cannot be converted faithfully."""


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Convert; returns what the caller wants to know of the result."""
    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
    gguf, out = Path(request["gguf"]), Path(request["out"])
    say(0)
    metadata = read_metadata(gguf)

    # The tokenizer first: what is refused is mostly refused for it, and it takes 4 s, not 20.
    say(1)
    import torch

    torch.set_num_threads(int(request["threads"]))
    import transformers
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    mend_tokenizer(tokenizer, metadata)
    check_tokenizer(tokenizer, metadata)

    say(2)
    causal = metadata["architecture"] not in ("bert", "nomic-bert", "jina-bert-v2", "modern-bert")
    model = (AutoModelForCausalLM if causal else AutoModel).from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16 if causal else torch.float32,
        # Left to itself transformers keeps the blocks packed, and such a model cannot be saved.
        quantization_config=GgufConfig(dequantize=True),
    )
    check_weights(model)

    say(3)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for path in out.iterdir():
        os.chmod(path, 0o644)  # save_pretrained leaves weights readable by their owner alone
    return {"ok": True, "converter": f"transformers {transformers.__version__}"}


def read_metadata(gguf: Path) -> dict[str, Any]:
    """What the file says of its architecture and tokenizer."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf)

    def value(key: str) -> Any:
        field = reader.fields.get(key)
        return None if field is None else field.contents()

    architecture = value("general.architecture")
    tokens = value("tokenizer.ggml.tokens")
    if not architecture or not tokens:
        raise Refused("it names no architecture or holds no vocabulary")
    eos = value("tokenizer.ggml.eos_token_id")
    return {
        "architecture": architecture,
        "model": value("tokenizer.ggml.model"),
        "pre": value("tokenizer.ggml.pre"),
        "eos": None if eos is None else tokens[eos],
        "eos_id": eos,
        "vocabulary": len(tokens),
        "chat_template": value("tokenizer.chat_template"),
        "context": value(f"{architecture}.context_length"),
    }


def mend_tokenizer(tokenizer: Any, metadata: dict[str, Any]) -> None:
    """Give a byte-level tokenizer the pre-tokenizer that its vocabulary was learned with."""
    if metadata["context"]:
        tokenizer.model_max_length = int(metadata["context"])
    if metadata["model"] != "gpt2":
        return
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    known = json.loads(backend.to_str())["pre_tokenizer"]["type"] != "ByteLevel"
    pre = metadata["pre"]
    if pre in SINGLE_DIGITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    elif not known and pre not in PLAIN_GPT2:
        # Guessing would give a model that works, only worse: nobody would notice.
        raise Refused(f"its pre-tokenizer {pre!r} is not known here")


def check_tokenizer(tokenizer: Any, metadata: dict[str, Any]) -> None:
    """Round trips, digits, special tokens and the chat template."""
    if len(tokenizer) != metadata["vocabulary"]:
        raise Refused(f"{len(tokenizer)} tokens came of {metadata['vocabulary']}")
    if metadata["eos"] is not None and tokenizer.eos_token != metadata["eos"]:
        raise Refused(f"its end token {metadata['eos']!r} became {tokenizer.eos_token!r}")
    if metadata["model"] == "gpt2":
        for probe in PROBES:
            ids = tokenizer.encode(probe, add_special_tokens=False)
            if tokenizer.decode(ids) != probe:
                raise Refused(f"the text {probe!r} does not survive encoding and decoding")
        digits = tokenizer.encode("12345", add_special_tokens=False)
        if metadata["pre"] in SINGLE_DIGITS and len(digits) != 5:
            raise Refused("digits are not encoded one by one")
    if metadata["chat_template"]:
        if tokenizer.chat_template != metadata["chat_template"]:
            raise Refused("its chat template was lost")
        turns = [{"role": "user", "content": "Hello, 你好"}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        if "Hello, 你好" not in text:
            raise Refused("its chat template loses what the user says")


def check_weights(model: Any) -> None:
    """Refuse weights that are not finite."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise Refused(f"the tensor {name} is not finite")


def say(step: int) -> None:
    """Tell the parent which step begins."""
    line = {"step": STEPS[step], "done": step, "total": len(STEPS)}
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def watch() -> None:
    """End when the parent has ended: its end of our standard input is closed then."""
    # The raw descriptor: a thread inside sys.stdin would hold its lock at interpreter exit.
    while os.read(0, 1024):
        pass
    os._exit(3)


if __name__ == "__main__":
    try:
        answer = main(json.loads(sys.argv[1]))
    except Refused as error:
        answer = {"error": str(error)}
    except Exception as error:  # noqa: BLE001  the message is for the parent, which raises
        answer = {"error": f"{type(error).__name__}: {error}"[:2000]}
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    sys.exit(0 if "ok" in answer else 1)
