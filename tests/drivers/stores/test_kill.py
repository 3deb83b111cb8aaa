"""What a process that is killed had acknowledged is there; and its lock is not."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmos.drivers.errors import StoreUnavailable
from llmos.drivers.stores.sqlite import SqliteStore

WRITER = """
import sys
from llmos.drivers.protocols import AgentRow, AgentWrite, StateWrite, TurnRow, TurnStatus
from llmos.drivers.stores.sqlite import SqliteStore
store = SqliteStore(sys.argv[1])
store.commit([AgentWrite(AgentRow("a", "m:C", b"", 1, 0.0))])
number = 0
while True:
    number += 1
    row = TurnRow(f"{number:09}", "a", 1, "k", b"m" * 200, "", float(number), 0.0,
                  TurnStatus.DONE, b"", "")
    store.commit([row, StateWrite("a", 1, str(number).encode())])
    print(number, flush=True)
"""


@pytest.mark.parametrize("acknowledged", [1, 40, 300])
def test_no_acknowledged_commit_is_lost(tmp_path: Path, acknowledged: int) -> None:
    path = tmp_path / "s.db"
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            lines = [process.stdout.readline() for _ in range(acknowledged)]
            with pytest.raises(StoreUnavailable, match=f"another process .{process.pid}."):
                SqliteStore(path)
        finally:
            process.send_signal(signal.SIGKILL)
        lines += process.stdout.read().splitlines()
    last = int([line for line in lines if line.strip()][-1])
    assert last >= acknowledged
    store = SqliteStore(path)
    rows = store.turns(limit=10**6)
    state = store.state("a")
    store.close()
    # A commit may have been made and not yet acknowledged, but never the other way round.
    assert len(rows) in (last, last + 1)
    assert [int(r.turn) for r in rows] == list(range(len(rows), 0, -1))
    assert state == str(len(rows)).encode()
