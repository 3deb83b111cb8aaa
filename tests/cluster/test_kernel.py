"""A kernel on a real Ray: launching, asking, failing, recovering."""

from __future__ import annotations

import os
import signal
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from llmos.drivers.errors import DocumentError, RuleSyntaxError, UnknownModel
from llmos.kernel.client import Kernel
from llmos.kernel.core.errors import AlreadyLaunched, DoesNotFit
from llmos.kernel.program import ProgramError
from llmos.syscalls.errors import (
    Busy,
    CallCycle,
    CapabilityDenied,
    DeadlineExceeded,
    EmptyCorpus,
    HandlerFailed,
    InvalidMessage,
    LabelViolation,
    ReadOnlyTurn,
    UnhandledMessage,
    UnknownAgent,
    UnknownResource,
)
from llmos.syscalls.messages import Wire
from tests.cluster import programs as p
from tests.cluster.conftest import own_processes

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def worker(kernel: Kernel) -> str:
    return kernel.launch(p.Worker, "w", tenant="acme", config={"peer": "acme/worker/*"})


def test_ask_gets_an_answer_with_where_it_came_from(kernel: Kernel, worker: str) -> None:
    assert worker == "acme/worker/w"
    said = kernel.ask(worker, p.Say(text="hello there"), p.Said)
    assert "hello there" in said.text
    reply = kernel.ask_reply(worker, Wire.of(p.Say(text="again")))
    assert [x.kind for x in reply.provenance] == ["model"]
    assert reply.labels.tenants == {"acme"}
    assert not reply.labels.trusted
    *calls, turn = kernel.turn(reply.turn[:16])
    assert (turn.agent, turn.kind, turn.name, turn.phase) == (worker, "turn", "Say", "result")
    assert [(c.kind, c.name) for c in calls] == [("Generate", "chat")]


def test_an_unambiguous_part_of_the_name_will_do(kernel: Kernel, worker: str) -> None:
    assert "x y" in kernel.ask("acme/worker", p.Say(text="x y"), p.Said).text
    with pytest.raises(UnknownAgent) as error:
        kernel.ask("nobody", p.Say(text="x"))
    assert worker in error.value.known


def test_state_survives_and_turns_are_serial(kernel: Kernel) -> None:
    agent = kernel.launch(p.Worker, "serial", tenant="acme")
    with ThreadPoolExecutor(8) as pool:
        totals = list(pool.map(lambda _: kernel.ask(agent, p.Count(), p.Counted).total, range(8)))
    assert sorted(totals) == list(range(1, 9))
    assert kernel.ask(agent, p.Count(by=2), p.Counted).total == 10


def test_what_is_used_and_waited_for_is_told(kernel: Kernel) -> None:
    agent = kernel.launch(p.Worker, "waits", tenant="acme")
    with ThreadPoolExecutor(2) as pool:
        asked = [
            pool.submit(kernel.ask, agent, p.Wait(seconds=seconds), p.Said)
            for seconds in (2.0, 2.0)
        ]
        until = time.monotonic() + 20
        whats: set[str] = set()
        while not {"turn", "sleep", "mailbox"} <= whats:
            assert time.monotonic() < until, whats
            found = kernel.why("waits")
            whats = {r["what"] for r in found["reasons"]}
            whats |= {r["what"] for top in found["reasons"] for r in top["under"]}
        assert found["agent"] == agent
        assert found["host"].startswith("host:")
        for future in asked:
            future.result(timeout=20)
    kernel.ask(agent, p.Say(text="one two three"), p.Said)
    state = kernel.top()
    assert {d["name"] for d in state["devices"]} == {"cpu:0"}
    assert {s["model"]: s["state"] for s in state["slots"]}["chat"] == "ready"
    assert sum(h["active"] for h in state["hosts"]) >= 1
    (mine,) = [a for a in state["agents"] if a["agent"] == agent]
    assert mine["written"] == 3
    assert next(t for t in state["tenants"] if t["tenant"] == "acme")["share"] > 0
    assert 'llmos_tenant_tokens_total{phase="decode",process="device:cpu:0",tenant="acme"}' in (
        kernel.metrics()
    )


