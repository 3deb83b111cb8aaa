"""Every recorded turn of this folder runs again as it did. See README.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmos.kernel.recording import Recording
from llmos.kernel.replaying import replay

HERE = Path(__file__).parent
FILES = sorted(HERE.glob("*.json"))


def test_the_corpus_is_not_empty() -> None:
    assert len(FILES) >= 12


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
async def test_a_recorded_turn_runs_again_as_it_did(file: Path) -> None:
    found = await replay(Recording.read(file))
    assert found.identical, "\n".join(found.differences)
    assert found.ended


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_a_file_is_what_it_is_written_from(file: Path) -> None:
    assert Recording.read(file).dump() == file.read_text(encoding="utf-8")
