from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import scheduling
from llmos.kernel.core.policies import NAMES


def test_it_ends_with_one_object(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(scheduling, "LOADS", (0.8, 2.0))
    monkeypatch.setattr(scheduling, "decision_us", lambda name: 1.0)
    runs = [{"context_chars": 400, "output_chars": 40}, {"context_chars": 800, "output_chars": 9}]
    (tmp_path / "gpt4o_trajectories_calls.jsonl").write_text(json.dumps({"llm_calls": runs}) + "\n")
    # Without the sections that load models.
    sections = "completion,recorded,fairness,flood,decision"
    arguments = ["--json", "--jobs", "150", "--seeds", "1", "--traces", str(tmp_path)]
    arguments += ["--only", sections]
    assert scheduling.main(arguments) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found["completion"]) == {"0.8", "2.0"}
    assert found["completion"]["2.0"]["serpt"]["mean"] > 1
    assert set(found["recorded"]) == {"agent-runs"}
    gaps = found["gap_tokens"]["simulated"]
    assert gaps["fair"] <= found["gap_bound_tokens"]["simulated"]
    assert gaps["fair"] < gaps["fcfs"]
    assert set(found["decision_us_at_100k"]) == set(NAMES)
    assert found["flood_p95_ratio"]["fair"] < found["flood_p95_ratio"]["fcfs"]


def test_a_decision_is_measured() -> None:
    assert 0 < scheduling.decision_us("fair", waiting=2000) < 10_000


def test_an_unknown_section_is_refused() -> None:
    with pytest.raises(SystemExit):
        scheduling.main(["--only", "luck"])