def test_many_agents_share_one_model(kernel: Kernel) -> None:
    agents = [kernel.launch(p.Worker, f"m{n}", tenant="acme") for n in range(8)]
    with ThreadPoolExecutor(32) as pool:
        answers = list(
            pool.map(
                lambda n: kernel.ask(agents[n % 8], p.Say(text=f"number {n}"), p.Said).text,
                range(32),
            )
        )
    assert all(f"number {n}" in text for n, text in enumerate(answers))
    slots = {s["model"]: s for s in kernel.status()["slots"]}
    assert slots["chat"]["state"] == "ready"
    assert slots["chat"]["users"] >= 8


def test_a_failing_handler_harms_nobody(kernel: Kernel, worker: str) -> None:
    before = kernel.ask(worker, p.Count(by=0), p.Counted).total
    with pytest.raises(HandlerFailed, match="ZeroDivisionError: one by zero") as error:
        kernel.ask(worker, p.Fail())
    assert "programs.py" in error.value.where
    with pytest.raises(HandlerFailed, match="SystemExit"):
        kernel.ask(worker, p.Fail(how="exit"))
    with pytest.raises(HandlerFailed, match="returned str, not a Message"):
        kernel.ask(worker, p.Fail(how="type"))
    # The state is that of the last turn that committed.
    assert kernel.ask(worker, p.Count(by=0), p.Counted).total == before
    assert kernel.turn(error.value.turn)[-1].phase == "failed"


def test_default_deny_and_an_error_that_an_agent_may_catch(kernel: Kernel, worker: str) -> None:
    with pytest.raises(CapabilityDenied) as error:
        kernel.ask(worker, p.Fail(how="denied"))
    assert (error.value.syscall, error.value.resource) == ("generate", "forbidden")
    assert kernel.ask(worker, p.Fail(how="caught"), p.Said).text == "denied forbidden"


def test_a_read_only_turn_cannot_change_the_state(kernel: Kernel) -> None:
    agent = kernel.launch(p.Reader, tenant="acme")
    with pytest.raises(ReadOnlyTurn):
        kernel.ask(agent, p.Say(text="x"))


def test_messages_of_the_wrong_type(kernel: Kernel, worker: str) -> None:
    with pytest.raises(UnhandledMessage) as error:
        kernel.ask(worker, p.Counted(total=1))
    assert "Say" in error.value.handled
    with pytest.raises(InvalidMessage, match="text"):
        kernel.ask_reply(worker, Wire.of_json("Say", {"text": 7})).message()
    with pytest.raises(InvalidMessage, match="extra"):
        kernel.ask_reply(worker, Wire.of_json("Say", {"extra": 7})).message()
    with pytest.raises(UnhandledMessage):
        kernel.tell(worker, p.Counted(total=1))


def test_tell_arrives(kernel: Kernel) -> None:
    agent = kernel.launch(p.Worker, "told", tenant="acme")
    for _ in range(3):
        kernel.tell(agent, p.Count(by=5))
    assert kernel.ask(agent, p.Count(by=0), p.Counted).total == 15


def test_agents_ask_each_other_within_their_tenant(kernel: Kernel, worker: str) -> None:
    other = kernel.launch(p.Worker, "other", tenant="acme", config={"peer": "*"})
    said = kernel.ask(other, p.Relay(to=worker, text="via"), p.Said)
    assert "via" in said.text
    with pytest.raises(CallCycle):
        kernel.ask(other, p.Relay(to=other, text="me"))
    foreign = kernel.launch(p.Worker, "f", tenant="rival")
    with pytest.raises(LabelViolation):
        kernel.ask(other, p.Relay(to=foreign, text="secret"))


def test_deadlines_hold_and_a_full_mailbox_says_busy(kernel: Kernel) -> None:
    agent = kernel.launch(p.Worker, "slow", tenant="acme")
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        kernel.ask(agent, p.Wait(seconds=20), deadline_s=0.5)
    assert time.monotonic() - started < 3
    with ThreadPoolExecutor(20) as pool:
        futures = [
            pool.submit(kernel.ask, agent, p.Wait(seconds=0.3), deadline_s=10) for _ in range(20)
        ]
        errors = [f.exception() for f in futures]
    refused = [e for e in errors if isinstance(e, Busy)]
    assert refused
    assert refused[0].retry_after_s > 0
    assert any(e is None for e in errors)


