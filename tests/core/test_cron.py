from __future__ import annotations

import contextlib
import pickle
from datetime import UTC, datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos.kernel.core.cron import Cron
from llmos.kernel.core.errors import InvalidCron, NeverDue

BERLIN = ZoneInfo("Europe/Berlin")


def due(text: str, *start: int, zone: ZoneInfo | timezone = UTC, count: int = 1) -> list[str]:
    cron, at, found = Cron.parse(text), datetime(*start, tzinfo=zone), []  # type: ignore[misc,arg-type]
    for _ in range(count):
        at = cron.next_after(at)
        assert at.tzinfo is zone
        found.append(at.isoformat())
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("* * * * *", "2026-01-01T00:01:00+00:00"),
        ("30 8 * * mon-fri", "2026-01-01T08:30:00+00:00"),
        ("0 0 * * 0", "2026-01-04T00:00:00+00:00"),
        ("0 0 * * 7", "2026-01-04T00:00:00+00:00"),
        ("0 0 * * sat-sun", "2026-01-03T00:00:00+00:00"),
        ("*/20 * * * *", "2026-01-01T00:20:00+00:00"),
        ("10-30/10,45 3 * * *", "2026-01-01T03:10:00+00:00"),
        ("0 12 29 FEB *", "2028-02-29T12:00:00+00:00"),
        ("@hourly", "2026-01-01T01:00:00+00:00"),
        ("@daily", "2026-01-02T00:00:00+00:00"),
        ("@weekly", "2026-01-04T00:00:00+00:00"),
        ("@monthly", "2026-02-01T00:00:00+00:00"),
        (" @Yearly ", "2027-01-01T00:00:00+00:00"),
        # Both day fields restricted: either is enough. 2026-01-01 is a Thursday.
        ("0 0 13 * 5", "2026-01-02T00:00:00+00:00"),
        # One begins with a star: both.
        ("0 0 */2 * 5", "2026-01-09T00:00:00+00:00"),
        ("0 0 13 * */7", "2026-09-13T00:00:00+00:00"),
    ],
)
def test_next(text: str, expected: str) -> None:
    assert due(text, 2026, 1, 1) == [expected]


def test_seconds_do_not_make_a_minute_come_twice() -> None:
    cron = Cron.parse("30 8 * * *")
    assert cron.next_after(datetime(2026, 1, 1, 8, 29, 59, 999, tzinfo=UTC)).day == 1
    assert cron.next_after(datetime(2026, 1, 1, 8, 30, 0, 1, tzinfo=UTC)).day == 2
    assert cron.next_after(datetime(2026, 1, 1, 8, 30, tzinfo=UTC)).day == 2


