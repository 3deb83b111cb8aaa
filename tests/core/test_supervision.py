from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmos.kernel.core.restarts import RestartPolicy
from llmos.kernel.core.supervision import MAX_ERROR_CHARS, NEEDS, AgentSupervisor, falls_with
from llmos.kernel.core.types import ProcessKind

AGENT = "t/p/a"


def test_different_messages_that_fail_quarantine_the_agent_with_its_story() -> None:
    supervisor = AgentSupervisor()
    for n in range(3):
        assert supervisor.failed(AGENT, f"s#{n}", f"error {n}", f"turn-{n}", 10.0 + n) is None
    story = supervisor.failed(AGENT, "s#3", "KeyError: 'x'\nline two", "turn-3", 13.5)
    assert story is not None
    assert [f.message_id for f in story.failures] == ["s#0", "s#1", "s#2", "s#3"]
    for part in ("t/p/a is quarantined: 4", "1970-01-01 00:00:13.500Z  turn turn-3", "line two"):
        assert part in story.text
    assert "llmos strace" in story.text
    # The count starts anew.
    assert supervisor.failed(AGENT, "s#4", "e", "t", 14.0) is None
    supervisor.validate()


def test_the_same_message_again_is_the_business_of_its_attempts() -> None:
    supervisor = AgentSupervisor()
    for n in range(50):
        assert supervisor.failed(AGENT, "s#0", "e", f"t{n}", float(n)) is None
    for n in range(1, 3):
        assert supervisor.failed(AGENT, f"s#{n}", "e", "t", 50.0) is None
    story = supervisor.failed(AGENT, "s#3", "e", "t", 51.0)
    assert story is not None
    assert story.failures[0].times == 50
    assert "50 times" in story.text


def test_old_failures_and_forgiven_ones_do_not_count() -> None:
    supervisor = AgentSupervisor(RestartPolicy(intensity=1, window_s=60.0))
    assert supervisor.failed(AGENT, "1", "e", "t", 0.0) is None
    assert supervisor.failed(AGENT, "2", "e", "t", 61.0) is None
    supervisor.forgive(AGENT)
    supervisor.forgive("t/p/unknown")
    assert supervisor.failed(AGENT, "3", "e", "t", 62.0) is None
    assert supervisor.failed(AGENT, "4", "e", "t", 63.0) is not None


def test_agents_fail_each_for_themselves() -> None:
    supervisor = AgentSupervisor(RestartPolicy(intensity=2))
    for n in range(3):
        assert supervisor.failed(f"t/p/{n}", f"m{n}", "e", "t", 1.0) is None


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 6), st.floats(0, 50)), max_size=80)
)
def test_memory_is_bounded_and_a_story_has_just_enough(
    failures: list[tuple[str, int, float]],
) -> None:
    supervisor = AgentSupervisor(RestartPolicy(intensity=3, window_s=60.0), agents_limit=3)
    now = 0.0
    for agent, message, by in failures:
        now += by
        story = supervisor.failed(agent, str(message), "x" * 9999, "t", now)
        supervisor.validate()
        if story is not None:
            assert len({f.message_id for f in story.failures}) == 4
            assert all(now - f.at <= 60.0 for f in story.failures)
            assert all(len(f.error_text) <= MAX_ERROR_CHARS + 1 for f in story.failures)
    assert len(supervisor) <= 3


def test_who_falls_with_whom() -> None:
    assert set(NEEDS) == set(ProcessKind)
    assert falls_with(ProcessKind.JOURNAL) == {ProcessKind.HOST}
    for kind in (ProcessKind.HOST, ProcessKind.DEVICE, ProcessKind.KNOWLEDGE):
        assert falls_with(kind) == frozenset()
