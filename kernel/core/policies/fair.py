"""Fair between tenants: virtual token counters (VTC, Sheng et al., OSDI 2024).

Each tenant has a counter of the work it has been served, divided by its weight. The tenant
with the lowest counter among those that wait is next. A tenant that comes back after a pause
is lifted to the lowest counter of those that wait, so it cannot save up a claim.

**Bound on the gap**: of two tenants that always have something waiting, the work served to
them, divided by their weights, never differs by more than ``2·max(w_p·L, w_q·M)`` over the
smaller weight: L is the longest prompt, M the tokens that the KV cache holds, w_p and w_q the
costs of a token read and written.

**Bound on the wait**: a tenant that waits is first once every other tenant that waits has been
served that much; within a tenant the bound is that of the policy used there, in entries of
this tenant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from heapq import heapify, heappop, heappush, heapreplace

from llmos.drivers.protocols import QueuedRequest, Standing
from llmos.kernel.core.history import Cost
from llmos.kernel.core.policies.ranked import Ranked

MAX_TENANTS = 4096
"""Tenants that are remembered without anything waiting."""


class Tenant:
    """One tenant's account."""

    __slots__ = ("name", "promised", "promises", "queue", "served", "weight")

    def __init__(self, name: str, weight: float, queue: Ranked) -> None:
        self.name, self.weight, self.queue = name, weight, queue
        self.served = 0.0
        """The counter: work divided by weight."""
        self.promised = 0.0
        """The same of prompts that were let in and not read yet."""
        self.promises: dict[str, float] = {}
        """Their tokens by agent."""

    @property
    def level(self) -> float:
        """What tenants are compared by. Prompts count as soon as they are let in, or several
        of one tenant would enter before the first of them is read."""
        return self.served + self.promised