@pytest.mark.parametrize(
    ("text", "position", "reason"),
    [
        ("", 0, "0 fields"),
        ("* * * *", 7, "4 fields"),
        ("* * * * * *", 10, "6 fields"),
        ("60 * * * *", 0, "minute 60 is not 0 to 59"),
        ("* 24 * * *", 2, "hour 24"),
        ("* * 0 * *", 4, "day of month 0"),
        ("* *  * foo *", 7, "a name such as jan"),
        ("* * * * 8", 8, "day of week 8"),
        ("1,2,x * * * *", 4, "'x' is no minute"),
        ("1,,2 * * * *", 2, "'' is no minute"),
        ("5-1 * * * *", 0, "backwards"),
        ("1-99 * * * *", 2, "minute 99"),
        ("*/0 * * * *", 2, "step"),
        ("*/-1 * * * *", 2, "step"),
        ("5/10 * * * *", 0, "5-59/10"),
        ("-5 * * * *", 0, "'' is no minute"),
        ("١ * * * *", 0, "is no minute"),
        ("@reboot", 0, "@hourly"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place(text: str, position: int, reason: str) -> None:
    with pytest.raises(InvalidCron) as raised:
        Cron.parse(text)
    error = pickle.loads(pickle.dumps(raised.value))
    assert (error.text, error.position) == (text, position)
    assert reason in error.reason


def test_what_never_comes_is_said_to_be_so() -> None:
    with pytest.raises(NeverDue, match="30 February"):
        Cron.parse("0 0 30 2 *").next_after(datetime(2026, 1, 1, tzinfo=UTC))
    # The longest wait there is.
    assert due("0 0 29 2 *", 2096, 2, 29) == ["2104-02-29T00:00:00+00:00"]
    with pytest.raises(NeverDue):
        Cron.parse("0 0 1 1 *").next_after(datetime(9999, 6, 1, tzinfo=UTC))
    with pytest.raises(ValueError, match="time zone"):
        Cron.parse("@daily").next_after(datetime(2026, 1, 1))


def test_a_time_that_is_left_out_is_due_right_after_the_gap_and_once() -> None:
    # 2026-03-29: 02:00 becomes 03:00.
    assert due("15,45 2 * * *", 2026, 3, 28, 12, zone=BERLIN, count=3) == [
        "2026-03-29T03:00:00+02:00",
        "2026-03-30T02:15:00+02:00",
        "2026-03-30T02:45:00+02:00",
    ]
    assert due("30 * * * *", 2026, 3, 29, 1, zone=BERLIN, count=3) == [
        "2026-03-29T01:30:00+01:00",
        "2026-03-29T03:00:00+02:00",
        "2026-03-29T03:30:00+02:00",
    ]
    # What is due at the end of the gap anyway is due once.
    assert due("0,30 2,3 * * *", 2026, 3, 29, 1, zone=BERLIN, count=2) == [
        "2026-03-29T03:00:00+02:00",
        "2026-03-29T03:30:00+02:00",
    ]


def test_a_time_that_comes_twice_is_due_once() -> None:
    # 2026-10-25: 03:00 becomes 02:00.
    assert due("30 2 * * *", 2026, 10, 24, 12, zone=BERLIN, count=2) == [
        "2026-10-25T02:30:00+02:00",
        "2026-10-26T02:30:00+01:00",
    ]
    second = datetime(2026, 10, 25, 2, 10, tzinfo=BERLIN, fold=1)
    assert Cron.parse("30 2 * * *").next_after(second).day == 26
    assert Cron.parse("*/5 * * * *").next_after(second).isoformat() == "2026-10-25T03:00:00+01:00"


def test_a_day_that_is_left_out_altogether() -> None:
    # Samoa crossed the date line: 2011-12-30 does not exist there.
    assert due("0 12 30 12 *", 2011, 12, 29, zone=ZoneInfo("Pacific/Apia")) == [
        "2011-12-31T00:00:00+14:00"
    ]


def test_a_start_that_does_not_exist_is_taken_for_what_it_means() -> None:
    assert due("0 * * * *", 2026, 3, 29, 2, 30, zone=BERLIN) == ["2026-03-29T04:00:00+02:00"]


@st.composite
def fields(draw: st.DrawFn) -> str:
    def one(low: int, high: int) -> str:
        kind = draw(st.sampled_from(["star", "number", "range", "step", "list"]))
        numbers = st.integers(low, high)
        if kind == "star":
            return "*"
        if kind == "number":
            return str(draw(numbers))
        if kind == "list":
            return ",".join(map(str, draw(st.lists(numbers, min_size=1, max_size=4))))
        if kind == "step":
            return f"*/{draw(st.integers(1, 12))}"
        a, b = sorted((draw(numbers), draw(numbers)))
        return f"{a}-{b}"

    return " ".join([one(0, 59), one(0, 23), one(1, 31), one(1, 12), one(0, 7)])


ZONES = [
    ZoneInfo(name)
    for name in (
        "UTC",
        "Europe/Berlin",
        "America/New_York",
        "Australia/Lord_Howe",
        "Asia/Kathmandu",
    )
]
CHANGES = [
    datetime(2026, 3, 29, 1, tzinfo=UTC),
    datetime(2026, 10, 25, 1, tzinfo=UTC),
    datetime(2026, 3, 8, 7, tzinfo=UTC),
    datetime(2026, 11, 1, 6, tzinfo=UTC),
    datetime(2026, 4, 4, 15, tzinfo=UTC),
    datetime(2026, 10, 3, 15, 30, tzinfo=UTC),
]


def is_due(cron: Cron, at: datetime, zone: ZoneInfo) -> bool:
    """Said of a minute (UTC) in the plainest way."""
    wall = at.astimezone(zone)
    if wall.fold == 0 and cron.fits(wall):
        return True
    before = (at - timedelta(minutes=1)).astimezone(zone).replace(tzinfo=None)
    left_out = before + timedelta(minutes=1)
    end = wall.replace(tzinfo=None)
    while left_out < end:
        if cron.fits(left_out):
            return True
        left_out += timedelta(minutes=1)
    return False


@given(
    fields(),
    st.sampled_from(ZONES),
    st.sampled_from(CHANGES),
    st.integers(-36 * 3600, 12 * 3600),
)
@settings(max_examples=150, deadline=None)
def test_around_changes_of_the_clock_nothing_is_left_out_or_doubled(
    text: str, zone: ZoneInfo, change: datetime, seconds: int
) -> None:
    cron = Cron.parse(text)
    start = change + timedelta(seconds=seconds)
    end = start + timedelta(hours=48)
    minute = start.replace(second=0) + timedelta(minutes=1)
    expected = []
    while minute < end and len(expected) < 200:
        if is_due(cron, minute, zone):
            expected.append(minute)
        minute += timedelta(minutes=1)
    at = start.astimezone(zone)
    for one in expected:
        at = cron.next_after(at)
        assert at.astimezone(UTC) == one
    if len(expected) < 200:
        with contextlib.suppress(NeverDue):
            assert cron.next_after(at).astimezone(UTC) >= end


@given(
    fields(),
    st.datetimes(datetime(1990, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC)),
    st.data(),
)
@settings(deadline=None)
def test_the_result_fits_and_nothing_between_does(
    text: str, start: datetime, data: st.DataObject
) -> None:
    cron = Cron.parse(text)
    try:
        found = cron.next_after(start)
    except NeverDue:
        found = start + timedelta(days=7 * 365)
    else:
        assert found > start
        assert cron.fits(found)
        assert (found.second, found.microsecond) == (0, 0)
    minutes = int((found - start.replace(second=0, microsecond=0)).total_seconds()) // 60
    for _ in range(20):
        n = data.draw(st.integers(1, max(1, minutes - 1)))
        between = start.replace(second=0, microsecond=0) + timedelta(minutes=n)
        assert between >= found or not cron.fits(between)
