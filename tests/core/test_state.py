from __future__ import annotations

import pickle
import time
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from llmos.drivers.errors import EngineFailed, UnknownModel
from llmos.drivers.stores.rows import SHARDS, shard_of
from llmos.kernel.core import actions as act
from llmos.kernel.core import events as ev
from llmos.kernel.core.errors import (
    AlreadyLaunched,
    DoesNotFit,
    HostUnavailable,
    NoDevice,
    NoOtherHost,
    UnknownProcess,
)
from llmos.kernel.core.shards import Shard
from llmos.kernel.core.slots import SlotState
from llmos.kernel.core.state import Actions, KernelCore
from llmos.kernel.core.types import DeviceSpec, ModelSpec, ProcessKind, ProcessState, ShardState
from llmos.syscalls.errors import UnknownAgent

Feed = Callable[[ev.AnyEvent], Actions]

CHAT = ModelSpec("chat", "causal", 60)
EMBED = ModelSpec("embed", "encoder", 20, pinned=True)
BIG = ModelSpec("big", "causal", 500)
OTHER = ModelSpec("other", "causal", 50)


def answer_fences(feed: Feed, actions: Actions) -> Actions:
    """The store writes every epoch that it is told to."""
    out: Actions = []
    for fence in of(actions, act.Fence):
        out += feed(
            ev.Fenced(now=0.1, cause="f", host=fence.host, epoch=fence.epoch, shards=fence.shards)
        )
    return out


def up(feed: Feed, actions: Actions, now: float = 0.1) -> Actions:
    """Every process that is started comes up."""
    out: Actions = []
    for start in of(actions, act.StartProcess):
        out += feed(
            ev.ProcessUp(now=now, cause="up", process=start.process, incarnation=start.incarnation)
        )
    return out


def lose(feed: Feed, core: KernelCore, process: str, now: float = 1.0) -> Actions:
    incarnation = core.processes[process].incarnation
    return feed(
        ev.ProcessLost(now=now, cause="l", process=process, incarnation=incarnation, reason="boom")
    )


def wear_out(feed: Feed, core: KernelCore, process: str, now: float = 1.0) -> Actions:
    """Lose a process until it is given up; the actions of the last loss."""
    while True:
        out = lose(feed, core, process, now)
        if core.processes[process].state is ProcessState.GIVEN_UP:
            return out
        if core.processes[process].state is ProcessState.WAITING:
            now += 5.0
            out = feed(ev.Tick(now=now, cause="t"))
        answer_fences(feed, out)


def boot(feed: Feed, *, hosts: int = 1, capacity: int = 100) -> Actions:
    out = feed(
        ev.Booted(
            now=0.0,
            cause="boot",
            devices=(DeviceSpec("cpu:0", "cpu", capacity, 4),),
            models=(CHAT, EMBED, BIG, OTHER),
            hosts=hosts,
        )
    )
    return out + answer_fences(feed, out) + up(feed, out)


def of(actions: Actions, kind: type) -> list:
    return [a for a in actions if isinstance(a, kind)]


def launch(feed: Feed, agent: str = "t/p/a", *models: str, now: float = 1.0) -> Actions:
    return feed(
        ev.LaunchAsked(
            now=now,
            cause=f"launch:{agent}",
            agent=agent,
            models=tuple((m, None) for m in models or ("chat",)),
        )
    )


def loaded(feed: Feed, slot: str, size: int = 10, now: float = 2.0) -> Actions:
    return feed(ev.SlotLoaded(now=now, cause="device", slot=slot, measured={"weights": size}))


def test_boot_starts_everything_and_loads_what_is_pinned(core: KernelCore, feed: Feed) -> None:
    out = boot(feed, hosts=2)
    started = {a.process for a in of(out, act.StartProcess)}
    assert started == {"journal", "knowledge", "device:cpu:0", "host:0", "host:1"}
    assert [a.slot for a in of(out, act.LoadSlot)] == ["embed"]
    assert core.ledger.free_bytes("cpu:0") == 80


