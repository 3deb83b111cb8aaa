from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from llmos.drivers.errors import EngineFailed
from llmos.drivers.protocols import Passage
from llmos.drivers.stores.rows import JournalRow
from llmos.kernel import record
from llmos.kernel.context import Context
from llmos.kernel.dispatch import TurnDispatcher, as_llmos_error, status_of
from llmos.kernel.manifest import Limits, Manifest
from llmos.syscalls.base import Hit
from llmos.syscalls.clock import Now, Sleep
from llmos.syscalls.deferred import Post
from llmos.syscalls.errors import (
    Busy,
    CallCycle,
    Cancelled,
    CapabilityDenied,
    DeadlineExceeded,
    HandlerFailed,
    LabelViolation,
    SyscallError,
)
from llmos.syscalls.generate import Generate
from llmos.syscalls.labels import Labels, Sensitivity
from llmos.syscalls.messages import Message, Reply, Wire
from llmos.syscalls.retrieve import Retrieve
from tests.kernel.conftest import sample
from tests.kernel.local import RowLog
from tests.syscalls.fakes import SECRET, FakeServices, failing, words


class Hello(Message):
    text: str = ""


class HandClock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1e9 + self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds

    def random(self) -> float:
        return 0.5


class Bench:
    """A dispatcher with all that is around it."""

    def __init__(self, *capabilities: str, **given: Any) -> None:
        self.services = FakeServices()
        self.services.scripts = [words("one", " two", " three")]
        self.services.hits = [Hit(Passage("a#0", "a.md", "v1", (0, 4), "text"), 0.8)]
        self.clock = HandClock()
        self.log = RowLog()
        self.dispatcher = TurnDispatcher(
            agent="acme/desk/main",
            turn="turn-1",
            chain=given.get("chain", ()),
            manifest=Manifest(capabilities=capabilities, limits=given.get("limits", Limits())),
            services=self.services,
            clock=self.clock,
            deadline_s=given.get("deadline_s", 60.0),
            labels=given.get("labels", Labels()),
            log=self.log,
            epoch=3,
            code_version="c0de",
        )
        self.os = Context(self.dispatcher)

    @property
    def rows(self) -> list[JournalRow]:
        return self.log.rows

    def statuses(self) -> list[str]:
        """How the syscalls ended, in that order."""
        ended = [row for row in self.rows if row.phase in ("result", "failed")]
        return [status_of(record.raised(r.result) if r.phase == "failed" else None) for r in ended]


# ------------------------------------------------------------------ capabilities


async def test_what_no_capability_names_is_denied_with_the_remedy() -> None:
    bench = Bench("generate:chat", "retrieve:help")
    with pytest.raises(CapabilityDenied) as caught:
        await bench.os.generate("other", "hi")
    assert (caught.value.syscall, caught.value.resource) == ("generate", "other")
    assert 'add "generate:other" to the capabilities' in str(caught.value)
    assert caught.value.granted == ("generate:chat", "retrieve:help")
    with pytest.raises(CapabilityDenied, match='add "clock"'):
        await bench.os.now()
    assert bench.statuses() == ["denied", "denied"]
    assert not bench.services.jobs
    assert record.view(bench.rows[0].result)["error"] == "CapabilityDenied"


async def test_wildcards_cover_what_they_say_and_no_more() -> None:
    bench = Bench("retrieve:help-*", "ask:acme/finance/*")
    bench.services.reply = lambda e: Reply("t", e.receiver)
    await bench.os.retrieve("help-en", "q")
    assert await bench.os.ask("acme/finance/main", Hello()) is None
    for denied in (
        bench.os.retrieve("help", "q"),
        bench.os.retrieve("Help-en", "q"),
        bench.os.ask("acme/finance", Hello()),
        bench.os.ask("globex/finance/main", Hello()),
        bench.os.send("acme/finance/main", Hello()),
    ):
        with pytest.raises(CapabilityDenied):
            await denied


async def test_no_capabilities_no_syscalls() -> None:
    bench = Bench()
    for attempt in (bench.os.now(), bench.os.random(), bench.os.read_state("a/b/c")):
        with pytest.raises(CapabilityDenied):
            await attempt


# ------------------------------------------------------------------ bounds


async def test_a_deadline_cancels_the_handler_and_is_told() -> None:
    bench = Bench("clock")
    cancelled = asyncio.Event()

    async def hang(seconds: float) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    bench.services.sleep = hang  # type: ignore[method-assign]
    with pytest.raises(DeadlineExceeded) as caught:
        await bench.os.call(Sleep(seconds=5), deadline_s=0.01)
    assert caught.value.deadline_s == 0.01
    assert cancelled.is_set()
    assert bench.statuses() == ["error"]


