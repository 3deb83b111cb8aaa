"""The benchmark of narrow weights, on a small random model and a short text."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import perplexity
from benchmarks.gpu import make_model
from llmos.drivers.engines.quantize import has_int4, int8_is_exact

pytestmark = pytest.mark.skipif(
    not (int8_is_exact() and has_int4()), reason="this processor has no kernels for int8 and int4"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the benchmark's random model the tokenizer, and a body that takes no time."""
    made = make_model(tmp_path_factory.mktemp("random"))
    config = AutoConfig.from_pretrained(made)
    config.update({"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2})
    config.update({"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 32})
    AutoModelForCausalLM.from_config(config).save_pretrained(made)
    return made


def test_perplexity_is_of_the_whole_text(folder: Path) -> None:
    text = "the kernel lends memory " * 30  # more than a window of this model's bytes
    plain = perplexity.perplexity(folder, text, "plain", "float32")
    assert plain == pytest.approx(perplexity.perplexity(folder, text, "plain", "bfloat16"), rel=0.1)
    assert math.log(plain) > 4  # nobody trained it
    assert perplexity.perplexity(folder, text, "int8", "float32") == pytest.approx(plain, rel=0.1)


def test_the_table_has_a_row_for_each_way(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a short text")
    monkeypatch.setattr(perplexity, "BATCHES", (1, 2))
    arguments = ["--model", str(folder), "--text", str(text), "--pairs", "1"]
    assert perplexity.main([*arguments, "--new-tokens", "16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    ways = {(way["weights"], way["dtype"]): way for way in found["ways"]}
    assert set(ways) == set(perplexity.WAYS)
    plain, narrow = ways["plain", "bfloat16"], ways["int4", "bfloat16"]
    assert narrow["bytes"] < 0.6 * plain["bytes"]
    assert plain["over_plain_bfloat16_2"] == 1
    assert all(way["tokens_per_cpu_s_1"] > 0 for way in ways.values())


def test_the_text_that_ships_is_long_enough() -> None:
    assert 10_000 < len(perplexity.TEXT.read_text(encoding="utf-8")) < 20_000


def test_no_model_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert perplexity.main(["--model", str(tmp_path)]) == 2
    assert "no model" in capsys.readouterr().err
