"""Nodes inside containers, and handles as arguments of calls."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, NamedTuple

import pytest

from fastapi_graph import DeploymentHandle, Graph, GraphSettings, InputNode, deployment
from tests.contract.conftest import Serve

pytestmark = pytest.mark.anyio


@deployment
def identity(value: Any) -> Any:
    return value


@deployment
async def double(value: int) -> int:
    return value * 2


class Point(NamedTuple):
    x: Any
    y: Any = 0


@dataclasses.dataclass
class Record:
    value: Any
    computed: Any = dataclasses.field(init=False, default="kept")


@dataclasses.dataclass(frozen=True)
class Frozen:
    value: Any


@dataclasses.dataclass(slots=True)
class Slotted:
    value: Any


CONTAINERS = {
    "list": (lambda n: [1, n], [1, 6]),
    "tuple": (lambda n: (n, n), (6, 6)),
    "dict": (lambda n: {"k": n}, {"k": 6}),
    "named tuple": (Point, Point(6)),
    "dataclass": (Record, Record(6)),
    "frozen dataclass": (Frozen, Frozen(6)),
    "dataclass with slots": (Slotted, Slotted(6)),
    "ordered dict": (
        lambda n: collections.OrderedDict(b=n, a=1),
        collections.OrderedDict(b=6, a=1),
    ),
    "default dict": (
        lambda n: collections.defaultdict(list, k=n),
        collections.defaultdict(list, k=6),
    ),
    "nested": (
        lambda n: {"a": [(n, Record([Frozen(Point(1, n))]))]},
        {"a": [(6, Record([Frozen(Point(1, 6))]))]},
    ),
    "empty": (lambda n: [[], {}, (), n], [[], {}, (), 6]),
}


@pytest.mark.parametrize("name", CONTAINERS)
async def test_node_in_a_container(name: str, serve: Serve) -> None:
    wrap, expected = CONTAINERS[name]
    with InputNode() as x:
        dag = identity.bind(wrap(double.bind(x)))
    async with serve(dag) as graph:
        result = await graph.handle.remote(3)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize("name", CONTAINERS)
async def test_input_in_a_container_of_a_keyword(name: str, serve: Serve) -> None:
    wrap, expected = CONTAINERS[name]
    with InputNode() as x:
        dag = identity.bind(value=wrap(x["n"][0]))
    async with serve(dag) as graph:
        assert await graph.handle.remote({"n": [6]}) == expected


async def test_the_container_that_was_bound_is_not_changed(serve: Serve) -> None:
    with InputNode() as x:
        node = double.bind(x)
        container = {"a": [node], "b": [1]}
        dag = identity.bind(container)
    async with serve(dag) as graph:
        assert await graph.handle.remote(1) == {"a": [2], "b": [1]}
        assert await graph.handle.remote(2) == {"a": [4], "b": [1]}
    assert container["a"][0] is node


@deployment
def extend(values: list[Any]) -> list[Any]:
    values.append("seen")
    return values


async def test_a_container_with_nodes_is_made_anew_for_each_request(serve: Serve) -> None:
    with InputNode() as x:
        dag = extend.bind([x])
    async with serve(dag) as graph:
        assert await graph.handle.remote(1) == [1, "seen"]
        assert await graph.handle.remote(2) == [2, "seen"]


class Opaque:
    """Neither a container nor comparable: it must be passed as it is."""

    def __eq__(self, other: object) -> bool:
        raise AssertionError("compared")

    __hash__ = None  # type: ignore[assignment]


async def test_values_without_nodes_are_the_same_objects(in_process: GraphSettings) -> None:
    if in_process.serialize:
        pytest.skip("every value is a copy")
    constant, opaque = [1, 2], Opaque()
    with InputNode() as x:
        dag = identity.bind([x, constant, opaque])
    async with Graph(dag, settings=in_process) as graph:
        whole = object()
        result = await graph.handle.remote(whole)
    assert result[0] is whole
    assert result[1] is constant
    assert result[2] is opaque


@deployment
class Model:
    def __init__(self, weight: int) -> None:
        self.weight = weight

    def forward(self, value: int) -> int:
        return value * self.weight

    async def __call__(self, value: int) -> int:
        return value + self.weight


@deployment
async def call(handle: DeploymentHandle, value: int) -> list[int]:
    assert isinstance(handle, DeploymentHandle)
    return [await handle.remote(value), await handle.forward.remote(value)]


@deployment
async def call_all(handles: dict[str, list[DeploymentHandle]], value: int) -> list[int]:
    return [await handle.forward.remote(value) for handle in handles["all"]]


async def test_class_node_as_call_argument_is_a_handle(serve: Serve) -> None:
    with InputNode() as x:
        dag = call.bind(Model.bind(10), x)
    async with serve(dag) as graph:
        assert await graph.handle.remote(3) == [13, 30]


async def test_class_nodes_nested_in_call_arguments_are_handles(serve: Serve) -> None:
    with InputNode() as x:
        dag = call_all.bind({"all": [Model.bind(1), Model.bind(10)]}, x)
    async with serve(dag) as graph:
        assert await graph.handle.remote(3) == [3, 30]


async def test_handle_and_method_of_one_node_share_the_instance(serve: Serve) -> None:
    @deployment
    class Counter:
        def __init__(self) -> None:
            self.count = 0

        async def increment(self, *after: Any) -> int:
            self.count += 1
            return self.count

    @deployment
    async def again(counter: DeploymentHandle, first: int) -> list[int]:
        return [first, await counter.increment.remote()]

    counter = Counter.bind()
    async with serve(again.bind(counter, counter.increment.bind())) as graph:
        assert await graph.handle.remote() == [1, 2]
        assert await graph.handle.remote() == [3, 4]


async def test_bare_function_as_call_argument_is_its_value(serve: Serve) -> None:
    @deployment
    def answer() -> int:
        return 21

    async with serve(double.bind(answer.bind())) as graph:
        assert await graph.handle.remote() == 42


async def test_constants_are_new_for_every_call(serve: Serve) -> None:
    @deployment
    async def keep(value: Any, seen: list[Any], options: dict[str, Any]) -> Any:
        seen.append(value)
        options["nested"].add(value)
        return seen, options["nested"]

    with InputNode() as x:
        dag = keep.bind(x, [], {"nested": set()})
    async with serve(dag) as graph:
        assert await graph.handle.remote("alice") == (["alice"], {"alice"})
        assert await graph.handle.remote("bob") == (["bob"], {"bob"})
