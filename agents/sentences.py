# ruff: noqa: SIM905 - word lists are easier to read and to change as text
"""Texts as people read them: Markdown taken off, sentences, words, numbers.

Small and rule-based on purpose: an agent's answer is checked sentence by sentence, and
a check must give the same result every time, on every machine, for nothing.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_MARKS = re.compile(r"(\*\*|__|~~|`|(?<!\w)[*_](?=\S)|(?<=\S)[*_](?!\w))")
_HEADER = re.compile(r"^\s{0,3}#{1,6}\s+")
_BULLET = re.compile(r"^\s*(?:[-*+•]|\d{1,2}[.)])\s+")
_RULER = re.compile(r"^\s*\|?[\s:|-]*-{3,}[\s:|-]*\|?\s*$")
_END = re.compile(r"[.!?…][\"'”’)\]]*(?=\s+[\"'“‘(\[]?[A-Z0-9€$£])|[。！？](?=\S)|\n+")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(])(?:e\.g|i\.e|etc|vs|cf|approx|no|nos|dr|mr|mrs|ms|prof|st|fig|max|min|a\.m|p\.m"
    r"|[A-Za-z])\.$",
    re.IGNORECASE,
)
_ENDS_WELL = re.compile(r"[.!?…。！？][\"'”’)\]]*$")
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*|[\u4e00-\u9fff]")
_NUMBER = re.compile(
    r"(?P<before>[€$£])?\s?(?P<number>\d+(?:[,.]\d+)*)(?:\s*(?P<after>%|[€$£]|°?[A-Za-z]+))?"
)

_SMALL = {
    word: number
    for number, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen twenty".split()
    )
} | {"thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "ninety": 90, "hundred": 100}
_UNITS = {
    "€": "eur", "eur": "eur", "euro": "eur", "euros": "eur",
    "$": "usd", "usd": "usd", "dollar": "usd", "dollars": "usd",
    "£": "gbp", "gbp": "gbp", "pound": "gbp", "pounds": "gbp",
    "%": "percent", "percent": "percent", "per": "",
    "working": "workday", "business": "workday",
    "h": "hour", "hrs": "hour", "min": "minute", "mins": "minute",
}  # fmt: skip
_TIMES = ("second", "minute", "hour", "day", "week", "month", "year")

STOPWORDS = frozenset(
    "a about after against all also although an and any are as at be because been being before both but by can could did do "
    "does doing don during each either for from get getting give given go got had has have having he her "
    "here hers him his how i if in into is it its itself just like make makes me might mine more "
    "most my no nor not of off on once only or other our ours out over own please s same she should "
    "so some such t than that the their theirs them then there these they this those through to too "
    "under until up us very was we were what when where which while who whom whose why will with "
    "would you your yours yourself may must shall one want need know tell help".split()
)
"""Words that say little by themselves."""

CRITICAL = frozenset(
    "after all always any before both cannot every except free less least max maximum min minimum "
    "more most must never no nobody none nor not nothing only other twice under unless until "
    "within without instead immediately automatically guaranteed always safe dangerous".split()
)
"""Words that turn a statement round: a claim may hold one only if its source does."""

GENERIC = frozenset(
    "treat treatment treatm symptom sign cause caus diagnos diagnose diagnosis disease diseas illness "
    "syndrome syndrom condition disorder patient people person problem thing way kind type long last "
    "best good bad lot curable cure cur help work time day week month year today now still already "
    "question information inform possible possibl mean happen use using look find found feel take "
    "took see said say show think thought try person adult normal actually really ok hi hello thank "
    "much many often new old pleas outlook prognosis manag medicin medical doctor could "
    "prevent prevention avoid protect risk spread catch sign danger dangerous serious".split()
)
"""Stems and words by which a question asks, rather than what it asks about."""

_POINTER = re.compile(
    r"https?://|www\.|\bclick here\b|\b(?:table|list) below\b|\bthe following\b[^:]*[.:]$|:\s*\.?$",
    re.IGNORECASE,
)

_NEGATION = re.compile(
    r"\b(?:not|no|never|none|nobody|nothing|nor|cannot|without|unable)\b|n['’]t\b", re.IGNORECASE
)

CITED = re.compile(r"\s?\[(\d{1,2})\]")
"""The number of a source in a text."""


class Quantity(NamedTuple):
    """A number with what it counts, in one spelling."""

    number: str
    unit: str
    """``eur``, ``percent``, ``day``, another word's stem, or empty."""


def plain_lines(markdown: str) -> list[str]:
    """Lines without Markdown: headers gone, a table row or list item one line each.

    A list keeps the sentence that introduces it: "Bring: a; b; c" where that is short,
    else the introduction before every item. Fenced code is left out.
    """
    lines: list[str] = []
    lead, items = "", list[str]()
    header: list[str] = []
    in_code = False

    def close() -> None:
        nonlocal lead, items
        if items:
            together = f"{lead} {'; '.join(i.rstrip('.;') for i in items)}.".strip()
            if lead and len(together) <= 280:
                lines.append(together)
            else:
                lines.extend(f"{lead} {item}".strip() for item in items)
        elif lead:
            lines.append(lead)
        lead, items = "", []

    for raw in markdown.replace("\r\n", "\n").split("\n"):
        if raw.lstrip().startswith(("```", "~~~")):
            in_code = not in_code
            continue
        if in_code or _RULER.match(raw):
            continue
        if raw.lstrip().startswith("|"):
            cells = [_inline(c) for c in raw.strip().strip("|").split("|")]
            if not header:
                close()
                header = cells
            else:
                lines.append(_row(header, cells))
            continue
        header = []
        text = _inline(_BULLET.sub("", raw, count=1)).lstrip("> ")
        if _HEADER.match(raw):
            close()
        elif _BULLET.match(raw):
            items.append(text)
        elif not text:
            if items or not lead:
                close()
        elif items and raw.startswith((" ", "\t")):
            items[-1] += f" {text}"
        else:
            if items:
                close()
            joined = f"{lead} {text}".strip()
            if joined.endswith(":"):
                before, _, last = joined.rpartition(". ")
                if before:
                    lines.append(before + ".")
                lead = last
            else:
                # A paragraph may be wrapped over several lines.
                if lead:
                    lead = ""
                    lines.append(joined)
                elif lines and lines[-1] and not _ENDS_WELL.search(lines[-1]) and not header:
                    lines[-1] += f" {joined}"
                else:
                    lines.append(joined)
    close()
    return [line for line in lines if line]


