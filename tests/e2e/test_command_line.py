"""The command line as a person uses it: up, ask, strace, down, run, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import EXAMPLE, gone, processes_with

pytestmark = [pytest.mark.cluster, pytest.mark.models, pytest.mark.slow]

LLMOS = [sys.executable, "-m", "llmos.shell.main"]


def llmos(
    environment: dict[str, str], *args: str, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LLMOS, *args], env=environment, capture_output=True, text=True, timeout=timeout
    )


def test_run_prints_one_json_object_and_leaves_nothing_behind(environment: dict[str, str]) -> None:
    done = llmos(
        environment,
        "run",
        str(EXAMPLE / "system.toml"),
        "--questions",
        str(EXAMPLE / "questions.toml"),
        "--json",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["failed"] == 0
    decisions = [a["answer"]["decision"] for a in result["answers"]]
    assert {"answer", "refund", "escalate", "hand-over", "refuse", "emergency"} <= set(decisions)
    assert all(a["provenance"] or a["answer"]["grounded"] == "none" for a in result["answers"])
    assert gone(environment["LLMOS_TEST_MARK"]) == []
    # The record outlives the kernel.
    listed = llmos(environment, "strace", "--json")
    assert len(json.loads(listed.stdout)) >= len(result["answers"])


def test_up_ask_strace_down(environment: dict[str, str], tmp_path: Path) -> None:
    system = tmp_path / "system.toml"
    system.write_text(
        '[system]\nname = "little"\n'
        '[models.chat]\nsource = "smollm2-135m-instruct"\nengine = "causal"\nkv_tokens = 2048\n'
        '[[agents]]\nprogram = "little_program:Echoing"\ntenant = "t"\n'
    )
    (tmp_path / "little_program.py").write_text(
        "from llmos import Agent, Answer, Context, Manifest, Question, on\n"
        "class Echoing(Agent):\n"
        "    manifest = Manifest(models=('chat',), capabilities=('generate:chat',))\n"
        "    @on(Question, read_only=True)\n"
        "    async def answer(self, question: Question, os: Context) -> Answer:\n"
        "        made = await os.generate('chat', question.text, max_new_tokens=12)\n"
        "        return Answer(text=made.text)\n"
    )
    try:
        up = llmos(environment, "up", str(system))
        assert up.returncode == 0, up.stderr
        assert "t/echoing/main" in up.stdout
        again = llmos(environment, "up", str(system))
        assert again.returncode == 1
        assert "runs already" in again.stderr
        asked = llmos(environment, "ask", "echoing", "What is the capital of France?", "--json")
        assert asked.returncode == 0, asked.stderr
        answer = json.loads(asked.stdout)
        assert "Paris" in answer["answer"]["text"]
        traced = llmos(environment, "strace", answer["turn"])
        assert "Generate chat" in traced.stdout
        assert llmos(environment, "strace", "ffff").returncode == 3
        assert llmos(environment, "ask", "nobody", "x").returncode == 3
        assert json.loads(llmos(environment, "status", "--json").stdout)["system"] == "little"
        assert "llmos_turn_seconds_count" in llmos(environment, "metrics").stdout
        assert "launched t/echoing/main" in llmos(environment, "logs").stdout
        killed = llmos(environment, "kill", "echoing", "--json")
        assert json.loads(killed.stdout) == {"killed": "t/echoing/main"}
        assert json.loads(llmos(environment, "ps", "--json").stdout) == []
    finally:
        down = llmos(environment, "down")
    assert down.returncode == 0, down.stderr
    assert gone(environment["LLMOS_TEST_MARK"]) == []
    assert llmos(environment, "ps").returncode == 3


def test_ctrl_c_in_the_middle_leaves_nothing_behind(environment: dict[str, str]) -> None:
    process = subprocess.Popen(
        [
            *LLMOS,
            "run",
            str(EXAMPLE / "system.toml"),
            *(
                x
                for _ in range(8)
                for x in ("--ask", "clinic/medical/main=What helps against migraine?")
            ),
        ],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert "are up after" in line
    time.sleep(1.0)
    assert processes_with(environment["LLMOS_TEST_MARK"])
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=40)
    assert process.returncode == 130, errors
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert gone(environment["LLMOS_TEST_MARK"]) == []


def test_ctrl_c_during_boot_leaves_nothing_behind(
    environment: dict[str, str], tmp_path: Path
) -> None:
    # Sockets of Ray stand in it, and their paths must be short.
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as temp:
        process = subprocess.Popen(
            [*LLMOS, "run", str(EXAMPLE / "system.toml"), "--ask", "clinic/medical/main=Why?"],
            env={**environment, "TMPDIR": temp},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        time.sleep(3.0)
        assert process.poll() is None
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130, errors
        assert "interrupted" in errors
        assert "Traceback" not in errors
        assert gone(environment["LLMOS_TEST_MARK"]) == []
        assert list(Path(temp).glob("llmos-*")) == []
    assert list((tmp_path / "home").rglob("kernel.json")) == []
