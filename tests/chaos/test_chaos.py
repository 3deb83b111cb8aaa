"""A real system under random kills loses, doubles and reorders nothing; and the checker that
says so finds it when something is wrong."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from llmos.drivers.stores.rows import (
    TURN,
    Append,
    JournalRow,
    LaunchRow,
    PutLaunch,
    SaveAgent,
    TakeShards,
)
from llmos.drivers.stores.sqlite import SqliteStore
from llmos.kernel import record
from llmos.syscalls.messages import Envelope, Wire
from tests.chaos import check, ledger
from tests.chaos.faults import sequence
from tests.chaos.programs import Book, Note
from tests.chaos.run import Options, percentile, run
from tests.chaos.workload import Deed


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_twenty_kills(tmp_path: Path) -> None:
    result = run(Options(kills=20, seed=20, folder=tmp_path, hurry=True))
    assert result.ok, "\n".join(result.stories) or result.summary()
    summary = result.summary()
    assert summary["kills"] == 20
    assert summary["messages"] > 500
    assert (summary["lost"], summary["duplicated"], summary["reordered"]) == (0, 0, 0)


def test_the_sequence_of_faults_is_the_seeds_and_has_all_kinds() -> None:
    one, same, other = (sequence(random.Random(s), 40, kernel=True, nodes=True) for s in (1, 1, 2))
    assert one == same != other
    assert set(one) == {"host", "journal", "stop", "device", "knowledge", "kernel", "node"}
    assert "kernel" not in sequence(random.Random(1), 40, kernel=False, nodes=False)


def test_percentiles() -> None:
    assert percentile([], 95) is None
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([float(n) for n in range(1, 101)], 95) == 95.0


# ------------------------------------------------------------------ the checker

AGENT, CLIENT = "t/worker/w0", "teller0"


class Past:
    """A little history: notes that were told, handled and written down outside."""

    def __init__(self, folder: Path) -> None:
        self.store = SqliteStore(folder / "store.db")
        self.store.commit(
            [
                [TakeShards(tuple(range(256)), 1)],
                [PutLaunch(LaunchRow("t/worker/*", "m:C", b"\x80", "l", 0.0))],
            ]
        )
        self.deeds: list[Deed] = []
        self.entries: list[ledger.Entry] = []
        self.book = Book()
        self.changes = 0

    def told(self, number: int) -> None:
        self.deeds.append(
            Deed("tell", CLIENT, AGENT, number, 1.0, 2.0, "acked", message_id=f"client:c#{number}")
        )

    def handled(self, number: int, turn: str, *, seq: int | None = None) -> None:
        """A committed turn, with its call."""
        seq = seq or number
        envelope = Envelope(
            AGENT, CLIENT, Wire.of(Note(sender=CLIENT, number=number)), "client:c", seq
        )
        self.book.notes[CLIENT] = self.book.notes.get(CLIENT, 0) + 1
        self.book.last[CLIENT] = number
        self.changes += 1
        call = JournalRow(AGENT, turn, 1, "result", "Call", "ledger", idem_key=f"key-{turn}")
        end = JournalRow(
            AGENT,
            turn,
            0,
            "result",
            TURN,
            "Note",
            args=envelope.pack(),
            result=record.turn_result(None, None, 0, None),
            idem_key=envelope.id,
        )
        state = self.book.model_dump_json().encode()
        assert self.store.commit(
            [[Append(call), Append(end), SaveAgent(AGENT, 0, state, 1, self.changes)]]
        ) == [None]

    def done(self, number: int, key: str, *, again: bool = False) -> None:
        """The ledger was called."""
        arguments = {"receiver": AGENT, "sender": CLIENT, "id": f"note {CLIENT} {number}"}
        line = {"at": 1.0, "key": key, "again": again, "arguments": arguments}
        self.entries.append(ledger.Entry(line))

    def wrong(self) -> Counter[str]:
        evidence = check.Evidence.of(self.deeds, self.entries, self.store)
        assert not evidence.broken
        verdict = check.check(evidence)
        for wrong in verdict.wrong:
            assert str(wrong) in check.story(wrong, evidence, Path("/nowhere"))
        return Counter(w.what for w in verdict.wrong)


@pytest.fixture
def past(tmp_path: Path) -> Past:
    past = Past(tmp_path)
    for number in (1, 2):
        past.told(number)
        past.handled(number, f"turn{number}")
        past.done(number, f"key-turn{number}")
    return past


def test_a_whole_history_is_found_whole(past: Past) -> None:
    past.done(2, "key-turn2", again=True)
    assert not past.wrong()


def test_an_acknowledged_note_that_nobody_handled_is_lost(past: Past) -> None:
    past.told(3)
    assert past.wrong() == {"lost": 1}


def test_a_note_handled_by_two_turns_is_duplicated(past: Past) -> None:
    past.handled(2, "turn3", seq=3)
    past.done(2, "key-turn3")
    # Twice in the journal, and twice outside.
    assert past.wrong()["duplicated"] == 2


def test_an_effect_that_happened_twice_is_duplicated(past: Past) -> None:
    past.done(2, "another-key")
    assert past.wrong() == {"duplicated": 1, "orphan": 1}


def test_an_effect_of_no_committed_turn_is_an_orphan(past: Past) -> None:
    past.done(3, "key-of-nobody")
    assert past.wrong() == {"orphan": 1}


def test_a_call_that_never_came_is_an_orphan(past: Past) -> None:
    past.handled(3, "turn3")
    assert past.wrong() == {"orphan": 1}


def test_a_note_behind_a_later_one_is_reordered(past: Past) -> None:
    past.handled(5, "turn5")
    past.done(5, "key-turn5")
    past.handled(4, "turn4")
    past.done(4, "key-turn4")
    assert past.wrong()["reordered"] == 2


def test_a_memory_of_more_than_was_committed_is_found(past: Past) -> None:
    past.book.notes[CLIENT] += 1
    past.handled(3, "turn3")
    past.done(3, "key-turn3")
    assert past.wrong() == {"duplicated": 1}


def test_a_reply_of_a_turn_that_did_not_commit_is_untrue(past: Past) -> None:
    past.deeds.append(Deed("ask", CLIENT, AGENT, 1, 1.0, 2.0, "replied", turn="gone", total=1))
    assert past.wrong() == {"untrue": 1}


def test_an_ask_that_never_ended_is_late_and_an_untyped_error_is_one(past: Past) -> None:
    past.deeds.append(Deed("ask", CLIENT, AGENT, 1, 1.0))
    past.deeds.append(Deed("ask", CLIENT, AGENT, 2, 1.0, 2.0, "untyped KeyError"))
    assert past.wrong() == {"late": 1, "untyped": 1}


def test_a_note_that_an_agent_sent_and_nobody_got_is_lost(past: Past) -> None:
    past.book.sent["t/worker/w1"] = 1
    past.handled(3, "turn3")
    past.done(3, "key-turn3")
    assert past.wrong() == {"lost": 1}