async def test_no_syscall_gets_more_time_than_the_turn_has_left() -> None:
    bench = Bench("ask:*", deadline_s=2.0)
    bench.services.reply = lambda e: Reply("t", e.receiver)
    bench.clock.now += 1.5
    assert bench.os.remaining_s == 0.5
    await bench.os.ask("acme/a/b", Hello(), deadline_s=30.0)
    await bench.os.ask("acme/a/b", Hello(), deadline_s=0.25)
    assert [e.deadline_s for e in bench.services.asked] == [0.5, 0.25]
    bench.clock.now += 10
    assert bench.os.remaining_s == 0.0


async def test_a_turn_has_a_bounded_number_of_syscalls() -> None:
    bench = Bench("clock", limits=Limits(syscalls_per_turn=2))
    await bench.os.now()
    await bench.os.now()
    with pytest.raises(Busy, match="syscalls_per_turn") as caught:
        await bench.os.now()
    assert caught.value.waiting == 2
    assert bench.statuses() == ["ok", "ok", "error"]


async def test_an_agent_does_not_wait_for_itself() -> None:
    bench = Bench("ask:*", "send:*", chain=("acme/boss/main",))
    for agent in ("acme/desk/main", "acme/boss/main"):
        with pytest.raises(CallCycle) as caught:
            await bench.os.ask(agent, Hello())
        assert caught.value.chain == ("acme/boss/main", "acme/desk/main")
    # To tell is not to wait.
    await bench.os.send("acme/boss/main", Hello())
    (post,) = bench.services.deferred
    assert isinstance(post, Post)
    assert (post.receiver, post.cause) == ("acme/boss/main", "turn-1/3")
    assert not bench.services.asked


async def test_a_chain_of_askers_has_a_bounded_depth() -> None:
    limits = Limits(call_depth=2)
    shallow = Bench("ask:*", chain=("acme/a/1",), limits=limits)
    shallow.services.reply = lambda e: Reply("t", e.receiver)
    await shallow.os.ask("acme/z/1", Hello())
    deep = Bench("ask:*", chain=("acme/a/1", "acme/a/2"), limits=limits)
    with pytest.raises(Busy, match="acme/a/1 → acme/a/2 → acme/desk/main"):
        await deep.os.ask("acme/z/1", Hello())


# ------------------------------------------------------------------ labels and provenance


async def test_data_of_a_tenant_stays_with_it() -> None:
    bench = Bench("ask:*", "send:*", "retrieve:help")
    bench.services.reply = lambda e: Reply("t", e.receiver)
    await bench.os.ask("globex/desk/main", Hello())
    await bench.os.retrieve("help", "q")
    for flow in (
        bench.os.ask("globex/desk/main", Hello()),
        bench.os.send("globex/desk/main", Hello()),
    ):
        with pytest.raises(LabelViolation, match="data of acme") as caught:
            await flow
        assert caught.value.sink == "globex/desk/main"
        assert caught.value.remedy
    await bench.os.ask("acme/other/main", Hello())
    assert bench.statuses() == ["ok", "ok", "denied", "denied", "ok"]
    assert [e.labels for e in bench.services.asked] == [Labels(), SECRET]


async def test_a_turn_joins_all_it_has_seen_in_order_and_once() -> None:
    bench = Bench("retrieve:help", "generate:chat", labels=Labels(trusted=False))
    await bench.os.retrieve("help", "q")
    await bench.os.generate("chat", "hi")
    await bench.os.retrieve("help", "q again")
    assert bench.os.labels == SECRET.join(Labels(trusted=False))
    assert [p.source for p in bench.dispatcher.provenance] == ["a.md", "chat"]


async def test_what_failed_leaves_no_labels() -> None:
    bench = Bench("generate:chat")
    bench.services.scripts = [failing(EngineFailed("chat", "it broke"))]
    with pytest.raises(EngineFailed):
        await bench.os.generate("chat", "hi")
    assert bench.os.labels == Labels()
    assert not bench.dispatcher.provenance


# ------------------------------------------------------------------ the record


async def test_a_row_tells_of_request_result_and_time() -> None:
    bench = Bench("retrieve:help", "clock")
    before = sample("llmos_syscall_seconds_count", syscall="retrieve", status="ok")
    bench.clock.now += 2.0
    await bench.os.retrieve("help", "where", k=3)
    await bench.os.sleep(1.25)
    first, second = bench.rows
    assert (first.agent, first.turn, first.seq) == ("acme/desk/main", "turn-1", 1)
    assert (first.kind, first.name, first.phase) == ("Retrieve", "help", "result")
    assert (first.epoch, first.code_version) == (3, "c0de")
    assert (first.ts, first.elapsed_s) == (1e9 + 102.0, 0.0)
    assert record.view(first.args)["query"] == "where"
    assert first.args_hash == record.hash_of(first.args)
    assert record.view(first.result)["passages"][0]["text"] == "text"
    assert record.provenance_of(first)[0].source == "a.md"
    assert record.labels_of(first).sensitivity == Sensitivity.CONFIDENTIAL
    assert (second.seq, second.kind, second.name) == (2, "Sleep", "")
    after = sample("llmos_syscall_seconds_count", syscall="retrieve", status="ok")
    assert after == before + 1


