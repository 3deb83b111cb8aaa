"""The rule files of examples/rules, on their own cases and on the data they are about."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.rules import AI4I, failures_of, read_machines
from llmos.drivers.registry import driver
from llmos.drivers.rules.cases import read_cases, run_case
from llmos.drivers.rules.files import driver_of, read_source

EXAMPLES = Path(__file__).parents[3] / "examples" / "rules"
FILES = sorted(p for p in EXAMPLES.iterdir() if p.suffix in (".clp", ".json"))


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.name)
def test_a_file_passes_its_own_cases(file: Path) -> None:
    source = read_source(file)
    base = driver("rules", driver_of(file, source))(file.name, source)
    cases = read_cases(file.with_name(f"{file.stem}.cases.toml"))
    assert [r for r in (run_case(base, case) for case in cases) if r.complaints] == []


@pytest.mark.skipif(not AI4I.exists(), reason="the AI4I data set is not here")
@pytest.mark.parametrize("name", ["machine_failure.clp", "machine_failure.json"])
def test_the_failure_rules_of_ai4i_give_the_labels_of_every_row(name: str) -> None:
    machines, labels = read_machines(AI4I)
    assert len(machines) == 10_000
    found = failures_of(EXAMPLES / name, machines)
    assert [m.slots["id"] for m in machines if found[m.slots["id"]] != labels[m.slots["id"]]] == []
