"""The real engine on a small random model: no model store and no GPU are needed."""

import pytest
import torch

from benchmarks.gpu import Report, check_tokens, main, make_model


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


def test_the_librarys_own_attention_gives_the_same_tokens(tmp_path, monkeypatch):
    # What a GPU runs, but for the kernels: block tables, mask and cache of the library.
    from llmos.drivers.engines.stepper import Stepper

    monkeypatch.setattr(Stepper, "_own_attention", lambda self, config: False)
    report = Report("cpu", "random", "float32", 8)
    check_tokens(report, make_model(tmp_path), "cpu", 8)
    assert (report.equal_fp32, report.compared_fp32) == (8, 8)
