"""What a process that is killed had acknowledged is there; and its lock is not."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmos.drivers.errors import StoreUnavailable
from llmos.drivers.registry import driver
from llmos.drivers.stores import chain

WRITER = """
import sys
from llmos.drivers.registry import driver
from llmos.drivers.stores.rows import *
store = driver("store", sys.argv[1])(sys.argv[2])
store.commit([[TakeShards(tuple(range(SHARDS)), 1)]])
number = 0
while True:
    number += 1
    store.commit([[Own("t/p/a", 1), PutMail(MailRow("t/p/a", "s", number, b"m" * 200))]])
    row = JournalRow("t/p/a", f"{number:09}", 0, "result", "turn", "k", ts=float(number),
                     idem_key=f"s#{number}")
    errors = store.commit([[Own("t/p/a", 1), Append(row), EndMail("t/p/a", "s", number),
                            SaveAgent("t/p/a", number, str(number).encode(), 1, number)]])
    assert errors == [None], errors
    print(number, flush=True)
"""


def kill_and_look(kind: str, path: str, acknowledged: int, match: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, kind, path], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            lines = [process.stdout.readline() for _ in range(acknowledged)]
            with pytest.raises(StoreUnavailable, match=match.format(pid=process.pid)):
                driver("store", kind)(path)
        finally:
            process.send_signal(signal.SIGKILL)
        lines += process.stdout.read().splitlines()
    last = int([line for line in lines if line.strip()][-1])
    assert last >= acknowledged
    store: Any = driver("store", kind)(path)
    rows = store.turns(limit=10**6)
    agent = store.agent("t/p/a")
    waiting = store.mail()
    findings = chain.verify_agent(store, "t/p/a")
    store.close()
    # A commit may have been made and not yet acknowledged, but never the other way round.
    assert len(rows) in (last, last + 1)
    assert [int(r.turn) for r in rows] == list(range(len(rows), 0, -1))
    assert (agent.state, agent.pos) == (str(len(rows)).encode(), len(rows))
    assert [m.seq for m in waiting] in ([], [len(rows) + 1])
    assert findings == []


@pytest.mark.parametrize("acknowledged", [1, 40, 300])
def test_no_acknowledged_commit_is_lost_by_sqlite(tmp_path: Path, acknowledged: int) -> None:
    kill_and_look("sqlite", str(tmp_path / "s.db"), acknowledged, "another process .{pid}.")


@pytest.mark.parametrize("acknowledged", [1, 150])
def test_no_acknowledged_commit_is_lost_by_postgres(
    database: Callable[[], str], acknowledged: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmos.drivers.stores.postgres.LOCK_WAIT_S", 0.5)
    kill_and_look("postgres", database(), acknowledged, "another process")
