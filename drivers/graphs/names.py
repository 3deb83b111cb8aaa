"""Finds the names of nodes in running text, in time that does not depend on the graph's size.

Names and text are cut into words in the same way. Under the first word of each name
stand the lengths that names beginning with it have; a text is walked word by word,
and only those lengths are looked up. Scanning all names per call was rejected: at
50,000 nodes it costs a second.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

# Chinese and Japanese write no spaces, so each of their characters is a word.
_CJK = "぀-ヿ㐀-䶿一-鿿豈-﫿"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")


def words(text: str) -> list[str]:
    """Words of a text, lower case, without punctuation, plurals as singulars.

    The singular is a rough one (``-ies`` to ``-y``, ``-s`` off); it need not be a word,
    only the same for both forms.
    """
    folded = unicodedata.normalize("NFKC", text).casefold().replace("’", "'").replace("'s", "")
    return [_singular(word) for word in _WORD.findall(folded)]


def placed(text: str) -> list[tuple[str, int, int]]:
    """Words of a text as :func:`words` gives them, with the characters they stand at."""
    # Folding may change lengths, so the text is cut first and its pieces folded.
    found: list[tuple[str, int, int]] = []
    for piece in re.finditer(rf"[{_CJK}]|(?:[^\W_{_CJK}]|['’](?=s\b))+", text):
        found.extend((word, piece.start(), piece.end()) for word in words(piece.group()))
    return found


def normalised(name: str) -> str:
    """A name as an id: lower case, single spaces. Punctuation stays, so ids do not merge."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def _singular(word: str) -> str:
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    return word[:-3] + "y" if word.endswith("ies") and len(word) > 4 else word[:-1]


class NameIndex:
    """Ids by name, to be found in text. Not thread-safe; the graph that owns it locks."""

    def __init__(self) -> None:
        self._ids: dict[tuple[str, ...], set[str]] = {}
        self._lengths: dict[str, Counter[int]] = {}

    def add(self, node_id: str, name: str) -> None:
        """Add a name. One without a word in it cannot be found and is left out."""
        key = tuple(words(name))
        if not key:
            return
        ids = self._ids.setdefault(key, set())
        if not ids:
            self._lengths.setdefault(key[0], Counter())[len(key)] += 1
        ids.add(node_id)

    def remove(self, node_id: str, name: str) -> None:
        """Take a name out that was added."""
        key = tuple(words(name))
        ids = self._ids.get(key)
        if ids is None:
            return
        ids.discard(node_id)
        if not ids:
            del self._ids[key]
            lengths = self._lengths[key[0]]
            lengths[len(key)] -= 1
            if not lengths[len(key)]:
                del lengths[len(key)]
            if not lengths:
                del self._lengths[key[0]]

    def find(self, text: str) -> set[str]:
        """Ids of all names that occur in the text as whole words."""
        found: set[str] = set()
        spoken = words(text)
        for position, word in enumerate(spoken):
            for length in self._lengths.get(word, ()):
                found |= self._ids.get(tuple(spoken[position : position + length]), set())
        return found

    def spans(self, text: str) -> list[tuple[int, int, set[str]]]:
        """Where names stand: start, end, ids; the longest from left to right, none in another."""
        found: list[tuple[int, int, set[str]]] = []
        spoken = placed(text)
        position = 0
        while position < len(spoken):
            lengths = self._lengths.get(spoken[position][0], ())
            for length in sorted(lengths, reverse=True):
                part = spoken[position : position + length]
                if ids := self._ids.get(tuple(word for word, _, _ in part)):
                    found.append((part[0][1], part[-1][2], set(ids)))
                    position += length
                    break
            else:
                position += 1
        return found
