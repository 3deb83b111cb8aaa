"""The rule bases of a host: read once, and again when their files change.

A changed file counts for evaluations that begin ``CHECK_S`` later at most. One that
cannot be read keeps the version before in use: rules that worked are better than none,
and every verdict says which version it is of. Recorded verdicts are not made again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from llmos.drivers.errors import LlmosError
from llmos.drivers.protocols import RuleBase
from llmos.drivers.registry import driver
from llmos.syscalls.labels import Labels

log = logging.getLogger("llmos.rules")

CHECK_S = 1.0
"""So often it is asked whether the file is still the same."""

Source = tuple[str, str, str, Labels]
"""Driver, file name, source and labels."""


@dataclass(slots=True)
class _Known:
    base: RuleBase
    labels: Labels
    digest: bytes
    """Of what was read last, whether it could be used or not."""
    checked: float
    complaint: str = ""
    """Why a later file could not be used, as said last."""


class RuleBases:
    """Rule bases by tenant and name."""

    def __init__(
        self,
        source: Callable[[str, str], Awaitable[Source]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``source`` answers for tenant and name."""
        self._source, self._clock = source, clock
        self._known: dict[tuple[str, str], _Known] = {}
        self._locks: dict[tuple[str, str], asyncio.Lock] = {}

    async def get(self, tenant: str, name: str) -> tuple[RuleBase, Labels]:
        """The rule base as its file is now, or was last usable. Raises for one never usable."""
        key = (tenant, name)
        known = self._known.get(key)
        if known is None or self._clock() - known.checked >= CHECK_S:
            async with self._locks.setdefault(key, asyncio.Lock()):
                known = self._known.get(key)
                if known is None or self._clock() - known.checked >= CHECK_S:
                    known = await self._read(key, known)
        return known.base, known.labels

    async def _read(self, key: tuple[str, str], known: _Known | None) -> _Known:
        tenant, name = key
        try:
            driver_name, file, source, labels = await self._source(tenant, name)
            digest = hashlib.sha256(source.encode("utf-8", "surrogatepass")).digest()
            if known is not None and known.digest == digest:
                known.labels, known.checked = labels, self._clock()
                return known
            if known is not None:
                # It is not read again and again where it cannot be used.
                known.digest = digest
            base: RuleBase = await asyncio.to_thread(driver("rules", driver_name), file, source)
        except LlmosError as error:
            if known is None:
                # Names that are not there must not pile up.
                self._locks.pop(key, None)
                raise
            known.checked = self._clock()
            if known.complaint != str(error):
                known.complaint = str(error)
                log.warning("rules %s stay at version %s: %s", name, known.base.version, error)
            return known
        if known is not None:
            log.info("rules %s: version %s is now %s", name, known.base.version, base.version)
        self._known[key] = _Known(base, labels, digest, self._clock())
        return self._known[key]
