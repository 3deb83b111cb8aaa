"""Schemas of answers and of tools, and what becomes of answers."""

from __future__ import annotations

import json
import pickle
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, field_validator

from llmos.syscalls.errors import AnswerCutOff, InvalidAnswer
from llmos.syscalls.schemas import (
    ToolDescription,
    ToolUse,
    answer_schema,
    describe,
    read_answer,
)


class Inner(BaseModel):
    """A note."""

    title: str = Field(description="A note.", examples=["x"])
    description: int = 3


class Loose(BaseModel):
    model_config = ConfigDict(extra="allow")

    x: int


class Cat(BaseModel):
    kind: Literal["cat"]


class Dog(BaseModel):
    kind: Literal["dog"]


class Whole(BaseModel):
    inner: list[Inner]
    loose: Loose
    named: dict[str, Inner]
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]

    @field_validator("inner")
    @classmethod
    def _not_empty(cls, inner: list[Inner]) -> list[Inner]:
        if not inner:
            raise ValueError("none is there")
        return inner


GOOD = {
    "inner": [{"title": "a"}],
    "loose": {"x": 1, "more": 2},
    "named": {"n": {"title": "b", "description": 4}},
    "pet": {"kind": "dog"},
}


def test_notes_are_left_out_but_not_fields_that_are_called_so() -> None:
    schema = json.loads(answer_schema(Whole))
    inner = schema["$defs"]["Inner"]
    assert inner == {
        "type": "object",
        "properties": {"title": {"type": "string"}, "description": {"type": "integer"}},
        "required": ["title"],
        "additionalProperties": False,
    }
    assert schema["$defs"]["Loose"]["additionalProperties"] is True
    assert schema["properties"]["named"]["additionalProperties"] == {"$ref": "#/$defs/Inner"}
    assert schema["properties"]["pet"] == {
        "anyOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}]
    }


def test_an_answer_becomes_an_object() -> None:
    found = read_answer(Whole, json.dumps(GOOD), by="chat", cut_off=False)
    assert isinstance(found, Whole)
    assert found.pet == Dog(kind="dog")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "EOF"),
        ('{"inner": []}', "inner: Value error, none is there"),
        ("[]", "Input should be an object"),
    ],
)
def test_one_that_does_not_fit_is_an_error_that_says_why(text: str, reason: str) -> None:
    with pytest.raises(InvalidAnswer) as caught:
        read_answer(Whole, text, by="chat", cut_off=False)
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.model, error.schema, error.text) == ("chat", "Whole", text)
    assert reason in error.reason
    assert type(error) is InvalidAnswer


def test_one_that_is_cut_off_is_never_taken_for_whole() -> None:
    with pytest.raises(AnswerCutOff) as caught:
        read_answer(Whole, json.dumps(GOOD), by="chat", cut_off=True)
    assert "max_new_tokens" in str(caught.value)
    assert pickle.loads(pickle.dumps(caught.value)).facts == caught.value.facts


# ------------------------------------------------------------------ tools


class Booking(BaseModel):
    """Books a seat.

    On any train.
    """

    train: str = Field(description="Its number.")
    seats: int = 1


def book(train: Annotated[str, Field(description="Its number.")], seats: int = 1) -> str:
    """Books a seat."""
    return f"{train} {seats}"


EXPECTED = {
    "type": "object",
    "properties": {
        "train": {"type": "string", "description": "Its number."},
        "seats": {"type": "integer", "default": 1},
    },
    "required": ["train"],
    "additionalProperties": False,
}


def test_a_class_and_a_function_describe_themselves() -> None:
    of_class, of_function = describe(Booking), describe(book)
    assert of_class.name == "Booking"
    assert of_class.description == "Books a seat.\n\nOn any train."
    assert (of_function.name, of_function.description) == ("book", "Books a seat.")
    assert of_class.parameters == of_function.parameters == EXPECTED
    assert describe(of_class) is of_class


def test_one_without_arguments() -> None:
    def now() -> float:
        return 0.0

    assert describe(now).parameters == ToolDescription(name="now").parameters


def untyped(x):  # type: ignore[no-untyped-def]
    return x


def starred(*x: int) -> None: ...


@pytest.mark.parametrize("tool", [untyped, starred, "book", 3])
def test_what_cannot_be_described_is_refused(tool: Any) -> None:
    with pytest.raises(TypeError):
        describe(tool)


def test_arguments_are_read_as_a_class() -> None:
    call = ToolUse(name="Booking", arguments={"train": "ICE 5"})
    assert call.parsed(Booking) == Booking(train="ICE 5")
    with pytest.raises(InvalidAnswer, match="train"):
        ToolUse(name="Booking", arguments={}).parsed(Booking)
