"""Statements of a graph as sentences a person can read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from llmos.agents import sentences as text_of
from llmos.syscalls.graph import GraphNode, Neighbour

OUT = {
    "is_a": "{s} is a kind of {o}",
    "has_symptom": "Symptoms of {s} can include {o}",
    "treated_by": "{s} may be treated with {o}",
    "caused_by": "{s} can be caused by {o}",
    "spread_by": "{s} spreads through {o}",
    "prevented_by": "{s} can be prevented by {o}",
    "raised_by": "The risk of {s} is raised by {o}",
    "affects": "{s} affects {o}",
    "found_by": "{s} is found by {o}",
    "can_lead_to": "{s} can lead to {o}",
    "seek_help_for": "With {s}, seek medical help for {o}",
}
"""Relation → sentence, read from the subject; {o} may be several things."""

IN = {
    "is_a": "Kinds of {o} are {s}",
    "has_symptom": "{o} can be a symptom of {s}",
    "treated_by": "{o} can be used against {s}",
    "caused_by": "{o} can cause {s}",
    "prevented_by": "{o} can help to prevent {s}",
    "raised_by": "{o} can raise the risk of {s}",
    "affects": "{o} can be affected by {s}",
    "can_lead_to": "{o} can follow from {s}",
}
"""Relation → sentence, read from the object; {s} may be several things."""

CUES = {
    "has_symptom": "symptom sign feel notic recogni",
    "treated_by": "treat help against medicin cure cura therap remed reliev ease manag",
    "caused_by": "caus why trigger reason",
    "spread_by": "spread catch contagious infectious infect transmi pass",
    "prevented_by": "prevent avoid protect stop vaccin",
    "raised_by": "risk caus likely trigger why",
    "found_by": "test diagnos found check detect measur",
    "can_lead_to": "lead complicat follow consequenc dangerous untreat serious",
    "affects": "affect organ",
    "is_a": "kind type categor class",
    "seek_help_for": "doctor emergency help hospital seriou",
}
"""Relation → beginnings of words with which people ask for it."""

_ALWAYS = frozenset({"has_symptom", "treated_by"})
"""What is said of an illness where the question gives no cue."""


def asked_for(question: str, node: GraphNode, neighbours: Sequence[Neighbour]) -> list[Neighbour]:
    """The statements that the question asks for.

    By the words people use, not by embeddings: every statement about a node names it, so
    "Migraine affects the head" is as near to a question about its symptoms as the symptoms.
    A symptom or another thing named is always connected to the illnesses it belongs to.
    """
    words = text_of.words(question)

    def cued(relation: str) -> bool:
        cues = tuple(CUES.get(relation, relation.replace("_", " ")).split())
        return any(word.startswith(cues) for word in words)

    outgoing = {n.statement.relation for n in neighbours if n.statement.subject == node.id}
    wanted = {r for r in outgoing if cued(r)} or (outgoing & _ALWAYS)
    causes = cued("caused_by") or cued("raised_by")
    return [
        n
        for n in neighbours
        if (
            n.statement.relation in wanted
            if n.statement.subject == node.id
            else not outgoing or (causes and n.statement.relation == "can_lead_to")
        )
    ]


def sentences(node: GraphNode, neighbours: Sequence[Neighbour], most: int = 8) -> list[str]:
    """One sentence for each relation of a node and each direction, at most ``most`` names in it.

    One sentence per statement was tried and rejected: eight symptoms became eight
    sentences that differ in a word.
    """
    groups: dict[tuple[str, bool], list[str]] = defaultdict(list)
    for neighbour in neighbours:
        statement = neighbour.statement
        groups[statement.relation, statement.subject == node.id].append(neighbour.node.name)
    found = []
    for (relation, outgoing), others in groups.items():
        names = listed(sorted(set(others), key=str.lower)[:most])
        if outgoing:
            pattern = OUT.get(relation, "{s} " + relation.replace("_", " ") + " {o}")
            sentence = pattern.format(s=node.name, o=names)
        else:
            pattern = IN.get(relation, "{s} " + relation.replace("_", " ") + " {o}")
            sentence = pattern.format(s=names, o=node.name)
        found.append(f"{sentence[0].upper()}{sentence[1:]}.")
    return found


def listed(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else ""