def test_launch_waits_for_its_model_and_then_is_served(core: KernelCore, feed: Feed) -> None:
    boot(feed)
    out = launch(feed)
    assert [a.slot for a in of(out, act.LoadSlot)] == ["chat"]
    assert not of(out, act.Launched)
    assert core.route("t/p/a") is None
    (launched,) = of(loaded(feed, "chat"), act.Launched)
    assert (launched.cause, launched.agent) == ("launch:t/p/a", "t/p/a")
    assert core.route("t/p/a") == ("host:0", core.epoch_of("host:0"))


def test_a_second_launch_of_the_model_shares_the_slot(core: KernelCore, feed: Feed) -> None:
    boot(feed)
    launch(feed)
    loaded(feed, "chat")
    out = launch(feed, "t/p/b")
    assert not of(out, act.LoadSlot)
    assert of(out, act.Launched)
    assert core.slots["chat"].users == {"t/p/a", "t/p/b"}


def test_what_can_never_fit_is_refused_with_the_numbers(feed: Feed) -> None:
    boot(feed)
    (refused,) = of(launch(feed, "t/p/a", "big"), act.Refused)
    assert isinstance(refused.error, DoesNotFit)
    assert (refused.error.needed_bytes, refused.error.capacity_bytes) == (500, 100)


def test_a_manifest_may_ask_for_more_than_any_device_has(feed: Feed) -> None:
    boot(feed)
    out = feed(ev.LaunchAsked(now=1.0, cause="r", agent="t/p/a", models=(("chat", 64 << 30),)))
    (refused,) = of(out, act.Refused)
    assert isinstance(refused.error, DoesNotFit)
    assert refused.error.needed_bytes == 64 << 30


def test_an_unknown_model_and_a_double_launch_are_refused(feed: Feed) -> None:
    boot(feed)
    (refused,) = of(launch(feed, "t/p/a", "nonsense"), act.Refused)
    assert isinstance(refused.error, UnknownModel)
    launch(feed)
    (refused,) = of(launch(feed), act.Refused)
    assert isinstance(refused.error, AlreadyLaunched)


def test_what_does_not_fit_now_waits_until_a_kill_makes_room(core: KernelCore, feed: Feed) -> None:
    boot(feed)
    launch(feed)
    loaded(feed, "chat")
    out = launch(feed, "t/q/b", "other")
    assert not of(out, act.LoadSlot)
    assert not of(out, act.Refused)
    out = feed(ev.KillAsked(now=3.0, cause="k", agent="t/p/a"))
    assert of(out, act.Killed)
    (unload,) = of(out, act.UnloadSlot)
    assert unload.slot == "chat"
    assert core.slots["chat"].state is SlotState.DRAINING
    out = feed(ev.SlotUnloaded(now=4.0, cause="device", slot="chat"))
    assert [a.slot for a in of(out, act.LoadSlot)] == ["other"]
    assert of(loaded(feed, "other", now=5.0), act.Launched)


def test_a_leased_or_pinned_slot_is_never_unloaded(core: KernelCore, feed: Feed) -> None:
    boot(feed)
    loaded(feed, "embed")
    launch(feed)
    loaded(feed, "chat")
    out = launch(feed, "t/q/b", "other")
    assert not of(out, act.UnloadSlot)
    assert core.slots["chat"].state is SlotState.READY


def test_giving_up_a_launch_frees_its_claim(core: KernelCore, feed: Feed) -> None:
    boot(feed)
    launch(feed)
    feed(ev.LaunchGivenUp(now=2.0, cause="x", request="launch:t/p/a"))
    assert not core.agents
    assert not core.slots["chat"].users
    with pytest.raises(UnknownAgent):
        core.route("t/p/a")


def test_a_model_that_cannot_be_loaded_refuses_its_launches(core: KernelCore, feed: Feed) -> None:
    boot(feed)
    launch(feed)
    error = EngineFailed("chat", "no such file")
    out = feed(ev.SlotFailed(now=2.0, cause="device", slot="chat", error=error))
    (refused,) = of(out, act.Refused)
    assert refused.error is error
    assert core.ledger.free_bytes("cpu:0") == 80
    # The next launch tries again.
    assert of(launch(feed, now=3.0), act.LoadSlot)


