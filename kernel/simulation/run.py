"""One run of a trace under a policy, by names."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from llmos.drivers.protocols import QueuePolicy
from llmos.kernel.core import policies
from llmos.kernel.core.history import Cost, History, program_of
from llmos.kernel.core.policies.fair import Fair
from llmos.kernel.core.policies.las import LeastAttained
from llmos.kernel.core.policies.ranked import Ranked
from llmos.kernel.simulation.clairvoyant import ShortestJob, ShortestKnown, ShortestRequest
from llmos.kernel.simulation.jobs import Machine, Trace
from llmos.kernel.simulation.world import Outcome, World

CLAIRVOYANT: dict[str, Callable[[World], Ranked]] = {
    "shortest-known": ShortestKnown,
    "shortest-request": ShortestRequest,
    "srpt": ShortestJob,
}
"""To compare with: no kernel knows what the last two know."""
NAMES = (*policies.NAMES, *CLAIRVOYANT)


def simulate(
    trace: Trace,
    policy: str,
    machine: Machine | Mapping[str, Machine],
    *,
    devices: int = 1,
    cost: Cost | None = None,
    past: Trace | None = None,
    watch_gap: bool = True,
) -> Outcome:
    """Run a trace to its end.

    Args:
        policy: one of :data:`NAMES`.
        machine: what the models run on; one for all models of the trace, or by model.
        past: a trace that the policies with a history have seen before, so that the run shows
            a kernel that has been up for a while.

    Raises:
        ValueError: no such policy, a model without a machine, or a request that is larger
            than the KV cache.
    """
    cost = cost or Cost()
    if isinstance(machine, Machine):
        machine = dict.fromkeys(sorted({j.model for j in trace.jobs}), machine)
    share = any(m.share_prefixes for m in machine.values())

    def make(world: World) -> QueuePolicy:
        if policy in CLAIRVOYANT:
            return CLAIRVOYANT[policy](world)
        made = policies.make(policy, weights=trace.weights, cost=cost)
        if past is not None:
            _teach(made, past, cost, share)
        return made

    return World(
        trace, make, machines=machine, devices=devices, cost=cost, watch_gap=watch_gap
    ).run()


def _teach(policy: QueuePolicy, past: Trace, cost: Cost, share: bool) -> None:
    histories: list[tuple[str, History]] = []
    if isinstance(policy, LeastAttained):
        histories = [("", policy.history)]
    elif isinstance(policy, Fair):
        for tenant in sorted({j.tenant for j in past.jobs}):
            queue = policy.queue_of(tenant)
            if isinstance(queue, LeastAttained):
                histories.append((tenant, queue.history))
    for job in past.jobs:
        for tenant, history in histories:
            if tenant in ("", job.tenant):
                history.learn(program_of(job.agent), job.work(cost, share))