def _inline(text: str) -> str:
    return " ".join(_MARKS.sub("", _LINK.sub(r"\1", text)).split())


def _row(header: list[str], cells: list[str]) -> str:
    pairs = [
        f"{name.lower()} {cell}"
        for name, cell in zip(header[1:], cells[1:], strict=False)
        if cell and cell not in "-–—"
    ]
    return f"{cells[0]}: {', '.join(pairs)}." if pairs else f"{cells[0]}."


def split_sentences(text: str, *, whole: bool = False) -> list[str]:
    """Sentences of a text, Markdown taken off.

    Args:
        text: Any text.
        whole: Leave out a last sentence that was cut off, as a model's answer is when its
            tokens run out.
    """
    found: list[str] = []
    for line in plain_lines(text):
        start = 0
        for match in _END.finditer(line):
            piece = line[start : match.end()]
            if match.group().startswith(".") and _ABBREVIATION.search(piece.rstrip("\"'”’)]")):
                continue
            found.append(piece.strip())
            start = match.end()
        if rest := line[start:].strip():
            found.append(rest)
    if whole and found and not _ENDS_WELL.search(found[-1]):
        found.pop()
    return [s if _ENDS_WELL.search(s) else s.rstrip(" ,;:") + "." for s in found if s.strip(" .")]


def words(text: str) -> list[str]:
    """All words, lower case; each Chinese character is one."""
    return [w.lower().replace("’", "'") for w in _WORD.findall(text)]


def stem(word: str) -> str:
    """A word without its commonest English endings; equal for forms of one word."""
    word = word.removesuffix("'s")
    for ending, put, least in (
        ("ies", "y", 3), ("sses", "ss", 2), ("ing", "", 4), ("edly", "", 4), ("ed", "", 4),
        ("ly", "", 4), ("es", "", 4), ("s", "", 3),
    ):  # fmt: skip
        if word.endswith(ending) and len(word) - len(ending) >= least:
            if ending == "s" and word.endswith(("ss", "us", "is")):
                break
            word = word[: len(word) - len(ending)] + put
            break
    doubled = len(word) > 3 and word[-1] == word[-2]
    if doubled and (word[-1] not in "ls" or (word[-1] == "l" and len(word) > 5)):
        word = word[:-1]
    return word.removesuffix("e") if len(word) > 4 else word


def content_words(text: str) -> set[str]:
    """Stems of the words that carry the meaning."""
    return {stem(w) for w in words(text) if w not in STOPWORDS and (len(w) > 1 or not w.isascii())}


def focus_words(text: str) -> set[str]:
    """Stems of the words that say what a question is about."""
    generic = {stem(w) for w in GENERIC} | GENERIC
    return {w for w in content_words(text) if w not in generic} or content_words(text)


def is_pointer(sentence: str) -> bool:
    """Whether a sentence only says where to look: a link, a list that is not part of it."""
    return _POINTER.search(sentence) is not None


def critical_words(text: str) -> set[str]:
    """Words of the text that turn a statement round, negations apart."""
    return {w for w in words(text) if w in CRITICAL and not _NEGATION.fullmatch(w)}


def is_negative(text: str) -> bool:
    """Whether the sentence denies something."""
    return _NEGATION.search(text) is not None


def quantities(text: str) -> set[Quantity]:
    """Numbers with their units: "€5", "5 euros" and "five euro" are the same."""
    spelt = re.sub(
        r"[A-Za-z]+", lambda m: str(_SMALL.get(m.group().lower(), m.group())), text
    )  # "one" counts: "one working day" is a claim
    found = set()
    for match in _NUMBER.finditer(spelt):
        digits = match["number"]
        if re.fullmatch(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", digits):
            digits = digits.replace(",", "")
        elif re.fullmatch(r"\d+,\d{1,2}", digits):
            digits = digits.replace(",", ".")
        number = digits.rstrip("0").rstrip(".") if "." in digits else digits
        after = (match["after"] or "").lower()
        unit = _UNITS.get(match["before"] or "") or _UNITS.get(after)
        if unit is None:
            unit = next((t for t in _TIMES if after.startswith(t)), "")
        found.add(Quantity(number.lstrip("0") or "0", unit))
    return found


def covers(claimed: set[Quantity], stated: set[Quantity]) -> bool:
    """Whether each claimed quantity is stated; one without a unit fits any unit."""
    return all(
        any(c.number == s.number and (not c.unit or c.unit == s.unit) for s in stated)
        for c in claimed
    )
