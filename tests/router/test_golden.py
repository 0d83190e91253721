"""The generated endpoint against the one that one would write by hand: schema and input."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
from typing import Annotated, Any, Literal

import pytest
from fastapi import Depends
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from tests.router.golden import PATH, by_hand, client_of, served


class Item(BaseModel):
    """Something to sell."""

    name: str
    price: float = Field(gt=0)
    tags: list[str] = []


class Order(BaseModel):
    item: Item
    others: dict[str, Item] = {}
    note: str | None = None


class Strict(BaseModel):
    model_config = ConfigDict(strict=True)

    count: int
    at: datetime.datetime | None = None
    pair: tuple[int, int] | None = None


class Aliased(BaseModel):
    model_config = ConfigDict(extra="forbid")

    the_name: str = Field(alias="theName")


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    bark: str


class Movie(TypedDict):
    title: str
    year: int


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Point:
    x: float
    y: float = 0.0


ITEM = {"name": "pen", "price": 1.5}

TYPES: dict[str, tuple[Any, list[Any]]] = {
    "model": (Item, [ITEM, {**ITEM, "more": 1}, {"name": "pen"}, {**ITEM, "price": -1}]),
    "nested model": (Order, [{"item": ITEM, "others": {"a": ITEM}}, {"item": {"name": 1}}]),
    "list of models": (list[Item], [[ITEM, ITEM], [], [ITEM, {"name": "x"}], ITEM]),
    "strict model": (
        Strict,
        [
            {"count": 1},
            {"count": "1"},
            {"count": 1.0},
            {"count": 1, "pair": [1, 2]},
            {"count": 1, "at": "2024-01-01T00:00:00"},
        ],
    ),
    "model with an alias": (Aliased, [{"theName": "a"}, {"the_name": "a"}, {}]),
    "int": (int, [1, "2", 2.0, 2.5, True, 10**30]),
    "float": (float, [1, 0.1, 1e308, "3.5", "nan"]),
    "str": (str, ["text", "", "\u00e9\u20ac", 1]),
    "bool": (bool, [True, 0, "yes", 2]),
    "datetime": (datetime.datetime, ["2024-01-01T10:00:00Z", 0, "soon"]),
    "enum": (Colour, ["red", "green"]),
    "literal": (Literal["a", 1], ["a", 1, "b"]),
    "constrained": (Annotated[int, Field(gt=0, title="Positive")], [1, 0]),
    "union of scalars": (int | str, [1, "1", 1.5, None]),
    "union of models": (Cat | Dog, [{"kind": "cat", "lives": 9}, {"kind": "dog"}]),
    "tagged union": (
        Annotated[Cat | Dog, Field(discriminator="kind")],
        [{"kind": "dog", "bark": "wau"}, {"kind": "cow"}],
    ),
    "optional": (Item | None, [ITEM, None, {}]),
    "dict": (dict[str, int], [{"a": 1, "b": "2"}, {}, {"a": "x"}, []]),
    "any dict": (dict[str, Any], [{"a": {"b": [None, 1.5]}}, "x"]),
    "tuple": (tuple[int, str], [[1, "a"], [1], [1, "a", 2]]),
    "set": (set[int], [[1, 1, 2], ["x"]]),
    "bytes": (bytes, ["text"]),
    "dataclass": (Point, [{"x": 1}, {"x": 1, "y": 2}, {"y": 2}, [1, 2]]),
    "typed dict": (Movie, [{"title": "M", "year": 1931}, {"title": "M"}]),
    "any": (Any, [1, "a", [1, {"b": None}], {}, 1.5, True]),
}
NAMES = list(TYPES)
MODELS = [name for name in NAMES if name != "any"]

JSON = {"content-type": "application/json"}

# Bodies that go wrong, or might, before any type is looked at.
TYPE_WITH = "application/json; charset="
RAW: dict[str, tuple[bytes, dict[str, str]]] = {
    "no body": (b"", {}),
    "empty body, declared as JSON": (b"", JSON),
    "invalid JSON": (b'{"a": ', JSON),
    "two values": (b"1 2", JSON),
    "null": (b"null", JSON),
    "an object": (b'{"a": 1}', JSON),
    "a key twice": (b'{"name": "a", "price": 0, "name": "b", "price": 2, "x": 1, "x": 2}', JSON),
    "white space around": (b' \n[1]\t\r\n', JSON),
    "not a number": (b"NaN", JSON),
    "infinity": (b"[-Infinity]", JSON),
    "too large a number": (b"1e999", JSON),
    "a very long number": (b"1" * 5000, JSON),
    "a long number": (b"1" * 400, JSON),
    "many decimals": (b"0.1000000000000000055511151231257827021181583404541015625001", JSON),
    "minus zero": (b"-0", JSON),
    "leading zero": (b"01", JSON),
    "control character": (b'"a\x01b"', JSON),
    "lone surrogate": (rb'"\ud800"', JSON),
    "surrogate pair": (rb'"\ud83d\ude00"', JSON),
    "deeply nested": (b"[" * 300 + b"]" * 300, JSON),
    "utf-16": ('"text"'.encode("utf-16"), JSON),
    "utf-32": ('"text"'.encode("utf-32"), JSON),
    "byte order mark": (b'\xef\xbb\xbf"text"', JSON),
    "latin-1": ('"\u00e9"'.encode("latin-1"), JSON),
    "latin-1, declared": ('"\u00e9"'.encode("latin-1"), {"content-type": TYPE_WITH + "latin-1"}),
    "with a charset": (b'{"name": "a", "price": 1}', {"content-type": TYPE_WITH + "utf-8"}),
    "capital letters": (b'{"name": "a", "price": 1}', {"content-type": "Application/JSON"}),
    "with a space": (b'{"name": "a", "price": 1}', {"content-type": "application/json ;a=b"}),
    "a JSON dialect": (b'{"name": "a", "price": 1}', {"content-type": "application/geo+json"}),
    "no JSON dialect": (b'{"name": "a", "price": 1}', {"content-type": "application/jsonp"}),
    "form": (b"name=a&price=1", {"content-type": "application/x-www-form-urlencoded"}),
    "text": (b'{"name": "a", "price": 1}', {"content-type": "text/plain"}),
    "empty content type": (b'{"name": "a", "price": 1}', {"content-type": ""}),
    "no content type": (b'{"name": "a", "price": 1}', {}),
}  # fmt: skip


async def nothing() -> None:
    """A dependency that changes nothing."""


def shown(value: Any) -> str:
    """Return the value with its exact types, to compare inputs and not only answers."""
    return f"{type(value).__name__} {value!r}"


def answers(app: Any, requests: list[tuple[bytes, dict[str, str]]]) -> list[tuple[int, Any]]:
    with client_of(app) as client:
        found = []
        for body, headers in requests:
            response = client.post(PATH, content=body, headers=headers)
            content = response.text if response.status_code == 500 else response.json()
            found.append((response.status_code, content))
        return found


def differences(
    requests: list[tuple[bytes, dict[str, str]]], left: list[Any], right: list[Any]
) -> list[Any]:
    return [
        (request, mine, theirs)
        for request, mine, theirs in zip(requests, left, right, strict=True)
        if mine != theirs
    ]


@pytest.mark.parametrize("name", NAMES)
def test_schema_of_the_input(name: str) -> None:
    type_, _ = TYPES[name]
    assert served(type_).openapi() == by_hand(type_).openapi()


@pytest.mark.parametrize("name", NAMES)
def test_schema_of_the_result(name: str) -> None:
    type_, _ = TYPES[name]
    assert served(Any, type_).openapi() == by_hand(Any, type_).openapi()


@pytest.mark.parametrize("name", NAMES)
def test_input_of_the_type(name: str) -> None:
    type_, values = TYPES[name]
    requests = [(json.dumps(value).encode(), JSON) for value in values if value is not None]
    expected = answers(by_hand(type_, str, shown), requests)
    assert {status for status, _ in expected} <= {200, 422}
    assert 200 in {status for status, _ in expected}
    assert differences(requests, answers(served(type_, str, shown), requests), expected) == []


@pytest.mark.parametrize("name", MODELS)
def test_raw_bodies(name: str) -> None:
    type_, _ = TYPES[name]
    requests = list(RAW.values())
    expected = answers(by_hand(type_, str, shown), requests)
    assert differences(requests, answers(served(type_, str, shown), requests), expected) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_dependency_changes_no_answer(name: str) -> None:
    """With a dependency FastAPI's own handler answers, without one a shorter way may."""
    type_, values = TYPES[name]
    requests = [*RAW.values(), *((json.dumps(value).encode(), JSON) for value in values)]
    plain = answers(served(type_, str, shown), requests)
    depending = answers(served(type_, str, shown, dependencies=[Depends(nothing)]), requests)
    assert differences(requests, plain, depending) == []