def test_a_lost_host_is_fenced_and_restarted_at_once(core: KernelCore, feed: Feed) -> None:
    boot(feed)
    launch(feed)
    loaded(feed, "chat")
    before = core.route("t/p/a")
    out = lose(feed, core, "host:0", now=5.0)
    kinds = [type(a) for a in out]
    assert kinds.index(act.Fence) < kinds.index(act.StartProcess)
    (fence,) = of(out, act.Fence)
    assert fence.shards == tuple(range(SHARDS))
    assert of(out, act.ForgetClient)
    assert core.route("t/p/a") is None
    up(feed, out, now=6.0)
    assert core.route("t/p/a") is None
    answer_fences(feed, out)
    after = core.route("t/p/a")
    assert before is not None
    assert after is not None
    assert after[1] == fence.epoch > before[1]


def test_news_of_an_old_incarnation_is_ignored(core: KernelCore, feed: Feed) -> None:
    boot(feed)
    feed(ev.ProcessLost(now=5.0, cause="h", process="host:0", incarnation=1, reason="x"))
    assert not feed(ev.ProcessLost(now=5.1, cause="h", process="host:0", incarnation=1, reason="x"))
    assert not feed(ev.ProcessUp(now=5.2, cause="h", process="host:0", incarnation=1))
    assert core.processes["host:0"].state is ProcessState.STARTING


def test_restarts_slow_down_then_the_shards_move(core: KernelCore, feed: Feed) -> None:
    boot(feed, hosts=3)
    launch(feed)
    loaded(feed, "chat")
    mine = {n for n, s in enumerate(core.shards) if s.host == "host:0"}
    out = wear_out(feed, core, "host:0")
    # The others started earlier, under lower epochs: they serve once the store says so.
    fences = of(out, act.Fence)
    assert {f.host for f in fences} == {"host:1", "host:2"}
    assert {n for f in fences for n in f.shards} == mine
    assert {s.state for n, s in enumerate(core.shards) if n in mine} == {ShardState.MOVING}
    loads = Counter(s.host for s in core.shards)
    assert max(loads.values()) - min(loads.values()) <= 1
    assert set(core.shard_map()) == {
        ("", 0),
        ("host:1", core.epoch_of("host:1")),
        ("host:2", core.epoch_of("host:2")),
    }
    answer_fences(feed, out)
    assert ("", 0) not in core.shard_map()
    assert core.route("t/p/a") == core.shard_map()[shard_of("t/p/a")]


def test_chance_spreads_restarts(core: KernelCore, feed: Feed) -> None:
    boot(feed)
    lose(feed, core, "host:0")
    out = feed(
        ev.ProcessLost(now=2.0, cause="l", process="host:0", incarnation=2, reason="x", chance=0.0)
    )
    (wake,) = of(out, act.WakeAt)
    assert wake.when == pytest.approx(2.4)


def test_shards_are_spread_over_hosts_and_fenced_before_they_start(
    core: KernelCore, feed: Feed
) -> None:
    out = boot(feed, hosts=3)
    fences = {f.host: f for f in of(out, act.Fence)}
    for start in of(out, act.StartProcess):
        if start.kind is ProcessKind.HOST:
            fence = fences[start.process]
            assert out.index(fence) < out.index(start)
            assert fence.epoch == start.epoch == core.epoch_of(start.process)
    assert [s.host for s in core.shards] == [f"host:{n % 3}" for n in range(SHARDS)]
    assert {s.state for s in core.shards} == {ShardState.SERVED}
    with pytest.raises(UnknownProcess):
        core.epoch_of("journal")


def test_a_pattern_serves_any_key_of_its_program(core: KernelCore, feed: Feed) -> None:
    boot(feed, hosts=4)
    launch(feed, "t/p/*")
    assert core.route("t/p/7") is None
    assert not core.serves("t/p/7")
    loaded(feed, "chat")
    assert core.serves("t/p/7")
    assert not core.serves("t/q/7")
    hosts = {route[0] for n in range(100) if (route := core.route(f"t/p/{n}"))}
    assert hosts == {"host:0", "host:1", "host:2", "host:3"}
    with pytest.raises(UnknownAgent):
        core.route("t/q/7")
    # An agent launched by its own name beside it waits for its own models and is served.
    launch(feed, "t/p/7", "other")
    assert core.route("t/p/7") is not None
    feed(ev.KillAsked(now=3.0, cause="k", agent="t/p/*"))
    assert core.route("t/p/7") is None
    with pytest.raises(UnknownAgent):
        core.route("t/p/8")


