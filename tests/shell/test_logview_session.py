from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from llmos.kernel.system import SystemFileError
from llmos.shell import logview
from llmos.shell.logview import LEVELS, Filter, follow_lines, read_lines
from llmos.shell.session import read_questions

ALL = Filter(None, None, None, LEVELS["DEBUG"])


def line(ts: float, message: str, **fields: Any) -> str:
    whole = {"ts": ts, "level": "INFO", "process": "host:0", "message": message, **fields}
    return json.dumps(whole) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "host-0.jsonl.1").write_text(line(1, "oldest"))
    (tmp_path / "host-0.jsonl").write_text(
        line(2, "second", agent="acme/desk/main", turn="t-0001")
        + line(5, "fifth", level="ERROR", exception="Traceback …\nKeyError: 'x'")
        + '{"ts": 6, "message": "cut o'
    )
    (tmp_path / "journal.jsonl").write_text(
        "not json\n[1, 2]\n" + '{"no": "ts"}\n' + line(3, "third", process="journal")
    )
    (tmp_path / "device.jsonl").write_bytes(
        line(4, "fourth", level="WARNING", process="device:cpu:0").encode() + b"\xff\xfe\n"
    )
    (tmp_path / "daemon.out").write_text("ready\n")
    return tmp_path


def messages(folder: Path, wanted: Filter = ALL) -> list[str]:
    return [found.fields["message"] for found in read_lines(folder, wanted)]


def test_all_files_are_merged_in_the_order_of_time(folder: Path) -> None:
    assert messages(folder) == ["oldest", "second", "third", "fourth", "fifth"]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (Filter("journal", None, None, 10), ["third"]),
        (Filter(None, "desk", None, 10), ["second"]),
        (Filter(None, None, "t-0", 10), ["second"]),
        (Filter(None, None, "t-9", 10), []),
        (Filter(None, None, None, LEVELS["WARNING"]), ["fourth", "fifth"]),
        (Filter("host:0", None, None, LEVELS["ERROR"]), ["fifth"]),
    ],
)
def test_lines_are_filtered(folder: Path, wanted: Filter, expected: list[str]) -> None:
    assert messages(folder, wanted) == expected


def test_a_line_for_people_has_who_and_the_trace(folder: Path) -> None:
    lines = {found.fields["message"]: found.text() for found in read_lines(folder, ALL)}
    assert "[acme/desk/main t-0001] second" in lines["second"]
    assert lines["fifth"].splitlines()[-1] == "KeyError: 'x'"
    assert "ERROR" in lines["fifth"]


def test_following_brings_whole_lines_as_they_come(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logview, "FOLLOW_S", 0.005)
    log = folder / "host-0.jsonl"
    log.write_text("")
    looked = threading.Event()
    steps = [
        lambda: log.write_text(line(10, "ten")),
        lambda: (folder / "new.jsonl").write_text(line(11, "eleven", process="new")),
        lambda: log.open("a").write('{"ts": 12, "level": "INFO", "mess'),
        lambda: log.open("a").write('age": "twelve"}\n'),
        # Rotated: shorter than what was read of it.
        lambda: log.write_text(line(13, "13")),
    ]

    def sleep(seconds: float) -> None:
        """Each look at the folder is followed by the next change to it."""
        if steps:
            steps.pop(0)()
        else:
            looked.set()

    monkeypatch.setattr("llmos.shell.logview.time.sleep", sleep)
    found = follow_lines(folder, ALL)
    assert [next(found).fields["message"] for _ in range(4)] == ["ten", "eleven", "twelve", "13"]
    assert not steps
    assert not looked.is_set()


# ------------------------------------------------------------------ questions


def test_questions_are_read(tmp_path: Path) -> None:
    file = tmp_path / "q.toml"
    file.write_text(
        '[[questions]]\nagent = "desk"\ntext = "free?"\n\n'
        '[[questions]]\nagent = "desk"\ntext = "how old?"\ndata = { age = 3, tags = ["x"] }\n'
    )
    first, second = read_questions(file)
    assert (first.agent, first.text, first.data) == ("desk", "free?", {})
    assert second.data == {"age": 3, "tags": ["x"]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no [[questions]]"),
        ("questions = []", "holds no [[questions]]"),
        ("questions = 3", "holds no [[questions]]"),
        ("questions = [3]", "question 1"),
        ('[[questions]]\nagent = "a"', "question 1, text: Field required"),
        ('[[questions]]\nagent = "a"\ntext = ""', "question 1, text"),
        (
            '[[questions]]\nagent = "a"\ntext = "t"\n[[questions]]\nagent = 3\ntext = "t"',
            "question 2, agent",
        ),
        ('[[questions]]\nagent = "a"\ntext = "t"\nwhen = 1', "question 1, when"),
        ("[[questions", "end of document"),
        (b"\xff", "utf-8"),
        ("x = " + "[" * 5000, ""),
    ],
)
def test_mistakes_in_questions_name_the_file_and_the_question(
    tmp_path: Path, text: str | bytes, said: str
) -> None:
    file = tmp_path / "q.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SystemFileError) as caught:
        read_questions(file)
    assert caught.value.file == str(file)
    assert said in str(caught.value)


def test_a_folder_or_nothing_is_no_file_of_questions(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.toml"):
        with pytest.raises(SystemFileError):
            read_questions(path)
