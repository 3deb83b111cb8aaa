"""A small forward-chaining engine without dependencies, for tests and examples.

The source is JSON::

    {"templates": {"patient": {"name": "text", "fever": "boolean", "tags": ["text"]}},
     "rules": [{"name": "feverish", "comment": "A fever needs a doctor",
                "when": {"patient": {"name": "?n", "fever": true}},
                "then": {"advice": {"name": "?n"}}}]}

Slot types are text, integer, number, boolean and any; in a list, the slot holds
several. ``when`` names one fact per template; ``?n`` stands for any value, the same
one everywhere. A rule fires once for each combination of facts.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmos.drivers.errors import RuleLimitExceeded, RuleSyntaxError, RuleTimeout, UnknownTemplate
from llmos.drivers.protocols import Fact, Firing, RuleOutcome, Scalar

SlotType: TypeAlias = Literal["text", "integer", "number", "boolean", "any"]
Value: TypeAlias = Scalar | tuple[Scalar, ...]
Pattern: TypeAlias = dict[str, dict[str, Value]]

_TYPES: dict[SlotType, tuple[type, ...]] = {
    "text": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "any": (str, int, float, bool),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Rule(_Strict):
    name: str
    comment: str = ""
    when: Annotated[Pattern, Field(min_length=1)]
    then: Pattern


class _Source(_Strict):
    templates: dict[str, dict[str, SlotType | Annotated[list[SlotType], Field(max_length=1)]]]
    rules: list[_Rule] = []


@dataclass(frozen=True, slots=True)
class _Match:
    rule: _Rule
    facts: tuple[int, ...]
    """Positions of the matched facts, in the order of ``when``."""
    bound: dict[str, Value]


class _Clock:
    """The end of an evaluation's time."""

    def __init__(self, name: str, timeout_s: float) -> None:
        self._name, self._timeout_s = name, timeout_s
        self._until = time.monotonic() + timeout_s

    def check(self) -> None:
        if time.monotonic() > self._until:
            raise RuleTimeout(self._name, self._timeout_s)