def test_what_cannot_be_launched_says_why_and_harms_nobody(kernel: Kernel, worker: str) -> None:
    with pytest.raises(ProgramError, match="no module"):
        kernel.launch("nowhere:Nothing")
    with pytest.raises(ProgramError, match="does not derive"):
        kernel.launch("tests.cluster.programs:Counter")
    with pytest.raises(ProgramError, match=r"config\.modle"):
        kernel.launch(p.Worker, "x", config={"modle": "chat"})
    with pytest.raises(UnknownModel, match="llmos models pull"):
        kernel.launch(p.Worker, "x", config={"model": "missing"})
    with pytest.raises(UnknownModel):
        kernel.launch(p.Worker, "x", config={"model": "nonsense"})
    with pytest.raises(RuleSyntaxError) as error:
        kernel.launch(p.Judge, "x", config={"rules": "broken"})
    assert "broken.clp" in str(error.value)
    with pytest.raises(UnknownResource):
        kernel.launch(p.Judge, "x", config={"rules": "nonsense"})
    with pytest.raises(DocumentError):
        kernel.launch(p.Scholar, "x", config={"corpus": "gone"})
    with pytest.raises(UnknownResource):
        kernel.launch(p.Scholar, "x", tenant="rival", config={"corpus": "help"})
    with pytest.raises(DoesNotFit, match=r"64\.00 GiB.*cpu:0, has 2\.00 GiB"):
        kernel.launch(p.Greedy)
    with pytest.raises(AlreadyLaunched):
        kernel.launch(p.Worker, "w", tenant="acme", config={"peer": "another"})
    assert "still" in kernel.ask(worker, p.Say(text="still"), p.Said).text


def test_documents_that_cannot_be_read_are_left_out_by_name(kernel: Kernel) -> None:
    agent = kernel.launch(p.Scholar, tenant="acme", config={"corpus": "help"})
    assert "blocked" in kernel.ask(agent, p.Say(text="lost card"), p.Said).text
    corpus = kernel.status()["knowledge"]["corpora"]["help"]
    assert {s["path"].rsplit("/", 1)[-1] for s in corpus["skipped"]} == {"photo.md", "old.txt"}


def test_an_empty_corpus_says_so(kernel: Kernel) -> None:
    agent = kernel.launch(p.Scholar, "e", tenant="acme", config={"corpus": "empty"})
    with pytest.raises(EmptyCorpus):
        kernel.ask(agent, p.Say(text="anything"))


def test_rules_decide(kernel: Kernel) -> None:
    agent = kernel.launch(p.Judge, tenant="acme", config={"rules": "good"})
    assert kernel.ask(agent, p.Say(text="20"), p.Said).text == "refund"
    reply = kernel.ask_reply(agent, Wire.of(p.Say(text="80")))
    assert kernel.turn(reply.turn)[0].kind == "Evaluate"


def test_kill_forgets_the_agent_and_cancels_its_turn(kernel: Kernel) -> None:
    agent = kernel.launch(p.Worker, "victim", tenant="acme")
    kernel.ask(agent, p.Count(by=3))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(kernel.ask, agent, p.Wait(seconds=20))
        time.sleep(0.3)
        assert kernel.kill(agent) == agent
        assert waiting.exception(timeout=5) is not None
    assert agent not in {a["agent"] for a in kernel.ps()}
    with pytest.raises(UnknownAgent):
        kernel.ask(agent, p.Count())
    assert kernel.launch(p.Worker, "victim", tenant="acme") == agent
    assert kernel.ask(agent, p.Count(by=0), p.Counted).total == 0


