"""What an agent waits for, as the kernel tells it: real hosts, device and store, no Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llmos.drivers.protocols import EngineOptions, GenerationJob, SamplingParams
from llmos.drivers.stores.rows import SetHold
from llmos.kernel.core.limits import Quota
from llmos.kernel.core.slots import Slot, SlotState
from llmos.kernel.core.state import KernelCore
from llmos.kernel.core.types import ProcessKind
from llmos.kernel.scheduling import Scheduling
from llmos.kernel.why import Why
from llmos.shell.why import page
from tests.kernel import programs as p
from tests.kernel.local import until
from tests.kernel.machine import DESK, PEER, Machine


class Kernel(Why):
    """The kernel actor's part: everything is on one host and one device."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._core = KernelCore()
        slot = Slot("chat", 0)
        slot.state, slot.device = SlotState.READY, "cpu:0"
        self._core.slots["chat"] = slot
        self._handles = {"host:0": machine.host_handle, "device:cpu:0": machine.device_handle}
        self._kinds = {"host:0": ProcessKind.HOST, "device:cpu:0": ProcessKind.DEVICE}
        self._model_errors = {}

    async def _booted(self) -> None:
        pass

    async def _read(self, method: str, *args: Any, **options: Any) -> Any:
        return await self._machine.read(method, *args, **options)

    def _resolve(self, agent: str) -> str:
        return agent

    def _host_of(self, agent: str) -> str:
        return "host:0"


@pytest.fixture
async def machine(tmp_path: Path) -> AsyncIterator[Machine]:
    p.GATES.clear()
    made = Machine(tmp_path)
    await made.start()
    yield made
    for event in p.GATES.values():
        event.set()
    await made.device.cancel("test", ["long"])
    await made.stop()


async def why(machine: Machine, agent: str = DESK) -> list[dict[str, Any]]:
    found = await Kernel(machine).why(agent)
    assert isinstance(found, dict)
    console = Console(width=80, force_terminal=False)
    with console.capture() as got:
        console.print(page(found))
    assert max(map(len, got.get().splitlines())) <= 80
    return list(found["reasons"])


