from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from llmos.drivers.errors import RuleFailed, RuleLimitExceeded, RuleSyntaxError, UnknownTemplate
from llmos.drivers.protocols import Fact, RuleBase
from llmos.drivers.rules.clips import ClipsRuleBase
from tests.drivers.rules.rules_suite import RulesSuite

PROGRAM = """
; the clinic
(deftemplate patient
  (slot name (type STRING))
  (slot fever (type SYMBOL) (allowed-values TRUE FALSE))
  (slot age (type INTEGER))
  (slot weight (type FLOAT))
  (multislot tags))
(deftemplate advice (slot name (type STRING)) (slot text (type STRING)))
(deftemplate visit (slot name (type STRING)))
(defrule feverish "A fever needs a doctor"
  (patient (name ?n) (fever TRUE))
  =>
  (printout t "seen " ?n crlf)
  (assert (advice (name ?n) (text "see a doctor"))))
(defrule visiting
  (advice (name ?n) (text "see a doctor"))
  =>
  (assert (visit (name ?n))))
"""


class TestClipsRules(RulesSuite):
    program = PROGRAM
    broken = "(deftemplate a (slot b))\n\n(defrule r (a (c 1)) => )\n(defrule good (a) => )\n"

    def make(self, source: str) -> RuleBase:
        return ClipsRuleBase("clinic", source)


def fire(source: str, *facts: Fact, limit: int = 100) -> list[str]:
    return [f.rule for f in ClipsRuleBase("r", source).evaluate(facts, max_firings=limit).firings]


def test_output_is_captured(capfd: pytest.CaptureFixture[str]) -> None:
    ClipsRuleBase("clinic", PROGRAM).evaluate([Fact("patient", {"name": "Ann", "fever": True})])
    with contextlib.suppress(RuleSyntaxError):
        ClipsRuleBase("bad", "(defrule")
    with contextlib.suppress(RuleSyntaxError):
        ClipsRuleBase("bad", "(deftemplate a (slot x (type STRIN)))")
    assert capfd.readouterr() == ("", "")


def test_the_engines_own_words_are_kept() -> None:
    with pytest.raises(RuleSyntaxError, match="TMPLTDEF1") as caught:
        ClipsRuleBase("clinic", TestClipsRules.broken)
    assert "Invalid slot 'c'" in caught.value.engine_message
    assert "rules.clp" not in str(caught.value)
    assert "/tmp" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "foo",
        "(deftemplate a) )",
        "(foo)",
        "(defrule r (a) => (nofunc 1))",
        '(deftemplate a "x',
        "(((",
    ],
)
def test_sources_that_are_not_clips(source: str) -> None:
    with pytest.raises(RuleSyntaxError):
        ClipsRuleBase("bad", source)


DANGEROUS = [
    '(defrule r (a) => (system "touch x"))',
    '(defrule r (test (system "touch x")) => )',
    '(defrule r (a ?x&:(system "touch x")) => )',
    '(defrule r (a ?x&=(system "touch x")) => )',
    '(defrule r (and (a) (not (b ?x&~=(open "x" y "w")))) => )',
    '(defrule r (declare (salience (system "touch x"))) (a) => )',
    '(deffacts f (a (system "touch x")))',
    '(deffacts f (a =(system "touch x")))',
    '(deftemplate t (slot s (default (system "touch x"))))',
    '(deftemplate t (slot s (default-dynamic (system "touch x"))))',
    '(deftemplate t (slot s)) (deffacts f (t (s (system "touch x"))))',
    '(deftemplate t (slot s)) (defrule r ?f <- (t) => (modify ?f (s (system "touch x"))))',
    '(defglobal ?*x* = (system "touch x"))',
    '(deffunction f () (system "touch x"))',
    '(defrule r (a) => (if TRUE then (bind ?x (open "x" y "w"))))',
    '(defrule r (a) => (eval "(system \\"touch x\\")"))',
    '(defrule r (a) => (build "(defrule q => (exit))"))',
    '(defrule r (a) => (funcall (sym-cat sys tem) "touch x"))',
    '(defrule r (a) => (funcall system "touch x"))',
    '(defrule r (a) => (sort system "touch" "x"))',
    '(defrule r (a) => (bind ?f system) (sort ?f "touch" "x"))',
    '(defrule r (a) => (assert-string "(a =(system \\"touch x\\"))"))',
    '(defrule r (a) => (printout out "text"))',
    '(defrule r (a) => (format out "text"))',
    "(defrule r (a) => (exit 3))",
    "(defrule r (a) => (bind ?x (read)))",
    '(defrule r (a) => (MAIN::system "touch x"))',
    '(defclass c (is-a USER) (slot s (default (system "touch x"))))',
    '(defmethod m ((?x (system "touch x"))) 1)',
    "(defrule r (a) => (while TRUE do))",
    "(defrule r (a) => (watch facts))",
]


