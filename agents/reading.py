# ruff: noqa: SIM905 - word lists are easier to read and to change as text
"""Facts read from a person's words: what rules can weigh.

The vocabulary that matters (fraud, chest pain, …) stands in the rule files, where the
people who answer for it can read and change it. So a program hands the rules all terms
of the text and decides nothing about them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from pydantic import JsonValue

from llmos.syscalls.rules import Fact

MAX_TERMS = 6000
"""Terms handed to the rules; a text of 20,000 characters has some 10,000, most of them rare."""

_TOKEN = re.compile(r"[^\W_]+(?:['’][^\W_]+)*|[.,;:!?()\n]")
_NO = frozenset("no not never without none nor denies deny denied isn't aren't don't doesn't "
                "didn't haven't hasn't wasn't cannot can't".split())  # fmt: skip
_REACH = 4
"""A denial covers so many words after it, up to the end of the clause."""
_BREAK = frozenset("but and however though although except i my he she when".split()) | set(
    ".,;:!?()\n"
)

_AMOUNT = re.compile(
    r"(?P<sign>[€$£])\s?(?P<a>\d[\d.,]*\d|\d)"
    r"|(?P<b>\d[\d.,]*\d|\d)\s?(?P<word>€|\$|£|eur\b|euros?\b|usd\b|dollars?\b|gbp\b|pounds?\b)",
    re.IGNORECASE,
)
_CURRENCY = {"€": "EUR", "$": "USD", "£": "GBP", "e": "EUR", "u": "USD", "d": "USD",
             "g": "GBP", "p": "GBP"}  # fmt: skip
_NUMBER_WORDS = {
    w: n
    for n, w in enumerate(
        "one two three four five six seven eight nine ten eleven twelve".split(), 1
    )
} | {"a": 1, "an": 1, "a couple of": 2, "a few": 3}
_AGO = re.compile(
    r"\b(?P<n>\d{1,4}|" + "|".join(sorted(_NUMBER_WORDS, key=len, reverse=True)) + r")\s+"
    r"(?:(?:working|business)\s+)?(?P<unit>day|week|month|year)s?\b(?=\s+(?:ago|back|now|already)|"
    r"[^.]{0,12}(?:waiting|late))|\b(?P<word>yesterday|today|last week|last month)\b",
    re.IGNORECASE,
)
_DAYS = {"day": 1, "week": 7, "month": 30, "year": 365,
         "today": 0, "yesterday": 1, "last week": 7, "last month": 30}  # fmt: skip


def terms(text: str) -> dict[str, bool]:
    """Words and runs of two and three words, ``-`` between them → whether all are denied.

    "no fever but a stiff neck" gives ``fever`` denied, and ``stiff-neck`` not.
    """
    tokens = [t.lower().replace("’", "'") for t in _TOKEN.findall(text)]
    denied: list[bool] = []
    reach = 0
    for token in tokens:
        if token in _NO:
            reach = _REACH
            denied.append(False)
            continue
        if token in _BREAK:
            reach = 0
        denied.append(reach > 0)
        reach = max(0, reach - 1)
    found: dict[str, bool] = {}
    for size in (1, 2, 3):
        for start in range(len(tokens) - size + 1):
            run = tokens[start : start + size]
            if any(not t[0].isalnum() for t in run):
                continue
            term = "-".join(run)
            if term not in found and len(found) >= MAX_TERMS:
                continue
            # Said once without a denial counts as said.
            found[term] = found.get(term, True) and any(denied[start : start + size])
    return found


def term_facts(text: str) -> list[Fact]:
    """``(term (text stiff-neck) (denied FALSE))`` for every term."""
    return [Fact.of("term", text=term, denied=denied) for term, denied in terms(text).items()]


def amount_in(text: str) -> tuple[float, str] | None:
    """The first amount of money named, with its currency."""
    match = _AMOUNT.search(text)
    if match is None:
        return None
    digits = match["a"] or match["b"]
    if re.fullmatch(r"\d{1,3}(?:[.,]\d{3})+", digits):
        digits = re.sub(r"[.,]", "", digits)
    elif re.search(r",\d{1,2}$", digits):
        digits = digits.replace(".", "").replace(",", ".")
    else:
        digits = digits.replace(",", "")
    mark = (match["sign"] or match["word"])[0].lower()
    try:
        return float(digits), _CURRENCY[mark]
    except ValueError:
        return None


def days_in(text: str) -> int | None:
    """How many days ago something happened, where the text says so."""
    match = _AGO.search(text)
    if match is None:
        return None
    if match["word"]:
        return _DAYS[match["word"].lower()]
    count = match["n"].lower()
    return (int(count) if count.isdigit() else _NUMBER_WORDS[count]) * _DAYS[match["unit"].lower()]


def number(data: Mapping[str, JsonValue], name: str) -> float | None:
    """A number of a question's data, or None where there is none."""
    value = data.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


def scalars(data: Mapping[str, JsonValue], *, without: frozenset[str]) -> dict[str, str | float]:
    """The plain values of a question's data, as facts for another agent."""
    found: dict[str, str | float] = {}
    for name, value in data.items():
        if name in without or value is None or isinstance(value, list | dict):
            continue
        found[name] = value if isinstance(value, str) else float(value)
    return found
