"""The real engine on a small random model: no model store and no GPU are needed."""

import pytest
import torch

from benchmarks.gpu import Report, check_tokens, main, make_model
from llmos.drivers.engines.sampling import choose
from llmos.drivers.protocols import SamplingParams


def test_tokens_equal_static_generate_without_any_model_store(tmp_path):
    torch.set_num_threads(1)
    report = Report("cpu", "random", "float32", 8)
    check_tokens(report, make_model(tmp_path), "cpu", 8)
    assert (report.equal_fp32, report.compared_fp32) == (8, 8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_the_gpu_benchmark_says_that_there_is_no_gpu(capsys):
    assert main(["--json"]) == 3
    printed = capsys.readouterr()
    assert "No CUDA" in printed.err
    assert not printed.out


class TestChoose:
    def rows(self, count, logits):
        return torch.tensor([logits] * count, dtype=torch.float32)

    def test_frequencies_follow_temperature(self):
        params = SamplingParams(temperature=2.0)
        logits = self.rows(4000, [0.0, 2.0, 4.0])
        tokens = choose(logits, [(r, params) for r in range(4000)])
        expected = torch.softmax(torch.tensor([0.0, 1.0, 2.0]), 0)
        found = tokens.bincount(minlength=3) / 4000
        assert torch.allclose(found, expected, atol=0.05)

    def test_top_k_then_top_p_of_the_rest(self):
        # Of the two best, 0.73 and 0.27, top_p=0.7 leaves the first alone.
        logits = self.rows(200, [1.0, 2.0, 0.9, 0.8])
        cut = SamplingParams(temperature=1.0, top_k=2, top_p=0.7)
        assert set(choose(logits, [(r, cut) for r in range(200)]).tolist()) == {1}
        loose = SamplingParams(temperature=1.0, top_k=2)
        assert set(choose(logits, [(r, loose) for r in range(200)]).tolist()) == {0, 1}

    def test_top_p_beyond_the_first_candidates(self):
        flat = torch.zeros(300, 5000)
        params = SamplingParams(temperature=1.0, top_p=0.9)
        tokens = choose(flat, [(r, params) for r in range(300)])
        assert len(set(tokens.tolist())) > 200

    def test_rows_keep_their_own_parameters(self):
        logits = torch.randn(6, 100)
        hot = SamplingParams(temperature=50.0)
        tokens = choose(logits, [(1, hot), (4, SamplingParams(temperature=1.0, top_k=1))])
        greedy = logits.argmax(-1)
        assert [bool(tokens[r] == greedy[r]) for r in (0, 2, 3, 4, 5)] == [True] * 5

    @pytest.mark.parametrize("temperature", [1e-45, 1e-9, 1e30])
    def test_extreme_temperatures_stay_finite(self, temperature):
        logits = torch.randn(3, 50, dtype=torch.bfloat16) * 100
        params = SamplingParams(temperature=temperature, top_p=0.5)
        tokens = choose(logits, [(r, params) for r in range(3)])
        assert ((tokens >= 0) & (tokens < 50)).all()


def test_the_librarys_own_attention_gives_the_same_tokens(tmp_path, monkeypatch):
    # What a GPU runs, but for the kernels: block tables, mask and cache of the library.
    from llmos.drivers.engines.stepper import Stepper

    monkeypatch.setattr(Stepper, "_own_attention", lambda self, config: False)
    report = Report("cpu", "random", "float32", 8)
    check_tokens(report, make_model(tmp_path), "cpu", 8)
    assert (report.equal_fp32, report.compared_fp32) == (8, 8)