def test_an_answer_to_a_fence_of_the_past_has_the_owner_fenced_again(
    core: KernelCore, feed: Feed
) -> None:
    boot(feed, hosts=2)
    first = lose(feed, core, "host:0")
    (old,) = of(first, act.Fence)
    second = lose(feed, core, "host:0")
    (wake,) = of(second, act.WakeAt)
    (new,) = of(feed(ev.Tick(now=wake.when, cause="t")), act.Fence)
    answer_fences(feed, [new])
    # The store may have written the old epoch after the new one.
    (again,) = of(answer_fences(feed, [old]), act.Fence)
    assert (again.epoch, again.shards) == (new.epoch, old.shards)
    assert {s.state for s in core.shards if s.host == "host:0"} == {ShardState.MOVING}
    answer_fences(feed, [again])
    assert {s.state for s in core.shards} == {ShardState.SERVED}


def test_a_drained_host_is_stopped_when_others_serve_its_shards(
    core: KernelCore, feed: Feed
) -> None:
    boot(feed, hosts=3)
    out = feed(ev.DrainAsked(now=2.0, cause="drain", process="host:1"))
    releases = of(out, act.ReleaseShards)
    assert {r.to for r in releases} == {"host:0", "host:2"}
    # Until it has released them, it serves them.
    assert ("host:1", core.epoch_of("host:1")) in core.shard_map()
    fences: Actions = []
    for r in releases:
        fences += feed(ev.ShardsReleased(now=3.0, cause="r", host=r.host, shards=r.shards, to=r.to))
    assert not of(fences, act.StopProcess)
    assert {f.host for f in of(fences, act.Fence)} == {"host:0", "host:2"}
    out = answer_fences(feed, fences)
    assert [a.process for a in of(out, act.StopProcess)] == ["host:1"]
    assert [(a.process, a.cause) for a in of(out, act.Drained)] == [("host:1", "drain")]
    assert core.processes["host:1"].state is ProcessState.STOPPED
    assert Counter(s.host for s in core.shards) == {"host:0": 128, "host:2": 128}
    # Its end is no crash.
    assert not lose(feed, core, "host:1")
    (drained,) = feed(ev.DrainAsked(now=4.0, cause="again", process="host:1"))
    assert drained == act.Drained(process="host:1", cause="again")


def test_what_cannot_be_drained_is_refused(core: KernelCore, feed: Feed) -> None:
    boot(feed)
    (refused,) = feed(ev.DrainAsked(now=2.0, cause="d", process="host:0"))
    assert isinstance(refused, act.Refused)
    assert isinstance(refused.error, NoOtherHost)
    for name in ("host:9", "journal"):
        (refused,) = feed(ev.DrainAsked(now=2.0, cause="d", process=name))
        assert isinstance(refused, act.Refused)
        assert isinstance(refused.error, UnknownProcess)
        assert pickle.loads(pickle.dumps(refused.error)).process == name


def test_a_host_lost_while_it_is_drained_stays_down(core: KernelCore, feed: Feed) -> None:
    boot(feed, hosts=2)
    out = feed(ev.DrainAsked(now=2.0, cause="d", process="host:1"))
    (release,) = of(out, act.ReleaseShards)
    out = lose(feed, core, "host:1", now=3.0)
    assert not of(out, act.StartProcess)
    (fence,) = of(out, act.Fence)
    assert (fence.host, fence.shards) == ("host:0", release.shards)
    assert of(answer_fences(feed, out), act.Drained)
    # The answer comes late, and changes nothing.
    assert not feed(
        ev.ShardsReleased(now=4.0, cause="r", host="host:1", shards=release.shards, to="host:0")
    )


