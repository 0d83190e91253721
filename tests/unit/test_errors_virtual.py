"""split and shadow: what cannot work is an error at once, which says where."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from pydantic import BaseModel

from fastapi_graph import Graph, InputNode, UnknownMethodError, deployment, shadow, split
from fastapi_graph.graph.build import Plan, build
from tests.unit.located import line, refused

HERE = Path(__file__).name


@deployment
def one(value: int) -> int:
    return value


@deployment
def text(value: str) -> str:
    return value


@deployment
def stream(value: int) -> Iterator[int]:
    yield value


@deployment
class Left:
    def predict(self, value: int) -> int: ...

    def both(self, value: int, more: int = 0) -> list[int]: ...

    def items(self) -> Iterator[int]:
        yield 1

    def only(self) -> None: ...


@deployment
class Right:
    def predict(self, value: int, other: int = 0) -> str: ...

    def both(self, value: int) -> list[int]: ...

    def items(self) -> list[int]: ...

    def __call__(self, value: str) -> Any: ...


with InputNode() as x:
    value = x["k"]


ALTERNATIVES = {
    "an unbound deployment": (lambda: Left, "Left is a deployment"),
    "an unbound method": (lambda: Left.bind().predict, "Left.predict is a method"),
    "a bound function": (lambda: one.bind(1), "one.bind()"),
    "a bound method": (lambda: Left.bind().predict.bind(1), "is a value"),
    "an input": (lambda: x, "InputNode"),
    "a part": (lambda: value, "InputNode['k']"),
    "a number": (lambda: 5, "5 is no node"),
}


@pytest.mark.parametrize("kind", ALTERNATIVES)
def test_what_is_no_alternative(kind: str) -> None:
    make, said = ALTERNATIVES[kind]
    with refused("split", said):
        split({make(): 1})
    with refused("shadow", said):
        shadow(Left.bind(), make())


@pytest.mark.parametrize("weight", [0, -1, math.nan, math.inf, 10**400, "1", None, True])
def test_weights(weight: Any) -> None:
    node = Left.bind()
    with refused("split", "Left", repr(weight)):
        split({node: weight})


@pytest.mark.parametrize("alternatives", [[], 5, [Left.bind()]])
def test_no_mapping(alternatives: Any) -> None:
    with refused("split", "dict"):
        split(alternatives)


def test_no_alternatives() -> None:
    with refused("split has no alternatives"):
        split({})


async def an_async_key(user: Any) -> Any: ...


@pytest.mark.parametrize("sticky_by", [1.5, True, ["id"], an_async_key])
def test_sticky_by(sticky_by: Any) -> None:
    node = one.bind()
    with refused("split", "sticky_by", "function"):
        split({node: 1}, sticky_by=sticky_by)


class User(BaseModel):
    id: int


@deployment
def of_user(user: User) -> int:
    return user.id


@pytest.mark.parametrize("nested", [lambda node: node, lambda node: shadow(node, of_user.bind())])
def test_a_key_that_the_declared_type_lacks(nested: Any) -> None:
    with InputNode(User) as user:
        nested(split({of_user.bind(): 1}, sticky_by="id")).bind(user)
        node = nested(split({of_user.bind(): 1}, sticky_by="idd"))
        with refused("split(of_user): sticky_by='idd'", "User has no attribute 'idd'", at=line(-1)):
            node.bind(user)
    with InputNode() as anything:
        split({of_user.bind(): 1}, sticky_by="idd").bind(anything)


class Row(TypedDict):
    id: int


@pytest.mark.parametrize(
    "type_", [dict, dict[str, Any], Mapping[str, int], Row, Annotated[dict[str, Any], "a row"]]
)
def test_a_key_of_a_declared_mapping(type_: Any) -> None:
    @deployment
    def of_row(row: Any) -> int:
        return 1

    with InputNode(type_) as row:
        split({of_row.bind(): 1}, sticky_by="id").bind(row)


@pytest.mark.parametrize("share", [0, -0.1, 1.1, math.nan, "all", True])
def test_share(share: Any) -> None:
    left, right = Left.bind(), Right.bind()
    with refused("shadow", "share", repr(share)):
        shadow(left, right, share=share)


@pytest.mark.parametrize("most", [0, 1.5, True])
def test_max_ongoing_requests(most: Any) -> None:
    left, right = Left.bind(), Right.bind()
    with refused("shadow", "max_ongoing_requests", repr(most)):
        shadow(left, right, max_ongoing_requests=most)


def test_a_shadow_of_itself() -> None:
    node = Left.bind()
    with refused("shadow(Left, Left)", "the same node"):
        shadow(node, node)


@pytest.mark.parametrize("other", [one, stream])
def test_nothing_in_common(other: Any) -> None:
    left = (stream if other is one else Left).bind()
    bound = other.bind()
    with refused("no method in common"):
        split({left: 1, bound: 1})


def test_unknown_methods() -> None:
    left, at_left = Left.bind(), line()
    right, at_right = Right.bind(), line()
    node, bound = split({left: 1, right: 1}), line()
    with refused("split(Left, Right)", "'only'", f"{HERE}:{at_right}", "both, predict", at=bound):
        node.only.bind()
    with refused("'__call__'", "Left (bound at", at=at_left):
        node.bind(1)
    with refused("'items'", "only Left.items is a generator", error=UnknownMethodError):
        node.items.bind()
    assert not hasattr(node, "neither")
    assert not hasattr(split({node: 1}), "only")
    with refused("split(one)", "'predict'", "__call__", error=AttributeError):
        split({one.bind(): 1}).predict.bind(1)


def test_arguments_are_checked_against_every_alternative() -> None:
    node = split({Left.bind(): 1, shadow(Left.bind(), Right.bind()): 1})
    with refused("split(Left, shadow(Left, Right)).both: Right.both takes 1 argument"):
        node.both.bind(1, 2)
    with refused("Left.predict takes 1 argument (value), bound with 2"):
        node.predict.bind(1, 2)
    with refused("one takes 1 argument"):
        split({one.bind(): 1}).bind()


def test_types_are_checked_for_every_alternative() -> None:
    mixed = split({Left.bind(): 1, Right.bind(): 1})
    answers = shadow(Left.bind(), Right.bind())
    with refused("one: parameter 'value' is int", "split(Left, Right).predict", "gives str"):
        one.bind(mixed.predict.bind(1))
    with refused("text: parameter 'value' is str", "gives int"):
        text.bind(mixed.predict.bind(1))
    one.bind(answers.predict.bind(1))
    with refused("text", "split(one, text)", "is int", "gives str"):
        split({one.bind(): 1, text.bind(): 1}).bind(text.bind("a"))


def test_misuse_like_that_of_any_node() -> None:
    node = split({Left.bind(): 1})
    for misuse, said in (
        (lambda: node.remote(1), ".remote()"),
        (lambda: list(node), "iterated"),
        (lambda: node[0], "indexed"),
        (lambda: node.predict(1), "called"),
        (lambda: node.predict.bind(1).bind(2), "second time"),
        (lambda: one.bind(node.predict), "is a method, not a node"),
    ):
        with refused("split(Left)", said, at=misuse.__code__.co_firstlineno):
            misuse()
    outside, at_other = Left.bind(), line()
    with refused("not a deployment of this graph", "split(Left)", at=at_other):
        Graph(node.predict.bind(1)).handle_of(outside)


# -- What is built ----------------------------------------------------------------------------


def test_names_and_what_is_required() -> None:
    left, right, function = Left.bind(), Left.bind(), one.bind()
    inner = split({left: 1, right: 3})
    again = split({left: 1, right: 1})
    outer = shadow(inner, left)

    @deployment
    class Holds:
        def __init__(self, *held: Any) -> None: ...

    built = build(Holds.bind([outer], again, split({function: 1})))
    assert list(built.deployments) == ["Left", "Left_1", "one", "Holds"]
    assert list(built.virtual) == [
        "split(Left, Left_1)",
        "shadow(split(Left, Left_1), Left)",
        "split(Left, Left_1)_1",
        "split(one)",
    ]
    assert built.virtual["shadow(split(Left, Left_1), Left)"].requires == {"Left", "Left_1"}
    assert built.deployments["Holds"].requires == {"Left", "Left_1", "one"}
    assert built.names[outer] == "shadow(split(Left, Left_1), Left)"


def test_declared_types() -> None:
    def output_type(dag: Any) -> Any:
        root = build(dag).roots[dag]
        assert isinstance(root, Plan)
        return root.output_type

    node = split({Left.bind(): 1, Right.bind(): 1})
    assert output_type(node.both.bind(1)) == list[int]
    assert output_type(node.predict.bind(1)) == int | str
    assert output_type(shadow(Right.bind(), Left.bind()).predict.bind(1)) is str
    assert output_type(split({Right.bind(): 1}).bind("a")) is Any


def test_a_graph_is_named_after_the_first_alternative() -> None:
    node = shadow(split({Left.bind(): 1}), Right.bind())
    assert Graph(node.predict.bind(1)).name == f"{__name__}.Left"
