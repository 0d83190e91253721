"""Bad options, what is no node or no graph, and what only looks like one."""

from __future__ import annotations

import re
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Generator,
    Iterable,
    Iterator,
)
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pytest

from fastapi_graph import (
    DeploymentResponseGenerator,
    Graph,
    GraphDefinitionError,
    InputNode,
    OptionError,
    deployment,
)
from tests.unit.located import line, refused

HERE = Path(__file__).name


@deployment
def one(value: Any) -> Any:
    return value


@deployment
def anything(*args: Any, **kwargs: Any) -> Any:
    return args


@deployment
class Model:
    weight = 1

    def __init__(self, weight: Any = 1) -> None: ...

    def forward(self, value: Any) -> Any: ...

    def _private(self) -> None: ...

    def __call__(self, value: Any) -> Any: ...


# Options


@pytest.mark.parametrize(
    "option, value",
    [
        ("num_replicas", 0),
        ("num_replicas", "two"),
        ("num_replicas", 1.5),
        ("num_replicas", True),
        ("max_ongoing_requests", 0),
        ("max_queued_requests", -2),
        ("name", ""),
        ("name", 5),
        ("health_check_period_s", 0),
        ("health_check_timeout_s", float("nan")),
        ("graceful_shutdown_timeout_s", -1),
        ("graceful_shutdown_timeout_s", float("inf")),
        ("ray_actor_options", []),
        ("route_prefix", "no-slash"),
        ("max_concurent_requests", 1),
    ],
)
def test_bad_options(option: str, value: Any) -> None:
    with refused("one", option.replace("_prefix", ""), error=OptionError):
        one.options(**{option: value})
    with refused(option.replace("_prefix", ""), error=OptionError):
        deployment(**{option: value})(lambda: None)


# Nodes of no deployment, and what is no node


@pytest.mark.parametrize("target", [5, "name", None, len])
def test_what_is_no_graph(target: Any) -> None:
    with pytest.raises(GraphDefinitionError, match=re.escape(repr(target))):
        Graph(target)


def test_an_input_node_or_a_deployment_is_no_graph() -> None:
    with InputNode() as x:
        bound = line(-1)
        with refused("InputNode", at=bound):
            Graph(x)
        part, bound = x["k"], line()
        with refused("InputNode['k']", at=bound):
            Graph(part)
    with pytest.raises(GraphDefinitionError, match=r"one\.bind"):
        Graph(one)
    with pytest.raises(GraphDefinitionError, match=r"Model\.forward.*bind"):
        Graph(Model.bind().forward)


ARGUMENTS = {
    "deployment": (lambda x: anything.bind(one), "one.bind"),
    "nested deployment": (lambda x: anything.bind([one]), "one.bind"),
    "class": (lambda x: anything.bind(k=Model), "Model.bind"),
    "method": (lambda x: anything.bind(Model.bind().forward), "Model.forward.bind"),
    "set": (lambda x: anything.bind({x}), "set"),
    "frozen set": (lambda x: anything.bind([frozenset([one.bind(x)])]), "set"),
    "key": (lambda x: anything.bind({x: 1}), "key"),
    "deployment for a constructor": (lambda x: Model.bind(one), "one.bind"),
    "method for a constructor": (
        lambda x: Model.bind({"k": Model.bind().forward}),
        "Model.forward.bind",
    ),
    "set for a constructor": (lambda x: Model.bind({one.bind()}), "set"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_what_looks_like_a_node_among_arguments(name: str) -> None:
    bind, word = ARGUMENTS[name]
    label = "Model" if "constructor" in name else "anything"
    with InputNode() as x, refused(label, word, at=bind.__code__.co_firstlineno):
        bind(x)


@deployment
def stream(value: Any) -> Iterator[int]:
    yield 1


@deployment
def two(left: Any, right: Any = None) -> Any:
    return left


def test_a_generator_that_two_nodes_take() -> None:
    with InputNode() as x:
        items, bound = stream.bind(x), line()
        dag = two.bind(one.bind(items), one.bind([items]))
    with refused("stream", "generator", "one reader", "taken twice", at=bound):
        Graph(dag)


def test_a_generator_that_one_node_takes_twice() -> None:
    with InputNode() as x:
        items, bound = stream.bind(x), line()
        dag = two.bind(items, right=items)
    with refused("stream", "taken twice: by two", at=bound):
        Graph(dag)


WRONG_READERS = [int, str, list[int], list, dict[str, int], tuple[int, ...], Iterator[str]]
READERS: list[Any] = [
    *(Any, object, AsyncIterator, AsyncIterator[int], AsyncIterable[int], Iterator[int]),
    *(Iterable[int], Iterable, Generator[int, None, None], AsyncGenerator[int, None]),
    *(DeploymentResponseGenerator, int | Iterator[int], Annotated[Iterator[int], "note"]),
    *(Iterator[Any], AsyncIterator[float], TypeVar("T")),
]


def reader(annotation: Any) -> Any:
    def read(items: Any) -> None: ...

    read.__annotations__ = {"items": annotation}
    return deployment(read)


@pytest.mark.parametrize("annotation", WRONG_READERS)
def test_a_generator_for_a_parameter_that_takes_none(annotation: Any) -> None:
    with InputNode() as x, refused("read: parameter 'items'", "stream"):
        reader(annotation).bind(stream.bind(x))


@pytest.mark.parametrize("annotation", READERS)
def test_a_generator_for_a_parameter_that_takes_one(annotation: Any) -> None:
    with InputNode() as x:
        Graph(reader(annotation).bind(stream.bind(x)))


def test_a_part_of_a_generator() -> None:
    with InputNode() as x, refused("stream[0]", "generator"):
        Graph(stream.bind(x)[0])


def test_decorating_twice_or_what_cannot_be() -> None:
    with refused("one", "options"):
        deployment(one)
    with refused("function or a class"):
        deployment(5)


def test_a_node_and_name_of_another_graph() -> None:
    graph = Graph(one.bind(1))
    for wrong in ("two", Model.bind()):
        with pytest.raises(GraphDefinitionError, match=r"not a deployment of this graph.*one"):
            graph.handle_of(wrong)
        with pytest.raises(GraphDefinitionError, match=r"not a deployment of this graph.*one"):
            graph.provide(wrong)