def flat(reasons: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for reason in reasons:
        yield reason
        yield from flat(reason["under"])


def one(reasons: list[dict[str, Any]], what: str) -> dict[str, Any]:
    (found,) = [r for r in flat(reasons) if r["what"] == what]
    return found


async def fill(machine: Machine) -> None:
    """A request that holds nearly all of the KV cache."""
    params = SamplingParams(max_new_tokens=8150, ignore_eos=True)
    job = GenerationJob("long", "a b", params, tenant="globex", agent="globex/p/x")
    assert await machine.device.submit("test", [("chat", job)]) == [None]
    await until(lambda: machine.device._causal["chat"].statistics().running)


async def test_an_agent_without_mail_waits_for_nothing(machine: Machine) -> None:
    assert "no message" in one(await why(machine), "nothing")["text"]


async def test_a_message_waits_for_the_turn_before_it(machine: Machine) -> None:
    first = machine.asking(DESK, p.Gate(name="one"))
    await until(lambda: "one" in p.GATES)
    second = machine.asking(DESK, p.Count())
    await until(lambda: machine.host._inbox.mailboxes.waiting(DESK))
    found = await why(machine)
    turn = one(found, "turn")
    assert (turn["kind"], turn["stage"]) == ("Gate", "computing")
    assert 0 < turn["deadline_in_s"] <= 20
    message = one(found, "mailbox")
    assert (message["by"], message["turns"], message["position"]) == ("turn", [turn["turn"]], 1)
    assert "turns run one after the other" in message["text"]
    p.gate("one").set()
    await asyncio.gather(first, second)


async def test_the_chain_of_asks_ends_at_the_queue_of_the_model(machine: Machine) -> None:
    await fill(machine)
    asked = machine.asking(DESK, p.Do(what="relay"))
    await until(lambda: machine.device._causal["chat"].statistics().waiting)
    found = await why(machine)
    assert one(found, "agent")["resource"] == PEER
    whats = [r["what"] for r in flat(found)]
    assert whats == ["turn", "agent", "turn", "model", "engine", "kv"]
    place = one(found, "engine")
    assert (place["state"], place["position"], place["running"]) == ("waiting", 1, 1)
    assert place["kv_needed"] > place["kv_free"] > 0
    assert "number 1 in the queue of chat" in place["text"]
    assert "order of arrival" in place["text"]
    assert "no room yet" in one(found, "kv")["text"]
    await machine.device.cancel("test", ["long"])
    assert "via desk" in (await asked).text


async def test_the_policy_says_why_it_stands_there(machine: Machine) -> None:
    await machine.device.unload("chat")
    await machine.device.load("echo", "causal", EngineOptions("chat", Path()), Scheduling("fair"))
    await fill(machine)
    asked = machine.asking(DESK, p.Say(text="hello"))
    await until(lambda: machine.device._causal["chat"].statistics().waiting)
    text = one(await why(machine), "engine")["text"]
    assert "the turn of its tenant acme" in text
    assert "tokens of work" in text
    await machine.device.cancel("test", ["long"])
    await asked


async def test_a_slot_that_is_not_there_is_told(machine: Machine) -> None:
    await fill(machine)
    asked = machine.asking(DESK, p.Say(text="hello"))
    await until(lambda: machine.device._causal["chat"].statistics().waiting)
    kernel = Kernel(machine)
    kernel._core.slots["chat"].state = SlotState.LOADING
    found = await kernel.why(DESK)
    assert isinstance(found, dict)
    assert "loading on cpu:0" in one(found["reasons"], "slot")["text"]
    kernel._core.slots["chat"].state = SlotState.READY
    del kernel._handles["device:cpu:0"]
    found = await kernel.why(DESK)
    assert isinstance(found, dict)
    assert "being restarted" in one(found["reasons"], "device")["text"]
    await machine.device.cancel("test", ["long"])
    await asked


async def test_a_held_agent_and_its_mail(machine: Machine) -> None:
    assert await machine.tell(DESK, p.Count()) is None
    await until(lambda: not machine.host._inbox.entries)
    await machine.host.hold(DESK, "unknown effect", "a call of bank")
    assert await machine.journal.commit([[SetHold(DESK, "unknown effect", "a call of bank")]]) == [
        None
    ]
    assert await machine.tell(DESK, p.Count()) is None
    found = await why(machine)
    assert one(found, "hold")["story"] == "a call of bank"
    assert "effects list" in one(found, "hold")["text"]
    assert one(found, "mailbox")["by"] == "hold"


async def test_a_quota_that_is_used_up_is_told(machine: Machine) -> None:
    quotas = {"acme": Quota(concurrent_requests=1)}
    await machine.device.unload("chat")
    scheduling = Scheduling("fair", {}, quotas)
    await machine.device.load("echo", "causal", EngineOptions("chat", Path()), scheduling)
    params = SamplingParams(max_new_tokens=4000, ignore_eos=True)
    job = GenerationJob("long", "a b", params, tenant="acme", agent="acme/p/x")
    assert await machine.device.submit("test", [("chat", job)]) == [None]
    told = await machine.device.places(DESK)
    assert told["requests"] == []
    assert told["refused"].limit == "concurrent_requests"
    reply = await machine.deliver(DESK, p.Say(text="x"))
    assert reply.error is not None
    assert reply.error.code == "OverQuota"


async def test_an_asker_who_leaves_cancels_the_whole_tree_of_calls(machine: Machine) -> None:
    await fill(machine)
    asked = machine.asking(DESK, p.Do(what="relay"))
    await until(lambda: machine.device._causal["chat"].statistics().waiting)
    asked.cancel()
    # The turn, that of the agent it asked, and its request: all end, and soon.
    await until(lambda: not machine.device._causal["chat"].statistics().waiting)
    await until(lambda: not machine.host._inbox.entries)
    assert machine.device._causal["chat"].statistics().cancelled == 1


async def test_the_deadline_of_a_turn_goes_with_its_requests(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(machine)
    engine = machine.device._causal["chat"]
    jobs: list[GenerationJob] = []
    submit = engine.submit
    monkeypatch.setattr(engine, "submit", lambda job, put: (jobs.append(job), submit(job, put)))
    began = time.monotonic()
    # Through two agents: who was asked has what is left to the one that asked.
    reply = await machine.deliver(DESK, p.Do(what="relay"), deadline_s=0.5)
    assert reply.error is not None
    assert reply.error.code == "DeadlineExceeded"
    (job,) = jobs
    assert job.deadline_s is not None
    assert began < job.deadline_s <= began + 1.0
    await until(lambda: not engine.statistics().waiting)
