"""What declared types and annotations rule out is an error at once; what may be, passes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypedDict, TypeVar

import pytest
from pydantic import BaseModel

from fastapi_graph import InputNode, deployment
from tests.unit.located import line, refused

T = TypeVar("T")
HERE = Path(__file__).name


# Declared types


class Inner(BaseModel):
    number: int = 0


class Payload(BaseModel):
    text: str
    inner: Inner = Inner()


@dataclasses.dataclass
class Record:
    text: str
    inner: Inner


class Row(TypedDict):
    text: str
    numbers: list[int]


class Pair(NamedTuple):
    left: str
    right: int


LACKING = {
    "model attribute": (Payload, lambda x: x.txt, "'txt'"),
    "nested model attribute": (Payload, lambda x: x.inner.nmber, "'nmber'"),
    "model item": (Payload, lambda x: x["text"], "'text'"),
    "dataclass attribute": (Record, lambda x: x.txt, "'txt'"),
    "dataclass item": (Record, lambda x: x["text"], "'text'"),
    "typed dict key": (Row, lambda x: x["txt"], "'txt'"),
    "typed dict attribute": (Row, lambda x: x.text, "'text'"),
    "typed dict list key": (Row, lambda x: x["numbers"]["a"], "'a'"),
    "named tuple attribute": (Pair, lambda x: x.middle, "'middle'"),
    "named tuple index": (Pair, lambda x: x[2], "2"),
    "tuple index": (tuple[int, str], lambda x: x[2], "2"),
    "tuple key": (tuple[int, str], lambda x: x["a"], "'a'"),
    "list key": (list[int], lambda x: x["a"], "'a'"),
    "list item attribute": (list[Inner], lambda x: x[0].nmber, "'nmber'"),
    "dict attribute": (dict[str, int], lambda x: x.k, "'k'"),
    "dict value item": (dict[str, int], lambda x: x["k"]["j"], "'j'"),
    "int item": (int, lambda x: x[0], "0"),
    "str attribute": (str, lambda x: x.length, "'length'"),
    "str key": (str, lambda x: x["a"], "'a'"),
    "none": (None, lambda x: x["a"], "'a'"),
}


@pytest.mark.parametrize("name", LACKING)
def test_what_the_declared_type_lacks(name: str) -> None:
    type_, access, word = LACKING[name]
    with InputNode(type_) as x, refused("InputNode", word, at=access.__code__.co_firstlineno):
        access(x)


@pytest.mark.parametrize("part", [lambda n: n.txt, lambda n: n["text"]])
def test_what_a_return_annotation_lacks(part: Any) -> None:
    @deployment
    def make() -> Payload: ...

    with refused("make", "Payload", at=part.__code__.co_firstlineno):
        part(make.bind())


class Extra(BaseModel, extra="allow"):
    text: str


class Dynamic:
    def __getattr__(self, name: str) -> Any: ...


class Open:
    def __init__(self) -> None:
        self.set_later = 1


HAVING = {
    "extra": (Extra, lambda x: x.whatever),
    "getattr": (Dynamic, lambda x: x.whatever),
    "instance attribute": (Open, lambda x: x.set_later),
    "model property": (Payload, lambda x: x.model_fields_set),
    "complex": (complex, lambda x: x.real),
    "variadic tuple": (tuple[int, ...], lambda x: x[99]),
    "dict of any": (dict[str, Any], lambda x: x["a"]["b"].c[0]),
    "union": (Payload | None, lambda x: x.whatever),
    "any": (Any, lambda x: x.a["b"][0]),
    "negative": (tuple[int, str], lambda x: x[-2]),
    "named tuple": (Pair, lambda x: (x.left, x[1], x[-1])),
    "inherited typed dict": (TypedDict("More", {"k": Row}), lambda x: x["k"]["text"]),
}


@pytest.mark.parametrize("name", HAVING)
def test_what_the_declared_type_has_or_may_have(name: str) -> None:
    type_, access = HAVING[name]
    with InputNode(type_) as x:
        access(x)


# Annotations


class Animal: ...


class Dog(Animal): ...


class Sized(Protocol):
    size: int


class Box(list[T]): ...


def returning(type_: Any) -> Any:
    def produce() -> Any: ...

    produce.__annotations__["return"] = type_
    return deployment(produce)


def taking(type_: Any) -> Any:
    def consume(value: Any) -> Any: ...

    consume.__annotations__["value"] = type_
    return deployment(consume)


@pytest.mark.parametrize(
    "produced, expected",
    [(str, int), (float, int), (Dog, str), (Payload, Record), (dict, list), (None, str)],
)
def test_a_definite_mismatch(produced: Any, expected: Any) -> None:
    node, bound = returning(produced).bind(), line()
    with refused("consume", "'value'", "produce", f"{HERE}:{bound}"):
        taking(expected).bind(node)


@pytest.mark.parametrize(
    "produced, expected",
    [
        (int, int),
        (int, float),
        (int, complex),
        (bool, int),
        (bool, float),
        (Dog, Animal),
        (Animal, Dog),  # what is declared as an Animal may be a Dog
        (Any, int),
        (str, Any),
        (str, object),
        (object, str),
        (str | int, int),
        (str, int | None),
        (None, str | None),
        (list[int], list[str]),  # generics are not judged
        (list[int], str),
        (Row, dict),
        (dict, Row),
        (Payload, Sized),
        (T, int),
        (str, T),
        (Box[int], list),
        ("Undefined", int),
    ],
)
def test_what_may_fit_passes(produced: Any, expected: Any) -> None:
    taking(expected).bind(returning(produced).bind())


def test_a_mismatch_of_methods_keywords_and_inputs() -> None:
    @deployment
    class Typed:
        def give(self) -> str: ...

        def take(self, first: Any, number: int) -> None: ...

    node = Typed.bind()
    with refused("Typed.take", "'number'", "str", "int"):
        node.take.bind(1, node.give.bind())
    with refused("Typed.take", "'number'"):
        node.take.bind(1, number=node.give.bind())
    with InputNode(Payload) as x, refused("consume", "InputNode.text", "str"):
        taking(int).bind(x.text)
    with InputNode(int) as x, refused("consume", "InputNode", "int"):
        taking(str).bind(x)
