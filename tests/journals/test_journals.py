"""Every recorded turn of this folder runs again as it did. See README.md."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import msgpack
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
def test_a_file_is_what_it_is_written_from(file: Path, tmp_path: Path) -> None:
    found = Recording.read(file)
    written = tmp_path / file.name
    written.write_text(found.dump(), encoding="utf-8")
    assert Recording.read(written) == found
    if _envelope_version(file) == _envelope_version(written):
        # The others were recorded before envelopes had their present form.
        assert found.dump() == file.read_text(encoding="utf-8")


def test_both_forms_of_envelopes_are_in_the_corpus() -> None:
    assert {_envelope_version(file) for file in FILES} == {1, 2}


def _envelope_version(file: Path) -> int:
    packed = json.loads(file.read_text(encoding="utf-8"))["message"]["envelope"]
    version: int = msgpack.unpackb(base64.b64decode(packed))[0]
    return version
