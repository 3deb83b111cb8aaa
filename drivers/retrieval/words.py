"""Words of a text as the lexical leg compares them: lower case, stemmed, Chinese by pairs.

The stemmer is Porter's algorithm (M. F. Porter, *An algorithm for suffix stripping*, 1980),
written from its description. A package was rejected: those with a fast stemmer are wheels in
C that not every machine has, and words are stemmed once each, then remembered.
"""

# ruff: noqa: SIM905 - word lists are easier to read and to change as text
from __future__ import annotations

import re
from functools import lru_cache

STOPWORDS = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their then "
    "there these they this to was will with".split()
)
"""Words of nearly every English text. Few: a question may consist of the others."""

_TOKEN = re.compile(r"[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|[\u3040-\u30ff\u3400-\u9fff]+")
_HAN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")
_PLAIN = re.compile(r"[a-z]{3,40}")
LONGEST = 64
"""Longer runs of letters (digests, base64) are cut here."""


def terms(text: str, *, stopwords: bool = False) -> list[str]:
    """The terms of a text in order; ``stopwords``: those too.

    English words are stemmed. Chinese and Japanese are not written in words: each pair of
    neighbours is a term, and a character that stands alone.
    """
    found: list[str] = []
    for token in _TOKEN.findall(text.lower()):
        if _HAN.match(token):
            if len(token) == 1:
                found.append(token)
            else:
                found.extend(token[i : i + 2] for i in range(len(token) - 1))
        elif stopwords or token not in STOPWORDS:
            found.append(stem(token[:LONGEST]))
    return found


@lru_cache(maxsize=200_000)
def stem(word: str) -> str:
    """The stem of a lower-case English word; what is not one comes back as it is."""
    if not _PLAIN.fullmatch(word):
        return word
    word = _plural(word)
    word = _past(word)
    if word.endswith("y") and _has_vowel(word[:-1]):
        word = word[:-1] + "i"
    word = _swap(word, _STEP_2, 0)
    word = _swap(word, _STEP_3, 0)
    word = _strip(word)
    if word.endswith("e"):
        rest = word[:-1]
        if _measure(rest) > 1 or (_measure(rest) == 1 and not _short(rest)):
            word = rest
    if word.endswith("ll") and _measure(word[:-1]) > 1:
        word = word[:-1]
    return word


_STEP_2 = tuple(
    pair.split(":")
    for pair in "ational:ate tional:tion enci:ence anci:ance izer:ize abli:able alli:al entli:ent "
    "eli:e ousli:ous ization:ize ation:ate ator:ate alism:al iveness:ive fulness:ful ousness:ous "
    "aliti:al iviti:ive biliti:ble".split()
)
_STEP_3 = tuple(
    pair.split(":") for pair in "icate:ic ative: alize:al iciti:ic ical:ic ful: ness:".split()
)
_STEP_4 = "al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive ize".split()


def _is_consonant(word: str, i: int) -> bool:
    if word[i] in "aeiou":
        return False
    return word[i] != "y" or i == 0 or not _is_consonant(word, i - 1)


def _measure(word: str) -> int:
    """Porter's m: how many times a vowel is followed by a consonant."""
    count, vowel = 0, False
    for i in range(len(word)):
        if not _is_consonant(word, i):
            vowel = True
        elif vowel:
            count, vowel = count + 1, False
    return count


def _has_vowel(word: str) -> bool:
    return any(not _is_consonant(word, i) for i in range(len(word)))


def _short(word: str) -> bool:
    """Ends consonant, vowel, consonant, the last not w, x or y."""
    return (
        len(word) > 2
        and _is_consonant(word, len(word) - 1)
        and not _is_consonant(word, len(word) - 2)
        and _is_consonant(word, len(word) - 3)
        and word[-1] not in "wxy"
    )


def _plural(word: str) -> str:
    if word.endswith(("sses", "ies")):
        return word[:-2]
    if word.endswith("s") and not word.endswith("ss"):
        return word[:-1]
    return word


def _past(word: str) -> str:
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    for suffix in ("ed", "ing"):
        rest = word[: -len(suffix)]
        if word.endswith(suffix) and _has_vowel(rest):
            if rest.endswith(("at", "bl", "iz")):
                return rest + "e"
            doubled = len(rest) > 1 and rest[-1] == rest[-2] and _is_consonant(rest, len(rest) - 1)
            if doubled and rest[-1] not in "lsz":
                return rest[:-1]
            return rest + "e" if _measure(rest) == 1 and _short(rest) else rest
    return word


def _swap(word: str, table: tuple[list[str], ...], least: int) -> str:
    """Replace the longest suffix of the table whose stem has more than ``least`` measures."""
    for suffix, new in sorted(table, key=lambda pair: -len(pair[0])):
        if word.endswith(suffix):
            rest = word[: -len(suffix)]
            return rest + new if _measure(rest) > least else word
    return word


def _strip(word: str) -> str:
    for suffix in sorted(_STEP_4, key=len, reverse=True):
        if word.endswith(suffix):
            rest = word[: -len(suffix)]
            if _measure(rest) > 1 and (suffix != "ion" or rest.endswith(("s", "t"))):
                return rest
            return word
    return word
