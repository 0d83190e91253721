"""Every misuse is an error at once, which names the node and the place of its bind."""

# ruff: noqa: PLW0108 - where a lambda stands is what the messages must say

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastapi_graph import (
    Graph,
    GraphDefinitionError,
    InputNode,
    OptionError,
    batch,
    deployment,
)
from tests.unit.located import line, refused

HERE = Path(__file__).name


@deployment
def one(value: Any) -> Any:
    return value


@deployment
def keyword_only(*, key: Any) -> Any:
    return key


@deployment
def anything(*args: Any, **kwargs: Any) -> Any:
    return args


@deployment
def nothing() -> int:
    return 1


@deployment
class Model:
    weight = 1

    def __init__(self, weight: Any = 1) -> None: ...

    def forward(self, value: Any) -> Any: ...

    def _private(self) -> None: ...

    def __call__(self, value: Any) -> Any: ...


@deployment
class Plain:
    """Has no methods."""


def test_unknown_method() -> None:
    node, bound = Model.bind(), line()
    with refused("Model", "'backward'", "forward", "__call__", f"{HERE}:{bound}"):
        node.backward.bind(1)
    assert not hasattr(node, "backward")


@pytest.mark.parametrize("name", ["weight", "__call__"])
def test_what_is_no_method(name: str) -> None:
    node = (Model if name == "weight" else Plain).bind()
    with refused(name):
        getattr(node, name).bind(1)


def test_a_private_method_cannot_be_bound() -> None:
    with pytest.raises(AttributeError):
        Model.bind()._private.bind()


ARITY = {
    "too many": lambda: one.bind(1, 2),
    "unknown keyword": lambda: one.bind(1, other=2),
    "twice": lambda: one.bind(1, value=2),
    "missing keyword": lambda: keyword_only.bind(other=1),
    "positional for keyword": lambda: keyword_only.bind(1),
    "constructor": lambda: Model.bind(1, 2),
    "constructor keyword": lambda: Model.bind(heavy=2),
    "no constructor": lambda: Plain.bind(1),
    "method too few": lambda: Model.bind().forward.bind(),
    "method too many": lambda: Model.bind().forward.bind(1, 2),
    "method keyword": lambda: Model.bind().forward.bind(1, k=2),
    "call": lambda: Model.bind().__call__.bind(),
}


@pytest.mark.parametrize("name", ARITY)
def test_wrong_arguments(name: str) -> None:
    bind = ARITY[name]
    names = {"constructor": "Model", "method": "Model.forward", "call": "Model.__call__"}
    label = names.get(name.split(maxsplit=1)[0], "keyword_only" if "keyword" in name else "one")
    label = {"no constructor": "Plain", "unknown keyword": "one"}.get(name, label)
    with refused(label, "bound", at=bind.__code__.co_firstlineno):
        bind()


def test_the_message_counts_arguments() -> None:
    with refused("one takes 1 argument (value), bound with 2"):
        one.bind(1, 2)
    with refused("Model.forward takes 1 argument (value), bound with 0 arguments"):
        Model.bind().forward.bind()
    with refused("nothing takes no arguments, bound with 1 argument"):
        nothing.bind(1)


def test_a_bare_function_as_a_value_is_checked_when_the_graph_is_built() -> None:
    bare, bound = one.bind(), line()
    dag = anything.bind(bare)
    with refused("one", at=bound):
        Graph(dag)
    Graph(anything.bind(nothing.bind()))


@pytest.mark.parametrize(
    "make", [lambda: one.bind(1), lambda: Model.bind(), lambda: Model.bind().forward.bind(1)]
)
def test_second_bind(make: Any) -> None:
    node = make()
    with refused("bound a second time"):
        node.bind(1)


@pytest.mark.parametrize(
    "make", [lambda: one.bind(1), lambda: Model.bind(), lambda: Model.bind().forward.bind(1)]
)
def test_remote_on_a_node(make: Any) -> None:
    node = make()
    with refused(".remote()", "handle"):
        node.remote(1)


def test_remote_on_an_unbound_method_and_on_a_deployment() -> None:
    node = Model.bind()
    with refused("Model", ".remote()", "handle"):
        node.forward.remote(1)
    with refused("one", "handle", "bind"):
        one.remote(1)
    with refused("Model", "handle", "bind"):
        Model.remote(1)


