"""What the system file says about shares and quotas, as a device process needs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llmos.drivers.protocols import GenerationJob, QueuePolicy
from llmos.kernel.core import policies
from llmos.kernel.core.limits import Accounts, Over, Quota
from llmos.syscalls.errors import OverQuota


@dataclass(frozen=True, slots=True)
class Scheduling:
    """Who is served first, and how much anybody may use."""

    policy: str = "fair"
    """One of :data:`llmos.kernel.core.policies.NAMES`."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Shares of the tenants; 1 where not named."""
    quotas: Mapping[str, Quota] = field(default_factory=dict)
    """By tenant."""

    def make_policy(self) -> QueuePolicy:
        """The policy of one engine."""
        return policies.make(self.policy, weights=self.weights)


class Meter:
    """Holds the tenants to their quotas on one device.

    Each device counts for itself, so a tenant that uses models on two devices may use its
    quota on both. (One account for all of them would put a round trip before every request.)
    """

    def __init__(self) -> None:
        self._accounts = Accounts()
        self._quotas: Mapping[str, Quota] = {}

    def use(self, quotas: Mapping[str, Quota]) -> None:
        """These quotas hold from now on; what they were before is forgotten if they differ."""
        if quotas != self._quotas:
            self._quotas = dict(quotas)
            self._accounts = Accounts({_owner(t): q for t, q in quotas.items()})

    def enter(self, key: str, job: GenerationJob, now_s: float) -> OverQuota | None:
        """A job wants in; None: it is counted until :meth:`leave`."""
        over = self._accounts.enter(key, (_owner(job.tenant),), now_s)
        return None if over is None else _error(over)

    def refuses(self, tenant: str, now_s: float) -> OverQuota | None:
        """Why a job of a tenant would be refused now; None: it would not."""
        over = self._accounts.over((_owner(tenant),), now_s)
        return None if over is None else _error(over)

    def charge(self, key: str, tokens: int, now_s: float) -> None:
        """A job has used tokens."""
        self._accounts.charge(key, tokens, now_s)

    def leave(self, key: str) -> None:
        """A job has ended, however."""
        self._accounts.leave(key)


def _owner(tenant: str) -> str:
    return f"tenant {tenant}"


def _error(over: Over) -> OverQuota:
    return OverQuota(over.owner, over.limit, over.allowed, over.used, over.retry_after_s)
