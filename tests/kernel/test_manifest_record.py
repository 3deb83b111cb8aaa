from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from llmos.drivers.errors import EngineBusy
from llmos.kernel import record
from llmos.kernel.manifest import SYSCALLS, Limits, Manifest
from llmos.syscalls.errors import InvalidRequest
from llmos.syscalls.labels import Labels, Provenance, Sensitivity
from llmos.syscalls.messages import Wire


class Config(BaseModel):
    model: str = "chat"
    corpus: str = ""
    peer: str = "acme/clerk/main"
    number: int = 3


# ------------------------------------------------------------------ manifest


def test_configuration_is_put_in_place_of_names() -> None:
    manifest = Manifest(
        models=("$model", {"name": "big-$number", "memory": "1GiB"}),
        stores=("corpus:$corpus", "rules:fixed"),
        capabilities=("generate:$model", "retrieve:$corpus", "ask:$peer", "clock"),
    )
    resolved = manifest.resolve(Config())
    assert [m.name for m in resolved.models] == ["chat", "big-3"]
    assert resolved.models[1].memory == 1 << 30
    # What an empty field leaves behind is dropped, never granted.
    assert resolved.stores == ("rules:fixed",)
    assert resolved.capabilities == ("generate:chat", "ask:acme/clerk/main", "clock")
    assert not resolved.allows("retrieve", "")
    assert not resolved.allows("retrieve", "anything")
    assert manifest.capabilities[0] == "generate:$model"


def test_an_empty_model_is_no_need() -> None:
    assert Manifest(models=("$model",)).resolve(Config(model="")).models == ()


@pytest.mark.parametrize("entry", ["generate:$modle", "$x"])
def test_a_name_that_is_no_field_is_refused(entry: str) -> None:
    with pytest.raises(InvalidRequest, match="is no field of Config"):
        Manifest(capabilities=(entry,)).resolve(Config())
    with pytest.raises(InvalidRequest, match="is no field of Config"):
        Manifest(models=("$nothing",)).resolve(Config())


@pytest.mark.parametrize("capability", ["genrate:chat", "*", "", "Generate:chat", ":chat"])
def test_a_capability_of_no_syscall_is_refused(capability: str) -> None:
    with pytest.raises(InvalidRequest, match="no syscall of that name") as caught:
        Manifest(capabilities=(capability,)).resolve(Config())
    assert "generate" in caught.value.reason


def test_allows_is_exact_but_for_the_star() -> None:
    manifest = Manifest(capabilities=("clock", "generate:chat", "retrieve:*", "ask:acme/*/main"))
    yes = [("clock", ""), ("generate", "chat"), ("retrieve", "x"), ("ask", "acme/a/main")]
    no = [
        ("clock", "x"),
        ("generate", ""),
        ("generate", "chat2"),
        ("generate", "CHAT"),
        ("retrieve", ""),
        ("ask", "acme/a/other"),
        ("send", "acme/a/main"),
    ]
    assert all(manifest.allows(*pair) for pair in yes)
    assert not any(manifest.allows(*pair) for pair in no)


@given(st.sampled_from(sorted(SYSCALLS)), st.text(max_size=20))
def test_an_empty_manifest_allows_nothing(syscall: str, resource: str) -> None:
    assert not Manifest().allows(syscall, resource)


@pytest.mark.parametrize(
    "fields", [{"mailbox": 0}, {"turn_deadline_s": 0}, {"concurrent_turns": 0}, {"speed": 1}]
)
def test_limits_are_checked(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Limits(**fields)


# ------------------------------------------------------------------ record


class Colour(enum.StrEnum):
    RED = "red"


@dataclass
class Thing:
    name: str = "thing"


# Whole unicode: lone surrogates come in with file names and with what models write.
TEXT = st.text(st.characters(), max_size=40)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=2**70)
    | st.floats()
    | TEXT
    | st.binary(max_size=40)
    | st.just(np.zeros((2, 3)))
    | st.sampled_from([np.float32(1.5), np.float64(2.5), np.int64(3), np.bool_(True)])
    | st.just(Colour.RED)
    | st.just(Thing())
    | st.just(Path("/x"))
    | st.just(Labels(tenants=frozenset({"a"})))
    | st.just(Wire.of_json("Kind", {"a": 1}))
)
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(TEXT | st.integers() | st.booleans(), inner, max_size=4)
    ),
    max_leaves=25,
)


@given(ANYTHING)
def test_whatever_there_is_can_be_recorded(value: Any) -> None:
    short = record.shorten(value)
    packed = record.pack(value)
    assert msgpack.packb(short) == packed
    record.unpack(packed)
    # What is short stays as it is.
    assert (
        record.shorten(short) == short or short != short or isinstance(short, list | dict | float)
    )


def deep(levels: int) -> Any:
    value: Any = "bottom"
    for _ in range(levels):
        value = {"in": [value]}
    return value


def test_long_and_deep_things_are_cut_and_say_so() -> None:
    text = record.shorten("x" * 5000)
    assert text.startswith("x" * record.MAX_TEXT)
    assert text.endswith("… (5000 characters)")
    items = record.shorten(list(range(1000)))
    assert (len(items), items[-1]) == (record.MAX_ITEMS + 1, "… (1000 items)")
    assert record.shorten(b"x" * 5000) == "bytes(5000)"
    assert "nested too deeply" in str(record.shorten(deep(5000)))
    assert "bottom" in str(record.shorten(deep(10)))
    assert len(record.pack(deep(5000))) < 1000


def test_numbers_keep_their_kind_and_huge_ones_become_text() -> None:
    values = [True, 1, 1.5, -(2**63), 2**64 - 1]
    assert record.unpack(record.pack(values)) == values
    assert record.unpack(record.pack([2**64, -(2**63) - 1])) == [
        str(2**64),
        str(-(2**63) - 1),
    ]
    assert record.shorten(np.zeros((4, 2))) == "array(4, 2)"


def test_surrogates_are_shown_escaped_in_values_and_keys() -> None:
    assert record.unpack(record.pack({"\ud800": "\udfff"})) == {"\\ud800": "\\udfff"}


def test_an_error_is_recorded_with_its_facts() -> None:
    told = record.unpack(record.pack_error(EngineBusy("chat", 9, 0.5)))
    assert told["error"] == "EngineBusy"
    assert (told["model"], told["waiting"], told["retry_after_s"]) == ("chat", 9, 0.5)
    plain = record.unpack(record.pack_error(ValueError("bad \ud800")))
    assert plain == {"error": "ValueError", "message": "bad \\ud800"}


def test_provenance_and_labels_are_recorded_whole() -> None:
    about = Provenance(kind="document", source="a.md", version="1", span=(0, 3), corpus="c")
    (back,) = record.unpack(record.pack_provenance((about,)))
    assert Provenance.model_validate(back) == about
    assert len(record.unpack(record.pack_provenance((about,) * 500))) == record.MAX_ITEMS
    labels = Labels(tenants=frozenset({"a"}), sensitivity=Sensitivity.RESTRICTED, trusted=False)
    assert Labels.model_validate(record.unpack(record.pack_labels(labels))) == labels
    assert record.unpack(b"") is None