def test_a_drain_whose_target_is_lost_is_refused_and_the_shards_come_back(
    core: KernelCore, feed: Feed
) -> None:
    boot(feed, hosts=2)
    (release,) = of(feed(ev.DrainAsked(now=2.0, cause="d", process="host:1")), act.ReleaseShards)
    out = wear_out(feed, core, "host:0", now=3.0)
    (refused,) = of(out, act.Refused)
    assert isinstance(refused.error, NoOtherHost)
    assert refused.cause == "d"
    assert {s.host for s in core.shards} == {"host:1"}
    answer_fences(feed, out)
    out = feed(
        ev.ShardsReleased(now=9.0, cause="r", host="host:1", shards=release.shards, to="host:0")
    )
    (fence,) = of(out, act.Fence)
    assert (fence.host, fence.shards) == ("host:1", release.shards)
    answer_fences(feed, out)
    assert set(core.shard_map()) == {("host:1", core.epoch_of("host:1"))}


def test_rebalancing_moves_as_few_as_possible(core: KernelCore, feed: Feed) -> None:
    boot(feed, hosts=4)
    for shard in core.shards[:40]:
        shard.host = "host:0"
    before = Counter(s.host for s in core.shards)
    out = feed(ev.RebalanceAsked(now=2.0, cause="r"))
    moved = sum(len(r.shards) for r in of(out, act.ReleaseShards))
    assert moved == before["host:0"] - 64
    # Asked again while they move: nothing more to do.
    assert not of(feed(ev.RebalanceAsked(now=2.1, cause="r")), act.ReleaseShards)
    fences: Actions = []
    for r in of(out, act.ReleaseShards):
        fences += feed(ev.ShardsReleased(now=3.0, cause="r", host=r.host, shards=r.shards, to=r.to))
    answer_fences(feed, fences)
    assert set(Counter(s.host for s in core.shards).values()) == {64}
    assert {s.state for s in core.shards} == {ShardState.SERVED}


def test_without_the_journal_the_hosts_are_stopped_and_routes_name_it(
    core: KernelCore, feed: Feed
) -> None:
    boot(feed, hosts=2)
    launch(feed)
    loaded(feed, "chat")
    launch(feed, "t/p/b", "other")
    out = lose(feed, core, "journal")
    assert not of(out, act.StopProcess)  # It comes back; hosts wait for it.
    out = wear_out(feed, core, "journal")
    assert {a.process for a in of(out, act.StopProcess)} == {"host:0", "host:1"}
    assert any("being of no use" in n.text for n in of(out, act.Note))
    assert core.processes["host:0"].state is ProcessState.STOPPED
    with pytest.raises(HostUnavailable, match="journal"):
        core.route("t/p/a")
    assert set(core.shard_map()) == {("", 0)}
    # Knowledge is another matter: syscalls fail, turns go on.
    (refused,) = of(launch(feed, "t/p/c", now=9.0), act.Refused)
    assert "journal" in str(refused.error)


def test_what_nobody_needs_falls_alone(core: KernelCore, feed: Feed) -> None:
    boot(feed)
    launch(feed)
    loaded(feed, "chat")
    out = wear_out(feed, core, "knowledge")
    assert not of(out, act.StopProcess)
    assert core.route("t/p/a") is not None


def test_a_given_up_device_gets_no_more_models(core: KernelCore, feed: Feed) -> None:
    boot(feed)
    for n in range(4):
        feed(
            ev.ProcessLost(
                now=1.0, cause="d", process="device:cpu:0", incarnation=n + 1, reason="boom"
            )
        )
        feed(ev.Tick(now=50.0 if n else 1.0, cause="t"))
    assert core.processes["device:cpu:0"].state is ProcessState.GIVEN_UP
    (refused,) = of(launch(feed, now=60.0), act.Refused)
    assert isinstance(refused.error, NoDevice)


def test_a_failed_model_that_needs_room_is_tried_again_not_refused(
    core: KernelCore, feed: Feed
) -> None:
    boot(feed)
    launch(feed, "t/p/a", "other")
    feed(ev.SlotFailed(now=2.0, cause="d", slot="other", error=EngineFailed("other", "x")))
    launch(feed, "t/p/b", "chat", now=3.0)
    loaded(feed, "chat", now=4.0)
    feed(ev.KillAsked(now=5.0, cause="k", agent="t/p/b"))
    out = launch(feed, "t/p/c", "other", now=6.0)
    assert not of(out, act.Refused)
    assert [a.slot for a in of(out, act.UnloadSlot)] == ["chat"]


