"""Adapters made with peft, and what peft answers with one of them alone."""

from pathlib import Path
from typing import Any

import torch

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def tiny_llama(folder: Path) -> Path:
    """A random Llama of two layers, whose tokens are the printable characters of ASCII: equal
    texts are then equal tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = [*map(chr, range(0x21, 0x7F)), "\u0120"]  # The last stands for the space.
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
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=True,
        # Wide enough for distinct logits: ties would make equal tokens a matter of luck.
        initializer_range=0.25,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_adapters(base: Path, paths: dict[int, Path], std: float = 0.1, **config: Any) -> None:
    """Save random adapters that change the answers, by seed; ``config`` is for LoraConfig."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION, "task_type": "CAUSAL_LM"}
    wrapped = get_peft_model(model, LoraConfig(**(settings | config)))
    for seed, path in paths.items():
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0.0, std)
        wrapped.save_pretrained(path)


def make_adapter(base: Path, folder: Path, seed: int, **config: Any) -> Path:
    """One of them."""
    make_adapters(base, {seed: folder}, **config)
    return folder


class Peft:
    """peft's own model with every adapter loaded and one of them active at a time."""

    def __init__(self, base: Path, adapters: dict[str, Path]) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self._model: Any = None
        for name, path in adapters.items():
            if self._model is None:
                self._model = PeftModel.from_pretrained(model, path, adapter_name=name)
            else:
                self._model.load_adapter(path, adapter_name=name)

    def logits(self, ids: list[int], adapter: str) -> torch.Tensor:
        """Of each token; shape (tokens, vocabulary). An empty name: the base model alone."""
        with torch.inference_mode():
            if not adapter:
                with self._model.disable_adapter():
                    return self._model(torch.tensor([ids])).logits[0]
            self._model.set_adapter(adapter)
            return self._model(torch.tensor([ids])).logits[0]

    def answer(self, prompt: str, adapter: str, max_new_tokens: int) -> str:
        """The greedy answer to a raw prompt; nothing ends it before its length."""
        ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        settings = {"max_new_tokens": max_new_tokens, "eos_token_id": None}
        with torch.inference_mode():
            if adapter:
                self._model.set_adapter(adapter)
                out = self._model.generate(input_ids=ids, do_sample=False, **settings)
            else:
                with self._model.disable_adapter():
                    out = self._model.generate(input_ids=ids, do_sample=False, **settings)
        return str(self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
