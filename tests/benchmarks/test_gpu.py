"""The benchmark for GPUs, tried out on the CPU with a small random model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from tests.benchmarks.bare import make_bare

ROOT = Path(__file__).parents[2]
QUICK = ["--quick", "--device", "cpu", "--batches", "4", "--new-tokens", "6", "--pairs", "1"]

SECTIONS = "tokens,memory,decode,identical,adapters,encoder,structured"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main(["--json"]) == gpu.NO_CUDA == 3
    printed = capsys.readouterr()
    assert "No CUDA" in printed.err
    assert not printed.out


def test_unknown_sections_are_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--only", "tokens,nonsense"])
    assert "no section nonsense" in capsys.readouterr().err


@pytest.mark.slow
def test_torch_and_transformers_are_enough(tmp_path):
    # Neither Ray nor pydantic, psutil, peft, llguidance, … can be imported there.
    packages = tmp_path / "packages"
    packages.mkdir()
    make_bare(packages, "torch", "transformers")
    assert not (packages / "ray").exists()
    assert not (packages / "psutil").exists()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment |= {"PYTHONPATH": f"{packages}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        # -S: without the environment's own packages.
        [sys.executable, "-S", "-m", "benchmarks.gpu", *QUICK, "--json", "--only", SECTIONS],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.strip().splitlines()[-1])
    assert report["passed"] is True
    assert report["static_equal"] == {"equal": 8, "compared": 8}
    assert report["fp32_identical"] is True
    assert report["memory"]["predicted_bytes"] > 0
    assert report["decode"]["4"]["ours"] > 0
    # Measured without peft; what needs it is left out.
    assert {"1", "4"} <= set(report["adapters"])
    assert "wrong_tokens" not in report["adapters"]
    assert "sentence_transformers" not in report["encoder_texts_per_s"]
    assert "structured_output" not in report


class TestFailures:
    def test_nothing_ran_nothing_failed(self):
        assert gpu.failures({}) == []

    @pytest.mark.parametrize(
        ("report", "word"),
        [
            ({"static_equal": {"equal": 7, "compared": 8}}, "static"),
            ({"fp32": {"equal_or_rounding": False}}, "batching"),
            ({"memory": {"peak_over_predicted": 1.01}}, "memory"),
            ({"adapters": {"wrong_tokens": 1}}, "adapter"),
        ],
    )
    def test_each_is_told(self, report, word):
        (told,) = gpu.failures(report)
        assert word in told
