"""Supervision: what falls with what, and when an agent is taken out of service.

*Processes* (rest-for-one): :data:`NEEDS` says what each kind cannot work without. A process
that is merely restarted takes nobody with it, since whoever needs it waits; one that is
given up stops those that need it, for each of their turns would only fail at its end.

*Agents* (one-for-one): an agent whose messages fail one after the other is taken out of
service with the story of its failures, and no other agent is touched.
"""

from __future__ import annotations

from collections import OrderedDict
from datetime import UTC, datetime
from typing import NamedTuple

from llmos.kernel.core.restarts import RestartPolicy
from llmos.kernel.core.types import ProcessKind

NEEDS: dict[ProcessKind, frozenset[ProcessKind]] = {
    # The store: nothing runs without its own state. Losing it takes the kernel down as well.
    ProcessKind.JOURNAL: frozenset(),
    # A turn ends with a commit; without the journal no turn can end.
    ProcessKind.HOST: frozenset({ProcessKind.JOURNAL}),
    # Syscalls to these fail with an error that agents may catch; turns go on.
    ProcessKind.DEVICE: frozenset(),
    ProcessKind.KNOWLEDGE: frozenset(),
}
"""Which kinds a kind cannot work without, along store, kernel, engine. A device that is given
up fails its slots, not its hosts: other devices may hold the model."""


def falls_with(kind: ProcessKind) -> frozenset[ProcessKind]:
    """The kinds that cannot work without this one, directly or through others."""
    fallen: set[ProcessKind] = set()
    found = {kind}
    while found:
        found = {k for k, needs in NEEDS.items() if needs & found} - fallen
        fallen |= found
    return frozenset(fallen)


MAX_ERROR_CHARS = 2000
"""Of an error's text are kept; a story must fit a screen."""


class Failure(NamedTuple):
    """A message whose turn failed."""

    message_id: str
    at: float
    """Seconds since 1970, of the last time."""
    turn: str
    error_text: str
    times: int
    """How often, within the window."""


class Story(NamedTuple):
    """Why an agent is taken out of service."""

    agent: str
    failures: tuple[Failure, ...]
    """The oldest first; of different messages."""
    window_s: float

    @property
    def text(self) -> str:
        """For people: what happened, and what to do."""
        lines = [
            f"{self.agent} is quarantined: {len(self.failures)} different messages failed "
            f"within {self.window_s:.0f} s.",
        ]
        for failure in self.failures:
            at = datetime.fromtimestamp(failure.at, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
            times = f", {failure.times} times" if failure.times > 1 else ""
            lines.append(f"  {at}Z  turn {failure.turn}, message {failure.message_id}{times}")
            lines += [f"      {line}" for line in failure.error_text.splitlines() or ["?"]]
        lines.append(
            "Its messages wait. Look at a turn's journal (llmos strace), mend the program, its "
            "configuration or what it depends on, and then let the agent go on."
        )
        return "\n".join(lines)


class AgentSupervisor:
    """Counts the failures of agents, and says when one has had too many.

    Only failures of *different* messages count: the same message failing again is the
    business of its attempts (:mod:`llmos.kernel.core.attempts`), and says nothing about
    the agent.
    """

    def __init__(self, policy: RestartPolicy | None = None, *, agents_limit: int = 10_000) -> None:
        self.policy = policy or RestartPolicy()
        """``intensity`` and ``window_s`` count; the delays are for processes."""
        self.agents_limit = agents_limit
        """Agents remembered; those whose last failure is longest ago are forgotten first."""
        self._failures: OrderedDict[str, OrderedDict[str, Failure]] = OrderedDict()
        """By agent and message, the oldest first."""

    def failed(
        self, agent: str, message_id: str, error_text: str, turn: str, now: float
    ) -> Story | None:
        """Record a failed turn; a story if the agent must be taken out of service now.

        The count starts anew after a story.

        Args:
            agent: whose.
            message_id: the message; the same one again counts once.
            error_text: for the story.
            turn: its id.
            now: seconds since 1970.
        """
        mine = self._failures.setdefault(agent, OrderedDict())
        self._failures.move_to_end(agent)
        while mine:
            oldest = next(iter(mine.values()))
            if now - oldest.at <= self.policy.window_s:
                break
            del mine[oldest.message_id]
        before = mine.pop(message_id, None)
        times = before.times + 1 if before is not None else 1
        if len(error_text) > MAX_ERROR_CHARS:
            error_text = f"{error_text[:MAX_ERROR_CHARS]}…"
        mine[message_id] = Failure(message_id, now, turn, error_text, times)
        if len(mine) > self.policy.intensity:
            del self._failures[agent]
            return Story(agent, tuple(mine.values()), self.policy.window_s)
        while len(self._failures) > self.agents_limit:
            self._failures.popitem(last=False)
        return None

    def forgive(self, agent: str) -> None:
        """Forget an agent's failures: it was released, killed or given a new program."""
        self._failures.pop(agent, None)

    def __len__(self) -> int:
        """Agents with failures that are remembered."""
        return len(self._failures)

    def validate(self) -> None:
        """Nothing is kept beyond its bounds."""
        assert len(self._failures) <= self.agents_limit
        for agent, mine in self._failures.items():
            assert 1 <= len(mine) <= self.policy.intensity, agent
            times = [f.at for f in mine.values()]
            assert all(f.message_id == id_ for id_, f in mine.items()), agent
            assert len(times) == len(mine), agent
