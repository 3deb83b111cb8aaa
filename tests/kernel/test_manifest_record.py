from __future__ import annotations

import enum
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from llmos.drivers.errors import EngineBusy
from llmos.drivers.stores.rows import JournalRow
from llmos.kernel import record
from llmos.kernel.manifest import SYSCALLS, Limits, Manifest
from llmos.syscalls.base import Request, Response
from llmos.syscalls.clock import Instant, Now
from llmos.syscalls.embed import Embed, Embedded
from llmos.syscalls.errors import InvalidRequest, UnknownAgent
from llmos.syscalls.generate import Generate, Generated
from llmos.syscalls.labels import Labels, Provenance, Sensitivity
from llmos.syscalls.messages import Wire
from llmos.syscalls.retrieve import Retrieve, Retrieved


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


class Anything(Response):
    value: Any = None


class Ask(Request[Anything]):
    syscall: ClassVar[str] = "ask"
    value: Any = None


@given(ANYTHING)
def test_whatever_there_is_can_be_recorded_and_shown(value: Any) -> None:
    for data in (record.args_of(Ask(value=value)), record.result_of(Anything(value=value))):
        assert json.loads(data).keys() == {"value"}
        assert "value" in record.view(data)
    record.hash_of(data)


@given(ANYTHING)
def test_the_same_call_has_the_same_hash(value: Any) -> None:
    first, second = (record.hash_of(record.args_of(Ask(value=value))) for _ in range(2))
    assert first == second
    assert len(first) == 16


def test_a_response_comes_back_as_it_was() -> None:
    about = Provenance(kind="document", source="a.md", version="1", span=(0, 3), corpus="c")
    labels = Labels(tenants=frozenset({"a"}), sensitivity=Sensitivity.RESTRICTED, trusted=False)
    apart = {"provenance": (about,), "labels": labels}
    vectors = np.arange(6, dtype=np.float32).reshape(2, 3)
    responses: list[tuple[Request[Any], Response]] = [
        (Now(), Instant(time_s=1.5)),
        (Embed(model="m", texts=("a", "b")), Embedded(vectors=vectors, **apart)),
        (
            Retrieve(corpus="c", query="q"),
            Retrieved(passages=(), **apart),
        ),
    ]
    for request, response in responses:
        row = JournalRow(
            *("a/b/c", "t", 1, "result", type(request).__name__, request.resource),
            result=record.result_of(response),
            labels=record.pack_labels(response.labels),
            provenance=record.pack_provenance(response.provenance),
        )
        back = record.response_of(request, row)
        assert type(back) is type(response)
        assert (back.labels, back.provenance) == (response.labels, response.provenance)
        assert record.result_of(back) == record.result_of(response)
    embedded = record.response_of(
        responses[1][0], row._replace(result=record.result_of(responses[1][1]))
    )
    np.testing.assert_array_equal(embedded.vectors, vectors)
    assert embedded.vectors.dtype == np.float32


def test_the_type_of_an_answer_is_known_from_the_request() -> None:
    assert record.response_type(Generate) is Generated
    with pytest.raises(TypeError):
        record.response_type(BaseModel)  # type: ignore[arg-type]


def test_numbers_beyond_json_come_back() -> None:
    class Number(Response):
        x: float

    class Give(Request[Number]):
        syscall: ClassVar[str] = "give"

    for x in (float("inf"), float("-inf"), float("nan"), 1e308):
        row = JournalRow("a", "t", 1, "result", "Give", "", result=record.result_of(Number(x=x)))
        back = record.response_of(Give(), row).x
        assert back == x or (back != back and x != x)


def deep(levels: int) -> Any:
    value: Any = "bottom"
    for _ in range(levels):
        value = {"in": [value]}
    return value


def shown(value: Any) -> Any:
    return record.view(json.dumps(value).encode())


