"""States: how they are stored, migrated and loaded."""

from __future__ import annotations

import datetime
import enum
import hashlib
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from llmos import Agent
from llmos.agents.base import migration
from llmos.kernel.program import StateError, UnstorableState, code_version, load_state, pack_state

SEEN: list[Any] = []


class Colour(enum.Enum):
    RED = "red"


class Memory(BaseModel):
    model_config = ConfigDict(extra="forbid")

    first: str = ""
    last: str = ""
    visits: int = 0
    score: float = 0.0
    price: Decimal = Decimal(0)
    at: datetime.datetime | None = None
    colour: Colour = Colour.RED
    tags: set[str] = Field(default_factory=set)
    pair: tuple[int, int] = (0, 0)
    items: list[int] = Field(default_factory=list)
    raw: bytes = b""
    data: Any = None


class Old(Agent):
    State = Memory


class Desk(Agent):
    State = Memory
    state_version = 3

    @migration(1)
    @staticmethod
    def split_name(state: dict[str, Any]) -> dict[str, Any]:
        first, _, last = state.pop("name").partition(" ")
        return {**state, "first": first, "last": last}

    @classmethod
    @migration(2)
    def count_from_one(cls, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "visits": state.get("visits", 0) + 1}


def load(program: Any, data: bytes | None, version: int) -> BaseModel:
    return load_state("m:Desk", program, data, version)


# ------------------------------------------------------------------ loading


def test_a_new_agent_begins_with_the_defaults() -> None:
    assert load(Desk, None, 0) == load(Old, None, 0) == Memory()
    assert load(Old, pack_state(Memory(visits=2)), 1) == Memory(visits=2)


def test_a_state_goes_through_every_migration_from_its_version_on() -> None:
    assert load(Desk, b'{"name": "Ann Lee", "visits": 4}', 1) == Memory(
        first="Ann", last="Lee", visits=5
    )
    assert load(Desk, b'{"first": "Ann"}', 2) == Memory(first="Ann", visits=1)
    assert load(Desk, b'{"first": "Ann"}', 3) == Memory(first="Ann")


class Fragile(Agent):
    State = Memory
    state_version = 3

    @migration(2)
    @staticmethod
    def change(state: dict[str, Any]) -> Any:
        how = state.get("how")
        if how == "raise":
            raise KeyError("gone")
        if how == "nothing":
            return None
        return {"data": object()} if how == "object" else {"visits": state}


@pytest.mark.parametrize(
    ("data", "version", "said"),
    [
        (b"{}", 4, "knows versions up to 3"),
        (b"{}", 1, "no migration from version 1"),
        (b"{}", 0, "no migration from version 0"),
        (b'{"how": "raise"}', 2, "raised KeyError('gone') at"),
        (b'{"how": "nothing"}', 2, "returned NoneType, not dict"),
        (b'{"how": "object"}', 2, "made no JSON"),
        (b'{"how": "wrong"}', 2, "visits: "),
        (b"[1]", 2, "raised AttributeError"),
        (b"{broken", 2, "is no JSON"),
        (b"{broken", 3, "JSON"),
        (b'{"visits": "many"}', 3, "visits: "),
        (b'{"nmae": 1}', 3, "nmae: "),
        (b"[]", 3, "the state: "),
        (b"", 3, "JSON"),
        (b"\xff", 3, ""),
        (b"[" * 100_000, 2, "is no JSON"),
        (b"[" * 100_000, 3, ""),
    ],
)
def test_what_does_not_fit_is_told(data: bytes, version: int, said: str) -> None:
    with pytest.raises(StateError) as caught:
        load(Fragile, data, version)
    error = caught.value
    assert (error.program, error.version) == ("m:Desk", version)
    assert said in error.reason
    assert "Nothing is lost" in error.remedy


def test_a_state_without_defaults_is_told() -> None:
    class Strict(BaseModel):
        name: str

    class Needs(Agent):
        State = Strict

    with pytest.raises(StateError, match="needs defaults: name"):
        load(Needs, None, 0)


def test_a_state_that_cannot_be_made_is_told() -> None:
    class Bare(Agent):
        State = BaseModel

    class Torn(BaseModel):
        day: int = Field(default_factory=lambda: [][0])

    class Raises(Agent):
        State = Torn

    with pytest.raises(StateError, match="PydanticUserError"):
        load(Bare, None, 0)
    with pytest.raises(StateError, match="IndexError"):
        load(Raises, None, 0)


