"""Running a turn again: which recorded outcome belongs to which call, and when it comes.

A turn that was cut off runs again from its beginning. Its syscalls are numbered in the
order they are made; the outcomes in its journal stand in the order in which they came. If
the outcomes are handed back in that order, one at a time, the handler takes the same way
through its gathers and races as before, and makes the same calls under the same numbers.
Where it does not, :class:`~llmos.kernel.core.errors.Nondeterminism` says so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Literal, NamedTuple

from llmos.kernel.core.errors import Nondeterminism


class Recorded(NamedTuple):
    """What the journal says of one call."""

    seq: int
    """Number of the call, from 1."""
    kind: str
    """Class name of the request."""
    name: str
    """The resource."""
    args_hash: bytes
    phase: Literal["result", "failed", "unknown", "intent"]
    """``intent``: its effect was about to happen, and nothing is known of its end."""
    row: object = None
    """The caller's; not looked at."""
    cancelled: bool = False
    """Ended because the program gave it up, as the losers of a race are. It has no outcome to
    hand back: the caller lets it wait until it is given up again."""
    args: str = ""
    """JSON, for the message of an error; may be empty."""

    @property
    def ended(self) -> bool:
        """Whether there is an outcome to hand back."""
        return self.phase != "intent" and not self.cancelled


class Replay:
    """The recorded calls of one turn.

    The caller, for each call: ``match``.

    - An outcome: wait until ``next_seq`` is this call, hand it back, say ``handed_back``, and
      let the handler run until it waits again before the next one.
    - Cancelled: wait until the program gives it up.
    - None or an intent: make the call (or find out what became of it), and hand its outcome
      back once the turn is ``live``: when the turn was cut off, it had not come.
    """

    def __init__(
        self,
        agent: str,
        turn: str,
        recorded: Iterable[Recorded] = (),
        marks: Iterable[str] = (),
    ) -> None:
        """Take what is recorded.

        Args:
            agent: for errors.
            turn: for errors.
            recorded: in the order of the journal. Of several for one call the last counts,
                at its place.
            marks: names of the code changes that this turn was recorded with.
        """
        self.agent, self.turn = agent, turn
        self.marks = set(marks)
        """Recorded, or said to be in force by :meth:`patched`."""
        self._refused: set[str] = set()
        """Names that :meth:`patched` has said False to: it stays with that."""
        self._calls: dict[int, Recorded] = {}
        for one in recorded:
            self._calls.pop(one.seq, None)
            self._calls[one.seq] = one
        self._order = deque(one.seq for one in self._calls.values() if one.ended)
        self._back: set[int] = set()
        self._to_make = {one.seq for one in self._calls.values() if not one.cancelled}

    def match(
        self, seq: int, kind: str, name: str, args_hash: bytes, args: str = ""
    ) -> Recorded | None:
        """What is recorded of a call that is made now.

        Args:
            seq: its number.
            kind: class name of the request.
            name: the resource.
            args_hash: over its arguments.
            args: JSON, for the message of an error.

        Returns:
            None: nothing, make the call. An intent: it had begun to have its effect. Else
            its outcome.

        Raises:
            Nondeterminism: another call was recorded under this number.
        """
        found = self._calls.get(seq)
        if found is None:
            return None
        if (found.kind, found.name, found.args_hash) != (kind, name, args_hash):
            raise Nondeterminism(
                self.agent,
                self.turn,
                seq,
                (found.kind, found.name, found.args),
                (kind, name, args),
            )
        self._to_make.discard(seq)
        return found

    def next_seq(self) -> int | None:
        """The call whose outcome is to be handed back next; None: all of them have been.

        That call may not have been made yet: then outcomes of others wait for it.
        """
        return self._order[0] if self._order else None

    def handed_back(self, seq: int) -> None:
        """The handler has the outcome of this call.

        Raises:
            ValueError: it was not its turn.
        """
        if not self._order or self._order[0] != seq:
            raise ValueError(f"call {seq} is not next, {self.next_seq()} is")
        self._order.popleft()
        self._back.add(seq)

    @property
    def live(self) -> bool:
        """Whether every recorded outcome has been handed back: from here on all is new."""
        return not self._order

    def patched(self, name: str) -> bool:
        """Whether this turn is to run the code after the change of that name.

        True if it was recorded so, or if nothing recorded lies ahead; the caller then records
        a mark, unless it was in :attr:`marks` before. False for a turn recorded before the
        change; an intent that has not been made again counts as recorded, for the new code
        might never come to it. The answer stays the same for the whole turn.
        """
        if name in self.marks:
            return True
        if name in self._refused or not self.live or self._to_make:
            self._refused.add(name)
            return False
        self.marks.add(name)
        return True

    def finish(self) -> None:
        """The handler has ended.

        Raises:
            Nondeterminism: calls are recorded that were not made again. Those that the
                program had given up do not count.
        """
        if not self._to_make:
            return
        missing = [self._calls[seq] for seq in sorted(self._to_make)]
        first = missing[0]
        raise Nondeterminism(
            self.agent,
            self.turn,
            first.seq,
            (first.kind, first.name, first.args),
            None,
            [(one.seq, one.kind, one.name) for one in missing],
        )

    def validate(self) -> None:
        """What is still to come is recorded, once, and was not handed back."""
        ahead = list(self._order)
        assert len(ahead) == len(set(ahead)), ahead
        assert all(self._calls[seq].ended for seq in ahead), ahead
        assert not self._back & set(ahead), ahead
        ended = {one.seq for one in self._calls.values() if one.ended}
        assert ended == self._back | set(ahead), ended
        assert self._to_make <= set(self._calls)
        assert not self._back & self._to_make, "handed back, but never made"
        assert not self.marks & self._refused