async def test_an_error_is_recorded_with_its_facts_and_raised() -> None:
    bench = Bench("generate:chat")
    bench.services.scripts = [failing(EngineFailed("chat", "it broke"))]
    with pytest.raises(EngineFailed):
        await bench.os.generate("chat", "hi")
    (row,) = bench.rows
    assert row.phase == "failed"
    told = record.raised(row.result)
    assert isinstance(told, EngineFailed)
    assert (told.model, told.reason) == ("chat", "it broke")


async def test_a_cancelled_syscall_is_recorded_as_cancelled() -> None:
    bench = Bench("clock")

    async def hang(seconds: float) -> None:
        await asyncio.Event().wait()

    bench.services.sleep = hang  # type: ignore[method-assign]
    task = asyncio.create_task(bench.os.sleep(5))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert bench.statuses() == ["cancelled"]


async def test_concurrent_syscalls_have_their_own_numbers() -> None:
    bench = Bench("clock", "random")
    await asyncio.gather(bench.os.now(), bench.os.random(), bench.os.now())
    assert sorted(row.seq for row in bench.rows) == [1, 2, 3]


# ------------------------------------------------------------------ streams


async def test_a_stream_brings_the_words_and_is_recorded_once() -> None:
    bench = Bench("generate:chat")
    request = Generate(model="chat", prompt="hi")
    assert [t async for t in bench.os.stream(request)] == ["one", " two", " three"]
    (row,) = bench.rows
    assert (row.phase, record.view(row.result)["text"]) == ("result", "one two three")
    assert record.view(row.result)["pieces"] == [["one", 1], [" two", 1], [" three", 1], ["", 0]]
    assert bench.os.labels == Labels(trusted=False)
    bench.dispatcher.finish()
    assert len(bench.rows) == 1


async def test_a_stream_that_is_left_early_is_cancelled_and_still_was_seen() -> None:
    bench = Bench("generate:chat")
    async with aclosing(bench.os.stream(Generate(model="chat", prompt="hi"))) as texts:  # type: ignore[type-var]
        async for _ in texts:
            break
    assert bench.statuses() == ["cancelled"]
    # What was handed out of it is in the record, apart.
    assert [row.phase for row in bench.rows] == ["partial", "failed"]
    assert record.view(bench.rows[0].result) == {"pieces": [["one", 1]]}
    assert len(bench.services.closed) == 1
    # The model's words were read, so this turn is no longer trusted.
    assert bench.os.labels == Labels(trusted=False)
    assert [p.source for p in bench.dispatcher.provenance] == ["chat"]


async def test_what_a_handler_leaves_open_is_recorded_before_the_turn_is() -> None:
    bench = Bench("generate:chat", "clock")
    texts = bench.os.stream(Generate(model="chat", prompt="hi"))
    assert await anext(texts) == "one"
    await bench.os.now()
    bench.dispatcher.finish()
    # With the words that it had been shown.
    assert [(r.seq, r.phase) for r in bench.rows] == [(2, "result"), (1, "partial"), (1, "failed")]
    assert bench.statuses() == ["ok", "cancelled"]
    await texts.aclose()  # type: ignore[attr-defined]
    assert len(bench.rows) == 3


async def test_a_denied_stream_never_begins() -> None:
    bench = Bench()
    with pytest.raises(CapabilityDenied):
        await anext(bench.os.stream(Generate(model="chat", prompt="hi")))
    assert bench.statuses() == ["denied"]


async def test_a_stream_has_a_deadline() -> None:
    bench = Bench("generate:chat")

    async def hang(model: str, job: Any) -> Any:
        await asyncio.Event().wait()
        yield

    bench.services.generate = hang  # type: ignore[method-assign]
    with pytest.raises(DeadlineExceeded):
        await anext(bench.os.stream(Generate(model="chat", prompt="hi"), deadline_s=0.01))
    assert bench.statuses() == ["error"]


# ------------------------------------------------------------------ the context


async def test_the_context_checks_the_class_of_a_reply() -> None:
    bench = Bench("ask:*")
    bench.services.reply = lambda e: Reply("t", e.receiver, wire=Wire.of(Hello(text="yes")))
    assert await bench.os.ask("acme/a/b", Hello(), Hello) == Hello(text="yes")
    assert await bench.os.ask("acme/a/b", Hello()) == Hello(text="yes")

    class Other(Message):
        number: int

    with pytest.raises(SyscallError, match="number"):
        await bench.os.ask("acme/a/b", Hello(), Other)


