"""How much a tenant or an agent may use: rates, and how much at the same time.

An account is charged with what was really used, when that is known. Whether somebody may go
on is decided by whether its account is overdrawn, not by a guess of what it will use: a guess
(``max_new_tokens``) would hold back many times what is used. What runs at the same time is
bounded, and with it how far an account can be overdrawn.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

MAX_OWNERS = 100_000
"""Accounts that are kept; beyond them those that have been full longest are dropped, which
changes nothing."""


class Bucket:
    """A token bucket that may be overdrawn: it fills at a rate, up to its size."""

    __slots__ = ("_at_s", "_level", "rate_per_s", "size")

    def __init__(self, rate_per_s: float, size: float, now_s: float) -> None:
        if rate_per_s <= 0 or size <= 0:
            raise ValueError(f"a bucket of {size} that fills at {rate_per_s} per second")
        self.rate_per_s, self.size = rate_per_s, size
        self._level, self._at_s = size, now_s

    def level(self, now_s: float) -> float:
        """What is in it; below 0: overdrawn."""
        if now_s > self._at_s:
            self._level = min(self.size, self._level + (now_s - self._at_s) * self.rate_per_s)
            self._at_s = now_s
        return self._level

    def take(self, amount: float, now_s: float) -> None:
        """Charge it, whatever is in it."""
        self._level = self.level(now_s) - amount

    def wait_s(self, amount: float, now_s: float) -> float:
        """Seconds until ``amount`` is in it (at most its size); 0: it is."""
        return max(0.0, (min(amount, self.size) - self.level(now_s)) / self.rate_per_s)


@dataclass(frozen=True, slots=True)
class Quota:
    """What one owner may use; None: as much as it likes."""

    tokens_per_minute: int | None = None
    """Prompt and answer together."""
    concurrent_requests: int | None = None
    """To models, waiting or running."""
    device_s_per_minute: float | None = None
    """Seconds of device time."""
    messages_per_minute: int | None = None
    call_depth: int | None = None
    """Agents that may wait for one another in a chain."""


@dataclass(frozen=True, slots=True)
class Over:
    """A limit is reached. The shell answers with ``Busy``."""

    owner: str
    limit: str
    """Name of the field of :class:`Quota`."""
    allowed: float
    used: float
    """Now, or within the last minute."""
    retry_after_s: float

    @property
    def what(self) -> str:
        """For people: ``tenant bank: tokens_per_minute is 6000, used are 6420``."""
        return f"{self.owner}: {self.limit} is {self.allowed:g}, used are {self.used:g}"


@dataclass(slots=True)
class _Account:
    quota: Quota
    buckets: dict[str, Bucket]
    running: int = 0


class Accounts:
    """The accounts of all owners.

    An owner is a name that the caller chooses, such as ``tenant bank`` or
    ``agent bank/help/main``. A request is counted for several owners, and let in only if all
    allow it.
    """

    RETRY_S = 1.0
    """When somebody at the bound of its concurrent requests may try again: how long they will
    take is not known here."""

    def __init__(self, quotas: dict[str, Quota] | None = None) -> None:
        self._quotas = dict(quotas or {})
        self._accounts: OrderedDict[str, _Account] = OrderedDict()
        self._running: dict[str, tuple[str, ...]] = {}
        """Owners of each request under way."""

    def enter(self, key: str, owners: tuple[str, ...], now_s: float) -> Over | None:
        """A request to a model wants in; None: it is counted until :meth:`leave`.

        Raises:
            ValueError: a request of that key is under way.
        """
        if key in self._running:
            raise ValueError(f"{key} is under way already")
        over = self.over(owners, now_s)
        if over is not None:
            return over
        found = [(owner, account) for owner in owners if (account := self._of(owner, now_s))]
        for _, account in found:
            account.running += 1
        if found:
            self._running[key] = tuple(owner for owner, _ in found)
        return None

    def over(self, owners: tuple[str, ...], now_s: float) -> Over | None:
        """Why a request to a model would not be let in now; None: it would be."""
        for owner in owners:
            account = self._of(owner, now_s)
            if account is None:
                continue
            most = account.quota.concurrent_requests
            if most is not None and account.running >= most:
                return Over(owner, "concurrent_requests", most, account.running, self.RETRY_S)
            for name in ("tokens_per_minute", "device_s_per_minute"):
                over = self._overdrawn(owner, account, name, now_s)
                if over is not None:
                    return over
        return None

    def charge(self, key: str, tokens: int, device_s: float, now_s: float) -> None:
        """A request under way has used so much more."""
        for owner in self._running.get(key, ()):
            account = self._accounts[owner]
            for name, amount in (("tokens_per_minute", tokens), ("device_s_per_minute", device_s)):
                bucket = account.buckets.get(name)
                if bucket is not None:
                    bucket.take(amount, now_s)

    def leave(self, key: str) -> None:
        """A request has ended, however. Idempotent."""
        for owner in self._running.pop(key, ()):
            self._accounts[owner].running -= 1

    def message(self, owners: tuple[str, ...], now_s: float) -> Over | None:
        """A message wants to be sent; None: it is counted."""
        buckets = []
        for owner in owners:
            account = self._of(owner, now_s)
            bucket = account.buckets.get("messages_per_minute") if account else None
            if account is None or bucket is None:
                continue
            wait_s = bucket.wait_s(1, now_s)
            if wait_s > 0:
                most = account.quota.messages_per_minute or 0
                return Over(owner, "messages_per_minute", most, most, wait_s)
            buckets.append(bucket)
        for bucket in buckets:
            bucket.take(1, now_s)
        return None

    def depth(self, owners: tuple[str, ...], depth: int) -> Over | None:
        """A call wants to make a chain of ``depth`` agents; waiting does not help."""
        for owner in owners:
            quota = self._quotas.get(owner)
            most = quota.call_depth if quota else None
            if most is not None and depth > most:
                return Over(owner, "call_depth", most, depth, 0.0)
        return None

    # ------------------------------------------------------------ inside

    def _of(self, owner: str, now_s: float) -> _Account | None:
        quota = self._quotas.get(owner)
        if quota is None:
            return None
        account = self._accounts.get(owner)
        if account is None:
            rates = {
                "tokens_per_minute": quota.tokens_per_minute,
                "device_s_per_minute": quota.device_s_per_minute,
                "messages_per_minute": quota.messages_per_minute,
            }
            # A minute's worth may be used at once; after that it is the rate that counts.
            buckets = {n: Bucket(r / 60, r, now_s) for n, r in rates.items() if r}
            account = self._accounts[owner] = _Account(quota, buckets)
            self._drop_one(now_s)
        else:
            self._accounts.move_to_end(owner)
        return account

    def _drop_one(self, now_s: float) -> None:
        if len(self._accounts) <= MAX_OWNERS:
            return
        for owner, account in self._accounts.items():
            full = all(b.level(now_s) >= b.size for b in account.buckets.values())
            if not account.running and full:
                del self._accounts[owner]
            return

    @staticmethod
    def _overdrawn(owner: str, account: _Account, name: str, now_s: float) -> Over | None:
        bucket = account.buckets.get(name)
        # One token, not none: at exactly 0 the next would be let in and overdraw at once.
        least = 1.0 if name == "tokens_per_minute" else 1e-3
        wait_s = bucket.wait_s(least, now_s) if bucket else 0.0
        if bucket is None or wait_s <= 0:
            return None
        used = bucket.size - bucket.level(now_s)
        return Over(owner, name, bucket.size, used, wait_s)

    def validate(self) -> None:
        """What runs is what is counted, and nobody is beyond its bound."""
        counts: dict[str, int] = {}
        for owners in self._running.values():
            for owner in owners:
                counts[owner] = counts.get(owner, 0) + 1
        for owner, account in self._accounts.items():
            assert account.running == counts.get(owner, 0), (owner, account.running, counts)
            most = account.quota.concurrent_requests
            assert most is None or account.running <= most, (owner, account.running, most)
