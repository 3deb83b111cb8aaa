"""Cron expressions: five fields, and the times that fit them.

As in Vixie cron: if both day fields are restricted (neither begins with ``*``), a day fits
that fits either of them; else it must fit both.

Times are meant on the wall clock of a time zone. A time that a change of the clock leaves
out is due right after the change; one that comes twice is due the first time only.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, tzinfo
from itertools import product

from llmos.kernel.core.errors import InvalidCron, NeverDue

YEARS = 8
"""So far is looked ahead: the longest time between two 29 February (1896 to 1904)."""

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")

_SHORT = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    low: int
    high: int
    names: tuple[str, ...] = ()
    """Of ``low`` and those after it."""


_FIELDS = (
    _Field("minute", 0, 59),
    _Field("hour", 0, 23),
    _Field("day of month", 1, 31),
    _Field("month", 1, 12, _MONTHS),
    _Field("day of week", 0, 7, _DAYS),
)


@dataclass(frozen=True, slots=True)
class Cron:
    """A cron expression that has been read."""

    text: str
    minutes: tuple[int, ...]
    """Sorted, as all of them."""
    hours: tuple[int, ...]
    days: tuple[int, ...]
    """Of the month, from 1."""
    months: tuple[int, ...]
    weekdays: tuple[int, ...]
    """0 is Sunday."""
    either_day: bool
    """Whether a day fits that fits one of the two day fields."""

    @classmethod
    def parse(cls, text: str) -> Cron:
        """Read an expression: five fields, or ``@hourly``, ``@daily``, ``@weekly``,
        ``@monthly``, ``@yearly``.

        A field is a list of ``*``, numbers, ranges ``a-b``, and steps ``*/n``, ``a-b/n``.
        Months and days of the week have names: ``jan``, ``sun``. Sunday is 0 or 7.

        Raises:
            InvalidCron: with the position of what cannot be read.
        """
        parts = _words(text)
        if len(parts) == 1 and parts[0][1].startswith("@"):
            position, word = parts[0]
            if word.lower() not in _SHORT:
                raise InvalidCron(text, position, f"known are {', '.join(_SHORT)}")
            parts = _words(_SHORT[word.lower()])
        if len(parts) != len(_FIELDS):
            position = parts[len(_FIELDS)][0] if len(parts) > len(_FIELDS) else len(text)
            raise InvalidCron(text, position, f"it has {len(parts)} fields instead of 5")
        values = [
            _values(text, position, word, one)
            for one, (position, word) in zip(_FIELDS, parts, strict=True)
        ]
        minutes, hours, days, months, weekdays = (tuple(sorted(v)) for v in values)
        either = not parts[2][1].startswith("*") and not parts[4][1].startswith("*")
        weekdays = tuple(sorted({day % 7 for day in weekdays}))
        return cls(text, minutes, hours, days, months, weekdays, either)

    def fits_day(self, day: date) -> bool:
        """Whether there are times due on a day."""
        if day.month not in self.months:
            return False
        by_month, by_week = day.day in self.days, day.isoweekday() % 7 in self.weekdays
        return (by_month or by_week) if self.either_day else (by_month and by_week)

    def fits(self, wall: datetime) -> bool:
        """Whether a wall clock's minute fits all fields; seconds do not count."""
        return wall.minute in self.minutes and wall.hour in self.hours and self.fits_day(wall)

    def next_after(self, t: datetime) -> datetime:
        """The first time due later than ``t``, in its time zone.

        Args:
            t: with a time zone.

        Raises:
            ValueError: it has none.
            NeverDue: nothing fits within 8 years.
        """
        zone = t.tzinfo
        if zone is None or t.utcoffset() is None:
            raise ValueError("a time for cron needs a time zone")
        # Through UTC, so that a time that does not exist becomes one that does. Comparisons
        # are made in UTC as well: within one zone Python compares wall clocks.
        after = t.astimezone(UTC)
        wall: datetime | None = after.astimezone(zone).replace(tzinfo=None, fold=0)
        assert wall is not None
        end = min(date.max, _plus_years(wall.date()))
        while (wall := self._next_wall(wall, end)) is not None:
            due = _instant(wall, zone)
            if due > after:
                return due.astimezone(zone)
            # The second time around of what was due before the clock was set back.
        raise NeverDue(self.text, YEARS)

    def _next_wall(self, after: datetime, end: date) -> datetime | None:
        """The first minute later than ``after`` that fits, regardless of any zone."""
        now = (after.hour, after.minute)
        day = after.date()
        while day <= end:
            if self.fits_day(day):
                for hour, minute in product(self.hours, self.minutes):
                    if day > after.date() or (hour, minute) > now:
                        return datetime(day.year, day.month, day.day, hour, minute)
            if day == date.max:
                break
            day += timedelta(days=1)
        return None


