"""Where processes are started, and hosts beyond those of the boot."""

from __future__ import annotations

from llmos.kernel.core import actions as act
from llmos.kernel.core import events as ev
from llmos.kernel.core.placement import Node, Place, place, same_machine
from llmos.kernel.core.state import KernelCore
from llmos.kernel.core.types import ProcessKind as Kind
from llmos.kernel.core.types import ProcessState

A, B, C = Node("a", "10.0.0.1"), Node("b", "10.0.0.2"), Node("c", "10.0.0.3")


def test_hosts_are_spread_and_the_kernels_node_comes_last_among_equals() -> None:
    hosts: dict[str, int] = {}
    for _ in range(4):
        found = place(Kind.HOST, [A, B, C], kernel="a", hosts=hosts)
        assert found is not None
        assert not found.hard
        hosts[found.node] = hosts.get(found.node, 0) + 1
    assert hosts == {"b": 2, "c": 1, "a": 1}


def test_a_drained_node_gets_nothing_unless_only_it_will_do() -> None:
    assert place(Kind.HOST, [A, B], kernel="a", hosts={"a": 9}, closed={"b"}) == Place("a", False)
    assert place(Kind.HOST, [B], kernel="a", hosts={}, closed={"b"}) == Place("b", False)
    assert place(Kind.JOURNAL, [A, B], kernel="a", hosts={}, closed={"a"}) == Place("b", False)
    assert place(Kind.HOST, [], kernel="a", hosts={}) is None


def test_what_serves_the_kernel_is_near_it_and_devices_are_with_it() -> None:
    for kind in (Kind.JOURNAL, Kind.KNOWLEDGE):
        assert place(kind, [A, B, C], kernel="b", hosts={}) == Place("b", False)
    assert place(Kind.DEVICE, [A, B], kernel="b", hosts={}, closed={"b"}) == Place("b", True)


def test_a_store_that_is_a_file_is_where_the_file_is() -> None:
    assert place(Kind.JOURNAL, [A, B], kernel="b", hosts={}, file_on=A) == Place("a", True)
    assert place(Kind.JOURNAL, [B, C], kernel="b", hosts={}, file_on=A) is None
    # The machine came back, and is a new node to Ray.
    back = Node("a2", A.address)
    assert place(Kind.JOURNAL, [B, back], kernel="b", hosts={}, file_on=A) == Place("a2", True)
    assert same_machine([back, A], A) is A
    # A node that is drained gives it to another one of its machine, if there is one.
    both, shut = [A, B, back], {"a"}
    found = place(Kind.JOURNAL, both, kernel="b", hosts={}, file_on=A, closed=shut)
    assert found == Place("a2", True)
    found = place(Kind.JOURNAL, [A, B], kernel="b", hosts={}, file_on=A, closed=shut)
    assert found == Place("a", True)


def booted(hosts: int) -> KernelCore:
    core = KernelCore()
    for action in core.handle(ev.Booted(now=0.0, cause="boot", devices=(), models=(), hosts=hosts)):
        carry_out(core, action)
    return core


def carry_out(core: KernelCore, action: act.AnyAction, now: float = 1.0) -> list[act.AnyAction]:
    """What a shell would answer at once; returns everything that followed."""
    match action:
        case act.Fence(host=host, epoch=epoch, shards=shards):
            event: ev.AnyEvent = ev.Fenced(
                now=now, cause="t", host=host, epoch=epoch, shards=shards
            )
        case act.StartProcess(process=name, incarnation=incarnation):
            event = ev.ProcessUp(now=now, cause="t", process=name, incarnation=incarnation)
        case act.ReleaseShards(host=host, shards=shards, to=to):
            event = ev.ShardsReleased(now=now, cause="t", host=host, shards=shards, to=to)
        case _:
            return [action]
    followed: list[act.AnyAction] = [action]
    for new in core.handle(event):
        followed += carry_out(core, new)
    core.validate()
    return followed


def states(core: KernelCore) -> dict[str, ProcessState]:
    return {p.name: p.state for p in core.processes.values()}


def test_one_host_more_takes_what_a_drained_one_had() -> None:
    core = booted(1)
    assert core.spare_host() == "host:1"
    for action in core.handle(ev.HostAsked(now=1.0, cause="t", process="host:1")):
        carry_out(core, action)
    assert {s.host for s in core.shards} == {"host:0"}
    followed: list[act.AnyAction] = []
    for action in core.handle(ev.DrainAsked(now=1.0, cause="drain", process="host:0")):
        followed += carry_out(core, action)
    assert act.Drained(process="host:0", cause="drain") in followed
    assert {s.host for s in core.shards} == {"host:1"}
    assert states(core)["host:0"] is ProcessState.STOPPED
    # The next one that is wanted is the one that was stopped, under a new epoch.
    assert core.spare_host() == "host:0"
    before = core.processes["host:0"].epoch
    for action in core.handle(ev.HostAsked(now=2.0, cause="t", process="host:0")):
        carry_out(core, action)
    assert states(core)["host:0"] is ProcessState.UP
    assert core.processes["host:0"].epoch > before
    assert core.spare_host() == "host:2"
    core.validate()


def test_no_host_is_added_that_runs_or_cannot_work() -> None:
    core = booted(1)
    assert core.handle(ev.HostAsked(now=1.0, cause="t", process="host:0")) == []
    assert core.handle(ev.HostAsked(now=1.0, cause="t", process="journal")) == []
    core.processes["journal"].state = ProcessState.GIVEN_UP
    assert core.handle(ev.HostAsked(now=1.0, cause="t", process="host:1")) == []
