"""How much a tenant or an agent may use: rates, and how much at the same time.

An account is charged with what was really used, when that is known. Whether somebody may go
on is decided by whether its account is overdrawn, not by a guess of what it will use: a guess
(``max_new_tokens``) would hold back many times what is used. What runs at the same time is
bounded, and with it how far an account can be overdrawn.
"""

from __future__ import annotations

from dataclasses import dataclass


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
    bucket: Bucket | None
    """Tokens; None: as many as it likes."""
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
        self._accounts: dict[str, _Account] = {}
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
            bucket = account.bucket
            # One token, not none: at exactly 0 the next would be let in and overdraw at once.
            if bucket is not None and (wait_s := bucket.wait_s(1.0, now_s)) > 0:
                used = bucket.size - bucket.level(now_s)
                return Over(owner, "tokens_per_minute", bucket.size, used, wait_s)
        return None

    def charge(self, key: str, tokens: int, now_s: float) -> None:
        """A request under way has used so many more."""
        for owner in self._running.get(key, ()):
            bucket = self._accounts[owner].bucket
            if bucket is not None:
                bucket.take(tokens, now_s)

    def leave(self, key: str) -> None:
        """A request has ended, however. Idempotent."""
        for owner in self._running.pop(key, ()):
            self._accounts[owner].running -= 1

    # ------------------------------------------------------------ inside

    def _of(self, owner: str, now_s: float) -> _Account | None:
        quota = self._quotas.get(owner)
        if quota is None:
            return None
        account = self._accounts.get(owner)
        if account is None:
            rate = quota.tokens_per_minute
            # A minute's worth may be used at once; after that it is the rate that counts.
            bucket = Bucket(rate / 60, rate, now_s) if rate else None
            account = self._accounts[owner] = _Account(quota, bucket)
        return account

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