def _plus_years(day: date) -> date:
    if day.year + YEARS > date.max.year:
        return date.max
    # From 29 February to 1 March, where there is none.
    return date(day.year + YEARS, day.month, 1) + timedelta(days=day.day - 1)


def _instant(wall: datetime, zone: tzinfo) -> datetime:
    """When a wall clock shows that, in UTC: the first time, or the end of the gap it falls in."""
    first = wall.replace(tzinfo=zone, fold=0)
    due = first.astimezone(UTC)
    if due.astimezone(zone).replace(tzinfo=None, fold=0) == wall:
        return due
    # In a gap fold=0 counts with the offset before it, and so comes to lie behind it; fold=1
    # the other way round. Between the two the clock is changed.
    low = wall.replace(tzinfo=zone, fold=1).astimezone(UTC)
    before = low.astimezone(zone).utcoffset()
    seconds = int((due - low).total_seconds())
    left, right = 0, seconds
    while right - left > 1:
        middle = (left + right) // 2
        if (low + timedelta(seconds=middle)).astimezone(zone).utcoffset() == before:
            left = middle
        else:
            right = middle
    return low + timedelta(seconds=right)


def _words(text: str) -> list[tuple[int, str]]:
    """The words of a text, each with its position."""
    words: list[tuple[int, str]] = []
    position = 0
    for word in text.split():
        position = text.index(word, position)
        words.append((position, word))
        position += len(word)
    return words


def _values(text: str, position: int, word: str, one: _Field) -> set[int]:
    """All values of a field."""
    values: set[int] = set()
    for item in word.split(","):
        values |= _item(text, position, item, one)
        position += len(item) + 1
    return values


def _item(text: str, position: int, item: str, one: _Field) -> set[int]:
    """The values of one item of a field's list."""
    span, slash, step_text = item.partition("/")
    step = 1
    if slash:
        at = position + len(span) + 1
        if not _is_number(step_text) or int(step_text) < 1:
            raise InvalidCron(text, at, f"the step {step_text!r} is no number from 1")
        step = int(step_text)
    if span == "*":
        # Of the days of the week, 7 is 0 again.
        high = 6 if one.names is _DAYS else one.high
        return set(range(one.low, high + 1, step))
    start, dash, stop = span.partition("-")
    low = _value(text, position, start, one)
    if not dash:
        if slash:
            raise InvalidCron(
                text, position, f"a step needs * or a range: {start}-{one.high}{slash}{step_text}"
            )
        return {low}
    high = _value(text, position + len(start) + 1, stop, one)
    if one.names is _DAYS and high == 0 and low > 0:
        high = 7
    if low > high:
        raise InvalidCron(text, position, f"the range {span} runs backwards")
    return set(range(low, high + 1, step))


def _value(text: str, position: int, word: str, one: _Field) -> int:
    if word.lower() in one.names:
        return one.low + one.names.index(word.lower())
    if not _is_number(word):
        names = f" or a name such as {one.names[0]}" if one.names else ""
        raise InvalidCron(
            text, position, f"{word!r} is no {one.name}: {one.low} to {one.high}{names}"
        )
    value = int(word)
    if not one.low <= value <= one.high:
        raise InvalidCron(text, position, f"{one.name} {value} is not {one.low} to {one.high}")
    return value


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) <= 4
