from __future__ import annotations

import json
from typing import Any

import pytest

from llmos.drivers.errors import RuleSyntaxError
from llmos.drivers.protocols import Fact, RuleBase
from llmos.drivers.rules.memory import MemoryRuleBase
from tests.drivers.rules.rules_suite import RulesSuite

PROGRAM: dict[str, Any] = {
    "templates": {
        "patient": {
            "name": "text",
            "fever": "boolean",
            "age": "integer",
            "weight": "number",
            "tags": ["text"],
        },
        "advice": {"name": "text", "text": "text"},
        "visit": {"name": "text"},
    },
    "rules": [
        {
            "name": "feverish",
            "comment": "A fever needs a doctor",
            "when": {"patient": {"name": "?n", "fever": True}},
            "then": {"advice": {"name": "?n", "text": "see a doctor"}},
        },
        {
            "name": "visiting",
            "when": {"advice": {"name": "?n", "text": "see a doctor"}},
            "then": {"visit": {"name": "?n"}},
        },
    ],
}


class TestMemoryRules(RulesSuite):
    program = json.dumps(PROGRAM)
    broken = '{\n "templates": {},\n "rules": [}\n}'

    def make(self, source: str) -> RuleBase:
        return MemoryRuleBase("clinic", source)


def test_a_variable_joins_two_facts() -> None:
    source = {
        "templates": {"a": {"x": "any"}, "b": {"x": "any"}, "c": {"x": "any"}},
        "rules": [
            {"name": "r", "when": {"a": {"x": "?v"}, "b": {"x": "?v"}}, "then": {"c": {"x": "?v"}}}
        ],
    }
    base = MemoryRuleBase("join", json.dumps(source))
    outcome = base.evaluate([Fact("a", {"x": 1}), Fact("b", {"x": 2}), Fact("b", {"x": 1})])
    assert [f.slots["x"] for f in outcome.facts if f.template == "c"] == [1]
    assert len(outcome.firings[0].because) == 2


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ({"when": {"zebra": {}}, "then": {}}, "zebra"),
        ({"when": {"visit": {"nmae": "x"}}, "then": {}}, "nmae"),
        ({"when": {"visit": {}}, "then": {"visit": {"name": "?who"}}}, "who"),
        ({"when": {}, "then": {}}, "when"),
    ],
)
def test_rules_are_checked_when_read(rule: dict[str, Any], reason: str) -> None:
    source = json.dumps({**PROGRAM, "rules": [{"name": "r", **rule}]})
    with pytest.raises(RuleSyntaxError, match=reason):
        MemoryRuleBase("bad", source)
