"""What every rule engine must do. Subclass it, hand in the sources in the engine's language."""

from __future__ import annotations

import hashlib
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest

from llmos.drivers.errors import RuleLimitExceeded, RuleSyntaxError, UnknownTemplate
from llmos.drivers.protocols import Fact, RuleBase


def patient(name: str, fever: bool = True, **slots: object) -> Fact:
    return Fact("patient", {"name": name, "fever": fever, **slots})  # type: ignore[dict-item]


class RulesSuite:
    """Program: patient(name text, fever boolean, age integer, weight number, tags several texts),
    advice(name, text), visit(name). Rule ``feverish`` (comment "A fever needs a doctor"): a patient
    with fever gets the advice "see a doctor". Rule ``visiting``: such advice makes a visit."""

    program: str
    broken: str
    """Not accepted; the mistake is in line 3."""

    def make(self, source: str) -> RuleBase:
        raise NotImplementedError

    @pytest.fixture
    def base(self) -> RuleBase:
        return self.make(self.program)

    def test_it_knows_its_name_version_and_rules(self, base: RuleBase) -> None:
        assert base.name == "clinic"
        assert base.version == hashlib.sha256(self.program.encode()).hexdigest()[:16]
        assert base.rules == ("feverish", "visiting")

    def test_rules_chain_and_say_why(self, base: RuleBase) -> None:
        outcome = base.evaluate([patient("Ann Lee")])
        assert [f.rule for f in outcome.firings] == ["feverish", "visiting"]
        first, second = outcome.firings
        assert first.comment == "A fever needs a doctor"
        assert second.comment == ""
        assert len(first.because) == 1
        assert "patient" in first.because[0]
        assert "Ann Lee" in first.because[0]
        assert "see a doctor" in second.because[0]
        advice = outcome.first("advice")
        assert advice is not None
        assert advice.slots["text"] == "see a doctor"
        visit = outcome.first("visit")
        assert visit is not None
        assert visit.slots["name"] == "Ann Lee"

    def test_given_facts_come_back_with_their_types(self, base: RuleBase) -> None:
        given = patient("Bo", False, age=41, weight=72.5, tags=("a", "b c"))
        outcome = base.evaluate([given])
        assert outcome.firings == ()
        fact = outcome.first("patient")
        assert fact is not None
        assert fact.slots == given.slots
        assert fact.slots["fever"] is False
        assert type(fact.slots["age"]) is int
        assert type(fact.slots["name"]) is str

    def test_an_empty_multislot_stays_empty(self, base: RuleBase) -> None:
        fact = base.evaluate([patient("Bo", tags=())]).first("patient")
        assert fact is not None
        assert fact.slots["tags"] == ()

    @pytest.mark.parametrize(
        "text", ['say "ah"', "back\\slash", "new\nline", "žluť 漢", "", "; (x"]
    )
    def test_texts_survive(self, base: RuleBase, text: str) -> None:
        visit = base.evaluate([patient(text)]).first("visit")
        assert visit is not None
        assert visit.slots["name"] == text

    def test_the_same_fact_twice_counts_once(self, base: RuleBase) -> None:
        outcome = base.evaluate([patient("Ann", tags=()), patient("Ann", tags=())])
        assert [f.template for f in outcome.facts].count("patient") == 1

    def test_no_facts_no_firings(self, base: RuleBase) -> None:
        assert base.evaluate([]).firings == ()

    def test_evaluations_begin_with_nothing(self, base: RuleBase) -> None:
        first = base.evaluate([patient("Ann")])
        base.evaluate([patient("Bo")])
        assert base.evaluate([]).facts == ()
        assert base.evaluate([patient("Ann")]) == first

    @pytest.mark.parametrize(
        ("fact", "reason"),
        [
            (Fact("pateint", {}), "no such template"),
            (Fact("patient", {"nmae": "x"}), "nmae"),
            (Fact("patient", {"age": "forty"}), "age"),
            (Fact("patient", {"age": True}), "age"),
            (Fact("patient", {"name": 3}), "name"),
            (Fact("patient", {"name": ("a", "b")}), "name"),
            (Fact("patient", {"tags": "a"}), "tags"),
            (Fact("patient", {"fever": "maybe"}), "fever"),
        ],
    )
    def test_undeclared_facts_are_refused(self, base: RuleBase, fact: Fact, reason: str) -> None:
        with pytest.raises(UnknownTemplate, match=reason) as caught:
            base.evaluate([patient("Ann"), fact])
        assert caught.value.name == "clinic"
        assert caught.value.template == fact.template
        assert caught.value.known
        assert base.evaluate([]).facts == ()

    def test_the_limit_ends_it_and_names_the_last_rules(self, base: RuleBase) -> None:
        people = [patient(f"p{i}") for i in range(5)]
        assert len(base.evaluate(people, max_firings=10).firings) == 10
        with pytest.raises(RuleLimitExceeded) as caught:
            base.evaluate(people, max_firings=9)
        assert caught.value.limit == 9
        assert set(caught.value.last_rules) <= {"feverish", "visiting"}
        assert pickle.loads(pickle.dumps(caught.value)).last_rules == caught.value.last_rules
        assert len(base.evaluate(people[:1]).firings) == 2
        with pytest.raises(ValueError, match="max_firings"):
            base.evaluate([], max_firings=0)

    def test_threads_do_not_see_each_other(self, base: RuleBase) -> None:
        def names(i: int) -> list[object]:
            outcome = base.evaluate([patient(f"p{i}-{k}") for k in range(4)])
            return sorted(str(f.slots["name"]) for f in outcome.facts if f.template == "visit")

        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(names, range(80)))
        assert results == [[f"p{i}-{k}" for k in range(4)] for i in range(80)]

    def test_a_broken_source_is_refused_with_its_line(self) -> None:
        with pytest.raises(RuleSyntaxError) as caught:
            self.make(self.broken)
        assert caught.value.name == "clinic"
        assert caught.value.line == 3
        assert caught.value.engine_message