class MemoryRuleBase:
    """Rules in JSON. Immutable once read, so evaluations share nothing."""

    def __init__(self, name: str, source: str) -> None:
        """Read the source.

        Raises:
            RuleSyntaxError: not JSON, not of the form above, or a rule that uses a
                template, slot or variable which is not declared.
        """
        self._name = name
        self._version = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        try:
            raw = json.loads(source)
            # Lists are multislots; the model knows them as tuples.
            self._source = _Source.model_validate_json(json.dumps(raw))
        except json.JSONDecodeError as error:
            raise RuleSyntaxError(name, error.msg, error.lineno) from error
        except RecursionError as error:
            raise RuleSyntaxError(name, "the source nests too deeply") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise RuleSyntaxError(name, f"{where}: {first['msg']}") from error
        for rule in self._source.rules:
            self._check_rule(rule)

    @property
    def name(self) -> str:
        """What errors call it."""
        return self._name

    @property
    def version(self) -> str:
        """First 16 hex digits of the source's sha256."""
        return self._version

    @property
    def rules(self) -> tuple[str, ...]:
        """Names of the rules, in file order."""
        return tuple(rule.name for rule in self._source.rules)

    def evaluate(
        self, facts: Sequence[Fact], *, max_firings: int = 1000, timeout_s: float = 10.0
    ) -> RuleOutcome:
        """Assert the facts and fire rules until none is left. Thread-safe.

        Raises:
            UnknownTemplate: a fact that the source does not declare.
            RuleLimitExceeded: still firing at ``max_firings``.
            RuleTimeout: still at work after ``timeout_s`` seconds.
            ValueError: a limit is not above 0.
        """
        if max_firings < 1:
            raise ValueError(f"max_firings is {max_firings}, at least 1 is needed")
        if timeout_s <= 0:
            raise ValueError(f"timeout_s is {timeout_s}, a time above 0 is needed")
        clock = _Clock(self._name, timeout_s)
        known: list[Fact] = []
        for fact in facts:
            self._check_fact(fact)
            if fact not in known:
                known.append(fact)
        fired: set[tuple[str, tuple[int, ...]]] = set()
        firings: list[Firing] = []
        while (match := self._next(known, fired, clock)) is not None:
            if len(firings) == max_firings:
                last = [firing.rule for firing in firings[-5:]]
                raise RuleLimitExceeded(self._name, max_firings, last)
            fired.add((match.rule.name, match.facts))
            firings.append(
                Firing(
                    match.rule.name,
                    tuple(_shown(known[i]) for i in match.facts),
                    match.rule.comment,
                )
            )
            for template, slots in match.rule.then.items():
                fact = Fact(template, {k: _filled(v, match.bound) for k, v in slots.items()})
                if fact not in known:
                    known.append(fact)
        return RuleOutcome(facts=tuple(known), firings=tuple(firings))

    def _next(
        self, facts: list[Fact], fired: set[tuple[str, tuple[int, ...]]], clock: _Clock
    ) -> _Match | None:
        for rule in self._source.rules:
            for match in self._matches(rule, tuple(rule.when.items()), facts, (), {}, clock):
                if (rule.name, match.facts) not in fired:
                    return match
        return None

    def _matches(
        self,
        rule: _Rule,
        rest: tuple[tuple[str, dict[str, Value]], ...],
        facts: list[Fact],
        chosen: tuple[int, ...],
        bound: dict[str, Value],
        clock: _Clock,
    ) -> Iterator[_Match]:
        clock.check()
        if not rest:
            yield _Match(rule, chosen, bound)
            return
        template, pattern = rest[0]
        for position, fact in enumerate(facts):
            if fact.template != template:
                continue
            extended = _unify(pattern, fact.slots, bound)
            if extended is not None:
                yield from self._matches(
                    rule, rest[1:], facts, (*chosen, position), extended, clock
                )

    def _check_fact(self, fact: Fact) -> None:
        slots = self._source.templates.get(fact.template)
        if slots is None:
            raise UnknownTemplate(
                self._name, fact.template, "there is no such template", self._source.templates
            )
        for slot, value in fact.slots.items():
            kind = slots.get(slot)
            if kind is None:
                raise UnknownTemplate(self._name, fact.template, f"it has no slot {slot!r}", slots)
            many = isinstance(kind, list)
            if many != isinstance(value, tuple | list):
                wanted = "several values" if many else "one value"
                raise UnknownTemplate(
                    self._name, fact.template, f"slot {slot} takes {wanted}, got {value!r}", slots
                )
            single: SlotType = (kind[0] if kind else "any") if isinstance(kind, list) else kind
            for item in value if isinstance(value, tuple | list) else (value,):
                # In Python a bool is an int; as a slot's value it is not.
                fits = isinstance(item, _TYPES[single]) and (
                    not isinstance(item, bool) or single in ("boolean", "any")
                )
                if not fits:
                    raise UnknownTemplate(
                        self._name,
                        fact.template,
                        f"slot {slot} takes {single}, got {item!r}",
                        slots,
                    )

    def _check_rule(self, rule: _Rule) -> None:
        bound = {v for slots in rule.when.values() for v in slots.values() if _variable(v)}
        for part in (rule.when, rule.then):
            for template, slots in part.items():
                declared = self._source.templates.get(template)
                if declared is None:
                    raise RuleSyntaxError(
                        self._name, f"rule {rule.name}: there is no template {template!r}"
                    )
                for slot, value in slots.items():
                    if slot not in declared:
                        raise RuleSyntaxError(
                            self._name, f"rule {rule.name}: {template} has no slot {slot!r}"
                        )
                    if _variable(value) and value not in bound:
                        raise RuleSyntaxError(
                            self._name, f"rule {rule.name}: {value} is not bound in its conditions"
                        )


def _variable(value: Value) -> bool:
    return isinstance(value, str) and value.startswith("?")


def _unify(
    pattern: Mapping[str, Value], slots: Mapping[str, Value], bound: dict[str, Value]
) -> dict[str, Value] | None:
    extended = dict(bound)
    for slot, wanted in pattern.items():
        if slot not in slots:
            return None
        value = slots[slot]
        if _variable(wanted):
            if extended.setdefault(str(wanted), value) != value:
                return None
        elif wanted != value or isinstance(wanted, bool) != isinstance(value, bool):
            return None
    return extended


def _filled(value: Value, bound: Mapping[str, Value]) -> Value:
    return bound[str(value)] if _variable(value) else value


def _shown(fact: Fact) -> str:
    return f"{fact.template}{json.dumps(dict(fact.slots), ensure_ascii=False)}"
