"""A rule file's own cases: what it is given, and what must come of it.

They stand beside the rule file, in ``NAME.cases.toml``::

    [[case]]
    name = "a small refund is approved"
    given = [{ request = { intent = "refund", amount = 12.5 } }]
    expect = [{ decision = { outcome = "approve" } }]
    absent = [{ decision = { outcome = "refuse" } }]
    fired = ["small-refund"]

``expect``: for each of these there is a fact of that template with at least these
slots. ``absent``: there is none. ``fired``: exactly these rules, in this order.
``error``: the name of the error that the evaluation ends with. Numbers are compared
with a ``tolerance``.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmos.drivers.errors import RulesError, RuleSyntaxError
from llmos.drivers.protocols import Fact, RuleBase, RuleOutcome, Scalar

_Value = Scalar | tuple[Scalar, ...]
_Stated = dict[str, dict[str, bool | int | float | str | tuple[Scalar, ...]]]
"""Templates with slots."""


class Case(BaseModel):
    """One case."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    given: tuple[_Stated, ...] = ()
    expect: tuple[_Stated, ...] = ()
    absent: tuple[_Stated, ...] = ()
    fired: tuple[str, ...] | None = None
    error: str = ""
    tolerance: float = Field(default=1e-9, ge=0)
    max_firings: int = Field(default=10_000, ge=1)
    timeout_s: float = Field(default=10.0, gt=0)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    case: tuple[Case, ...] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class CaseResult:
    """How a case went; no complaints: well."""

    name: str
    complaints: tuple[str, ...]
    fired: tuple[str, ...]


def read_cases(path: Path) -> tuple[Case, ...]:
    """The cases of a file.

    Raises:
        RuleSyntaxError: it cannot be read, or is not of the form above.
    """
    try:
        with path.open("rb") as file:
            return _File.model_validate(tomllib.load(file)).case
    except OSError as error:
        raise RuleSyntaxError(str(path), error.strerror or str(error)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RuleSyntaxError(path.name, str(error)) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RuleSyntaxError(path.name, f"{where}: {first['msg']}") from error


def run_case(base: RuleBase, case: Case) -> CaseResult:
    """Evaluate one case."""
    try:
        outcome = base.evaluate(
            list(_facts(case.given)), max_firings=case.max_firings, timeout_s=case.timeout_s
        )
    except RulesError as error:
        right = case.error == error.code
        return CaseResult(case.name, () if right else (f"{error.code}: {error}",), ())
    complaints = list(_complaints(case, outcome))
    return CaseResult(case.name, tuple(complaints), tuple(f.rule for f in outcome.firings))


def _complaints(case: Case, outcome: RuleOutcome) -> Iterable[str]:
    if case.error:
        yield f"expected {case.error}, the evaluation came to its end"
    for wanted in _facts(case.expect):
        if not any(_holds(wanted, fact, case.tolerance) for fact in outcome.facts):
            near = [dict(f.slots) for f in outcome.facts if f.template == wanted.template]
            yield f"expected {wanted.template} {dict(wanted.slots)}, there is {near or 'none'}"
    for unwanted in _facts(case.absent):
        for fact in outcome.facts:
            if _holds(unwanted, fact, case.tolerance):
                yield f"there is {fact.template} {dict(fact.slots)}, which was not to be"
                break
    fired = tuple(f.rule for f in outcome.firings)
    if case.fired is not None and fired != case.fired:
        yield f"expected the rules {list(case.fired)}, there fired {list(fired)}"


def _facts(stated: Iterable[Mapping[str, Mapping[str, Any]]]) -> Iterable[Fact]:
    for one in stated:
        for template, slots in one.items():
            yield Fact(template, slots)


def _holds(wanted: Fact, fact: Fact, tolerance: float) -> bool:
    return fact.template == wanted.template and all(
        slot in fact.slots and _equal(value, fact.slots[slot], tolerance)
        for slot, value in wanted.slots.items()
    )


def _equal(wanted: _Value, found: _Value, tolerance: float) -> bool:
    if isinstance(wanted, tuple) or isinstance(found, tuple):
        return (
            isinstance(wanted, tuple)
            and isinstance(found, tuple)
            and len(wanted) == len(found)
            and all(_equal(w, f, tolerance) for w, f in zip(wanted, found, strict=True))
        )
    if isinstance(wanted, bool) or isinstance(found, bool):
        return wanted is found
    if isinstance(wanted, int | float) and isinstance(found, int | float):
        return math.isclose(wanted, found, rel_tol=tolerance, abs_tol=tolerance)
    return wanted == found