async def test_every_method_of_the_context_reaches_its_handler() -> None:
    bench = Bench(
        "generate:*", "embed:*", "retrieve:*", "graph:*", "rules:*", "state:*", "clock", "random"
    )
    services = bench.services
    services.add_rules("r", '{"templates": {}}')
    services.states["acme/x/y"] = {"n": 1}
    assert (await bench.os.generate("m", "hi")).text == "one two three"
    assert (await bench.os.embed("m", ["a", "b"])).vectors.shape[0] == 2
    assert (await bench.os.retrieve("c", "q")).passages[0].score == 0.8
    assert (await bench.os.find_nodes("g", "text")).nodes == ()
    assert (await bench.os.rules("r", [])).fired == ()
    assert (await bench.os.read_state("acme/x/y")).state == {"n": 1}
    assert await bench.os.now() == services.time()
    assert await bench.os.random() == services.random()
    assert (bench.os.agent, bench.os.tenant, bench.os.turn) == (
        "acme/desk/main",
        "acme",
        "turn-1",
    )
    assert set(bench.statuses()) == {"ok"}


def test_a_handlers_own_error_is_told_with_its_place() -> None:
    try:
        raise ZeroDivisionError("one by zero")
    except ZeroDivisionError as error:
        told = as_llmos_error(error, "a/b/c", "t1")
    assert isinstance(told, HandlerFailed)
    assert told.error == "ZeroDivisionError: one by zero"
    assert told.where.startswith("test_dispatch.py:")
    assert "llmos strace t1" in str(told)
    typed = EngineFailed("m", "x")
    assert as_llmos_error(typed, "a/b/c", "t1") is typed


async def test_requests_can_be_made_by_hand() -> None:
    bench = Bench("clock", "retrieve:help")
    assert (await bench.os.call(Now())).time_s == bench.services.time()
    assert (await bench.os.call(Retrieve(corpus="help", query="q"), 1.0)).passages


# ------------------------------------------------------------------ what must be durable before


async def test_what_another_agent_sees_waits_for_all_that_was_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench("retrieve:help", "ask:*", "clock")
    order: list[str] = []
    bench.services.reply = lambda e: order.append("asked") or Reply("t", e.receiver)  # type: ignore[func-returns-value]
    barrier = bench.log.barrier

    async def noted() -> None:
        order.append(f"durable {len(bench.rows)}")
        await barrier()

    monkeypatch.setattr(bench.log, "barrier", noted)
    await bench.os.retrieve("help", "q")
    await bench.os.now()
    assert order == []
    await bench.os.ask("acme/a/b", Hello())
    assert order == ["durable 2", "asked"]


async def test_results_that_come_together_are_handed_out_one_by_one() -> None:
    """So the order in which they were handed out is the order of the rows."""
    bench = Bench("clock", "random")
    seen: list[str] = []

    async def chain(name: str) -> None:
        for _ in range(3):
            await bench.os.now()
            seen.append(name)

    await asyncio.gather(*(chain(name) for name in "abc"))
    names = {1: "a", 2: "b", 3: "c"}
    for row in bench.rows:
        assert row.seq in names or row.seq > 3
    assert len(seen) == len(bench.rows) == 9
    order = [row.seq for row in bench.rows]
    assert order[:3] == [1, 2, 3]
    # A call is made as soon as the one before it was handed out, so its number tells of whom.
    made = sorted(order)
    assert made == list(range(1, 10))


async def test_a_task_that_was_left_makes_no_syscalls_and_no_marks() -> None:
    bench = Bench("clock")
    assert bench.dispatcher.finish() is None
    for late in (bench.os.now(), _as_call(bench.os.patched, "x")):
        with pytest.raises(Cancelled, match="the end of its turn"):
            await late
    assert not bench.rows


async def _as_call(function: Any, *args: Any) -> Any:
    return function(*args)


async def test_a_patch_is_marked_once_and_stays() -> None:
    bench = Bench("clock")
    await bench.os.now()
    assert bench.os.patched("twice")
    assert bench.os.patched("twice")
    assert bench.os.patched("other")
    marks = [row for row in bench.rows if row.phase == "mark"]
    assert [(m.kind, m.name, m.seq, m.part) for m in marks] == [
        ("Patched", "twice", 1, 1),
        ("Patched", "other", 1, 2),
    ]


async def test_ids_need_no_record_and_differ() -> None:
    bench, same = Bench(), Bench()
    ids = [bench.os.uuid() for _ in range(3)]
    assert len(set(ids)) == 3
    assert [same.os.uuid() for _ in range(3)] == ids
    assert not bench.rows