def test_calling_a_node() -> None:
    node = one.bind(1)
    with refused("one", "called"):
        node(1)
    with refused("Model.forward", "bind"):
        Model.bind().forward(1)


def test_input_node_outside_its_with() -> None:
    x, made = InputNode(), line()
    with refused("one", "InputNode", "with", f"{HERE}:{made}"):
        one.bind(x)
    with x:
        inside = x["k"]
    with refused("Model.forward", "InputNode['k']", "with"):
        Model.bind().forward.bind(inside)
    with refused("anything", "with"):
        anything.bind([{"nested": x[0]}])


def test_two_input_nodes_in_one_graph() -> None:
    with InputNode() as x:
        left = one.bind(x)
    with InputNode() as y:
        dag, bound = anything.bind(left, y), line()
    with refused("anything", "two input nodes", at=bound):
        Graph(dag)


def test_two_input_nodes_in_separate_sub_graphs_are_fine() -> None:
    with InputNode() as x:
        left = one.bind(x)
    with InputNode() as y:
        right = one.bind(y)
    Graph({"/left": left, "/right": right})


USES = {
    "iterated": lambda node: list(node),
    "unpacked": lambda node: anything.bind(*node),
    "searched": lambda node: 1 in node,
    "used as a condition": lambda node: bool(node),
    "measured": lambda node: len(node),
    "part of a text": lambda node: f"say {node}",
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("make", [lambda x: x, lambda x: x["k"], lambda x: one.bind([x])])
def test_a_node_has_no_value_yet(use: str, make: Any) -> None:
    with InputNode() as x:
        node, bound = make(x), make.__code__.co_firstlineno
        if node is x:
            bound = line(-3)
        word = {"unpacked": "iterated"}.get(use, use)
        with refused(word, f"{HERE}:{USES[use].__code__.co_firstlineno}", at=bound):
            USES[use](node)


def test_a_second_bind_of_an_instance_names_a_method() -> None:
    node = Model.bind()
    with refused("it is an instance", ".forward.bind(...)"):
        node.bind(1)


@pytest.mark.parametrize("retry_on", ["ConnectionError", ConnectionError("x"), [ValueError, 1]])
def test_retry_on_what_is_no_exception_type(retry_on: Any) -> None:
    with pytest.raises(OptionError, match="is not an exception type, or a tuple of them"):
        one.options(retry_on=retry_on)


def test_retry_on_can_be_taken_back() -> None:
    with_it = one.options(retry_on=ValueError)
    assert with_it.options(retry_on=None).deployment_options.retry_on == ()


@pytest.mark.parametrize("fallback", [lambda: 0, lambda _a, _b: 0, lambda *, name: 0])
def test_a_fallback_of_other_arguments(fallback: Any) -> None:
    node = one.options(fallback=fallback).bind(1)
    with pytest.raises(GraphDefinitionError, match=r"one: its fallback .* gets the arguments of"):
        Graph(node)


@pytest.mark.parametrize("fallback", [lambda _: 0, lambda *_: 0, lambda _a, _b=0: 0])
def test_a_fallback_of_the_same_arguments(fallback: Any) -> None:
    Graph(one.options(fallback=fallback).bind(1))


def test_a_batch_of_what_is_no_list() -> None:
    @batch
    async def shout(text: str) -> str:
        return text.upper()

    with pytest.raises(GraphDefinitionError, match=r"shout: text: str .* list\[str\]"):
        deployment(shout)


def test_slicing() -> None:
    with InputNode() as x:
        with refused("InputNode", "sliced"):
            x[1:2]
        with refused("one", "sliced"):
            one.bind(x)[:1]


RAW = {
    "whole": lambda x: Model.bind(x),
    "part": lambda x: Model.bind(x["k"][0]),
    "keyword": lambda x: Model.bind(weight=x),
    "nested": lambda x: Model.bind([{"k": (x.a,)}]),
}


@pytest.mark.parametrize("name", RAW)
def test_raw_input_as_a_constructor_argument(name: str) -> None:
    bind = RAW[name]
    with (
        InputNode() as x,
        refused("Model", "InputNode", "constructor", at=bind.__code__.co_firstlineno),
    ):
        bind(x)


def test_duplicate_explicit_names() -> None:
    first, at_first = one.options(name="same").bind(1), line()
    second, at_second = one.options(name="same").bind(2), line()
    with refused("'same'", f"{HERE}:{at_first}", at=at_second):
        Graph(anything.bind(first, second))
    Graph(anything.bind(first, first))
