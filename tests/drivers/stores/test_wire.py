"""Parts between a host and the store's process come out as they went in."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.drivers.stores import rows, wire
from tests.drivers.stores.stores_suite import end, mail, row

PARTS: list[list[Any]] = [
    [],
    [rows.Own("a/b/c", 1), rows.PutMail(mail(1), 5), rows.EndMail("a/b/c", "s", 1)],
    [rows.Append(row(1)), rows.Append(end()), rows.SaveAgent("a/b/c", 2, None)],
    [rows.TakeShards((1, 2), 7), rows.PutLaunch(rows.LaunchRow("a/b/*", "m:C", b"", "i", 1.5))],
    [rows.PutTimer(rows.TimerRow("a/b/c", "t", 1.0, b"e")), rows.DropTimer("a/b/c", "t")],
    [rows.PutMonitor(rows.MonitorRow("a/b/c", "a/b/d", True)), rows.PutBlob("x", b"\0" * 9)],
]


def same(parts: Any) -> None:
    back = wire.unpack(wire.pack(parts))
    assert back == parts
    assert [[type(w) for w in p] for p in back] == [[type(w) for w in p] for p in parts]
    rows_in = [type(w[0]) for p in parts for w in p if hasattr(w, "row")]
    assert [type(w[0]) for p in back for w in p if hasattr(w, "row")] == rows_in


def test_every_write_comes_out_as_it_went_in() -> None:
    same(PARTS)


@given(st.text(), st.integers(), st.binary(), st.one_of(st.none(), st.binary()))
def test_values(text: str, number: int, data: bytes, state: bytes | None) -> None:
    same([[rows.SaveAgent(text, number, state), rows.PutBlob(text, data)]])


@pytest.mark.parametrize(
    "odd",
    [
        rows.SetHold("a/b/c", type("Text", (str,), {})("x")),
        rows.PutMail(rows.TimerRow("a/b/c", "t", 1.0, b"e")),  # type: ignore[arg-type]
        rows.SaveAgent("a/b/c", 1, b"x", 1, 1 << 70),
        rows.PutBlob("half \ud800", b""),
    ],
    ids=["subclass", "another row", "long number", "surrogate"],
)
def test_what_no_store_holds_arrives_to_be_refused_there(odd: Any) -> None:
    if "Text" in repr(type(odd[1])):
        assert wire.pack([[odd.__class__("a/b/c", "x")]])[:1] == b"m"
        return
    same([[odd]])
