from __future__ import annotations

import pickle
import types
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, JsonValue, ValidationError

from llmos.drivers.errors import EngineBusy
from llmos.syscalls.deferred import Post
from llmos.syscalls.errors import InvalidMessage, InvalidRequest, MessageTooLarge, UnknownAgent
from llmos.syscalls.labels import Labels, Provenance
from llmos.syscalls.messages import (
    MAX_MESSAGE_BYTES,
    Ask,
    Asked,
    Envelope,
    Message,
    RawMessage,
    Reply,
    Send,
    Sent,
    Wire,
    ask,
    send,
)
from tests.syscalls.fakes import CALLER, SECRET, FakeServices


class Inner(BaseModel):
    items: tuple[int, ...] = ()


class Parcel(Message):
    text: str = ""
    number: int = 0
    ratio: float = 0.0
    yes: bool = False
    maybe: str | None = None
    inner: Inner = Inner()
    data: dict[str, JsonValue] = Field(default_factory=dict)


INT64 = st.integers(-(2**63), 2**64 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none() | st.booleans() | INT64 | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


@given(
    st.builds(
        Parcel,
        text=TEXT,
        number=INT64,
        ratio=st.floats(allow_nan=False),
        yes=st.booleans(),
        maybe=st.none() | TEXT,
        inner=st.builds(Inner, items=st.lists(INT64, max_size=3).map(tuple)),
        data=st.dictionaries(TEXT, JSON, max_size=4),
    )
)
def test_a_message_comes_back_as_it_was(parcel: Parcel) -> None:
    wire = pickle.loads(pickle.dumps(Wire.of(parcel)))
    assert wire.message() == parcel
    assert wire.decode(Parcel, "x") == parcel
    assert (wire.kind, wire.module) == ("Parcel", __name__)


def _module(name: str, field: str) -> Any:
    """A class ``Twin`` in a module of that name."""
    module = types.ModuleType(name)
    source = f"from llmos.syscalls.messages import Message\nclass Twin(Message):\n  {field}: int\n"
    exec(compile(source, name, "exec"), module.__dict__)
    return module.Twin


def test_two_modules_may_have_a_class_of_the_same_name() -> None:
    left, right = _module("tests.left", "a"), _module("tests.right", "b")
    assert Wire.of(left(a=1)).message() == left(a=1)
    assert Wire.of(right(b=2)).message() == right(b=2)
    # Which of the two is meant cannot be told without the module.
    raw = Wire.of_json("Twin", {"a": 1}).message()
    assert raw == RawMessage(of_kind="Twin", body={"a": 1})


def test_a_class_that_is_not_here_comes_as_raw_and_goes_on_unchanged() -> None:
    wire = Wire.of_json("NeverSeen", {"x": [1, None]})
    raw = wire.message()
    assert isinstance(raw, RawMessage)
    assert (raw.of_kind, raw.body) == ("NeverSeen", {"x": [1, None]})
    assert Wire.of(raw) == wire


def test_the_limit_of_size_is_exact_in_the_error() -> None:
    with pytest.raises(MessageTooLarge) as caught:
        Wire.of(Parcel(text="x" * (MAX_MESSAGE_BYTES + 1)))
    assert caught.value.size_bytes > caught.value.limit_bytes == MAX_MESSAGE_BYTES
    assert len(Wire.of(Parcel(text="x" * (MAX_MESSAGE_BYTES - 200))).body) <= MAX_MESSAGE_BYTES


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "body",
    [
        {"text": "\ud800"},
        {"\udfff": 1},
        {"number": 2**64},
        {"number": -(2**63) - 1},
        {"deep": nested(2000)},
        {"thing": object()},
    ],
    ids=["surrogate", "surrogate key", "too large", "too small", "deep", "object"],
)
def test_what_has_no_form_on_the_wire_is_refused_with_a_type(body: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Wire.of_json("Parcel", body)
    assert caught.value.field == "body"


def test_huge_numbers_in_a_message_are_refused() -> None:
    with pytest.raises(InvalidRequest):
        Wire.of(Parcel(number=10**30))


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"number": "many"}, "number"),
        ({"inner": {"items": [1, "x"]}}, "inner.items.1"),
        ({"nuber": 1}, "nuber"),
        ({"data": {"x": nested(400)}}, ""),
    ],
)
def test_an_invalid_body_names_the_field_and_the_receiver(body: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidMessage) as caught:
        Wire.of_json("Parcel", body).decode(Parcel, "acme/desk/main")
    assert named in caught.value.reason
    assert (caught.value.agent, caught.value.kind) == ("acme/desk/main", "Parcel")


@pytest.mark.parametrize("body", [b"\x93\x01\x02\x03", b"\x01"])
def test_a_body_that_is_no_map_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidMessage, match="not a map"):
        Wire("Parcel", "", body).decode(Parcel, "x")


def test_bytes_are_no_json() -> None:
    with pytest.raises(InvalidMessage, match="bytes"):
        Wire.of_json("Parcel", {"text": b"x"}).decode(Parcel, "x")


