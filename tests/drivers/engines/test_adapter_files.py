"""Which adapters are refused, and why."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmos.drivers.engines import adapter_files
from llmos.drivers.engines.adapter_files import CONFIG, WEIGHTS, read_adapter
from llmos.drivers.errors import AdapterUnusable

LAYERS = {
    f"model.layers.{n}.self_attn.{part}": sizes
    for n in range(2)
    for part, sizes in {"q_proj": (8, 8), "v_proj": (8, 4)}.items()
}
PLAIN = {
    "peft_type": "LORA",
    "base_model_name_or_path": "somebody/else's",
    "r": 2,
    "lora_alpha": 4,
    "lora_dropout": 0.1,
    "bias": "none",
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
    "inference_mode": True,
    "use_dora": False,
    "modules_to_save": None,
}


def key(layer, half):
    return f"base_model.model.{layer}.lora_{half}.weight"


def tensors(rank=2, layers=LAYERS):
    torch.manual_seed(0)
    made = {}
    for layer, (inside, outside) in layers.items():
        made[key(layer, "A")] = torch.randn(rank, inside)
        made[key(layer, "B")] = torch.randn(outside, rank)
    return made


@pytest.fixture
def write(tmp_path):
    def write(weights=None, **config):
        (tmp_path / CONFIG).write_text(json.dumps(PLAIN | config))
        save_file(tensors() if weights is None else weights, tmp_path / WEIGHTS)
        return tmp_path

    return write


def read(path, max_rank=4):
    return read_adapter("m", "a", path, LAYERS, max_rank)


def test_what_is_read(write):
    path = write()
    found = read(path)
    raw = load_file(path / WEIGHTS)
    assert found.rank == 2
    assert found.layers.keys() == LAYERS.keys()
    for layer, (a, b) in found.layers.items():
        assert torch.equal(a, raw[key(layer, "A")])
        assert torch.equal(b, raw[key(layer, "B")].t() * 2)
    assert len(found.digest) == 64
    assert read(write(lora_alpha=8)).digest != found.digest


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "IA3"}, "only LORA"),
        ({"bias": "all"}, "biases"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"of_the_future": {"x": 1}}, "of_the_future"),
        ({"init_lora_weights": "pissa"}, "changed the base model's weights"),
        ({"r": 0}, "r is 0"),
        ({"r": "2"}, "r is '2'"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"rank_pattern": {"q_proj": 3}}, "shape"),
        ({"rank_pattern": {"q_proj": 5}}, "rank"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is not an object"),
        ({"rank_pattern": {"(": 2}}, "broken"),
        ({"target_modules": "("}, "broken"),
        ({"target_modules": "x" * 2000}, "more than 1000 characters"),
        ({"target_modules": ["q_proj"]}, "target_modules do not"),
        ({"target_modules": 3}, "a list or a string"),
        ({"exclude_modules": ["v_proj"]}, "target_modules do not"),
        ({"layers_to_transform": [0]}, "target_modules do not"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
def test_configurations_that_mean_something_else(write, config, words):
    with pytest.raises(AdapterUnusable) as error:
        read(write(**config))
    assert words in error.value.reason
    assert (error.value.model, error.value.adapter) == ("m", "a")


def changed(**changes):
    made = tensors()
    for name, value in changes.items():
        half = name[-1]
        layer = "model.layers.0.self_attn.q_proj"
        if value is None:
            del made[key(layer, half)]
        else:
            made[key(layer, half)] = value
    return made


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (changed(A=None), "lacks weights"),
        (changed(A=torch.randn(2, 9)), "shape"),
        (changed(B=torch.randn(8, 3)), "shape"),
        (changed(A=torch.ones(2, 8, dtype=torch.int32)), "no finite number"),
        (changed(A=torch.full((2, 8), float("nan"))), "no finite number"),
        (changed(B=torch.full((8, 2), float("inf"))), "no finite number"),
        (tensors() | {"base_model.model.lm_head.weight": torch.ones(2)}, "no part of plain LoRA"),
        (tensors() | {"odd": torch.ones(2)}, "no part of plain LoRA"),
        (tensors(layers=LAYERS | {"model.layers.7.self_attn.q_proj": (8, 8)}), "no linear layer"),
        (tensors(layers={"model.layers.0.self_attn.q_proj": (8, 8)}), "lacks weights"),
    ],
)
def test_weights_that_do_not_fit(write, weights, words):
    with pytest.raises(AdapterUnusable, match=words):
        read(write(weights))


def test_a_rank_above_the_limit(write):
    with pytest.raises(AdapterUnusable, match="1 to 1 are allowed"):
        read(write(), max_rank=1)


def test_a_file_larger_than_any_adapter(write, monkeypatch):
    monkeypatch.setattr(adapter_files, "HEADER_BYTES", 600)
    with pytest.raises(AdapterUnusable, match="larger than any"):
        read(write(tensors() | {"odd": torch.ones(10_000)}))


def test_files_that_are_missing_broken_or_pickled(write, tmp_path):
    with pytest.raises(AdapterUnusable, match="not a folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(AdapterUnusable, match=CONFIG):
        read(tmp_path)
    write()
    (tmp_path / CONFIG).write_text("[1]")
    with pytest.raises(AdapterUnusable, match="not a JSON object"):
        read(tmp_path)
    write()
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(AdapterUnusable, match="shorter or longer"):
        read(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(pickle.dumps(tensors(), protocol=4))
    with pytest.raises(AdapterUnusable, match="pickled"):
        read(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterUnusable, match="pickled"):
        read(tmp_path)
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(AdapterUnusable, match="is missing"):
        read(tmp_path)