def test_what_a_manifest_asked_for_is_given_back_with_it(core: KernelCore, feed: Feed) -> None:
    boot(feed)
    feed(ev.LaunchAsked(now=1.0, cause="r", agent="t/p/a", models=(("chat", 75),)))
    assert core.slots["chat"].size_bytes == 75
    assert core.ledger.free_bytes("cpu:0") == 5
    loaded(feed, "chat")
    out = feed(ev.LaunchAsked(now=2.0, cause="r2", agent="t/p/b", models=(("chat", 79),)))
    assert of(out, act.Launched)
    assert core.ledger.free_bytes("cpu:0") == 1
    out = feed(ev.LaunchAsked(now=2.0, cause="r3", agent="t/p/c", models=(("chat", 80),)))
    assert of(out, act.Launched)
    feed(ev.KillAsked(now=3.0, cause="k", agent="t/p/a"))
    feed(ev.KillAsked(now=3.0, cause="k", agent="t/p/b"))
    feed(ev.KillAsked(now=3.0, cause="k", agent="t/p/c"))
    assert core.slots["chat"].size_bytes == 60


def test_without_any_host_agents_are_said_to_be_unreachable(core: KernelCore, feed: Feed) -> None:
    boot(feed)
    launch(feed)
    loaded(feed, "chat")
    wear_out(feed, core, "host:0")
    with pytest.raises(HostUnavailable, match="boom"):
        core.route("t/p/a")
    (refused,) = of(launch(feed, "t/p/b"), act.Refused)
    assert isinstance(refused.error, HostUnavailable)


def test_a_host_that_comes_up_takes_what_nobody_serves(core: KernelCore, feed: Feed) -> None:
    feed(ev.Booted(now=0.0, cause="boot", devices=(), models=(), hosts=1))
    for number in range(3):
        core.shards[number] = Shard()
    out = feed(ev.ProcessUp(now=1.0, cause="up", process="host:0", incarnation=1))
    (fence,) = of(out, act.Fence)
    assert (fence.host, fence.shards) == ("host:0", (0, 1, 2))


def test_a_lost_device_comes_back_with_its_models(core: KernelCore, feed: Feed) -> None:
    boot(feed)
    loaded(feed, "embed")
    launch(feed)
    loaded(feed, "chat")
    feed(ev.ProcessLost(now=5.0, cause="d", process="device:cpu:0", incarnation=1, reason="oom"))
    assert core.slots["chat"].state is SlotState.FAILED
    assert core.ledger.free_bytes("cpu:0") == 100
    out = feed(ev.ProcessUp(now=6.0, cause="d", process="device:cpu:0", incarnation=2))
    assert {a.slot for a in of(out, act.LoadSlot)} == {"chat", "embed"}
    assert core.route("t/p/a") is not None


def test_a_launch_during_a_device_restart_waits_for_it(core: KernelCore, feed: Feed) -> None:
    boot(feed)
    feed(ev.ProcessLost(now=5.0, cause="d", process="device:cpu:0", incarnation=1, reason="oom"))
    out = launch(feed, now=5.5)
    assert not of(out, act.Refused)
    out = feed(ev.ProcessUp(now=6.0, cause="d", process="device:cpu:0", incarnation=2))
    assert "chat" in {a.slot for a in of(out, act.LoadSlot)}
    assert of(loaded(feed, "chat", now=7.0), act.Launched)


def test_thread_quotas_follow_the_device(feed: Feed) -> None:
    boot(feed)
    (load,) = of(launch(feed), act.LoadSlot)
    assert load.threads == 1  # Four threads shared by the three causal models of the system.


def test_the_core_decides_in_microseconds(core: KernelCore, feed: Feed) -> None:
    boot(feed)
    launch(feed)
    loaded(feed, "chat")
    for n in range(100):
        core.handle(
            ev.LaunchAsked(now=3.0, cause=f"r{n}", agent=f"t/p/{n}", models=(("chat", None),))
        )
    started = time.perf_counter()
    for _ in range(1000):
        core.route("t/p/50")
    assert (time.perf_counter() - started) / 1000 < 50e-6