@pytest.mark.parametrize(
    "case",
    ["form", "text", "empty content type", "no content type", "no JSON dialect"],
)
def test_any_body_must_be_json(case: str) -> None:
    body, headers = RAW[case]
    with client_of(served()) as client:
        response = client.post(PATH, content=body, headers=headers)
    assert response.status_code == 422
    (error,) = response.json()["detail"]
    assert error["loc"] == ["body"]
    assert "JSON" in error["msg"]
    assert "application/json" in error["msg"]


def test_null_is_any_json() -> None:
    with client_of(served(Any, str, shown)) as client:
        response = client.post(PATH, content=b"null", headers=JSON)
    assert (response.status_code, response.json()) == (200, "NoneType None")


def test_error_of_a_field_says_where() -> None:
    with client_of(served(Order)) as client:
        response = client.post(PATH, json={"item": {"name": "a", "price": "much"}})
    assert response.status_code == 422
    (error,) = response.json()["detail"]
    assert error["loc"] == ["body", "item", "price"]
    assert error["input"] == "much"


def test_graph_without_input_takes_no_body() -> None:
    from fastapi import FastAPI

    from fastapi_graph import deployment, graph_router

    @deployment
    async def answer() -> int:
        """Say it."""
        return 42

    app = FastAPI()
    app.include_router(graph_router(answer.bind()), prefix=PATH)

    plain = FastAPI()

    @plain.post(PATH)
    async def answer() -> int:
        """Say it."""
        return 42

    assert app.openapi() == plain.openapi()
    with client_of(app) as client:
        assert client.post(PATH).json() == 42
        assert client.post(PATH, content=b"ignored").json() == 42


def test_description_is_the_docstring_of_the_output() -> None:
    from fastapi import FastAPI

    from fastapi_graph import InputNode, deployment, graph_router

    @deployment
    class Model:
        """Not this."""

        async def predict(self, value: int) -> int:
            """Predict.

            In detail.
            """
            return value

    with InputNode(int) as x:
        dag = Model.bind().predict.bind(x)
    app = FastAPI()
    app.include_router(graph_router(dag), prefix=PATH)
    operation = app.openapi()["paths"][PATH]["post"]
    assert operation["description"] == "Predict.\n\nIn detail."
    assert operation["operationId"] == "model_predict_answer_post"
