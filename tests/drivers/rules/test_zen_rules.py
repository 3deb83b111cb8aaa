from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from llmos.drivers.errors import RuleFailed, RuleSyntaxError, UnknownTemplate
from llmos.drivers.protocols import Fact, RuleBase
from llmos.drivers.rules.zen import ZenRuleBase
from tests.drivers.rules.rules_suite import RulesSuite

Model = dict[str, Any]


def table(
    name: str,
    inputs: dict[str, str],
    outputs: dict[str, str],
    description: str = "",
    **options: Any,
) -> Model:
    """A table of one row: cells by field."""
    row = {"_id": f"{name}-1", "_description": description}
    return {
        "id": name,
        "type": "decisionTableNode",
        "name": name,
        "content": {
            "hitPolicy": "first",
            "passThrough": True,
            "inputs": [{"id": f"i{i}", "field": field} for i, field in enumerate(inputs)],
            "outputs": [{"id": f"o{i}", "field": field} for i, field in enumerate(outputs)],
            "rules": [
                {
                    **row,
                    **{f"i{i}": cell for i, cell in enumerate(inputs.values())},
                    **{f"o{i}": cell for i, cell in enumerate(outputs.values())},
                }
            ],
            **options,
        },
    }


def model(*steps: Model, schema: Model | None = None) -> str:
    """Steps one after the other."""
    first: Model = {"id": "in", "type": "inputNode", "name": "in", "content": {}}
    if schema is not None:
        first["content"]["schema"] = json.dumps(schema)
    nodes = [first, *steps, {"id": "out", "type": "outputNode", "name": "out", "content": {}}]
    edges = [
        {"id": f"e{i}", "type": "edge", "sourceId": a["id"], "targetId": b["id"]}
        for i, (a, b) in enumerate(itertools.pairwise(nodes))
    ]
    return json.dumps({"nodes": nodes, "edges": edges})


PATIENT = {
    "type": "object",
    "properties": {
        "patient": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "fever": {"type": "boolean"},
                "age": {"type": "integer"},
                "weight": {"type": "number"},
                "tags": {"type": "array", "items": {"type": "string"}},
            },
        }
    },
}
PROGRAM = model(
    table(
        "feverish",
        {"patient.fever": "true"},
        {"advice.name": "patient.name", "advice.text": '"see a doctor"'},
        "A fever needs a doctor",
    ),
    table("visiting", {"advice.text": '"see a doctor"'}, {"visit.name": "advice.name"}),
    schema=PATIENT,
)


class TestZenRules(RulesSuite):
    program = PROGRAM
    broken = '{"nodes": [],\n"edges": [],\n}'

    def make(self, source: str) -> RuleBase:
        return ZenRuleBase("clinic", source)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("[]", "nodes and edges"),
        ('{"nodes": [], "edges": []}', "invalidInputCount"),
        (model({"id": "f", "type": "functionNode", "name": "code", "content": {}}), "functionNode"),
        (model({"id": "f", "type": "decisionNode", "name": "other", "content": {}}), "not allowed"),
        (model(table("t", {"a": "< <"}, {"b": "1"})), "< <"),
        (model(table("t", {"a": "< 1"}, {"b": "1 +* 2"})), "1 \\+\\* 2"),
        (model(schema={"type": 3, "properties": {}}), "schema"),
        ("[" * 100_000, "nests too deeply"),
    ],
)
def test_models_that_are_refused(source: str, words: str) -> None:
    with pytest.raises(RuleSyntaxError, match=words) as caught:
        ZenRuleBase("bad", source)
    assert "backtrace" not in str(caught.value)


def test_without_a_schema_any_fact_is_taken_and_combinations_are_tried() -> None:
    join = table(
        "join",
        {"order.customer == customer.name": "true", "customer.level": '"gold"'},
        {"discount.order": "order.id", "discount.percent": "10"},
    )
    base = ZenRuleBase("shop", model(join))
    outcome = base.evaluate(
        [
            *(Fact("customer", {"name": n, "level": v}) for n, v in (("a", "gold"), ("b", "tin"))),
            *(Fact("order", {"id": i, "customer": c}) for i, c in ((1, "a"), (2, "b"), (3, "a"))),
        ]
    )
    assert [f.slots["order"] for f in outcome.facts if f.template == "discount"] == [1, 3]
    assert [f.rule for f in outcome.firings] == ["join", "join"]
    assert any('"name": "a"' in because for because in outcome.firings[0].because)


def test_a_template_of_type_array_gets_all_facts() -> None:
    total = {
        "id": "x",
        "type": "expressionNode",
        "name": "total",
        "content": {
            "expressions": [{"id": "e", "key": "total", "value": "sum(map(line, #.price))"}]
        },
    }
    schema = {
        "properties": {
            "line": {
                "type": "array",
                "items": {"type": "object", "properties": {"price": {"type": "number"}}},
            }
        }
    }
    base = ZenRuleBase("shop", model(total, schema=schema))
    outcome = base.evaluate([Fact("line", {"price": 2.5}), Fact("line", {"price": 4})])
    assert outcome.first("total") == Fact("total", {"value": 6.5})
    with pytest.raises(UnknownTemplate, match="price"):
        base.evaluate([Fact("line", {"price": "much"})])


def test_collected_rows_are_named_by_number() -> None:
    rows = table("risk", {"a": "> 1"}, {"text": '"one"'}, hitPolicy="collect", outputPath="found")
    content = rows["content"]
    content["inputs"][0]["field"] = "x.a"
    content["passThrough"] = False
    content["rules"].append({"_id": "2", "_description": "second", "i0": "> 2", "o0": '"two"'})
    base = ZenRuleBase("r", model(rows))
    assert base.rules == ("risk 1", "risk 2")
    outcome = base.evaluate([Fact("x", {"a": 3})])
    assert [(f.rule, f.comment) for f in outcome.firings] == [("risk 1", ""), ("risk 2", "second")]
    assert [f.slots for f in outcome.facts if f.template == "found"] == [
        {"text": "one"},
        {"text": "two"},
    ]
    assert [f.rule for f in base.evaluate([Fact("x", {"a": 2})]).firings] == ["risk 1"]


def test_what_cannot_be_evaluated_is_an_error() -> None:
    bad = {
        "id": "x",
        "type": "expressionNode",
        "name": "bad",
        "content": {"expressions": [{"id": "e", "key": "y", "value": "x.a * 2"}]},
    }
    base = ZenRuleBase("r", model(bad))
    with pytest.raises(RuleFailed, match=r"x\.a") as caught:
        base.evaluate([Fact("x", {"a": "text"})])
    assert "backtrace" not in str(caught.value)
    with pytest.raises(UnknownTemplate, match="nan"):
        base.evaluate([Fact("x", {"a": float("nan")})])
