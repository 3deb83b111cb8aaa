from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from llmos.drivers.errors import EngineFailed
from llmos.shell import render
from llmos.shell.session import Result
from llmos.shell.trace import Trace
from llmos.syscalls.messages import RawMessage, Reply, Wire
from tests.shell.rows import (
    AGENTS,
    ANSWER,
    FIRED,
    SOURCE,
    STATUS,
    failed,
    syscalls,
    turn,
    unusual,
)

WHOLE = Trace.of([*syscalls(), turn()])


def shown(renderable: Any, width: int = 200) -> str:
    """What the terminal would show, by the console the commands use."""
    console = render.console()
    console.file = io.StringIO()
    console.width = width
    console.print(renderable)
    return str(console.file.getvalue())


def test_brackets_of_users_are_shown_and_not_read_as_markup() -> None:
    assert "a [/b] bracket, [red]colour[/red], :smile:" in shown(
        render.turns([Trace.of([turn()])]), 300
    )


def test_a_turn_shows_every_syscall_with_its_essentials() -> None:
    text = shown(render.turn(WHOLE))
    for part in (
        *("t-0001", "acme/desk/main", "epoch 3", "Question", "took 1.50 s", "ok"),
        *("Retrieve help", "0.50 T: a [/b] bracket", "from a.md@01234567"),
        *("→ small", "Small amounts are paid back"),
        *("7 + 20 tokens, 10.0 tokens/s", "0.0 tokens/s"),
        *("EngineFailed", "denied", "CapabilityDenied", "cancelled", "Cancelled"),
        *("reply: It is free.", "Generate chat ×4 1.00 s", "1.50 s in all"),
    ):
        assert part in text, part


def test_a_failed_turn_shows_its_error() -> None:
    text = shown(render.turn(Trace.of([failed()])))
    assert "EngineFailed" in text
    assert "error" in text
    assert "reply:" not in text


def test_what_has_no_end_is_shown_as_it_stands() -> None:
    trace = Trace.of(unusual())
    assert trace.status == "running"
    assert trace.elapsed_s is None
    assert [(s.seq, s.name, s.status) for s in trace.steps] == [
        (1, "Call", "ok"),
        (1, "Patched", "mark"),
        (2, "Call", "unknown"),
        (3, "Generate", "running"),
        (4, "Call", "running"),
        (4, "Retry", "mark"),
    ]
    assert trace.steps[0].phases == ["intent", "result"]
    text = shown(render.turn(trace))
    for part in (
        *("running", "has no end yet", "seat", "Patched ask-twice", "after that change"),
        *("nobody knows whether it was carried out", "llmos effects resolve t-0001/2"),
        *("2 pieces handed out, no end recorded", "It is free …"),
        "a person has allowed another attempt",
    ):
        assert part in text, part
    as_json = trace.as_json()
    assert json.loads(json.dumps(as_json))["syscalls"][2]["effect"] == "t-0001/2"


@pytest.mark.parametrize("width", [20, 40, 80, 300])
def test_no_width_breaks_anything(width: int) -> None:
    for renderable in (
        render.turn(WHOLE),
        render.turns([Trace.of([turn()]), Trace.of([failed()])]),
        render.status(STATUS),
        render.agents(AGENTS),
        render.answer(ANSWER),
    ):
        assert shown(renderable, width)


def test_turns_are_listed_with_what_came_of_them() -> None:
    text = shown(render.turns([Trace.of([turn()]), Trace.of([failed()])]))
    assert "t-0001" in text
    assert "t-0002" in text
    assert "error" in text
    assert "EngineFailed: The engine" in text
    assert "TURN" in shown(render.turns([]))


def test_status_shows_what_is_wrong_in_its_own_words() -> None:
    text = shown(render.status(STATUS), 400)
    for part in (
        *("System demo", "2 agents", "host:0", "given up", "cpu:0 A [fast] one"),
        *("2.00 GiB", "model chat 1.00 GiB", "chat (hf:x)", "3 + 4 waiting"),
        *("no such model [models.gone]", "7 passages, 1 files left out", "0 nodes, 0 edges"),
        *("ready", "loading"),
    ):
        assert part in text, part


def test_held_agents_and_those_of_a_program_are_listed() -> None:
    base = AGENTS[0]
    text = shown(
        render.agents(
            [
                {**base, "held": ["acme/desk/main: quarantined"]},
                {**base, "agent": "acme/x/*", "keys": 7, "all_counted": True, "held": []},
                {**base, "agent": "acme/y/*", "keys": 2000, "all_counted": False, "held": ["a"]},
            ]
        )
    )
    assert "quarantined" in text
    assert "acme/x/*  (7 agents)" in text
    assert "2000 or more agents" in text
    assert "1: llmos held" in text


def test_agents_are_listed_or_the_way_to_one_is() -> None:
    text = shown(render.agents(AGENTS))
    assert "acme/desk/main" in text
    assert "chat, embed" in text
    assert "llmos launch" in shown(render.agents([]))


def test_an_answer_shows_what_it_rests_on() -> None:
    text = shown(render.answer(ANSWER))
    for part in (
        *("It is free.", "Not advice", "decision: refund", "grounded: extract"),
        *("confidence: 0.75", "small", "[1]", "c/a.md[0:4]@01234567", "…"),
    ):
        assert part in text, part
    assert "x: 1" in shown(render.answer(RawMessage(of_kind="Other", body={"x": 1})))


@pytest.mark.parametrize(
    ("value", "said"), [(0.0, "0 µs"), (0.0005, "500 µs"), (0.25, "250 ms"), (12.5, "12.50 s")]
)
def test_durations_for_people(value: float, said: str) -> None:
    assert render.seconds(value) == said


def test_where_the_time_went_adds_up_by_syscall() -> None:
    text = render.where_time_went(WHOLE.steps, 2.0)
    assert text.startswith("2.00 s in all: Generate chat ×4 1.00 s, ")
    assert "Now 250 ms" in text
    assert render.where_time_went([], 0.1) == "100 ms in all: "


# ------------------------------------------------------------------ results


def test_a_result_is_a_panel_and_json() -> None:
    reply = Reply("t-0001", "acme/desk/main", wire=Wire.of(ANSWER), provenance=(SOURCE,))
    result = Result("acme/desk/main", "Is it [/free]?", reply, None, [*syscalls(), turn()])
    text = shown(result.panel(1))
    assert "1. acme/desk/main" in text
    assert "“Is it [/free]?”" in text
    assert "It is free." in text
    assert "llmos strace t-0001" in text
    told = json.loads(json.dumps(result.as_json()))
    assert told["answer"]["rules"][0]["rule"] == FIRED.rule
    assert told["provenance"][0]["source"] == "a.md"
    assert told["error"] is None
    assert len(told["syscalls"]) == 7


def test_a_question_that_failed_says_why() -> None:
    result = Result("[/x]", "text", None, EngineFailed("chat", "it [/broke]"))
    text = shown(result.panel(None))
    assert "EngineFailed" in text
    assert "it [/broke]" in text
    assert "no turn was begun" in text
    assert "[/x]" in text
    assert result.as_json()["error"]["error"] == "EngineFailed"
    empty = Result("a/b/c", "text", Reply("t", "a/b/c"), None)
    assert "(no reply)" in shown(empty.panel(None))


def test_the_console_of_a_pipe_is_wide_enough_to_read() -> None:
    console = render.console()
    assert isinstance(console, Console)
    assert console.width >= 80
