"""PostgreSQL: all that every store does, and what is its own."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from llmos.drivers.errors import StoreUnavailable
from llmos.drivers.stores import chain
from llmos.drivers.stores.rows import EndMail, PutMail, SaveAgent
from tests.drivers.stores.stores_suite import A, StoresSuite, end, mail, ok, row

psycopg = pytest.importorskip("psycopg")
postgres_store = pytest.importorskip("llmos.drivers.stores.postgres")
PostgresStore = postgres_store.PostgresStore


class TestPostgresStore(StoresSuite):
    @pytest.fixture(autouse=True)
    def _database(self, database: Callable[[], str]) -> None:
        self.new = database

    def make(self, path: Path) -> Any:
        self.url = self.new()
        return PostgresStore(self.url)

    def again(self, store: Any, path: Path) -> Any:
        return PostgresStore(self.url)


def test_a_second_opening_is_refused_until_the_first_closes(
    database: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_store, "LOCK_WAIT_S", 0.1)
    url = database()
    first = PostgresStore(url)
    ok(first, PutMail(mail(1)))
    with pytest.raises(StoreUnavailable, match="in use by another process"):
        PostgresStore(url)
    first.close()
    second = PostgresStore(url)
    assert len(second.mail()) == 1
    second.close()


def test_what_cannot_be_opened(database: Callable[[], str]) -> None:
    url = database()
    PostgresStore(url).close()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("UPDATE llmos.meta SET value = '99' WHERE name = 'version'")
    with pytest.raises(StoreUnavailable, match="newer LLM OS"):
        PostgresStore(url)
    for bad in ("host=/nowhere dbname=x connect_timeout=1", "no conninfo", "postgresql://[::"):
        with pytest.raises(StoreUnavailable):
            PostgresStore(bad)


def test_a_password_is_in_no_error() -> None:
    with pytest.raises(StoreUnavailable) as caught:
        PostgresStore("postgresql://user:hunter2@localhost:1/x")
    assert "hunter2" not in str(caught.value) + caught.value.store


def test_other_tables_of_the_database_are_left_alone(database: Callable[[], str]) -> None:
    url = database()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE TABLE agents (mine text)")
    store = PostgresStore(url)
    ok(store, PutMail(mail(1)))
    store.close()
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT * FROM public.agents").fetchall() == []


def test_a_server_that_hangs_behind_its_socket_fails_what_is_asked(
    postgres: Any, database: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_store, "ANSWER_S", 0.5)
    monkeypatch.setattr(postgres_store, "RECONNECT_S", 0.1)
    store = PostgresStore(f"{database()}&connect_timeout=2")
    ok(store, PutMail(mail(1)))
    assert len(store.mail()) == 1  # Both connections are there.
    main = int((Path(postgres.pgdata) / "postmaster.pid").read_text().split()[0])
    server = [psutil.Process(main), *psutil.Process(main).children(recursive=True)]
    try:
        for process in server:
            process.suspend()
        for ask in (lambda: store.commit([[PutMail(mail(2))]]), store.mail):
            began = time.monotonic()
            with pytest.raises(StoreUnavailable, match=r"did not answer in 0\.5 s"):
                ask()
            assert time.monotonic() - began < 10
        with pytest.raises(StoreUnavailable):
            store.commit([[PutMail(mail(2))]])
    finally:
        for process in server:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
    until = time.monotonic() + 20
    while True:
        try:
            ok(store, PutMail(mail(3)))
            break
        except StoreUnavailable:
            # What hung holds the lock until it has noticed that nobody is there any more.
            assert time.monotonic() < until
    assert [m.seq for m in store.mail()][-1] == 3
    store.close()


def test_a_connection_that_is_lost_is_made_anew(database: Callable[[], str]) -> None:
    url = database()
    store = PostgresStore(url)
    ok(store, PutMail(mail(1)), row("T1", 1))
    with psycopg.connect(url, autocommit=True) as shell:
        shell.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        assert [m.seq for m in store.mail()] == [1]
        with pytest.raises(StoreUnavailable):
            store.commit([[PutMail(mail(2))]])
        ok(store, PutMail(mail(2)), row("T1", 2))
    assert [m.seq for m in store.mail()] == [1, 2]
    assert chain.verify_agent(store, A) == []
    store.close()


def test_a_server_that_stops_and_starts_loses_nothing(
    database: Callable[[], str], postgres: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_store, "RECONNECT_S", 0.3)
    store = PostgresStore(database())
    acknowledged: list[int] = []
    unavailable = 0
    stop = threading.Event()

    def work() -> None:
        nonlocal unavailable
        seq = 1
        while not stop.is_set():
            # The same part until it is acknowledged: it may have been kept the first time.
            part = [PutMail(mail(seq)), row(f"T{seq}", 1), end(f"T{seq}", key=f"s#{seq}")]
            try:
                ok(store, *part, SaveAgent(A, seq), EndMail(A, "s", seq))
                acknowledged.append(seq)
                seq += 1
            except StoreUnavailable:
                unavailable += 1

    worker = threading.Thread(target=work)
    worker.start()
    try:
        wait_for(lambda: len(acknowledged) > 20)
        postgres.stop()
        wait_for(lambda: unavailable > 2)
        with pytest.raises(StoreUnavailable):
            store.mail()
        with pytest.raises(StoreUnavailable):
            store.backup(Path("never"))
        postgres.start()
        wanted = len(acknowledged) + 20
        wait_for(lambda: len(acknowledged) > wanted)
    finally:
        stop.set()
        postgres.start()
        worker.join()
    turns = [int(t.turn[1:]) for t in store.turns(limit=10**6)]
    assert sorted(turns) == list(range(1, len(turns) + 1))
    assert set(acknowledged) <= set(turns)
    assert len(turns) - len(acknowledged) <= 1
    assert chain.verify_agent(store, A) == []
    assert store.mail() == []
    store.close()


def wait_for(condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