def test_long_and_deep_things_are_cut_for_people_and_say_so() -> None:
    text = shown("x" * 5000)
    assert text.startswith("x" * record.MAX_TEXT)
    assert text.endswith("… (5000 characters)")
    items = shown(list(range(1000)))
    assert (len(items), items[-1]) == (record.MAX_ITEMS + 1, "… (1000 items)")
    assert "nested too deeply" in str(shown(deep(400)))
    assert "bottom" in str(shown(deep(10)))
    assert record.view(msgpack.packb({"a": b"x" * 50})) == {"a": "bytes(50)"}
    assert record.view(b"") is None


def test_surrogates_are_kept_escaped_in_values_and_keys() -> None:
    kept = json.loads(record.args_of(Ask(value={"\ud800": "\udfff"})))
    assert kept == {"value": {"\\ud800": "\\udfff"}}


def test_an_error_comes_back_with_its_facts() -> None:
    error = EngineBusy("chat", 9, 0.5)
    back = record.raised(record.error_of(error))
    assert type(back) is EngineBusy
    assert (back.model, back.waiting, back.retry_after_s) == ("chat", 9, 0.5)
    assert str(back) == str(error)
    assert back.remedy == error.remedy
    known = record.raised(record.error_of(UnknownAgent("a/b/c", ["a/b/d"])))
    assert isinstance(known, UnknownAgent)
    assert known.known == ("a/b/d",)


def test_an_error_of_an_unknown_class_is_still_told() -> None:
    plain = record.raised(record.error_of(ValueError("bad \ud800")))
    assert isinstance(plain, record.RecordedError)
    assert (plain.error, plain.message) == ("ValueError", "bad \\ud800")
    odd = record.raised(b'{"error": "os._exit", "module": "os", "message": "x", "facts": {}}')
    assert isinstance(odd, record.RecordedError)


def test_a_module_that_a_row_names_is_never_imported() -> None:
    result = b'{"error": "X", "module": "this", "message": "x", "facts": {}}'
    assert isinstance(record.raised(result), record.RecordedError)
    assert "this" not in sys.modules


def test_the_end_of_a_turn_gives_its_reply() -> None:
    wire = Wire.of_json("Kind", {"a": 1}, "m")
    row = JournalRow("a/b/c", "t", 0, "result", "turn", "Hi", elapsed_s=0.5)
    done = row._replace(result=record.turn_result(wire, None, 3, b'{"n":1}'))
    reply = record.reply_of(done)
    assert (reply.turn, reply.agent, reply.wire, reply.error) == ("t", "a/b/c", wire, None)
    assert json.loads(done.result)["base"] == 3
    assert json.loads(done.result)["state"] == {"n": 1}
    failed = row._replace(result=record.turn_result(None, EngineBusy("chat", 9, 0.5), 3, None))
    assert isinstance(record.reply_of(failed).error, EngineBusy)
    assert "state" not in json.loads(failed.result)
    assert record.reply_of(row).error is None


def test_provenance_and_labels_are_recorded_whole() -> None:
    about = Provenance(kind="document", source="a.md", version="1", span=(0, 3), corpus="c")
    row = JournalRow("a", "t", 1, "result", "Now", "")
    many = row._replace(provenance=record.pack_provenance((about,) * 500))
    assert record.provenance_of(many) == (about,) * 500
    labels = Labels(tenants=frozenset({"a"}), sensitivity=Sensitivity.RESTRICTED, trusted=False)
    assert record.labels_of(row._replace(labels=record.pack_labels(labels))) == labels
    # What most rows have costs nothing.
    assert (record.pack_labels(Labels()), record.pack_provenance(())) == (b"", b"")
    assert (record.labels_of(row), record.provenance_of(row)) == (Labels(), ())


@given(st.binary(max_size=200))
def test_a_reference_names_its_blob_and_nothing_else_does(data: bytes) -> None:
    digest, reference = record.blob_of(data)
    assert record.referred(reference) == digest
    assert record.referred(data) is None or data.startswith(b"sha256:")