def test_killing_a_host_at_work_loses_neither_question_nor_state(kernel: Kernel) -> None:
    agent = kernel.launch(p.Worker, "survivor", tenant="acme")
    kernel.ask(agent, p.Count(by=7))
    pid = kernel.ask(agent, p.Wait(seconds=0), p.Said).pid
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(kernel.ask, agent, p.Wait(seconds=1), p.Said) for _ in range(3)]
        time.sleep(0.4)
        os.kill(pid, signal.SIGKILL)
        started = time.monotonic()
        said = [w.result(timeout=30) for w in waiting]
    assert time.monotonic() - started < 15
    assert all(s.text == "waited" and s.pid != pid for s in said)
    assert kernel.ask(agent, p.Count(by=0), p.Counted).total == 7
    lost = [x for x in kernel.status()["processes"] if x["incarnation"] > 1]
    assert lost
    assert all(x["state"] == "up" for x in lost)


def test_text_that_was_shown_is_never_another_after_a_crash(kernel: Kernel) -> None:
    agent = kernel.launch(p.Narrator, tenant="acme")
    words = " ".join(f"word{n}" for n in range(30))
    calm = list(kernel.stream(agent, p.Say(text=words)))
    (pid,) = {s["pid"] for n, s in kernel.status()["hosts"].items() if n == _host_of(kernel, agent)}
    pieces: list[str] = []
    for piece in kernel.stream(agent, p.Say(text=words)):
        if isinstance(piece, str):
            pieces.append(piece)
            if len(pieces) == 5:
                os.kill(pid, signal.SIGKILL)
        else:
            reply = piece.message()
    assert isinstance(reply, p.Said)
    assert reply.pid != pid
    assert "".join(pieces) == reply.text
    last = calm[-1]
    assert not isinstance(last, str)
    before = last.message()
    assert isinstance(before, p.Said)
    assert "".join(x for x in calm if isinstance(x, str)) == before.text == reply.text


def _host_of(kernel: Kernel, agent: str) -> str:
    return next(str(a["host"]) for a in kernel.ps() if a["agent"] == agent)


def test_a_host_that_hangs_is_killed_and_its_agents_serve_again(kernel: Kernel) -> None:
    agent = kernel.launch(p.Stubborn, tenant="acme")
    kernel.ask(agent, p.Count(by=4))
    kernel.tell(agent, p.Wait(seconds=120))
    started = time.monotonic()
    assert kernel.ask(agent, p.Count(by=1), p.Counted, deadline_s=60).total == 5
    assert time.monotonic() - started < 40


@pytest.mark.parametrize("process", ["journal", "knowledge", "device:cpu:0"])
def test_killing_a_service_is_survived(kernel: Kernel, process: str) -> None:
    agent = kernel.launch(p.Worker, "patient", tenant="acme")
    total = kernel.ask(agent, p.Count(by=1), p.Counted).total
    title = {"journal": "JournalServer", "knowledge": "KnowledgeServer"}.get(
        process, "DeviceServer"
    )
    victims = own_processes(f"ray::{title}")
    assert victims
    for victim in victims:
        victim.kill()
    assert "after" in kernel.ask(agent, p.Say(text="after"), p.Said).text
    assert kernel.ask(agent, p.Count(by=1), p.Counted).total == total + 1


def test_metrics_of_all_processes(kernel: Kernel, worker: str) -> None:
    kernel.ask(worker, p.Say(text="count me"))
    text = kernel.metrics()
    assert 'llmos_turn_seconds_count{process="host:' in text
    assert 'llmos_tokens_total{model="chat",phase="decode"' in text
    assert 'llmos_device_bytes{device="cpu:0",owner="free",process="kernel"}' in text
    port = kernel.status()["metrics_port"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        assert b"llmos_turn_seconds_count" in response.read()


def test_logs_carry_agent_and_turn(kernel: Kernel, worker: str) -> None:
    import json
    from pathlib import Path

    reply = kernel.ask_reply(worker, Wire.of(p.Wait(seconds=0)))
    folder = Path(kernel.status()["run"]) / "logs"
    lines = [json.loads(x) for f in folder.glob("host-*.jsonl") for x in f.read_text().splitlines()]
    mine = [x for x in lines if x.get("turn") == reply.turn]
    assert any(x["message"] == "waiting" and x["agent"] == worker for x in mine)