class Fair:
    """Virtual token counters between tenants, another policy within each."""

    def __init__(
        self,
        within: Callable[[], Ranked],
        *,
        weights: Mapping[str, float] | None = None,
        cost: Cost | None = None,
        preempt_tokens: int = 4096,
    ) -> None:
        self._within = within
        self._weights = dict(weights or {})
        self.cost = cost or Cost()
        self.preempt_tokens = preempt_tokens
        """Work that a tenant must be ahead by, before its jobs give way to another's."""
        self._tenants: dict[str, Tenant] = {}
        self._owner: dict[str, Tenant] = {}
        """By key of what waits."""
        self._heap: list[tuple[float, str]] = []
        """(level, tenant). A level only rises, but for promises given back, where a new entry
        is made: so for every tenant that waits there is an entry at or below its level, and
        the top is corrected when it is looked at."""
        self._left = 0.0
        """Level of the tenant that had something waiting last."""

    def __len__(self) -> int:
        return len(self._owner)

    # ------------------------------------------------------------ QueuePolicy

    def add(self, request: QueuedRequest, now_s: float) -> None:
        """A job waits from now on."""
        tenant = self._tenant(request.tenant)
        if request.key in self._owner:
            raise ValueError(f"{request.key} waits already")
        if not tenant.queue:
            lowest = self._lowest()
            floor = lowest.level if lowest else self._left
            tenant.served += max(0.0, floor - tenant.level)
            heappush(self._heap, (tenant.level, tenant.name))
        tenant.queue.add(request, now_s)
        self._owner[request.key] = tenant

    def remove(self, key: str, now_s: float) -> None:
        """A job waits no longer, having been let in or gone. KeyError: it did not wait."""
        tenant = self._owner[key]
        first = self.first(now_s) == key
        request = tenant.queue.request(key)
        tenant.queue.remove(key, now_s)
        del self._owner[key]
        if first:
            # It may have gone instead of being let in: the promise is given back as soon as
            # its agent is heard of again.
            owed = self.cost.read * request.prompt_tokens / tenant.weight
            tenant.promises[request.agent] = tenant.promises.get(request.agent, 0.0) + owed
            tenant.promised += owed
        if not tenant.queue:
            self._left = tenant.level
        self._compact()

    def first(self, now_s: float) -> str | None:
        """Who enters next: of the tenant with the lowest counter, whoever its queue says."""
        lowest = self._lowest()
        return lowest.queue.first(now_s) if lowest else None

    def served(self, tenant: str, agent: str, read: int, written: int, now_s: float) -> None:
        """Charge a tenant."""
        account = self._tenant(tenant)
        account.queue.served(tenant, agent, read, written, now_s)
        level = account.level
        account.served += self.cost.of(read, written) / account.weight
        owed = account.promises.get(agent)
        if owed is not None:
            # What is read was promised before; who writes has read all.
            kept = 0.0 if written else max(0.0, owed - self.cost.read * read / account.weight)
            if kept > 0:
                account.promises[agent] = kept
            else:
                del account.promises[agent]
            account.promised = max(0.0, account.promised - (owed - kept))
            if not account.promises:
                account.promised = 0.0
            if account.queue and account.level < level:
                heappush(self._heap, (account.level, account.name))
                self._compact()

    def victim(self, running: Sequence[QueuedRequest], now_s: float) -> str | None:
        """Of the tenant that is furthest ahead, the job that loses least; None as long as
        nobody is far ahead. Within the tenant whose turn it is, its own policy says."""
        key = self.first(now_s)
        if key is None:
            return None
        owner = self._owner[key]
        ahead = [
            (
                self._tenants[job.tenant].level,
                -self._tenants[job.tenant].queue.length(job),
                job.key,
            )
            for job in running
            if job.tenant in self._tenants
            and job.tenant != owner.name
            and self._ahead(job, owner) > self.preempt_tokens
            and self._tenants[job.tenant].queue.may_leave(job)
        ]
        if ahead:
            return max(ahead)[2]
        own = [job for job in running if job.tenant == owner.name]
        return owner.queue.victim_for(owner.queue.request(key), own)

    def _ahead(self, job: QueuedRequest, owner: Tenant) -> float:
        """How far its tenant is ahead of another, beside what throwing it out would cost."""
        again = self.cost.of(self._tenants[job.tenant].queue.length(job), 0)
        return self._tenants[job.tenant].level - owner.level - again

    # ------------------------------------------------------------ looking

    def standing(self, key: str, now_s: float) -> Standing:
        """Where a job stands: tenants take their turns as if each paid for its prompts only.
        KeyError: it does not wait."""
        owner = self._owner[key]
        inner = owner.queue.standing(key, now_s)
        waiting = {name: t for name, t in self._tenants.items() if t.queue}
        orders = {name: t.queue.order() for name, t in waiting.items()}
        # Those that its own policy lets in before it, and then itself.
        orders[owner.name] = [*inner.before, key]
        heap = [(t.level, name, 0) for name, t in waiting.items()]
        heapify(heap)
        before: list[str] = []
        while heap:
            level, name, place = heappop(heap)
            found = orders[name][place]
            if found == key:
                break
            before.append(found)
            if place + 1 < len(orders[name]):
                tenant = waiting[name]
                prompt = tenant.queue.request(found).prompt_tokens
                heappush(heap, (level + self.cost.read * prompt / tenant.weight, name, place + 1))
        lowest = self._lowest()
        assert lowest is not None
        reason = f"it is the turn of its tenant {owner.name}"
        if lowest is not owner:
            ahead = owner.level - lowest.level
            reason = (
                f"its tenant {owner.name} has been served {ahead:.0f} tokens by weight more "
                f"than {lowest.name}, which comes first"
            )
        return Standing(tuple(before), f"{reason}; within the tenant, {inner.reason}")

    def levels(self) -> dict[str, float]:
        """Counters of all tenants."""
        return {name: tenant.level for name, tenant in self._tenants.items()}

    def queue_of(self, tenant: str) -> Ranked:
        """The queue within a tenant, to teach it what is known from before."""
        return self._tenant(tenant).queue

    # ------------------------------------------------------------ inside

    def _tenant(self, name: str) -> Tenant:
        tenant = self._tenants.get(name)
        if tenant is None:
            if len(self._tenants) >= MAX_TENANTS:
                self._forget()
            weight = self._weights.get(name, 1.0)
            tenant = self._tenants[name] = Tenant(name, weight, self._within())
        return tenant

    def _forget(self) -> None:
        """Drop the tenants without anything waiting that are furthest behind: they would be
        lifted when they come again anyway."""
        idle = sorted((t.level, t.name) for t in self._tenants.values() if not t.queue)
        for _, name in idle[: max(1, len(idle) // 2)]:
            del self._tenants[name]

    def _lowest(self) -> Tenant | None:
        heap = self._heap
        while heap:
            level, name = heap[0]
            tenant = self._tenants.get(name)
            if tenant is None or not tenant.queue:
                heappop(heap)
            elif tenant.level > level:
                heapreplace(heap, (tenant.level, name))
            else:
                return tenant
        return None

    def _compact(self) -> None:
        if len(self._heap) > 64 and len(self._heap) > 3 * len(self._tenants):
            self._heap = [(t.level, t.name) for t in self._tenants.values() if t.queue]
            heapify(self._heap)

    def validate(self) -> None:
        """Every queue is whole, and the lowest is the lowest."""
        assert sum(len(t.queue) for t in self._tenants.values()) == len(self._owner)
        for tenant in self._tenants.values():
            tenant.queue.validate()
            assert min(tenant.served, tenant.promised) >= 0, tenant.name
            promised = sum(tenant.promises.values())
            assert abs(promised - tenant.promised) <= 1e-6 * max(1.0, promised), tenant.name
        waiting = [t.level for t in self._tenants.values() if t.queue]
        lowest = self._lowest()
        assert (lowest is None) == (not waiting)
        assert lowest is None or lowest.level == min(waiting), (lowest.name, waiting)
        assert len(self._heap) <= 65 + 3 * len(self._tenants)
