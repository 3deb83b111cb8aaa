"""``classify``: from a model's probabilities to labels with provenance."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pydantic import ValidationError

from llmos.drivers.stores.rows import JournalRow
from llmos.kernel import record
from llmos.kernel.context import Context
from llmos.syscalls.classify import Classification, Classified, Classify, classify
from llmos.syscalls.errors import CapabilityDenied
from llmos.syscalls.labels import Labels, Provenance
from tests.kernel.test_dispatch import Bench
from tests.syscalls.fakes import CALLER, FakeServices

TEXTS = ("I want a refund", "good morning")


async def made(texts: tuple[str, ...] = TEXTS) -> Classified:
    caller = replace(CALLER, labels=Labels(trusted=False))
    found = await classify(Classify(model="m", texts=texts), caller, FakeServices())
    assert isinstance(found, Classified)
    return found


async def test_the_likeliest_label_comes_first() -> None:
    found = await made()
    assert [r.label for r in found.results] == ["refund", "other"]
    assert list(found.results[1].probabilities) == ["other", "refund"]
    assert found.results[1].probability == found.results[1].probabilities["other"] == 0.75
    assert (found.label, found.probability) == ("refund", found.results[0].probability)


async def test_it_says_which_model_and_is_no_more_trusted_than_its_text() -> None:
    found = await made()
    assert found.provenance == (Provenance(kind="model", source="m", version="digest-of-m"),)
    assert found.labels == Labels(trusted=False)


async def test_a_record_gives_the_same_numbers_back() -> None:
    request, found = Classify(model="m", texts=TEXTS), await made()
    row = JournalRow(
        *("a/b/c", "t", 1, "result", "Classify", "m"),
        result=record.result_of(found),
        labels=record.pack_labels(found.labels),
        provenance=record.pack_provenance(found.provenance),
    )
    assert record.response_of(request, row) == found


@pytest.mark.parametrize("texts", [(), ("x",) * 4097])
def test_there_are_texts_and_not_too_many(texts: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError):
        Classify(model="m", texts=texts)


async def test_an_agent_may_classify_what_its_manifest_names() -> None:
    os: Context = Bench("classify:mail").os
    one = await os.classify("mail", "a refund, please")
    assert one.label == "refund"
    assert isinstance(one.results[0], Classification)
    assert len((await os.classify("mail", ["a", "b"])).results) == 2
    with pytest.raises(CapabilityDenied):
        await os.classify("other", "x")
