"""Reads CLIPS source far enough to refuse what a rule file may not do.

CLIPS has no sandbox: a rule file can run shell commands, write files and end the
process. clipspy offers no way to take a function out of an environment, so the
source is checked before it is loaded. A regular expression over the text was
rejected: it stumbles over strings and comments, and over facts and slots that are
called ``open`` or ``remove``. Here the source is read into its lists, and only
lists that CLIPS will *call* are looked at. Where that is not certain (classes,
generic functions), every list counts as a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from llmos.drivers.errors import RuleSyntaxError

MAX_DEPTH = 200
"""Nesting beyond this is refused: CLIPS parses recursively on the C stack."""

_FILES = (
    "open close flush remove rename read readline read-number get-char unget-char put-char rewind "
    "seek tell with-open-file fetch toss print-region get-region load load* bload save bsave "
    "load-facts bload-facts save-facts bsave-facts load-instances restore-instances "
    "bload-instances save-instances bsave-instances batch batch* dribble-on dribble-off chdir "
    "constructs-to-c"
)
_SYSTEM = "system exit python-function set-locale"
_TEXT_AS_CODE = "eval build assert-string str-assert load-facts-from-string check-syntax"
_ENVIRONMENT = (
    "clear reset run watch unwatch set-break remove-break "
    "set-reset-globals set-dynamic-constraint-checking "
    "set-sequence-operator-recognition set-class-defaults-mode undefrule undeftemplate "
    "undeffacts undeffunction undefglobal undefgeneric undefmethod undefclass "
    "undefmessage-handler undefinstances profile profile-reset conserve-mem release-mem"
)
REFUSED: dict[str, str] = {
    **dict.fromkeys(_FILES.split(), "it touches files or waits for input"),
    **dict.fromkeys(_SYSTEM.split(), "it reaches outside the rules"),
    **dict.fromkeys(_TEXT_AS_CODE.split(), "it runs text as code"),
    **dict.fromkeys(_ENVIRONMENT.split(), "it changes later evaluations or their trace"),
    "while": "nothing bounds it; use foreach or loop-for-count",
}
"""Functions a rule file may not call, and why."""

_OUTPUT = {"t", "nil", "stdout", "stderr", "stdwrn"}
_CONNECTIVES = {"and", "or", "not", "exists", "forall", "logical"}
_CALLS_BY_NAME = {"funcall", "sort"}


@dataclass(slots=True)
class Token:
    """A word, string or bracket of the source."""

    text: str
    """A string without its quotes, escapes resolved."""
    line: int
    quoted: bool = False


@dataclass(slots=True)
class Form:
    """A list: its items are tokens and lists."""

    line: int
    items: list[Token | Form] = field(default_factory=list)

    @property
    def head(self) -> str:
        """The first word, without a module prefix; empty where there is none."""
        return _word(self.items[0]) if self.items else ""


@dataclass(frozen=True, slots=True)
class RuleText:
    """A rule as the file names it."""

    name: str
    comment: str


def _word(item: Token | Form) -> str:
    if isinstance(item, Form) or item.quoted:
        return ""
    return item.text.rpartition("::")[2] or item.text


def tokens(name: str, source: str) -> Iterator[Token]:
    """Split CLIPS source; comments are dropped. Raises RuleSyntaxError for an open string."""
    position, line, size = 0, 1, len(source)
    while position < size:
        character = source[position]
        if character == "\n":
            line += 1
            position += 1
        elif character.isspace():
            position += 1
        elif character == ";":
            end = source.find("\n", position)
            position = size if end < 0 else end
        elif character == '"':
            start, letters = line, []
            position += 1
            while position < size and source[position] != '"':
                if source[position] == "\\" and position + 1 < size:
                    position += 1
                line += source[position] == "\n"
                letters.append(source[position])
                position += 1
            if position >= size:
                raise RuleSyntaxError(name, "a string is not closed", start)
            position += 1
            yield Token("".join(letters), start, quoted=True)
        elif character in "()&|~":
            yield Token(character, line)
            position += 1
        else:
            # CLIPS allows "<" only at the beginning of a word.
            end = position + 1
            while end < size and not source[end].isspace() and source[end] not in '()&|~;"<':
                end += 1
            yield Token(source[position:end], line)
            position = end


def parse(name: str, source: str) -> list[Form]:
    """The top-level lists of a source.

    Words outside lists are left for CLIPS to complain about, in its own words.

    Raises:
        RuleSyntaxError: brackets do not match, a string is open, nesting is too deep.
    """
    if "\0" in source:
        raise RuleSyntaxError(name, "the source holds a NUL character")
    top: list[Form] = []
    stack: list[Form] = []
    for token in tokens(name, source):
        if not token.quoted and token.text == "(":
            form = Form(token.line)
            if stack:
                stack[-1].items.append(form)
            else:
                top.append(form)
            stack.append(form)
            if len(stack) > MAX_DEPTH:
                raise RuleSyntaxError(name, f"lists nest deeper than {MAX_DEPTH}", token.line)
        elif not token.quoted and token.text == ")":
            if stack:
                stack.pop()
        elif stack:
            stack[-1].items.append(token)
    if stack:
        raise RuleSyntaxError(name, "a list is not closed", stack[0].line)
    return top


def rules_of(forms: list[Form]) -> tuple[RuleText, ...]:
    """The rules in file order; a rule defined twice counts once, as in CLIPS."""
    found: dict[str, RuleText] = {}
    for form in forms:
        if form.head == "defrule" and len(form.items) > 1:
            name = _word(form.items[1])
            second = form.items[2] if len(form.items) > 2 else None
            comment = second.text if isinstance(second, Token) and second.quoted else ""
            found[name] = RuleText(name, comment)
    return tuple(found.values())


def check(name: str, forms: list[Form]) -> None:
    """Refuse calls of functions that a rule file may not use, and recursion.

    Raises:
        RuleSyntaxError: with the function and its line.
    """
    checker = _Checker(name, forms)
    for form in forms:
        checker.construct(form)
    checker.recursion()


class _Checker:
    def __init__(self, name: str, forms: list[Form]) -> None:
        self.name = name
        self.templates = {
            _word(f.items[1]) for f in forms if f.head == "deftemplate" and len(f.items) > 1
        }
        self.called_from: dict[str, set[str]] = {}
        self.defined_at: dict[str, int] = {}
        self.inside = ""

    def construct(self, form: Form) -> None:
        kind, body = form.head, form.items[2:]
        self.inside = ""
        if kind == "deftemplate":
            for slot in body:
                if isinstance(slot, Form):
                    for part in slot.items:
                        if isinstance(part, Form) and part.head in ("default", "default-dynamic"):
                            self.calls(part.items[1:])
        elif kind == "deffacts":
            self.facts(body)
        elif kind == "defrule":
            arrow = next(
                (i for i, item in enumerate(body) if isinstance(item, Token) and item.text == "=>"),
                len(body),
            )
            self.patterns(body[:arrow])
            self.calls(body[arrow:])
        elif kind == "defmodule":
            return
        else:
            if kind == "deffunction" and len(form.items) > 1:
                self.inside = _word(form.items[1])
                self.defined_at[self.inside] = form.line
            self.calls(form.items[1:])

    def calls(self, items: list[Token | Form]) -> None:
        """Every list in ``items`` is a call."""
        for item in items:
            if isinstance(item, Form):
                self.call(item)

    def call(self, form: Form) -> None:
        head, arguments = form.head, form.items[1:]
        self.refuse_if_named(head, form.line)
        if self.inside:
            self.called_from.setdefault(self.inside, set()).add(head)
        if head in _CALLS_BY_NAME:
            target = _word(arguments[0]) if arguments else ""
            if not target or target.startswith(("?", "$?")):
                raise RuleSyntaxError(
                    self.name, f"{head} may only be given a function by its name", form.line
                )
            self.refuse_if_named(target, form.line)
            if self.inside:
                self.called_from[self.inside].add(target)
        if head in ("printout", "format"):
            channel = _word(arguments[0]) if arguments else ""
            if channel not in _OUTPUT:
                raise RuleSyntaxError(
                    self.name, f"{head} may write to t only, not to a file", form.line
                )
        if head == "assert":
            self.facts(arguments)
        elif head in ("modify", "duplicate"):
            for slot in arguments:
                if isinstance(slot, Form):
                    self.calls(slot.items)
        else:
            self.calls(form.items)

    def facts(self, items: list[Token | Form]) -> None:
        """Lists in ``items`` are facts: the head names a template, values may be calls."""
        for fact in items:
            if not isinstance(fact, Form):
                continue
            for part in fact.items[1:]:
                if not isinstance(part, Form):
                    continue
                if fact.head in self.templates:
                    self.calls(part.items[1:])
                else:
                    self.call(part)

    def patterns(self, items: list[Token | Form]) -> None:
        """The left side of a rule: only test, declare and lists after ``:`` or ``=`` call."""
        before = ""
        for item in items:
            if isinstance(item, Token):
                before = item.text if not item.quoted else ""
                continue
            if item.head in ("test", "declare"):
                for part in item.items[1:]:
                    if isinstance(part, Form):
                        self.calls(part.items) if item.head == "declare" else self.call(part)
            elif before in (":", "="):
                self.call(item)
            elif item.head in _CONNECTIVES:
                self.patterns(item.items[1:])
            else:
                self.patterns(item.items)
            before = ""

    def refuse_if_named(self, function: str, line: int) -> None:
        reason = REFUSED.get(function)
        if reason is not None:
            raise RuleSyntaxError(
                self.name, f"the function {function} is not allowed here: {reason}", line
            )

    def recursion(self) -> None:
        """CLIPS runs on the C stack without a bound: endless recursion ends the process."""
        for start, line in self.defined_at.items():
            seen: set[str] = set()
            waiting = list(self.called_from.get(start, ()))
            while waiting:
                function = waiting.pop()
                if function == start:
                    raise RuleSyntaxError(
                        self.name, f"the function {start} calls itself, without a bound", line
                    )
                if function not in seen:
                    seen.add(function)
                    waiting.extend(self.called_from.get(function, ()))