@pytest.mark.parametrize("construct", DANGEROUS)
def test_reaching_outside_is_refused_with_the_line(
    construct: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuleSyntaxError) as caught:
        ClipsRuleBase("bad", "; first\n\n" + construct)
    assert caught.value.line == 3
    assert os.listdir(tmp_path) == []


def test_words_in_strings_comments_facts_and_slots_are_not_calls() -> None:
    source = """
    ; (system "rm")
    (deftemplate open (slot remove) (slot close (default save)))
    (deffacts doors "(system)" (open (remove read) (close exit)) (exit door))
    (defrule batch "(eval)" (open (remove read) (close ?x)) (exit ?d) => (assert (save "(exit)" ?x)))
    """
    outcome = ClipsRuleBase("words", source).evaluate([])
    assert [f.rule for f in outcome.firings] == ["batch"]
    assert outcome.facts[-1] == Fact("save", {"values": ("(exit)", "exit")})


def test_recursion_is_refused() -> None:
    with pytest.raises(RuleSyntaxError, match="calls itself"):
        ClipsRuleBase("deep", "(deffunction f (?x) (+ 1 (f ?x)))")
    with pytest.raises(RuleSyntaxError, match="nest deeper"):
        ClipsRuleBase("deep", "(" * 100_000)


def test_a_rule_that_makes_itself_true_again_is_stopped() -> None:
    source = "(defrule grow ?f <- (n ?x) => (retract ?f) (assert (n (+ ?x 1))))"
    with pytest.raises(RuleLimitExceeded) as caught:
        fire(source, Fact("n", {"values": (0,)}), limit=50)
    assert caught.value.last_rules == ("grow",) * 5


def test_retracted_facts_still_explain() -> None:
    source = "(defrule eat ?f <- (n $?x) => (retract ?f))"
    outcome = ClipsRuleBase("r", source).evaluate([Fact("n", {"values": ("a b", 1, 2.5, True)})])
    assert outcome.facts == ()
    assert outcome.firings[0].because == ('(n "a b" 1 2.5 TRUE)',)


def test_an_error_in_an_action_is_an_error() -> None:
    base = ClipsRuleBase("r", "(defrule bad (n ?x) => (/ 1 ?x))")
    with pytest.raises(RuleFailed, match="divide by zero") as caught:
        base.evaluate([Fact("n", {"values": (0,)})])
    assert caught.value.rule == "bad"
    assert len(base.evaluate([Fact("n", {"values": (1,)})]).firings) == 1


def test_output_that_imitates_the_trace_is_not_believed() -> None:
    source = '(defrule liar (n) => (printout t "FIRE    2 " honest ": f-1" crlf))'
    with pytest.raises(RuleFailed, match="trace"):
        fire(source, Fact("n", {}))


