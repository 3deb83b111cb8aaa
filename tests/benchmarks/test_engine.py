"""The benchmark of the engines on a small random model: that it runs, and that it counts right."""

import json

import pytest
import torch

from benchmarks import engine
from benchmarks.engine_decode import check_identical, first_difference
from benchmarks.engine_rig import (
    Stamp,
    alternate,
    decode_rates,
    load_model,
    load_tokenizer,
    make_prompts,
    median_ratio,
    percentile,
    spread,
)
from benchmarks.gpu import make_encoder, make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("llama"), hidden=72, layers=2)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp("bert"), hidden=48, layers=1)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(capsys, model, encoder, *sections):
    arguments = ["--quick", "--json", "--model", str(model), "--encoder", str(encoder)]
    engine.main([*arguments, "--only", ",".join(sections)])
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


class TestSections:
    def test_decode_and_tokens(self, capsys, model, encoder):
        report = run(capsys, model, encoder, "decode", "identical", "attention")
        row = report["decode"]["4"]
        for way in ("ours", "stock", "static"):
            assert row[way] > 0
            assert row["per_cpu_s"][way] > 0
            # Reading the prompts is no part of the one, and part of the other.
            assert row["whole_run_per_cpu_s"][way] < row["per_cpu_s"][way]
        assert report["fp32_identical"] is True
        assert report["fp32"]["equal"] == report["fp32"]["compared"] == 8
        assert report["attention_growth_32_64"] > 0
        assert report["conditions"]["threads"] == 1

    def test_adapters(self, capsys, model, encoder):
        pytest.importorskip("peft")
        found = run(capsys, model, encoder, "adapters")["adapters"]
        assert found["1"] == found["relative_cpu_time"]["1"] == 1
        assert {"4", "none", "peft_relative_throughput"} <= set(found)
        assert found["wrong_tokens"] == 0
        assert found["checked_requests"] == 4
        assert found["answers_changed_by_adapters"] == 8

    def test_the_rest(self, capsys, model, encoder):
        report = run(capsys, model, encoder, "encoder", "first_token", "structured")
        texts = report["encoder_texts_per_s"]
        assert texts["ours"] > 0
        assert texts["one_at_a_time"] > 0
        assert texts["least_cosine_with_ours"]["one_at_a_time"] > 0.9999
        for way in ("chunked", "whole"):
            first = report["first_token_ms"][way]
            assert 0 < first["p50"] <= first["p95"]
        assert report["structured_output"]["example"].startswith("[")

    def test_the_kernel_takes_models_from_the_store_alone(self, capsys, model):
        with pytest.raises(SystemExit):
            engine.main(["--quick", "--only", "kernel", "--model", str(model)])
        assert "leave out --model" in capsys.readouterr().err


class TestIdentity:
    def test_a_wrong_token_is_found_and_placed(self, model):
        tokenizer, library = load_tokenizer(model), load_model(model, "float32")
        (prompt,) = make_prompts(tokenizer, [9])
        with torch.inference_mode():
            out = library.generate(
                torch.tensor([prompt.ids]), max_new_tokens=6, do_sample=False, pad_token_id=0
            )[0, 9:].tolist()
        text = tokenizer.decode(out)
        assert first_difference(library, tokenizer, prompt, text, out) is None
        wrong = text[:3] + ("x" if text[3] != "x" else "y") + text[4:]
        found = first_difference(library, tokenizer, prompt, wrong, out)
        assert found.at_token == 3
        assert not found.by_rounding

    def test_no_difference_is_told_of_equal_tokens(self, model):
        found = check_identical(model, 4, 6)
        assert found["identical"]
        assert found["first_differences"] == []


class TestCounting:
    def test_rates_count_only_while_all_decode(self):
        # One step a second from 10 on; the second sequence has its first token at 12, and the
        # first one its last at 15. CPU time runs at half the speed.
        def sequence(begin, end):
            return [Stamp(float(t), t / 2, t - begin + 1) for t in range(begin, end + 1)]

        assert decode_rates([sequence(10, 15), sequence(12, 18)]) == pytest.approx((2.0, 4.0))

    def test_tokens_that_came_late_are_counted_once(self):
        stamps = [Stamp(0.0, 0.0, 1), Stamp(2.0, 2.0, 3), Stamp(3.0, 3.0, 4)]
        assert decode_rates([stamps])[0] == pytest.approx(1.0)

    def test_too_few_tokens_are_no_rate(self):
        with pytest.raises(RuntimeError, match="too few"):
            decode_rates([[Stamp(0.0, 0.0, 1)], [Stamp(1.0, 1.0, 1)]])

    def test_ways_take_turns(self):
        seen = []
        found = alternate(3, {"a": lambda: seen.append("a"), "b": lambda: seen.append("b")})
        assert seen == ["a", "b"] * 3
        assert {k: len(v) for k, v in found.items()} == {"a": 3, "b": 3}

    def test_ratios_are_of_rounds(self):
        assert median_ratio([2.0, 10.0, 9.0], [1.0, 10.0, 3.0]) == 2.0

    @pytest.mark.parametrize(
        ("share", "value"), [(0.5, 50), (0.95, 95), (0.951, 96), (1.0, 100), (0.0, 1)]
    )
    def test_percentiles(self, share, value):
        assert percentile(list(range(100, 0, -1)), share) == value

    @pytest.mark.parametrize("count", [1, 2, 8, 32, 37, 64])
    def test_lengths_are_all_there_and_mixed(self, count):
        lengths = spread(count, 3, 400)
        assert len(set(lengths)) == count
        if count > 1:
            assert (min(lengths), max(lengths)) == (3, 400)
        if count > 2:
            assert lengths != sorted(lengths)

    def test_prompts_are_different_and_of_their_length(self, model):
        prompts = make_prompts(load_tokenizer(model), spread(64, 3, 400))
        assert len({p.text for p in prompts}) == 64
        assert [len(p.ids) for p in prompts] == spread(64, 3, 400)