# ------------------------------------------------------------------ storing

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(
    st.builds(
        Memory,
        first=TEXT,
        visits=st.integers(),
        score=st.floats(allow_nan=False, allow_infinity=False),
        price=st.decimals(allow_nan=False, allow_infinity=False),
        at=st.none() | st.datetimes(),
        tags=st.sets(TEXT, max_size=4),
        pair=st.tuples(st.integers(), st.integers()),
        raw=st.text().map(lambda t: t.encode("utf-8", "ignore")),
        data=JSON,
    )
)
def test_a_state_comes_back_as_it_was(state: Memory) -> None:
    assert load(Old, pack_state(state), 1) == state


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("score", float("nan")),
        ("score", float("inf")),
        ("data", float("nan")),
        ("data", object()),
        ("first", "\ud800"),
        ("first", 3),
        ("visits", "many"),
        ("raw", b"\xff"),
        ("colour", "blue"),
    ],
)
def test_what_would_not_come_back_is_not_stored(field: str, value: Any) -> None:
    state = Memory()
    # As a handler does it: pydantic does not check assignments by default.
    state.__dict__[field] = value
    with pytest.raises(UnstorableState) as caught:
        pack_state(state)
    assert caught.value.state == "Memory"
    assert caught.value.reason


def test_what_has_no_end_is_not_stored() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(UnstorableState):
        pack_state(Memory(data=loop))


def test_a_value_of_another_type_that_comes_back_as_the_fields_is_stored() -> None:
    state = Memory()
    state.__dict__.update(items=(1, 2), score=3)
    assert load(Old, pack_state(state), 1) == Memory(items=[1, 2], score=3.0)


# ------------------------------------------------------------------ classes


def test_programs_without_versions_have_the_first() -> None:
    assert (Agent.state_version, Agent.migrations) == (1, {})
    assert (Old.state_version, Old.migrations) == (1, {})
    assert sorted(Desk.migrations) == [1, 2]
    assert Agent.migrations == {}


def test_migrations_are_inherited_and_may_be_replaced() -> None:
    class Later(Desk):
        state_version = 4

        @migration(1)
        @staticmethod
        def other(state: dict[str, Any]) -> dict[str, Any]:
            return {"first": "replaced"}

        @migration(3)
        @staticmethod
        def more(state: dict[str, Any]) -> dict[str, Any]:
            return {**state, "last": "new"}

    assert load(Later, b'{"name": "x"}', 1) == Memory(first="replaced", last="new", visits=1)
    assert sorted(Desk.migrations) == [1, 2]
    assert load(Desk, b'{"name": "x"}', 1) == Memory(first="x", visits=1)


def test_the_oldest_migrations_may_be_dropped() -> None:
    assert sorted(Fragile.migrations) == [2]


def identity(state: dict[str, Any]) -> dict[str, Any]:
    return state


@pytest.mark.parametrize(
    ("version", "versions", "said"),
    [
        (2, [], "state_version is 2, but there is no migration from version 1"),
        (4, [1, 3], "no migration from version 2"),
        (4, [1, 2], "no migration from version 3"),
        (2, [1, 2], "a migration from version 2, but state_version is 2"),
        (1, [1], "a migration from version 1, but state_version is 1"),
        (0, [], "at least 1"),
        (3, [1, 2, 2], "both m1 and m2 migrate from 2"),
    ],
)
def test_gaps_and_duplicates_are_told_where_the_class_is_written(
    version: int, versions: list[int], said: str
) -> None:
    body: dict[str, Any] = {"state_version": version}
    for index, at in enumerate(versions):

        def step(state: dict[str, Any]) -> dict[str, Any]:
            return state

        body[f"m{index}"] = staticmethod(migration(at)(step))
    with pytest.raises(TypeError) as caught:
        type("Torn", (Agent,), body)
    assert said in str(caught.value)


def test_a_migration_is_no_method_of_an_agent() -> None:
    with pytest.raises(TypeError, match="static or class method"):

        class Torn(Agent):
            state_version: ClassVar[int] = 2

            @migration(1)
            def change(self, state: dict[str, Any]) -> dict[str, Any]:
                return state

    with pytest.raises(TypeError, match="begin with 1"):
        migration(0)


# ------------------------------------------------------------------ code


def test_the_version_of_the_code_is_that_of_its_file() -> None:
    expected = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    assert code_version(Desk) == code_version(Old) == expected


def test_the_version_is_of_the_code_that_was_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "llmos_versioned.py"
    file.write_text("from llmos import Agent\nclass Desk(Agent):\n    pass\n")
    import importlib

    loaded = importlib.import_module("llmos_versioned").Desk
    before = code_version(loaded)
    file.write_text("# changed\n")
    assert code_version(loaded) == before
    sys.modules.pop("llmos_versioned")


def test_without_a_file_the_version_is_that_of_the_name() -> None:
    one, two = (type(name, (Agent,), {"__module__": "nowhere"}) for name in ("One", "Two"))
    assert code_version(one) != code_version(two)
    assert all(len(code_version(c)) == 16 and int(code_version(c), 16) >= 0 for c in (one, two))