# ------------------------------------------------------------------ handlers


def replying(reply: Reply) -> FakeServices:
    services = FakeServices()
    services.reply = lambda envelope: reply
    return services


async def test_ask_hands_over_chain_labels_and_cause_and_joins_the_reply() -> None:
    about = Provenance(kind="document", source="a.md")
    services = replying(
        Reply(
            "turn-9",
            "acme/clerk/main",
            wire=Wire.of(Parcel(number=4)),
            labels=SECRET,
            provenance=(about,),
        )
    )
    caller = replace(CALLER, chain=("acme/boss/main",), labels=Labels(trusted=False))
    request = Ask(agent="acme/clerk/main", message=Wire.of(Parcel(text="hi")), deadline_s=3.0)
    asked = await ask(request, caller, services)
    assert isinstance(asked, Asked)
    assert asked.reply is not None
    assert asked.reply.message() == Parcel(number=4)
    assert asked.turn == "turn-9"
    assert asked.labels == SECRET
    assert asked.provenance == (
        Provenance(kind="agent", source="acme/clerk/main", version="turn-9"),
        about,
    )
    (sent,) = services.asked
    assert sent.chain == ("acme/boss/main", "acme/desk/main")
    assert (sent.sender, sent.cause, sent.deadline_s) == ("acme/desk/main", "turn-1/3", 3.0)
    assert (sent.stream, sent.seq, sent.asked) == ("acme/desk/main#turn-1", 3, True)
    assert sent.labels == Labels(trusted=False)


async def test_ask_raises_the_error_of_the_other_turn() -> None:
    services = replying(Reply("t", "a/b/c", error=EngineBusy("chat", 9, 0.5)))
    with pytest.raises(EngineBusy) as caught:
        await ask(Ask(agent="a/b/c", message=Wire.of(Parcel())), CALLER, services)
    assert caught.value.waiting == 9


async def test_a_question_asked_again_by_the_same_turn_has_the_same_id() -> None:
    services = replying(Reply("t", "a/b/c"))
    for _ in range(2):
        await ask(Ask(agent="a/b/c", message=Wire.of(Parcel())), CALLER, services)
    one, two = services.asked
    assert one.key == two.key == ("a/b/c", "acme/desk/main#turn-1", 3)
    assert one.id == "acme/desk/main#turn-1#3"


async def test_send_is_left_to_the_commit_and_nobody_waits_for_it() -> None:
    services = FakeServices()
    wire = Wire.of(Parcel(text="hi"))
    caller = replace(CALLER, chain=("acme/boss/main",), labels=SECRET)
    sent = await send(Send(agent="acme/clerk/main", message=wire, priority=5), caller, services)
    assert isinstance(sent, Sent)
    assert sent.message_id == "turn-1/3"
    assert services.deferred == [Post("acme/clerk/main", wire, "turn-1/3", 5, SECRET)]
    assert not services.asked


@pytest.mark.parametrize("priority", [-101, 101])
def test_a_priority_has_bounds(priority: int) -> None:
    with pytest.raises(ValidationError):
        Send(agent="a/b/c", message=Wire.of(Parcel()), priority=priority)


def test_a_reply_is_its_message_its_error_or_nothing() -> None:
    assert Reply("t", "a").message() is None
    assert Reply("t", "a", wire=Wire.of(Parcel(number=1))).message() == Parcel(number=1)
    with pytest.raises(UnknownAgent):
        Reply("t", "a", error=UnknownAgent("a")).message()


def test_an_envelope_comes_back_from_the_store() -> None:
    sent = Envelope(
        "a/b/c",
        "acme/desk/main",
        Wire.of(Parcel(text="hi")),
        "acme/desk/main",
        7,
        asked=True,
        deadline_s=3.0,
        priority=-5,
        chain=("x/y/z",),
        labels=SECRET,
        cause="turn-1/3",
    )
    assert pickle.loads(pickle.dumps(sent)) == sent
    back = Envelope.unpack(sent.receiver, sent.stream, sent.seq, sent.pack())
    # How long somebody waits is not kept.
    assert back == sent._replace(deadline_s=60.0, again=True)
    assert back.wire.message() == Parcel(text="hi")


def test_an_envelope_of_a_newer_version_is_refused() -> None:
    with pytest.raises(InvalidMessage, match="version 3"):
        Envelope.unpack("a/b/c", "s", 1, msgpack.packb((3, "anything")))


def test_an_envelope_of_the_version_before_can_be_read() -> None:
    sent = Envelope("a/b/c", "client:1", Wire.of_json("K", {}), "client:1", 1, sent_at=5.0)
    assert Envelope.unpack("a/b/c", "client:1", 1, sent.pack()).sent_at == 5.0
    fields = msgpack.unpackb(sent.pack())
    before = msgpack.packb([1, *fields[1:-1]])
    assert Envelope.unpack("a/b/c", "client:1", 1, before) == sent._replace(again=True, sent_at=0.0)
