from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmos.drivers.errors import StoreUnavailable
from llmos.drivers.stores.memory import MemoryStore
from llmos.drivers.stores.rows import PutMail
from llmos.drivers.stores.sqlite import SqliteStore
from tests.drivers.stores.stores_suite import A, StoresSuite, everything, mail, ok, row


class TestMemoryStore(StoresSuite):
    def make(self, path: Path) -> Any:
        return MemoryStore(path)

    def again(self, store: Any, path: Path) -> Any:
        return store.reopen()


class TestSqliteStore(StoresSuite):
    def make(self, path: Path) -> Any:
        return SqliteStore(path / "deep" / "store.db")

    def again(self, store: Any, path: Path) -> Any:
        return SqliteStore(path / "deep" / "store.db")


def test_a_memory_store_outlives_its_process() -> None:
    store = MemoryStore()
    ok(store, PutMail(mail(1)), row())
    before = everything(store)
    again = store.reopen()
    assert everything(again) == before
    with pytest.raises(StoreUnavailable, match="closed"):
        store.commit([[PutMail(mail(2))]])
    assert everything(again) == before


def test_a_snapshot_goes_its_own_way() -> None:
    store = MemoryStore()
    ok(store, PutMail(mail(1)), row())
    before = everything(store)
    other = store.snapshot()
    ok(other, PutMail(mail(2)), row("T1", 2))
    assert everything(store) == before
    ok(store, PutMail(mail(3)), row("T2", 1))
    assert [m.seq for m in other.waiting(A)] == [1, 2]
    assert [r.turn for r in other.chain(A)] == ["T1", "T1"]
