from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from llmos.drivers.errors import EngineFailed, UnknownModel
from llmos.kernel.core import actions as act
from llmos.kernel.core import events as ev
from llmos.kernel.core.errors import AlreadyLaunched, DoesNotFit, HostUnavailable, NoDevice
from llmos.kernel.core.slots import SlotState
from llmos.kernel.core.state import Actions, KernelCore
from llmos.kernel.core.types import DeviceSpec, ModelSpec, ProcessState
from llmos.syscalls.errors import UnknownAgent

Feed = Callable[[ev.AnyEvent], Actions]

CHAT = ModelSpec("chat", "causal", 60)
EMBED = ModelSpec("embed", "encoder", 20, pinned=True)
BIG = ModelSpec("big", "causal", 500)
OTHER = ModelSpec("other", "causal", 50)


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
    for start in [a for a in out if isinstance(a, act.StartProcess)]:
        out += feed(
            ev.ProcessUp(now=0.1, cause="up", process=start.process, incarnation=start.incarnation)
        )
    return out


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
    return feed(ev.SlotLoaded(now=now, cause="device", slot=slot, measured_bytes=size))


def test_boot_starts_everything_and_loads_what_is_pinned(core: KernelCore, feed: Feed) -> None:
    out = boot(feed, hosts=2)
    started = {a.process for a in of(out, act.StartProcess)}
    assert started == {"journal", "knowledge", "device:cpu:0", "host:0", "host:1"}
    assert [a.slot for a in of(out, act.LoadSlot)] == ["embed"]
    assert core.ledger.free_bytes("cpu:0") == 80


def test_launch_waits_for_its_model_and_then_has_a_host(core: KernelCore, feed: Feed) -> None:
    boot(feed)
    out = launch(feed)
    assert [a.slot for a in of(out, act.LoadSlot)] == ["chat"]
    assert not of(out, act.Launched)
    assert core.route("t/p/a") is None
    (launched,) = of(loaded(feed, "chat"), act.Launched)
    assert (launched.cause, launched.host) == ("launch:t/p/a", "host:0")
    assert core.route("t/p/a") == ("host:0", launched.epoch)


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
    out = feed(ev.ProcessLost(now=5.0, cause="host:0", process="host:0", incarnation=1, reason="x"))
    kinds = [type(a) for a in out]
    assert kinds.index(act.Fence) < kinds.index(act.StartProcess)
    (fence,) = of(out, act.Fence)
    assert fence.agents == ("t/p/a",)
    assert of(out, act.ForgetClient)
    assert core.route("t/p/a") is None
    feed(ev.ProcessUp(now=6.0, cause="up", process="host:0", incarnation=2))
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


def test_restarts_slow_down_then_the_agents_move(core: KernelCore, feed: Feed) -> None:
    boot(feed, hosts=2)
    launch(feed)
    loaded(feed, "chat")
    now, incarnation = 10.0, 1
    for _ in range(4):
        out = feed(
            ev.ProcessLost(
                now=now, cause="h", process="host:0", incarnation=incarnation, reason="boom"
            )
        )
        for wake in of(out, act.WakeAt):
            now = wake.when
            out = feed(ev.Tick(now=now, cause="t"))
        for start in of(out, act.StartProcess):
            incarnation = start.incarnation
            feed(ev.ProcessUp(now=now, cause="u", process="host:0", incarnation=incarnation))
    assert core.processes["host:0"].state is ProcessState.GIVEN_UP
    # The other host started earlier, under a lower epoch: it serves once the store says so.
    assert core.route("t/p/a") is None
    (fence,) = of(out, act.Fence)
    assert (fence.host, fence.agents) == ("host:1", ("t/p/a",))
    feed(ev.Fenced(now=now, cause="f", host="host:1", agents=("t/p/a",)))
    route = core.route("t/p/a")
    assert route == ("host:1", fence.epoch)


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


def test_without_any_host_the_agent_is_said_to_be_unreachable(core: KernelCore, feed: Feed) -> None:
    boot(feed)
    launch(feed)
    loaded(feed, "chat")
    for n in range(4):
        feed(ev.ProcessLost(now=1.0, cause="h", process="host:0", incarnation=n + 1, reason="boom"))
        feed(ev.Tick(now=100.0 if n else 1.0, cause="t"))
    with pytest.raises(HostUnavailable):
        core.route("t/p/a")


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
                    hosts=2,
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
                case act.Launched() | act.Refused():
                    self.open.discard(action.cause)

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
            self._feed(ev.SlotLoaded(now=self.now, cause="d", slot=slot, measured_bytes=size))

    @rule()
    def unload_ends(self) -> None:
        if self.unloads:
            slot = self.unloads.pop(0)
            self._feed(ev.SlotUnloaded(now=self.now, cause="d", slot=slot))

    @rule(
        name=st.sampled_from(["host:0", "host:1", "device:cpu:0", "device:cuda:0", "journal"]),
        up=st.booleans(),
    )
    def process(self, name: str, up: bool) -> None:
        incarnation = self.core.processes[name].incarnation
        if up:
            self._feed(ev.ProcessUp(now=self.now, cause="p", process=name, incarnation=incarnation))
        else:
            self._feed(
                ev.ProcessLost(
                    now=self.now, cause="p", process=name, incarnation=incarnation, reason="x"
                )
            )

    @rule(host=st.sampled_from(["host:0", "host:1"]))
    def fenced(self, host: str) -> None:
        agents = tuple(a.agent for a in self.core.agents.values() if a.host == host)
        self._feed(ev.Fenced(now=self.now, cause="f", host=host, agents=agents))

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


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_model_counts_as_used_until_its_last_agent_goes(core: KernelCore, feed: Feed) -> None:
    boot(feed, capacity=150)
    for agent, model, at in (("t/p/a", "chat", 1.0), ("t/p/b", "other", 2.0)):
        launch(feed, agent, model, now=at)
        loaded(feed, model, now=at)
    feed(ev.KillAsked(now=3.0, cause="k", agent="t/p/b"))
    feed(ev.KillAsked(now=4.0, cause="k", agent="t/p/a"))
    # Loaded first, but used last.
    assert core.slots["chat"].last_used > core.slots["other"].last_used
