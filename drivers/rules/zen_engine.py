"""JSON Decision Models as rule bases, in this process.

**Facts in.** The model reads facts by their templates: ``machine.speed`` is the slot of
a ``machine``. Where several facts of a template are given, the model is evaluated for
each of them, and with several templates for each combination, as conditions of a rule
are matched. A JSON schema in the input node declares the templates and types of slots;
a template of type ``array`` gets all its facts at once. Without a schema any fact is
taken.

**Facts out.** Each object, or each object of a list, that stands under a name of the
result that was not given is a fact of that template. Slots are texts, numbers, truth
values and lists of them; a null is left out. A list of plain values under a name, or a
plain value, becomes a fact with the slot ``value``.

**Firings.** Each row of a decision table that was hit. It is called like its table, with
the row's number where the table has several, and its description is the comment.

Numbers are decimal and keep 15 digits: 308.6 - 300.0 is 8.6 here, and a little more in
CLIPS, which counts in binary.

Nodes that run JavaScript, call home or read other models are refused.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import zen

from llmos.drivers.errors import RuleFailed, RuleLimitExceeded, RuleSyntaxError, UnknownTemplate
from llmos.drivers.protocols import Fact, Firing, RuleOutcome, Scalar

NODES = {"inputNode", "outputNode", "decisionTableNode", "expressionNode", "switchNode"}
"""Kinds of nodes that a model may have."""

PLAIN_SLOT = "value"
"""The slot of a fact that was made of a plain value."""


class ZenProgram:
    """One decision model."""

    def __init__(self, name: str, source: str) -> None:
        """Read the model. Raises RuleSyntaxError."""
        self._name = name
        model = _parse(name, source)
        nodes = model["nodes"]
        for node in nodes:
            if node["type"] not in NODES:
                raise RuleSyntaxError(
                    name,
                    f"node {node.get('name', node['id'])!r} of type {node['type']} is not allowed "
                    f"here; allowed are {', '.join(sorted(NODES))}",
                )
        self._tables = {n["id"]: n for n in nodes if n["type"] == "decisionTableNode"}
        self._check_expressions(nodes)
        self._schemas = _schemas(name, nodes)
        self._checks = {
            template: jsonschema.Draft202012Validator(_one(schema))
            for template, schema in (self._schemas or {}).items()
        }
        self.rules = tuple(
            _rule_name(table, index)
            for table in self._tables.values()
            for index in range(len(table["content"].get("rules", ())))
        )
        """Names of the table rows, in file order."""
        try:
            self._decision = zen.ZenEngine().create_decision(source)
            self._decision.validate()
        except RuntimeError as error:
            raise RuleSyntaxError(name, _words(error)) from None

    def evaluate(self, facts: Sequence[Fact], max_firings: int) -> RuleOutcome:
        """Evaluate the model for each combination of the facts.

        Raises:
            UnknownTemplate: a fact that the model's schema does not know.
            RuleLimitExceeded: more table rows than ``max_firings`` were hit.
            RuleFailed: an expression could not be evaluated.
        """
        known: dict[str, Fact] = {}
        for fact in facts:
            self._check(fact)
            known.setdefault(_shown(fact.template, fact.slots), fact)
        firings: list[Firing] = []
        for context in self._contexts(list(known.values())):
            try:
                answer = self._decision.evaluate(json.dumps(context), {"trace": True})
            except RuntimeError as error:
                raise RuleFailed(self._name, "", _words(error)) from None
            firings.extend(self._firings(answer["trace"]))
            if len(firings) > max_firings:
                last = [firing.rule for firing in firings[-5:]]
                raise RuleLimitExceeded(self._name, max_firings, last)
            for fact in self._made(answer["result"], context):
                known.setdefault(_shown(fact.template, fact.slots), fact)
        return RuleOutcome(facts=tuple(known.values()), firings=tuple(firings))

    def _check(self, fact: Fact) -> None:
        for slot, value in fact.slots.items():
            for item in value if isinstance(value, tuple | list) else (value,):
                if isinstance(item, float) and not math.isfinite(item):
                    raise UnknownTemplate(
                        self._name, fact.template, f"slot {slot} is {item}", self._schemas or ()
                    )
        if self._schemas is None:
            return
        schema = self._schemas.get(fact.template)
        if schema is None:
            raise UnknownTemplate(
                self._name, fact.template, "there is no such template", self._schemas
            )
        error = next(self._checks[fact.template].iter_errors(_plain(fact.slots)), None)
        if error is not None:
            where = ".".join(map(str, error.path))
            raise UnknownTemplate(
                self._name,
                fact.template,
                f"slot {where}: {error.message}" if where else error.message,
                schema.get("properties", ()),
            )

    def _contexts(self, facts: Sequence[Fact]) -> Iterator[dict[str, Any]]:
        by_template: dict[str, list[dict[str, Any]]] = {}
        for fact in facts:
            by_template.setdefault(fact.template, []).append(_plain(fact.slots))
        schemas = self._schemas or {}
        whole = {t: rows for t, rows in by_template.items() if _many(schemas.get(t, {}))}
        single = {t: rows for t, rows in by_template.items() if t not in whole}
        if not by_template:
            return
        for chosen in itertools.product(*single.values()):
            yield {**whole, **dict(zip(single, chosen, strict=True))}

    def _firings(self, trace: Mapping[str, Any]) -> Iterator[Firing]:
        for step in sorted(trace.values(), key=lambda step: step["order"]):
            table = self._tables.get(step["id"])
            hits = step.get("traceData")
            if table is None or not hits:
                continue
            for hit in hits if isinstance(hits, list) else [hits]:
                names = dict.fromkeys(
                    reference.partition(".")[0] for reference in hit.get("reference_map") or {}
                )
                given = step.get("input") or {}
                yield Firing(
                    _rule_name(table, hit["index"]),
                    tuple(_shown(name, given[name]) for name in names if name in given),
                    hit["rule"].get("_description") or "",
                )

    def _made(self, result: Any, context: Mapping[str, Any]) -> Iterator[Fact]:
        if not isinstance(result, dict):
            result = {"result": result}
        for name, value in result.items():
            if name in context or value is None:
                continue
            for item in value if isinstance(value, list) else [value]:
                slots = item if isinstance(item, dict) else {PLAIN_SLOT: item}
                yield Fact(name, {k: _slot(v) for k, v in slots.items() if v is not None})

    def _check_expressions(self, nodes: Iterable[Mapping[str, Any]]) -> None:
        for node in nodes:
            content = node.get("content") or {}
            for expression in content.get("expressions", ()):
                self._check_one(node, expression.get("value", ""), unary=False)
            for table in (content,) if node["type"] == "decisionTableNode" else ():
                inputs = {i["id"]: bool(i.get("field")) for i in table.get("inputs", ())}
                outputs = {o["id"] for o in table.get("outputs", ())}
                for row in table.get("rules", ()):
                    for key, cell in row.items():
                        if key in inputs:
                            self._check_one(node, cell, unary=inputs[key])
                        elif key in outputs:
                            self._check_one(node, cell, unary=False)

    def _check_one(self, node: Mapping[str, Any], text: Any, *, unary: bool) -> None:
        if not isinstance(text, str) or not text.strip():
            return
        # The library's own validation takes "< 8.6" for wrong, so it is compiled instead.
        try:
            (zen.compile_unary_expression if unary else zen.compile_expression)(text)
        except RuntimeError as error:
            label = node.get("name", node["id"])
            raise RuleSyntaxError(
                self._name, f"node {label!r}: {text!r}: {_words(error)}"
            ) from None


def _parse(name: str, source: str) -> Any:
    try:
        model = json.loads(source)
    except json.JSONDecodeError as error:
        raise RuleSyntaxError(name, error.msg, error.lineno) from error
    except RecursionError as error:
        raise RuleSyntaxError(name, "the source nests too deeply") from error
    fits = (
        isinstance(model, dict)
        and isinstance(model.get("nodes"), list)
        and isinstance(model.get("edges"), list)
        and all(
            isinstance(n, dict)
            and isinstance(n.get("id"), str)
            and isinstance(n.get("type"), str)
            and isinstance(n.get("content") or {}, dict)
            for n in model["nodes"]
        )
    )
    if not fits:
        raise RuleSyntaxError(name, "not a JSON Decision Model: nodes and edges are missing")
    return model


def _schemas(name: str, nodes: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Templates by name, with the schema of their slots; None where nothing is declared."""
    for node in nodes:
        text = (node.get("content") or {}).get("schema")
        if node["type"] != "inputNode" or not text:
            continue
        try:
            schema = json.loads(text) if isinstance(text, str) else text
            jsonschema.Draft202012Validator.check_schema(schema)
        except (json.JSONDecodeError, RecursionError, jsonschema.SchemaError) as error:
            raise RuleSyntaxError(name, f"the schema of the input node: {error}") from error
        if isinstance(schema, dict) and schema.get("properties"):
            return dict(schema["properties"])
    return None


def _many(schema: Any) -> bool:
    return isinstance(schema, dict) and schema.get("type") == "array"


def _one(schema: Any) -> Any:
    """The schema of one fact; slots that it does not name are refused."""
    one = schema.get("items", {}) if _many(schema) else schema
    if isinstance(one, dict) and "properties" in one:
        return {"additionalProperties": False, **one}
    return one


def _rule_name(table: Mapping[str, Any], index: int) -> str:
    name = str(table.get("name") or table["id"])
    return name if len(table["content"]["rules"]) == 1 else f"{name} {index + 1}"


def _plain(slots: Mapping[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in slots.items()}


def _slot(value: Any) -> Scalar | tuple[Scalar, ...]:
    return tuple(_scalar(item) for item in value) if isinstance(value, list) else _scalar(value)


def _scalar(value: Any) -> Scalar:
    if isinstance(value, bool | int | float | str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _shown(template: str, slots: Any) -> str:
    return f"{template}{json.dumps(slots, ensure_ascii=False)}"


def _words(error: RuntimeError) -> str:
    return str(error).partition("\n\nStack backtrace")[0].strip()
