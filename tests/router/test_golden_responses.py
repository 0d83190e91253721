"""The generated endpoint against the one that one would write by hand: what it answers."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import math
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import Depends, Response
from fastapi.exceptions import ResponseValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.testclient import TestClient
from pydantic import BaseModel, ConfigDict, Field, computed_field, field_serializer
from typing_extensions import TypedDict

from tests.router.golden import PATH, by_hand, client_of, headers_of, served


class User(BaseModel):
    """What the world may see."""

    name: str
    age: int | None = None


class Account(User):
    password: str = "secret"


class Rectangle(BaseModel):
    model_config = ConfigDict(populate_by_name=True)

    width: float = Field(serialization_alias="w")
    height: float = Field(default=1.0, alias="theHeight")

    @computed_field  # type: ignore[prop-decorator]
    @property
    def area(self) -> float:
        return self.width * self.height

    @field_serializer("width")
    def rounded(self, value: float) -> str:
        return f"{value:.1f}"


class FromAttributes(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    name: str


class Movie(TypedDict):
    title: str


@dataclasses.dataclass
class Point:
    x: float
    y: float = 0.0


@dataclasses.dataclass
class Line:
    start: Point
    end: Point


class Colour(enum.Enum):
    RED = "red"


class Row:
    """Such as a database gives."""

    name = "row"


ID = uuid.UUID("12345678-1234-5678-1234-567812345678")
MOMENT = datetime.datetime(2024, 5, 6, 7, 8, 9, tzinfo=datetime.UTC)

RESULTS: dict[str, tuple[Any, Callable[[], Any]]] = {
    "model": (User, lambda: User(name="a", age=3)),
    "filtered": (User, lambda: Account(name="a")),
    "filtered list": (list[User], lambda: [Account(name="a"), User(name="b")]),
    "filtered dict": (dict[str, User], lambda: {"k": Account(name="a")}),
    "dict as model": (User, lambda: {"name": "a", "age": "4", "password": "x"}),
    "dataclass as model": (FromAttributes, Row),
    "not a model": (User, lambda: {"age": 3}),
    "alias and computed": (Rectangle, lambda: Rectangle(width=2.0, height=3.0)),
    "optional": (User | None, lambda: None),
    "dataclass": (Point, lambda: Point(1.0)),
    "nested dataclass": (Line, lambda: Line(Point(1), Point(2, 3))),
    "typed dict": (Movie, lambda: {"title": "M"}),
    "wrong typed dict": (Movie, lambda: {"year": 1}),
    "list": (list[int], lambda: [1, 2]),
    "coerced": (list[int], lambda: ["1", 2.0]),
    "wrong list": (list[int], lambda: [1, "x"]),
    "dict": (dict[str, float], lambda: {"a": 1}),
    "float": (float, lambda: 0.1),
    "nan": (float, lambda: math.nan),
    "nested nan": (dict[str, list[float]], lambda: {"a": [math.inf, 1.0, -math.inf]}),
    "int": (int, lambda: 10**30),
    "str": (str, lambda: "\u00e9\u20ac\U0001f600 \u2028 </script>"),
    "wrong int": (int, lambda: "many"),
    "bool": (bool, lambda: True),
    "none": (None, lambda: None),
    "something instead of none": (None, lambda: {"a": 1}),
    "decimal": (decimal.Decimal, lambda: decimal.Decimal("1.10")),
    "datetime": (datetime.datetime, lambda: MOMENT),
    "uuid": (uuid.UUID, lambda: ID),
    "enum": (Colour, lambda: Colour.RED),
    "set": (set[int], lambda: {3}),
    "bytes": (bytes, lambda: b"text"),
    "undeclared model": (Any, lambda: Account(name="a")),
    "undeclared model with an alias": (Any, lambda: Rectangle(width=2.0)),
    "undeclared dataclass": (Any, lambda: Line(Point(1), Point(2, 3))),
    "undeclared mixture": (
        Any,
        lambda: {"a": [User(name="a"), (1, 2.5)], "b": None, "c": Point(1), "d": {ID: MOMENT}},
    ),
    "undeclared float": (Any, lambda: 1.0),
    "undeclared nan": (Any, lambda: [math.nan]),
    "undeclared none": (Any, lambda: None),
    "undeclared enum": (Any, lambda: [Colour.RED, {1}]),
    "undeclared keys": (Any, lambda: {1: "a", None: "b", False: "c", 1.5: "d"}),
    "response": (Response, lambda: PlainTextResponse("as it is", 202, {"x-a": "b"})),
    "undeclared response": (Any, lambda: JSONResponse({"a": 1}, 203)),
    "response for a model": (User, lambda: PlainTextResponse("as it is")),
}  # fmt: skip
NAMES = list(RESULTS)
ERRORS = ["not a model", "wrong typed dict", "wrong list", "wrong int"]


async def nothing() -> None:
    """A dependency that changes nothing."""


def answer(app: Any) -> tuple[int, Any, dict[str, str]]:
    with client_of(app) as client:
        response = client.post(PATH, json=1)
    return response.status_code, response.content, dict(headers_of(response))


@pytest.mark.parametrize("dependencies", [[], [Depends(nothing)]], ids=["plain", "depending"])
@pytest.mark.parametrize("name", NAMES)
def test_answer_is_the_same(name: str, dependencies: list[Any]) -> None:
    gives, result = RESULTS[name]
    mine = answer(served(Any, gives, lambda _: result(), dependencies=dependencies))
    assert mine == answer(by_hand(Any, gives, lambda _: result(), dependencies=dependencies))


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("undeclared")])
def test_schema_is_the_same(name: str) -> None:
    gives, _ = RESULTS[name]
    assert served(Any, gives).openapi() == by_hand(Any, gives).openapi()


@pytest.mark.parametrize("dependencies", [[], [Depends(nothing)]], ids=["plain", "depending"])
@pytest.mark.parametrize("name", ERRORS)
def test_wrong_result_is_a_response_validation_error(name: str, dependencies: list[Any]) -> None:
    gives, result = RESULTS[name]
    errors = []
    for build in (served, by_hand):
        app = build(Any, gives, lambda _: result(), dependencies=dependencies)
        with TestClient(app) as client, pytest.raises(ResponseValidationError) as raised:
            client.post(PATH, json=1)
        errors.append((raised.value.errors(), raised.value.body))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_result_shows_nothing_of_itself(name: str) -> None:
    gives, result = RESULTS[name]
    status, content, _ = answer(served(Any, gives, lambda _: result()))
    assert (status, content) == (500, b"Internal Server Error")


@pytest.mark.parametrize("response_class", [JSONResponse, PlainTextResponse])
@pytest.mark.parametrize("level", ["router", "include", "app"])
@pytest.mark.parametrize("name", ["model", "str", "nan", "undeclared mixture"])
def test_an_explicit_response_class(name: str, level: str, response_class: Any) -> None:
    gives, result = RESULTS[name]
    given = {"default_response_class": response_class}
    options = given if level == "router" else {level: given}
    mine = answer(served(Any, gives, lambda _: result(), **options))
    theirs = answer(by_hand(Any, gives, lambda _: result(), **options))
    assert mine == theirs


def test_a_response_from_a_dependency_is_merged() -> None:
    async def decorate(response: Response) -> None:
        response.headers["x-trace"] = "abc"
        response.set_cookie("seen", "yes")
        response.set_cookie("twice", "yes")
        response.status_code = 201

    answers = []
    for build in (served, by_hand):
        app = build(Any, User, lambda _: User(name="a"), dependencies=[Depends(decorate)])
        with client_of(app) as client:
            response = client.post(PATH, json=1)
        assert response.status_code == 201
        assert response.headers["x-trace"] == "abc"
        assert response.headers.get_list("set-cookie") == [
            "seen=yes; Path=/; SameSite=lax",
            "twice=yes; Path=/; SameSite=lax",
        ]
        answers.append((response.status_code, response.content, headers_of(response)))
    assert answers[0] == answers[1]


def test_a_status_without_a_body_has_none() -> None:
    async def no_content(response: Response) -> None:
        response.status_code = 204

    for build in (served, by_hand):
        app = build(Any, Any, dependencies=[Depends(no_content)])
        with client_of(app) as client:
            response = client.post(PATH, json=1)
        assert (response.status_code, response.content) == (204, b"")
