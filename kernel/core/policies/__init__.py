"""Who enters the batch next: policies of an engine's queue, by name.

All are :class:`llmos.drivers.protocols.QueuePolicy`: pure, deterministic, with the time handed
in, O(log n) a decision, and with a stated bound on how long anybody waits.

| name | order |
|---|---|
| ``fcfs`` | of submission |
| ``priority`` | highest priority, growing with age |
| ``edf`` | earliest deadline |
| ``las`` | the turn that has had least work |
| ``serpt`` | the turn expected to need least work, learned from its program's history |
| ``fair`` | tenants by virtual token counters with weights; ``serpt`` within a tenant |
| ``fair-NAME`` | the same with another of these within |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from llmos.kernel.core.history import Cost
from llmos.kernel.core.policies.edf import EarliestDeadline
from llmos.kernel.core.policies.fair import Fair
from llmos.kernel.core.policies.fcfs import Fcfs
from llmos.kernel.core.policies.las import LeastAttained
from llmos.kernel.core.policies.priority import Priority
from llmos.kernel.core.policies.ranked import Ranked
from llmos.kernel.core.policies.serpt import ShortestExpected

_SINGLE: dict[str, Callable[[Cost], Ranked]] = {
    "edf": lambda cost: EarliestDeadline(),
    "fcfs": lambda cost: Fcfs(),
    "las": lambda cost: LeastAttained(cost=cost),
    "priority": lambda cost: Priority(),
    "serpt": lambda cost: ShortestExpected(cost=cost),
}

NAMES = (*_SINGLE, "fair", *(f"fair-{name}" for name in _SINGLE if name != "serpt"))
"""All that :func:`make` takes."""


def make(
    name: str, *, weights: Mapping[str, float] | None = None, cost: Cost | None = None
) -> Ranked | Fair:
    """A new policy.

    Args:
        name: one of :data:`NAMES`.
        weights: shares of the tenants, 1 where not named; for the fair ones.
        cost: what a token read and written counts.

    Raises:
        ValueError: no such policy; it names those there are.
    """
    cost = cost or Cost()
    within = {"fair": "serpt"}.get(name) or name.removeprefix("fair-")
    single = _SINGLE.get(within)
    if name not in NAMES or single is None:
        raise ValueError(f"no policy is called {name!r}; known: {', '.join(NAMES)}")
    if not name.startswith("fair"):
        return single(cost)
    return Fair(lambda: single(cost), weights=weights, cost=cost)
