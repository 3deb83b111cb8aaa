"""A small random Llama that writes anything at all, with a trained byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch

from llmos.drivers.engines import causal
from llmos.drivers.protocols import EngineOptions

TEXTS = [
    '{"name": "Ada", "age": 36, "tags": ["true", "false", "null"]}',
    "the kernel lends memory to the agents that ask for it, and they wait when there is none",
    "2024-05-17 yes no maybe 日本 Grüße 🌈",
] * 4
CHAT = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def make(folder: Path, chat: str = CHAT, controls: tuple[str, ...] = ()) -> Path:
    """Save it; ``controls`` are special tokens beside ``<|start|>`` and ``<|stop|>``."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    special = [AddedToken(c, special=True) for c in ("<|start|>", "<|stop|>", *controls)]
    tokenizer.add_special_tokens(special)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|stop|>",
        pad_token="<|stop|>",
        chat_template=chat,
    ).save_pretrained(folder)
    stop = tokenizer.token_to_id("<|stop|>")
    torch.manual_seed(0)
    config = LlamaConfig(
        # More than the tokenizer has: models pad their vocabulary.
        vocab_size=tokenizer.get_vocab_size() + 13,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=stop,
        eos_token_id=stop,
        pad_token_id=stop,
        tie_word_embeddings=True,
        # Wide enough for distinct logits: ties would make equal tokens a matter of luck.
        initializer_range=0.25,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def engine(folder: Path, **options: object) -> causal.TransformersCausalEngine:
    """An engine on it, in float32 so that tokens can be compared."""
    settings = {"dtype": "float32", "threads": 1, "kv_tokens": 4096, "max_batch_tokens": 256}
    return causal.TransformersCausalEngine(
        EngineOptions("tiny", path=folder, **{**settings, **options})  # type: ignore[arg-type]
    )
