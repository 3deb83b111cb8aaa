"""CLIPS programs, through clipspy, in this process.

This is the engine itself: it runs in the child processes of
:mod:`llmos.drivers.rules.isolated`, since nothing in CLIPS ends a loop or a match that
takes for ever. One environment serves one evaluation after the other; loading a file
costs more than a reset.

What fired, and why, is read from the engine's own trace (``watch rules``): each line
names the rule and the indexes of the facts that matched, and their text is fetched at
that moment, before the rule can retract them. Reading the agenda before each
``run(1)`` was rejected: it shows one module only, and a rule's ``halt`` would be lost
between two calls.

Strings and symbols: the type of the slot decides. Where it allows both, a text that
can be written as a symbol becomes one, because rule files write bare words; any other
becomes a string. Booleans are the symbols TRUE and FALSE. A fact without a template
(``(hungry Ann)``) has one slot, ``values``.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import clips

from llmos.drivers.errors import (
    RuleFailed,
    RuleLimitExceeded,
    RuleSyntaxError,
    UnknownTemplate,
)
from llmos.drivers.protocols import Fact, Firing, RuleOutcome
from llmos.drivers.rules.clips_source import check, parse, rules_of
from llmos.drivers.rules.clips_values import ORDERED_SLOT, Template, ordered_text, read_fact

_OUTPUT_CHARS = 20_000
"""What the rules print beyond this, per evaluation, is dropped."""

_ERROR = re.compile(r"^\[[A-Z]+\d+\]", re.MULTILINE)
_LOCATION = re.compile(r"^(\[[A-Z]+\d+\]) (.*), Line (\d+): ", re.MULTILINE)
_FIRE = re.compile(r"^FIRE\s+\d+ $")


class ClipsProgram:
    """A rule file that may not reach outside. Each evaluation begins with a reset."""

    def __init__(self, name: str, source: str) -> None:
        """Read the source.

        Raises:
            RuleSyntaxError: CLIPS does not accept some construct of it, or it calls a
                function that a rule file may not call.
        """
        self._name = name
        forms = parse(name, source)
        check(name, forms)
        texts = rules_of(forms)
        self.rules = tuple(rule.name for rule in texts)
        """Names of the rules, in file order."""
        self._comments = {rule.name: rule.comment for rule in texts}
        self._machine = Machine(name, source)
        self._templates = self._machine.templates()

    def evaluate(self, facts: Sequence[Fact], max_firings: int) -> RuleOutcome:
        """Assert the facts and fire rules until none is left. Not thread-safe.

        Raises:
            UnknownTemplate: a fact that the file does not declare, or with a value that
                its slot does not take; no rule has fired then.
            RuleLimitExceeded: still firing at ``max_firings``.
            RuleFailed: an action of a rule made CLIPS report an error.
        """
        asserts = [self._prepare(fact) for fact in facts]
        machine = self._machine
        try:
            machine.start()
            for template, values in asserts:
                machine.add(template, values)
            fired = machine.run(max_firings)
            firings = tuple(
                Firing(rule, because, self._comments.get(rule, ""))
                for rule, because in machine.trace.firings
            )
            last = firings[-1].rule if firings else ""
            if error := machine.trace.error():
                raise RuleFailed(self._name, last, error)
            if fired != len(firings):
                raise RuleFailed(
                    self._name, last, "a rule prints lines that look like the engine's trace"
                )
            if fired >= max_firings and machine.pending():
                raise RuleLimitExceeded(
                    self._name, max_firings, [firing.rule for firing in firings[-5:]]
                )
            return RuleOutcome(facts=machine.facts(), firings=firings)
        finally:
            machine.stop()

    def _prepare(self, fact: Fact) -> tuple[Template, dict[str, object]]:
        template = self._templates.get(fact.template)
        if template is None:
            raise UnknownTemplate(
                self._name, fact.template, "there is no such template", self._templates
            )
        return template, template.convert(self._name, fact)


class Machine:
    """One CLIPS environment with the program loaded."""

    def __init__(self, name: str, source: str) -> None:
        self.name = name
        self.trace = Trace()
        self.env = clips.Environment()
        self.env.add_router(self.trace)
        self.trace.env = self.env
        # CLIPS gives line numbers only when it loads from a file.
        with tempfile.TemporaryDirectory(prefix="llmos-rules-") as folder:
            path = Path(folder) / "rules.clp"
            try:
                path.write_text(source, encoding="utf-8")
            except UnicodeEncodeError as error:
                raise RuleSyntaxError(name, f"the source is not valid text: {error}") from error
            try:
                self.env.load(str(path))
            except clips.CLIPSError as error:
                raise syntax_error(name, self.trace.errors, str(path)) from error
        self.env.eval("(watch rules)")

    def templates(self) -> dict[str, Template]:
        """Templates by name; also by ``module::name`` outside MAIN."""
        found: dict[str, Template] = {}
        modules = sorted(self.env.modules(), key=lambda m: m.name != "MAIN")
        for module in modules:
            self.env.current_module = module
            for template in self.env.templates():
                home = template.module.name
                qualified = template.name if home == "MAIN" else f"{home}::{template.name}"
                read = Template.read(template, qualified)
                found.setdefault(template.name, read)
                found.setdefault(f"{home}::{template.name}", read)
        self.env.current_module = modules[0]
        return found

    def start(self) -> None:
        """Forget everything of the evaluation before."""
        self.trace.clear()
        # What rules may set, and a reset leaves.
        self.env.fact_duplication = False
        self.env.strategy = clips.Strategy.DEPTH
        self.env.salience_evaluation = clips.SalienceEvaluation.WHEN_DEFINED
        self.env.reset()
        self.env.eval("(setgen 1)")

    def stop(self) -> None:
        """Let go of the facts, so that an idle environment is small."""
        self.env.eval("(retract *)")
        self.trace.clear()

    def add(self, template: Template, values: dict[str, object]) -> None:
        """Assert a fact whose values were converted by the template."""
        try:
            if template.ordered:
                text = ordered_text(template.qualified, values[ORDERED_SLOT])
                self.env.eval(f"(assert {text})")
            else:
                self.env.find_template(template.qualified).assert_fact(**values)
        except (TypeError, ValueError, IndexError, KeyError, OverflowError) as error:
            raise UnknownTemplate(
                self.name, template.name, str(error).strip("\"'"), template.slots
            ) from error
        except clips.CLIPSError as error:
            # The same fact twice is not an error in CLIPS, but the builder reports it as one.
            if self.trace.errors:
                raise RuleFailed(self.name, "", "".join(self.trace.errors)) from error

    def run(self, limit: int) -> int:
        """Fire at most ``limit`` rules; returns how many."""
        return int(self.env.run(limit))

    def pending(self) -> bool:
        """Whether a rule would fire next."""
        return pending(self.env)

    def facts(self) -> tuple[Fact, ...]:
        """All facts, oldest first."""
        return tuple(read_fact(fact) for fact in self.env.facts())


class Trace(clips.Router):  # type: ignore[misc]
    """Takes everything CLIPS writes: the firing trace, the rules' output, errors."""

    def __init__(self) -> None:
        super().__init__("llmos-trace", 90)
        self.env: clips.Environment | None = None
        self.clear()

    def clear(self) -> None:
        """Begin an evaluation."""
        self.firings: list[tuple[str, tuple[str, ...]]] = []
        self.output: list[str] = []
        self.errors: list[str] = []
        self._size = 0
        self._line: list[str] | None = None

    def query(self, name: str) -> bool:
        """Say which channels come here."""
        return name in ("stdout", "stderr", "stdwrn")

    def write(self, name: str, message: str) -> None:
        """Take a piece of output."""
        if name == "stdout" and self._line is None and _FIRE.match(message):
            self._line = []
        elif name == "stdout" and self._line is not None:
            if message.endswith("\n"):
                self.fired("".join(self._line))
                self._line = None
            else:
                self._line.append(message)
        else:
            self.printed(name, message)

    def printed(self, name: str, message: str) -> None:
        """Keep what the rules print and what CLIPS complains about, up to a bound."""
        if self._size < _OUTPUT_CHARS:
            self._size += len(message)
            (self.errors if name == "stderr" else self.output).append(message)

    def error(self) -> str:
        """What CLIPS reported as an error, or nothing."""
        text = "".join(self.errors).strip()
        return text if _ERROR.search(text) else ""

    def fired(self, line: str) -> None:
        """Take a line of the trace: the rule, and the indexes of its facts."""
        rule, _, basis = line.partition(": ")
        because = []
        for part in basis.split(","):
            index = part.strip().removeprefix("f-")
            if index.isdigit() and self.env is not None:
                text = self.env.call("ppfact", int(index), clips.Symbol("nil"))
                because.append(" ".join(str(text).split()))
            elif part.strip() not in ("", "*"):
                because.append(part.strip())
        self.firings.append((rule, tuple(because)))


def pending(env: Any) -> bool:
    """Whether a rule would fire next. Takes modules without such rules off the focus."""
    while (focus := env.focus) is not None:
        env.current_module = focus
        if next(iter(env.activations()), None) is not None:
            return True
        env.eval("(pop-focus)")
    return False


def syntax_error(name: str, pieces: list[str], path: str) -> RuleSyntaxError:
    """What CLIPS said about a file, with the line and without the path."""
    message = "".join(pieces).strip()
    located = _LOCATION.search(message)
    line = int(located.group(3)) if located else None
    message = _LOCATION.sub(r"\1 ", message).replace(path, name)
    return RuleSyntaxError(name, message or "CLIPS gave no reason", line)
