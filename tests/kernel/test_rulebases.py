from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

import pytest

from llmos.drivers.errors import DocumentError, LlmosError, RuleSyntaxError
from llmos.drivers.protocols import Fact
from llmos.kernel.rulebases import CHECK_S, RuleBases, Source
from llmos.syscalls.labels import Labels


def program(text: str) -> str:
    rule = {"name": "r", "when": {"n": {"x": "?x"}}, "then": {"m": {"y": text}}}
    return json.dumps({"templates": {"n": {"x": "any"}, "m": {"y": "text"}}, "rules": [rule]})


class Files:
    """The rule file, and a clock."""

    def __init__(self, path: Path) -> None:
        self.path, self.now, self.reads = path, 0.0, 0

    async def source(self, tenant: str, name: str) -> Source:
        self.reads += 1
        await asyncio.sleep(0)
        try:
            return "memory", self.path.name, self.path.read_text(), Labels()
        except OSError as error:
            raise DocumentError(str(self.path), str(error)) from None


async def says(bases: RuleBases) -> str:
    base, _ = await bases.get("t", "r")
    fact = base.evaluate([Fact("n", {"x": 1})]).first("m")
    assert fact is not None
    return str(fact.slots["y"])


async def test_a_changed_file_counts_from_the_next_look(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = Files(tmp_path / "r.json")
    bases = RuleBases(files.source, lambda: files.now)
    files.path.write_text(program("one"))
    assert await asyncio.gather(*(says(bases) for _ in range(5))) == ["one"] * 5
    assert files.reads == 1
    files.path.write_text(program("two"))
    assert await says(bases) == "one"
    files.now += CHECK_S
    assert await says(bases) == "two"

    files.path.write_text("{")
    with caplog.at_level(logging.WARNING, "llmos.rules"):
        for _ in range(3):
            files.now += CHECK_S
            assert await says(bases) == "two"
    assert len(caplog.records) == 1
    files.path.unlink()
    files.now += CHECK_S
    assert await says(bases) == "two"
    files.path.write_text(program("three"))
    files.now += CHECK_S
    assert await says(bases) == "three"


async def test_one_that_was_never_usable_is_an_error(tmp_path: Path) -> None:
    files = Files(tmp_path / "r.json")
    bases = RuleBases(files.source, lambda: files.now)
    with pytest.raises(LlmosError):
        await bases.get("t", "r")
    files.path.write_text("{")
    with pytest.raises(RuleSyntaxError):
        await bases.get("t", "r")
    files.path.write_text(program("one"))
    assert await says(bases) == "one"
