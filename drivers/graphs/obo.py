"""Reads ontologies in OBO: terms with synonyms, ``is_a`` and other relationships.

Obsolete terms are left out, and what only they are related to with them. Of the format
(OBO 1.4) the tags ``id``, ``name``, ``namespace``, ``synonym``, ``is_a``,
``relationship`` and ``is_obsolete`` are read; others, such as definitions, are left out.
"""

from __future__ import annotations

import re
from pathlib import Path

from llmos.drivers.errors import GraphFileError
from llmos.drivers.graphs.source import read_text
from llmos.drivers.protocols import Edge, Node

_SYNONYM = re.compile(r'"((?:[^"\\]|\\.)*)"')
_ESCAPE = re.compile(r"\\(.)")
_SPECIAL = {"n": "\n", "t": "\t", "W": " "}


def load_obo(file: Path) -> tuple[list[Node], list[Edge]]:
    """Terms as nodes, of the kind of their namespace, and their relations as edges.

    Raises:
        GraphFileError: not there, not UTF-8, no OBO, or a term without an id; with the line.
    """
    text, version = read_text(file)
    nodes: dict[str, Node] = {}
    edges: dict[tuple[str, str, str], Edge] = {}
    kind = ""
    stanza = ""
    tags: list[tuple[str, str]] = []
    begun = 1
    seen = False

    def end() -> None:
        if stanza != "Term" or ("is_obsolete", "true") in tags:
            return
        ids = [value for tag, value in tags if tag == "id"]
        if len(ids) != 1 or not ids[0]:
            raise GraphFileError(str(file), "a term needs one id", begun)
        first = dict(reversed(tags))
        name = _unescaped(first.get("name", "")) or ids[0]
        synonyms = dict.fromkeys(
            _unescaped(found.group(1))
            for tag, value in tags
            if tag == "synonym" and (found := _SYNONYM.match(value))
        )
        synonyms.pop(name, None)
        nodes[ids[0]] = Node(
            ids[0], name, first.get("namespace", kind), file.name, version, tuple(synonyms)
        )
        for tag, value in tags:
            words = value.split()
            if tag == "is_a" and words:
                key = (ids[0], "is_a", words[0])
            elif tag == "relationship" and len(words) > 1:
                key = (ids[0], words[0], words[1])
            else:
                continue
            edges.setdefault(key, Edge(*key, file.name, version))

    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith("!"):
            continue
        if line.startswith("["):
            end()
            stanza, tags, begun, seen = line.strip("[]"), [], number, True
            continue
        tag, found, value = line.partition(":")
        if not found:
            raise GraphFileError(str(file), f"not a tag and a value: {line[:60]!r}", number)
        # What follows an exclamation mark is the name of the other term, for people.
        value = value.strip() if tag in ("name", "synonym") else value.partition(" !")[0].strip()
        if not seen and tag == "default-namespace":
            kind = value
        tags.append((tag, value))
    end()
    if not nodes:
        raise GraphFileError(str(file), "there are no terms in it", remedy="Use a file in OBO 1.4")
    kept = [edge for edge in edges.values() if edge.object in nodes]
    return list(nodes.values()), kept


def _unescaped(text: str) -> str:
    return _ESCAPE.sub(lambda found: _SPECIAL.get(found.group(1), found.group(1)), text)
