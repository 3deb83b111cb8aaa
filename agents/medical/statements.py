"""Statements of a graph as sentences a person can read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

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
    "treated_by": "{o} is used against {s}",
    "caused_by": "{o} can cause {s}",
    "prevented_by": "{o} helps to prevent {s}",
    "raised_by": "{o} raises the risk of {s}",
    "affects": "{o} is affected by {s}",
    "can_lead_to": "{o} can follow from {s}",
}
"""Relation → sentence, read from the object; {s} may be several things."""


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
