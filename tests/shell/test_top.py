"""``llmos top``: the page at several widths, and figures for people."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from llmos.shell.top import page, short, size

MIB = 1 << 20


def state() -> dict[str, Any]:
    counts = {
        "running": 31,
        "waiting": 117,
        "kv_tokens": 32768,
        "kv_tokens_used": 30000,
        "kv_tokens_cached": 2048,
        "preempted": 12,
        "adapters": ["a", "b"],
    }
    slot = {"kind": "causal", "device": "cpu:0", "error": None, "statistics": counts}
    rates = {"read_per_s": 812.4, "written_per_s": 143.2, "step_s": 0.0312}
    return {
        "system": "clinic-and-bank",
        "uptime_s": 93_784.0,
        "launched": 52,
        "policy": "fair",
        "window_s": 60,
        "rate_s": 5,
        "devices": [
            {
                "name": "cpu:0",
                "product": "x86",
                "state": "up",
                "used_bytes": 2100 * MIB,
                "capacity_bytes": 4096 * MIB,
                "free_bytes": 2000 * MIB,
                "utilisation": 0.97,
                "owners": {"embed": 96 * MIB, "chat": 2000 * MIB},
            }
        ],
        "slots": [
            {"model": "chat", "state": "ready", **slot, **rates},
            {
                "model": "large",
                "state": "failed",
                **slot,
                **rates,
                "step_s": None,
                "statistics": None,
                "device": None,
                "error": "it does not fit",
            },
        ],
        "missing_models": {"gone": "no such file"},
        "tenants": [
            {
                "tenant": "bank",
                "weight": 3.0,
                "read": 51_200,
                "written": 9_700,
                "under_way": 16,
                "share": 0.8,
                "tokens_per_minute": 60_000,
                "concurrent_requests": 16,
            },
            {
                "tenant": "clinic",
                "weight": 1.0,
                "read": 12_000,
                "written": 3_000,
                "under_way": 2,
                "share": 0.2,
                "tokens_per_minute": None,
                "concurrent_requests": None,
            },
        ],
        "agents": [
            {"agent": f"bank/help/{n}", "tenant": "bank", "read": 900 - n, "written": 90}
            for n in range(40)
        ],
        "hosts": [
            {"name": "host:0", "state": "up", "active": 40, "running": 31, "waiting": 117},
            {
                "name": "host:1",
                "state": "starting",
                "active": None,
                "running": None,
                "waiting": None,
            },
        ],
    }


def shown(width: int, height: int | None = None, **changes: Any) -> list[str]:
    console = Console(width=width, force_terminal=False, highlight=False, markup=False)
    with console.capture() as got:
        console.print(page({**state(), **changes}, width, height))
    return [line.rstrip() for line in got.get().splitlines()]


@pytest.mark.parametrize("width", [80, 100, 140])
def test_nothing_is_cut_off(width: int) -> None:
    lines = shown(width)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= width
    assert "…" not in text
    for word in (
        *("clinic-and-bank", "up 1d 2h", "52 launched", "policy fair"),
        *("cpu:0", "2.0G", "4.0G", "chat 2.0G", "embed 96M"),
        *("31", "117", "92%", "6%", "812", "143", "31 ms", "large", "failed", "gone"),
        *("bank", "80%", "51k", "clinic", "none"),
        *("bank/help/0", "host:0", "40", "host:1", "starting"),
    ):
        assert word in text, word
    wide = "61k of 60k tokens, 16 of 16 requests"
    assert (wide if width >= 110 else "61k/60k tok, 16/16 req") in text
    assert ("it does not fit" in text) == (width >= 110)


def test_the_bar_is_filled_as_the_ledger_is() -> None:
    line = next(line for line in shown(140) if line.startswith("cpu:0"))
    assert (line.count("█"), line.count("░")) == (16, 14)  # 2096 of 4096, 30 wide.


@pytest.mark.parametrize("height", [24, 30, 50])
def test_agents_fill_what_is_left_of_the_height(height: int) -> None:
    lines = shown(80, height)
    count = sum(line.startswith("bank/help/") for line in lines)
    assert count >= 1
    assert len(lines) <= height
    assert height < 50 or len(lines) >= height - 1


def test_a_system_that_does_nothing() -> None:
    text = "\n".join(shown(80, tenants=[], agents=[], slots=[], missing_models={}))
    assert "no tokens in the last 60 s" in text


def test_figures_have_four_characters_at_most() -> None:
    assert [size(n) for n in (0, 1023, 2048, 812 * MIB, 1300 * MIB, None)] == [
        *("0", "1023", "2.0K", "812M", "1.3G", "?")
    ]
    assert [short(n) for n in (0, 940, 1_000, 12_345, 999_999, 1_200_000)] == [
        *("0", "940", "1.0k", "12k", "1.0M", "1.2M")
    ]
