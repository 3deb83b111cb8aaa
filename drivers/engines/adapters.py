"""Which adapters an engine has, by name: versions, their users, and coming and going.

Names are looked up in callers' threads. The weights are touched in the engine's thread
alone, between two steps, so an adapter is loaded while jobs run, and a step never sees
half of one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from llmos.drivers.engines.adapter_files import AdapterWeights, read_adapter
from llmos.drivers.engines.lora import AdapterBank, ResidentAdapter
from llmos.drivers.errors import AdaptersFull, UnknownAdapter


class AdapterShelf:
    """The adapters of one engine."""

    def __init__(self, model: str, bank: AdapterBank | None, places: int) -> None:
        """``bank`` is None where ``places`` is 0."""
        self._model, self._bank, self._places = model, bank, places
        self._lock = threading.Lock()
        self._named: dict[str, ResidentAdapter] = {}
        """The version of each name that new jobs get."""
        self._leaving: list[ResidentAdapter] = []
        """Have a place until it is needed, and until their last job has ended."""
        self._serial = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Adapters that a job may name, sorted."""
        with self._lock:
            return tuple(sorted(self._named))

    def acquire(self, name: str) -> ResidentAdapter:
        """The adapter for a new job, which holds it until :meth:`release`.

        Raises:
            UnknownAdapter: none of that name.
        """
        with self._lock:
            adapter = self._named.get(name)
            if adapter is None:
                raise UnknownAdapter(self._model, name, self._named)
            adapter.users += 1
            return adapter

    def release(self, adapter: ResidentAdapter) -> None:
        """A job that held it has ended."""
        with self._lock:
            adapter.users -= 1

    def load(
        self, name: str, path: Path, between_steps: Callable[[Callable[[], None]], None]
    ) -> int:
        """Read an adapter and make it the one of this name; returns its bytes.

        Args:
            name: what jobs call it.
            path: folder as peft saves it.
            between_steps: runs a function in the engine's thread and waits for it.

        Raises:
            AdapterUnusable, AdaptersFull
        """
        bank = self._bank
        if bank is None:
            raise AdaptersFull(self._model, self._places)
        weights = read_adapter(self._model, name, path, bank.layers, bank.max_rank)
        size = bank.size_bytes(weights)
        between_steps(lambda: self._place(bank, name, weights, size))
        return size

    def unload(self, name: str) -> None:
        """No new jobs from now on; its place is free when the last job has ended.

        Raises:
            UnknownAdapter: none of that name.
        """
        with self._lock:
            adapter = self._named.pop(name, None)
            if adapter is None:
                raise UnknownAdapter(self._model, name, self._named)
            self._leaving.append(adapter)

    def close(self) -> None:
        """Let go of the weights."""
        self._bank = None

    def validate(self) -> None:
        """Nobody is in two lists, and nobody has fewer than no users."""
        with self._lock:
            everyone = [*self._named.values(), *self._leaving]
            assert len({a.serial for a in everyone}) == len(everyone) <= self._places, everyone
            assert all(a.users >= 0 and a.place >= 0 for a in everyone), everyone
            assert all(n == a.name for n, a in self._named.items()), self._named
        if self._bank is not None:
            self._bank.validate()

    # ------------------------------------------------------------ engine's thread

    def _place(self, bank: AdapterBank, name: str, weights: AdapterWeights, size: int) -> None:
        # The lock is held while the weights are copied (milliseconds), so that a name which
        # gets a new version is never unknown in between.
        with self._lock:
            old = self._named.get(name)
            gone = [a for a in self._leaving if not a.users]
            if not bank.free and not gone and old is not None and not old.users:
                # Nobody is answered by it, so its place is as good as a free one.
                gone, old = [old], None
            for adapter in gone:
                bank.free_place(adapter)
            self._leaving = [a for a in self._leaving if a not in gone]
            if not bank.free:
                raise AdaptersFull(self._model, self._places)
            self._serial += 1
            new = ResidentAdapter(name, self._serial, weights.digest, size)
            bank.write(new, weights)
            self._named[name] = new
            if old is not None:
                self._leaving.append(old)
