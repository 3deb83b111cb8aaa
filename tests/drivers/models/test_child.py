"""Children end at their deadline and with their parent."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmos.drivers.models.child import ChildTimeout, run_child


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_output_is_kept_by_its_tail(tmp_path: Path) -> None:
    code = "print('x' * 100000); print('{\"a\": 1}')"
    seen: list[str] = []
    result = run_child(
        [sys.executable, "-c", code], scratch=tmp_path, deadline_s=20, tick=seen.append
    )
    assert result.returncode == 0
    assert len(result.out) <= 16_384
    assert result.last_json() == {"a": 1}
    assert seen[-1] == result.out


def test_a_child_is_killed_at_its_deadline(tmp_path: Path) -> None:
    code = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"
    with pytest.raises(ChildTimeout):
        run_child([sys.executable, "-c", code], scratch=tmp_path, deadline_s=0.5)
    assert not alive(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize("script", ["convert_gguf", "fetch_hf"])
def test_a_script_ends_with_its_parent(tmp_path: Path, script: str) -> None:
    # The script's own watch, with a main that never comes back.
    code = (
        "import importlib.util, sys, threading, time\n"
        "from llmos.drivers.models.child import SCRIPTS\n"
        f"spec = importlib.util.spec_from_file_location('s', SCRIPTS / '{script}.py')\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "threading.Thread(target=module.watch, daemon=True).start()\n"
        "print('in', flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = (
        "import subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdin=subprocess.PIPE,"
        " stdout=subprocess.PIPE)\n"
        "p.stdout.readline(); print(p.pid, flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent, code], stdout=subprocess.PIPE, env=dict(os.environ)
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert alive(pid)
    process.kill()
    process.wait()
    process.stdout.close()
    ends_at = time.monotonic() + 10
    while alive(pid) and time.monotonic() < ends_at:
        time.sleep(0.02)
    assert not alive(pid)