def test_modules_and_halt() -> None:
    source = """
    (defmodule MAIN (export ?ALL))
    (deftemplate MAIN::in (slot x))
    (defrule MAIN::start (in) => (focus B))
    (defmodule B (import MAIN ?ALL))
    (deftemplate B::out (slot x))
    (defrule B::work (in (x ?x)) => (assert (out (x ?x))) )
    """
    base = ClipsRuleBase("m", source)
    outcome = base.evaluate([Fact("in", {"x": "v"})])
    assert [f.rule for f in outcome.firings] == ["start", "work"]
    assert outcome.first("out") == Fact("out", {"x": "v"})
    assert base.rules == ("start", "work")
    halt = "(defrule a (declare (salience 9)) (n) => (halt)) (defrule b (n) => )"
    assert fire(halt, Fact("n", {})) == ["a"]


def test_slot_types_decide_strings_and_symbols() -> None:
    source = """
    (deftemplate t (slot sym (type SYMBOL)) (slot any) (slot lex (type LEXEME) (allowed-values "q" w "-") (default "-"))
                   (slot num (type NUMBER)) (slot must (default ?NONE)) (slot small (range 1 5)))
    (defrule sym (t (sym active)) => )
    (defrule any-symbol (t (any bare-word)) => )
    (defrule any-string (t (any "two words")) => )
    (defrule lex-string (t (lex "q")) => )
    (defrule lex-symbol (t (lex w)) => )
    """

    def rules(**slots: object) -> list[str]:
        return fire(source, Fact("t", {"must": 1, **slots}))  # type: ignore[dict-item]

    assert rules(sym="active") == ["sym"]
    assert rules(any="bare-word") == ["any-symbol"]
    assert rules(any="two words") == ["any-string"]
    assert rules(lex="q") == ["lex-string"]
    assert rules(lex="w") == ["lex-symbol"]
    assert rules(num=2.5) == rules(num=3) == []
    for bad, word in (
        ({"lex": "z"}, "one of"),
        ({"num": "3"}, "num"),
        ({"small": 9}, "small"),
        ({"any": 2**70}, "64 bits"),
        ({"any": "a\0b"}, "NUL"),
        ({"any": "\ud800"}, "Unicode"),
    ):
        with pytest.raises(UnknownTemplate, match=word):
            rules(**bad)
    with pytest.raises(UnknownTemplate, match="must"):
        fire(source, Fact("t", {}))


def test_not_and_exists_leave_no_gap_in_the_reasons() -> None:
    source = "(deftemplate t (slot x)) (defrule r (t (x 1)) (not (t (x 2))) (exists (t (x 3))) => )"
    base = ClipsRuleBase("r", source)
    outcome = base.evaluate([Fact("t", {"x": 1}), Fact("t", {"x": 3})])
    assert outcome.firings[0].because == ("(t (x 1))",)


def test_settings_of_one_evaluation_do_not_reach_the_next() -> None:
    source = """
    (defrule set (declare (salience 9)) (mode) => (set-fact-duplication TRUE) (set-strategy breadth))
    (defrule twice (n) => (assert (m)) (assert (m)))
    (defrule first (n) => (bind ?x (gensym)) (assert (symbol ?x)))
    """
    base = ClipsRuleBase("r", source)
    before = base.evaluate([Fact("n", {})])
    changed = base.evaluate([Fact("mode", {}), Fact("n", {})])
    assert [f.template for f in changed.facts].count("m") == 2
    assert base.evaluate([Fact("n", {})]) == before


def test_a_library_takes_one_line_and_counts_for_the_version() -> None:
    source = "; uses: certainty\n\n(defrule broken (nothing) => (nofunc))"
    with pytest.raises(RuleSyntaxError) as caught:
        ClipsRuleBase("r", source)
    assert caught.value.line == 3
    with pytest.raises(RuleSyntaxError, match="certainty") as caught:
        ClipsRuleBase("r", "\n; uses: nope")
    assert caught.value.line == 2
    with_it = ClipsRuleBase("r", "; uses: certainty\n")
    assert with_it.rules == ("weigh",)
    assert with_it.version != ClipsRuleBase("r", "; uses certainty\n").version
