"""What the tables of operating say."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from llmos.drivers.stores.rows import MailRow
from llmos.shell import tables
from llmos.syscalls.messages import Envelope, Wire


def packed(sent_at: float) -> bytes:
    wire = Wire.of_json("Question", {})
    return Envelope("a/b/c", "client:x", wire, "client:x", 1, sent_at=sent_at).pack()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0s"), (0.2, "0s"), (59.6, "1m"), (125, "2m 5s"), (3 * 86_400 + 4 * 3_600 + 9, "3d 4h")],
)
def test_a_span_of_time_in_its_largest_units(seconds: float, text: str) -> None:
    assert tables.age(seconds) == text


def test_mail_says_how_long_it_has_waited() -> None:
    now = 1_000_000.0
    rows = [
        MailRow("a/b/c", "client:x", 1, packed(now - 125)),
        MailRow("a/b/c", "client:x", 2, packed(0.0)),
        MailRow("a/b/c", "timer:wake", int((now - 3600) * 1000), packed(0.0)),
    ]
    out = io.StringIO()
    Console(file=out, width=200).print(tables.mail(rows, now))
    head, *lines = out.getvalue().splitlines()
    ages = [line[head.index(" AGE ") : head.index("PRIORITY")].strip() for line in lines]
    assert ages == ["2m 5s", "", "1h"]
    assert tables.mail_json(rows[0])["sent_at"] == now - 125