HOSTS = ("host:0", "host:1", "host:2")
UNSETTLED = (ProcessState.STARTING, ProcessState.WAITING)


class Machine(RuleBasedStateMachine):
    """Random lives of a kernel: whatever happens, everything agrees with everything."""

    def __init__(self) -> None:
        super().__init__()
        self.core = KernelCore()
        self.now = 0.0
        self.wakes: list[float] = []
        self.loads: list[str] = []
        self.unloads: list[str] = []
        self.asked = 0
        self.open: set[str] = set()
        self.drains: set[str] = set()
        self.fences: list[act.Fence] = []
        """Not yet written."""
        self.written: list[act.Fence] = []
        """Written, but the core has not heard of it."""
        self.store = [0] * SHARDS
        self.releases: list[act.ReleaseShards] = []
        self._take(
            self.core.handle(
                ev.Booted(
                    now=0.0,
                    cause="boot",
                    devices=(
                        DeviceSpec("cpu:0", "cpu", 100, 4),
                        DeviceSpec("cuda:0", "cuda", 120, 4),
                    ),
                    models=(CHAT, EMBED, BIG, OTHER),
                    hosts=3,
                )
            )
        )

    def _take(self, actions: Actions) -> None:
        for action in actions:
            match action:
                case act.WakeAt():
                    self.wakes.append(action.when)
                case act.LoadSlot():
                    self.loads.append(action.slot)
                case act.UnloadSlot():
                    self.unloads.append(action.slot)
                case act.Launched() | act.Refused() | act.Drained():
                    self.open.discard(action.cause)
                    self.drains.discard(action.cause)
                case act.Fence():
                    self.fences.append(action)
                case act.ReleaseShards():
                    self.releases.append(action)
                case act.StopProcess():
                    assert self.core.processes[action.process].state is ProcessState.STOPPED

    def _feed(self, event: ev.AnyEvent) -> None:
        self._take(self.core.handle(event))

    @rule(
        agent=st.sampled_from("abcde"),
        models=st.sets(st.sampled_from(["chat", "other", "embed", "big"]), max_size=2),
    )
    def ask_launch(self, agent: str, models: set[str]) -> None:
        self.asked += 1
        cause = f"r{self.asked}"
        self.open.add(cause)
        self._feed(
            ev.LaunchAsked(
                now=self.now,
                cause=cause,
                agent=f"t/p/{agent}",
                models=tuple((m, None) for m in sorted(models)),
            )
        )

    @rule(agent=st.sampled_from("abcde"))
    def ask_kill(self, agent: str) -> None:
        self._feed(ev.KillAsked(now=self.now, cause="k", agent=f"t/p/{agent}"))

    @rule(index=st.integers(0, 10))
    def give_up(self, index: int) -> None:
        if self.open:
            request = sorted(self.open)[index % len(self.open)]
            self.open.discard(request)
            self._feed(ev.LaunchGivenUp(now=self.now, cause="g", request=request))

    @rule(size=st.integers(0, 70), fails=st.booleans())
    def load_ends(self, size: int, fails: bool) -> None:
        if not self.loads:
            return
        slot = self.loads.pop(0)
        if fails:
            error = EngineFailed(slot, "x")
            self._feed(ev.SlotFailed(now=self.now, cause="d", slot=slot, error=error))
        else:
            self._feed(
                ev.SlotLoaded(now=self.now, cause="d", slot=slot, measured={"weights": size})
            )

    @rule()
    def unload_ends(self) -> None:
        if self.unloads:
            slot = self.unloads.pop(0)
            self._feed(ev.SlotUnloaded(now=self.now, cause="d", slot=slot))

    @rule(
        name=st.sampled_from([*HOSTS, *HOSTS, "device:cpu:0", "device:cuda:0", "journal"]),
        up=st.booleans(),
        chance=st.floats(0, 1, exclude_max=True),
    )
    def process(self, name: str, up: bool, chance: float) -> None:
        incarnation = self.core.processes[name].incarnation
        if up:
            self._feed(ev.ProcessUp(now=self.now, cause="p", process=name, incarnation=incarnation))
        else:
            self._feed(
                ev.ProcessLost(
                    now=self.now,
                    cause="p",
                    process=name,
                    incarnation=incarnation,
                    reason="x",
                    chance=chance,
                )
            )

    @rule(index=st.integers(0, 5))
    def fence_written(self, index: int) -> None:
        """In any order: the core must not rely on that of the store."""
        if self.fences:
            fence = self.fences.pop(index % len(self.fences))
            for number in fence.shards:
                self.store[number] = fence.epoch
            self.written.append(fence)

    @rule(index=st.integers(0, 5))
    def fenced(self, index: int) -> None:
        if self.written:
            fence = self.written.pop(index % len(self.written))
            self._feed(
                ev.Fenced(
                    now=self.now,
                    cause="f",
                    host=fence.host,
                    epoch=fence.epoch,
                    shards=fence.shards,
                )
            )

    @rule(index=st.integers(0, 5))
    def released(self, index: int) -> None:
        if self.releases:
            r = self.releases.pop(index % len(self.releases))
            self._feed(
                ev.ShardsReleased(now=self.now, cause="r", host=r.host, shards=r.shards, to=r.to)
            )

    @rule()
    def rebalance(self) -> None:
        self._feed(ev.RebalanceAsked(now=self.now, cause="b"))

    @rule(host=st.sampled_from(HOSTS))
    def drain(self, host: str) -> None:
        self.asked += 1
        cause = f"d{self.asked}"
        self.drains.add(cause)
        self._feed(ev.DrainAsked(now=self.now, cause=cause, process=host))

    @rule(by=st.floats(0, 100))
    def time_passes(self, by: float) -> None:
        self.now += by
        if any(w <= self.now for w in self.wakes):
            self.wakes = [w for w in self.wakes if w > self.now]
            self._feed(ev.Tick(now=self.now, cause="t"))

    @invariant()
    def agrees(self) -> None:
        self.core.validate()
        # Every launch that was neither answered nor given up still waits in the core.
        assert self.open == set(self.core.launches)
        # And every drain that was not answered is under way.
        assert self.drains == {c for p in self.core.processes.values() for c in p.drains}

    def teardown(self) -> None:
        """When everything has come up and been answered, all is served, and by its owner."""
        for _ in range(1000):
            waiting = [p for p in self.core.processes.values() if p.state in UNSETTLED]
            if not (waiting or self.fences or self.written or self.releases):
                break
            self.now += 1000.0
            self._feed(ev.Tick(now=self.now, cause="t"))
            for p in waiting:
                self.process(p.name, up=True, chance=0.5)
            while self.fences or self.written or self.releases:
                self.fence_written(0)
                self.fenced(0)
                self.released(0)
            self.agrees()
        self.agrees()
        assert not self.drains
        for number, shard in enumerate(self.core.shards):
            assert shard.state is not ShardState.MOVING, (number, shard)
            assert not shard.to
            if shard.state is ShardState.SERVED:
                assert self.core.processes[shard.host].state is ProcessState.UP
                assert self.store[number] == self.core.epoch_of(shard.host), (number, shard)
        if any(
            p.state is ProcessState.UP and p.name in HOSTS for p in self.core.processes.values()
        ):
            assert ("", 0) not in self.core.shard_map()
        self._feed(ev.RebalanceAsked(now=self.now, cause="b"))
        loads = Counter(s.to or s.host for s in self.core.shards)
        assert max(loads.values()) - min(loads.values()) <= 1


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


def test_a_model_counts_as_used_until_its_last_agent_goes(core: KernelCore, feed: Feed) -> None:
    boot(feed, capacity=150)
    for agent, model, at in (("t/p/a", "chat", 1.0), ("t/p/b", "other", 2.0)):
        launch(feed, agent, model, now=at)
        loaded(feed, model, now=at)
    feed(ev.KillAsked(now=3.0, cause="k", agent="t/p/b"))
    feed(ev.KillAsked(now=4.0, cause="k", agent="t/p/a"))
    # Loaded first, but used last.
    assert core.slots["chat"].last_used > core.slots["other"].last_used
