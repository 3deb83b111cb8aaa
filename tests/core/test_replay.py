from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos.kernel.core.errors import Nondeterminism
from llmos.kernel.core.replay import Recorded, Replay


def result(seq: int, name: str = "n", **more: object) -> Recorded:
    return Recorded(seq, "Generate", name, name.encode(), "result", **more)  # type: ignore[arg-type]


def replay(*recorded: Recorded, marks: tuple[str, ...] = ()) -> Replay:
    return Replay("t/p/a", "turn-1", recorded, marks)


def test_outcomes_come_back_in_the_order_in_which_they_came() -> None:
    it = replay(result(2), result(1))
    assert it.next_seq() == 2
    first = it.match(1, "Generate", "n", b"n")
    assert first is not None
    assert first.seq == 1
    with pytest.raises(ValueError, match="not next"):
        it.handed_back(1)
    it.match(2, "Generate", "n", b"n")
    it.handed_back(2)
    assert not it.live
    it.handed_back(1)
    assert it.live
    assert it.next_seq() is None
    it.finish()
    it.validate()


def test_what_was_not_recorded_is_made_anew() -> None:
    it = replay()
    assert it.live
    assert it.match(1, "Generate", "n", b"n") is None
    it.finish()


def test_an_intent_without_outcome_is_told_and_holds_up_nobody() -> None:
    it = replay(Recorded(1, "CallTool", "mail", b"h", "intent"), result(2))
    assert it.next_seq() == 2
    found = it.match(1, "CallTool", "mail", b"h")
    assert found is not None
    assert found.phase == "intent"
    both = replay(
        Recorded(1, "CallTool", "mail", b"h", "intent"),
        result(2),
        Recorded(1, "CallTool", "mail", b"h", "result", row="done"),
    )
    assert both.next_seq() == 2
    found = both.match(1, "CallTool", "mail", b"h")
    assert found is not None
    assert found.row == "done"


def test_the_last_word_on_a_call_counts_at_its_place() -> None:
    it = replay(Recorded(1, "CallTool", "mail", b"h", "unknown"), result(2), result(1, "x"))
    assert it.next_seq() == 2


def test_losers_of_a_race_hold_up_nobody_and_need_not_come_again() -> None:
    it = replay(result(2), Recorded(1, "Generate", "n", b"n", "failed", cancelled=True), result(3))
    assert it.next_seq() == 2
    it.match(2, "Generate", "n", b"n")
    it.handed_back(2)
    assert it.next_seq() == 3
    it.match(3, "Generate", "n", b"n")
    it.handed_back(3)
    assert it.live
    it.finish()
    it.validate()


def test_another_call_under_the_number_is_shown_as_a_diff() -> None:
    it = replay(
        Recorded(1, "Generate", "chat", b"a", "result", args='{"prompt":"hi","model":"chat"}')
    )
    with pytest.raises(Nondeterminism) as raised:
        it.match(1, "Generate", "chat", b"b", '{"model":"chat","prompt":"hello"}')
    error = pickle.loads(pickle.dumps(raised.value))
    assert (error.agent, error.turn, error.seq) == ("t/p/a", "turn-1", 1)
    assert error.expected[:2] == ("Generate", "chat")
    assert error.actual == ("Generate", "chat", '{"model":"chat","prompt":"hello"}')
    text = str(error)
    assert '-  "prompt": "hi"' in text
    assert '+  "prompt": "hello"' in text
    assert '   "model": "chat"' in text
    assert "patched(" in text
    with pytest.raises(Nondeterminism, match=r"was Generate\(chat\) and is now Embed\(e5\)"):
        it.match(1, "Embed", "e5", b"a")


def test_calls_that_were_not_made_again_are_named_at_the_end() -> None:
    it = replay(result(1), Recorded(2, "CallTool", "mail", b"h", "intent"), result(3, "m"))
    it.match(1, "Generate", "n", b"n")
    with pytest.raises(Nondeterminism) as raised:
        it.finish()
    assert raised.value.missing == ((2, "CallTool", "mail"), (3, "Generate", "m"))
    assert raised.value.actual is None
    assert "2 CallTool(mail), 3 Generate(m)" in str(raised.value)


def test_code_changes_hold_for_turns_begun_after_them() -> None:
    assert replay(result(1), marks=("new",)).patched("new")
    old = replay(result(1))
    assert not old.patched("new")
    old.match(1, "Generate", "n", b"n")
    old.handed_back(1)
    assert old.live
    assert not old.patched("new"), "the same answer for the whole turn"
    assert old.patched("newer")
    assert old.marks == {"newer"}
    assert replay().patched("new")
    # An effect that may have happened: the new code might never come to it.
    assert not replay(Recorded(1, "CallTool", "mail", b"h", "intent")).patched("new")


# ---------------------------------------------------------------- random programs


@dataclass(frozen=True)
class Call:
    name: str
    effect: bool


@dataclass(frozen=True)
class Seq:
    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Gather:
    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Race:
    parts: tuple[Node, ...]


Node = Call | Seq | Gather | Race
Done = Callable[[int], None]

