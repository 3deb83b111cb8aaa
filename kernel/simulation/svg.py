"""Plots as SVG, written by hand: a plotting library would be 60 MB for three kinds of lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import ceil, floor, log10

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 72, 150, 40, 52
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#888888")
"""Told apart by people who do not see all colours (Okabe and Ito)."""
MOST_POINTS = 600


def lines(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x: str,
    y: str,
    log_x: bool = False,
) -> str:
    """A plot with one line per series of (x, y) points; ``log_x`` leaves out x ≤ 0."""
    points = {
        name: _thinned([(log10(a) if log_x else a, b) for a, b in s if a > 0 or not log_x])
        for name, s in series.items()
    }
    every = [p for s in points.values() for p in s] or [(0.0, 0.0)]
    x_low, x_high = _range([a for a, _ in every])
    y_low, y_high = _range([0.0, *(b for _, b in every)])

    def at(a: float, b: float) -> tuple[float, float]:
        across = (a - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        up = (b - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return round(LEFT + across, 1), round(HEIGHT - BOTTOM - up, 1)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="15">{escape(title)}</text>',
    ]
    for tick in _ticks(y_low, y_high):
        across, down = at(x_low, tick)
        out.append(
            f'<path d="M{across} {down}H{WIDTH - RIGHT}" stroke="#ddd"/>'
            f'<text x="{LEFT - 6}" y="{down + 4}" text-anchor="end">{_short(tick)}</text>'
        )
    ticks = range(ceil(x_low), floor(x_high) + 1) if log_x else _ticks(x_low, x_high)
    for tick in ticks:
        across, down = at(tick, y_low)
        out.append(
            f'<path d="M{across} {down}v5" stroke="#444"/>'
            f'<text x="{across}" y="{down + 19}" text-anchor="middle">'
            f"{_short(10.0**tick if log_x else tick)}</text>"
        )
    out.append(
        f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" fill="none" stroke="#444"/>'
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">'
        f"{escape(x)}</text>"
        f'<text transform="translate(16 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(y)}</text>'
    )
    for number, (name, line) in enumerate(points.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{a},{b}" for a, b in (at(*p) for p in line))
        down = TOP + 18 * number
        out.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
            f'<path d="M{WIDTH - RIGHT + 12} {down}h20" stroke="{colour}" stroke-width="3"/>'
            f'<text x="{WIDTH - RIGHT + 38}" y="{down + 4}">{escape(name)}</text>'
        )
    return "\n".join([*out, "</svg>", ""])


def distribution(values: Sequence[float]) -> list[tuple[float, float]]:
    """(value, share of values up to it), for a cumulative plot."""
    ordered = sorted(values)
    return [(value, (at + 1) / len(ordered)) for at, value in enumerate(ordered)]


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    step = max(1, len(points) // MOST_POINTS)
    return [*points[::step], *points[-1:]] if step > 1 else points


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low, low + 1.0)


def _ticks(low: float, high: float) -> list[float]:
    step = 10.0 ** floor(log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 6)
    return [step * n for n in range(ceil(low / step), floor(high / step) + 1)]


def _short(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:.4g}"