NODES = st.recursive(
    st.builds(Call, st.sampled_from("abc"), st.booleans()),
    lambda inner: st.one_of(
        *[
            st.builds(k, st.lists(inner, min_size=1, max_size=3).map(tuple))
            for k in (Seq, Gather, Race)
        ]
    ),
    max_leaves=10,
)


class Run:
    """Runs a program: what it calls depends on all outcomes before, and on their order."""

    def __init__(self) -> None:
        self.seq = 0
        self.history = 0
        self.calls: dict[int, str] = {}
        self.waiting: dict[int, Done] = {}
        self.ended = False

    def made(self, seq: int, call: Call, name: str) -> None: ...

    def cancelled(self, seq: int) -> None: ...

    def go(self, node: Node) -> None:
        def end(value: int) -> None:
            self.ended = True

        self.start(node, end)

    def start(self, node: Node, done: Done) -> Callable[[], None]:
        """Returns how to cancel it."""
        if isinstance(node, Call):
            self.seq += 1
            seq, name = self.seq, f"{node.name}{self.history}"
            self.calls[seq] = name
            self.waiting[seq] = done
            self.made(seq, node, name)

            def cancel() -> None:
                if self.waiting.pop(seq, None) is not None:
                    self.cancelled(seq)

            return cancel
        if isinstance(node, Seq):
            current: list[Callable[[], None]] = []

            def step(index: int, value: int) -> None:
                if index == len(node.parts):
                    done(value)
                    return
                current[:] = [self.start(node.parts[index], lambda v: step(index + 1, v))]

            step(0, 0)
            return lambda: [c() for c in current] and None  # type: ignore[func-returns-value]
        left = len(node.parts) if isinstance(node, Gather) else 1
        cancels: list[Callable[[], None]] = []

        def part(value: int) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                for other in cancels:
                    other()
                done(value)

        cancels += [self.start(one, part) for one in node.parts]
        return lambda: [c() for c in cancels] and None  # type: ignore[func-returns-value]

    def complete(self, seq: int, value: int) -> None:
        self.history = hash((self.history, value)) % 9973
        self.waiting.pop(seq)(value)


class First(Run):
    """The first run: writes the journal."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Recorded] = []
        self.made_by: list[dict[int, str]] = []
        """The calls made before the row after each row."""

    def write(self, seq: int, phase: str, *, value: int = 0, cancelled: bool = False) -> None:
        name = self.calls[seq]
        self.rows.append(
            Recorded(seq, "K", name, name.encode(), phase, value, cancelled)  # type: ignore[arg-type]
        )

    def made(self, seq: int, call: Call, name: str) -> None:
        if call.effect:
            self.write(seq, "intent")

    def cancelled(self, seq: int) -> None:
        self.write(seq, "failed", cancelled=True)

    def complete(self, seq: int, value: int) -> None:
        self.write(seq, "result", value=value)
        super().complete(seq, value)


class Again(Run):
    """Another run, from what there is of the journal."""

    def __init__(self, rows: list[Recorded]) -> None:
        super().__init__()
        self.replay = Replay("t/p/a", "turn", rows)
        self.recorded: dict[int, Recorded] = {}
        self.fresh: set[int] = set()
        self.handed: list[int] = []

    def made(self, seq: int, call: Call, name: str) -> None:
        found = self.replay.match(seq, "K", name, name.encode())
        if found is not None and found.ended:
            self.recorded[seq] = found
        elif found is None or found.phase == "intent":
            self.fresh.add(seq)

    def cancelled(self, seq: int) -> None:
        self.fresh.discard(seq)

    def hand_back(self) -> None:
        """All that is recorded."""
        while (seq := self.replay.next_seq()) is not None:
            assert seq in self.waiting, "it has been made: the handler waits for it"
            # Said before the handler goes on: it may end with this.
            self.replay.handed_back(seq)
            self.replay.validate()
            self.handed.append(seq)
            value = self.recorded[seq].row
            assert isinstance(value, int)
            self.complete(seq, value)
        assert self.replay.live


@given(NODES, st.data())
@settings(max_examples=300, deadline=None)
def test_whatever_way_a_turn_took_it_takes_again(node: Node, data: st.DataObject) -> None:
    first = First()
    first.go(node)
    while not first.ended:
        seq = data.draw(st.sampled_from(sorted(first.waiting)))
        first.complete(seq, data.draw(st.integers(0, 3)))
    # A crash loses the tail of the journal, and with it some outcomes.
    kept = first.rows[: data.draw(st.integers(0, len(first.rows)))]
    again = Again(kept)
    again.go(node)
    again.hand_back()
    final = {row.seq: row for row in kept}
    assert again.handed == [row.seq for row in kept if final[row.seq] is row and row.ended]
    # All that was called by then is called again, the same and under the same numbers.
    for row in kept:
        assert again.calls[row.seq] == row.name
    for seq, name in again.calls.items():
        assert first.calls[seq] == name
    while not again.ended:
        again.complete(data.draw(st.sampled_from(sorted(again.fresh & set(again.waiting)))), 7)
    again.replay.finish()
    again.replay.validate()
    if len(kept) == len(first.rows):
        assert again.calls == first.calls
