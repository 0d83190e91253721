"""Nodes among constructor arguments become handles to what they stand for."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
from typing import Any, NamedTuple

import pytest

from fastapi_graph import DeploymentHandle, Graph, GraphDefinitionError, InputNode, deployment
from tests.contract.conftest import Serve
from tests.contract.probes import Journal, here

pytestmark = pytest.mark.anyio


@deployment
async def double(value: int) -> int:
    return value * 2


@deployment
def sync_double(value: int) -> int:
    return value * 2


@deployment
async def add(left: int, right: int = 100) -> int:
    return left + right


@deployment
class Model:
    def __init__(self, weight: int = 1) -> None:
        self.weight = weight
        self.calls = 0

    async def forward(self, value: int) -> int:
        self.calls += 1
        return value * self.weight

    def sync_forward(self, value: int) -> int:
        return value * self.weight

    async def count(self, *after: Any) -> int:
        return self.calls

    async def __call__(self, value: int) -> int:
        return value + self.weight


@deployment
class Holder:
    """Holds whatever it is given, and calls it."""

    def __init__(self, held: Any, *, keyword: Any = None) -> None:
        self.held = held
        self.keyword = keyword

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return await self.held.remote(*args, **kwargs)

    def sync(self, *args: Any) -> Any:
        return self.held.remote(*args).result(timeout_s=5)

    async def forward(self, value: int) -> Any:
        return await self.held.forward.remote(value)

    async def by_keyword(self, value: int) -> Any:
        return await self.keyword.remote(value)

    async def kinds(self) -> list[str]:
        return [type(self.held).__name__, type(self.keyword).__name__]


async def test_a_class_node_is_a_handle_to_the_deployment(serve: Serve) -> None:
    async with serve(Holder.bind(Model.bind(10))) as graph:
        assert await graph.handle.remote(3) == 13
        assert await graph.handle.forward.remote(3) == 30
        assert await graph.handle.sync.remote(3) == 13


@pytest.mark.parametrize("function", [double, sync_double])
async def test_a_bare_function_is_a_handle_to_the_deployment(function: Any, serve: Serve) -> None:
    async with serve(Holder.bind(function.bind())) as graph:
        assert await graph.handle.remote(3) == 6
        assert await graph.handle.remote(value=4) == 8
        assert await graph.handle.sync.remote(3) == 6


async def test_handles_by_keyword_beside_constants(serve: Serve) -> None:
    async with serve(Holder.bind("constant", keyword=double.bind())) as graph:
        assert await graph.handle.kinds.remote() == ["str", "DeploymentHandle"]
        assert await graph.handle.by_keyword.remote(3) == 6


async def test_a_bound_function_is_a_handle_to_the_sub_graph(serve: Serve) -> None:
    with InputNode() as x:
        sub = add.bind(double.bind(x), x)
    async with serve(Holder.bind(sub)) as graph:
        assert await graph.handle.remote(3) == 9
        assert await graph.handle.sync.remote(5) == 15


async def test_a_bound_method_is_a_handle_to_the_sub_graph(serve: Serve) -> None:
    with InputNode() as x:
        sub = Model.bind(10).forward.bind(double.bind(x))
    async with serve(Holder.bind(sub)) as graph:
        assert await graph.handle.remote(3) == 60


async def test_a_function_bound_to_constants_only_is_a_sub_graph(serve: Serve) -> None:
    async with serve(Holder.bind(add.bind(1, 2))) as graph:
        assert await graph.handle.remote() == 3


async def test_a_sub_graph_takes_several_arguments(serve: Serve) -> None:
    with InputNode() as x:
        sub = add.bind(x[0], x["right"])
    async with serve(Holder.bind(sub)) as graph:
        assert await graph.handle.remote(1, right=5) == 6


async def test_a_part_of_an_output_is_a_sub_graph(serve: Serve) -> None:
    @deployment
    async def wrap(value: int) -> dict[str, list[int]]:
        return {"k": [value]}

    with InputNode() as x:
        sub = wrap.bind(x)["k"][0]
    async with serve(Holder.bind(sub)) as graph:
        assert await graph.handle.remote(3) == 3


async def test_a_sub_graph_has_no_methods(serve: Serve) -> None:
    with InputNode() as x:
        sub, place = double.bind(x), here()
    async with serve(Holder.bind(sub)) as graph:
        with pytest.raises(GraphDefinitionError, match=r"double.*forward") as caught:
            await graph.handle.forward.remote(3)
    assert place in str(caught.value)


async def test_sub_graphs_with_inputs_of_their_own(serve: Serve) -> None:
    with InputNode() as x:
        sub = double.bind(x)
    with InputNode() as y:
        dag = Holder.bind(sub).__call__.bind(add.bind(y, 1))
    async with serve(dag) as graph:
        assert await graph.handle.remote(3) == 8


async def test_sub_graphs_within_sub_graphs(serve: Serve) -> None:
    with InputNode() as x:
        inner = double.bind(x)
    with InputNode() as x:
        middle = Holder.bind(inner).__call__.bind(x)
    async with serve(Holder.bind(middle)) as graph:
        assert await graph.handle.remote(3) == 6


async def test_a_handle_and_a_method_of_one_node_share_the_instance(serve: Serve) -> None:
    with InputNode() as x:
        model = Model.bind(10)
        dag = model.count.bind(
            Holder.bind(model).forward.bind(x), Holder.bind(model).forward.bind(x)
        )
    async with serve(dag) as graph:
        assert sorted(status.name for status in graph.status()) == ["Holder", "Holder_1", "Model"]
        assert await graph.handle.remote(1) == 2
        assert await graph.handle.remote(1) == 4


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclasses.dataclass(frozen=True)
class Parts:
    first: Any
    rest: list[Any]


NESTED = {
    "list": lambda one, two: [one, two],
    "tuple": lambda one, two: (one, (two,)),
    "dict": lambda one, two: {"one": one, "two": [two]},
    "named tuple": Pair,
    "dataclass": lambda one, two: Parts(one, [two]),
    "default dict": lambda one, two: collections.defaultdict(list, one=one, two=two),
    "deep": lambda one, two: [{"k": (Parts(Pair(one, 0), [[two]]), "s")}],
}


def handles(value: Any) -> list[DeploymentHandle]:
    """Return the handles somewhere in a value, in order."""
    if isinstance(value, DeploymentHandle):
        return [value]
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [handle for item in value for handle in handles(item)]
    return []


@deployment
class Ensemble:
    def __init__(self, models: Any) -> None:
        self.kind = type(models).__name__
        self.models = handles(models)

    async def __call__(self, value: int) -> tuple[str, list[int]]:
        return self.kind, await asyncio.gather(*(model.remote(value) for model in self.models))


@pytest.mark.parametrize("name", NESTED)
async def test_nested_in_containers(name: str, serve: Serve) -> None:
    with InputNode() as x:
        sub = add.bind(x, 10)
    container = NESTED[name](Model.bind(1), sub)
    async with serve(Ensemble.bind(container)) as graph:
        kind, results = await graph.handle.remote(3)
    assert kind == type(container).__name__
    assert results == [4, 13]


@deployment
class Combiner:
    def __init__(self, m1: DeploymentHandle, m2: DeploymentHandle) -> None:
        self.m1 = m1
        self.m2 = m2

    async def run(self, left: float, right: float, operation: str) -> Any:
        request = left + right
        if operation == "first":
            return await self.m1.forward.remote(request)
        first = self.m1.forward.remote(request)
        second = self.m2.forward.remote(request)
        if operation == "chain":
            return await self.m2.forward.remote(first) + 0 * await second
        results = await asyncio.gather(first, second)
        return sum(results) if operation == "sum" else max(results)


@pytest.mark.parametrize(
    "operation, expected, calls",
    [("sum", 36, [1, 1]), ("max", 24, [1, 1]), ("chain", 288, [1, 2]), ("first", 12, [1, 0])],
)
async def test_control_flow_at_run_time(
    operation: str, expected: float, calls: list[int], serve: Serve
) -> None:
    m1, m2 = Model.bind(12), Model.bind(24)
    with InputNode() as x:
        dag = Combiner.bind(m1, m2=m2).run.bind(add.bind(x[0], 0), double.bind(x[1]), x[2])
    async with serve(dag) as graph:
        assert await graph.handle.remote([0, 0, operation]) == 0
        assert await graph.handle.remote([1, 0, operation]) == expected
        counted = [await graph.handle_of(model).count.remote() for model in (m1, m2)]
    assert counted == [2 * count for count in calls]


async def test_calls_of_a_sub_graph_may_overlap(serve: Serve) -> None:
    @deployment
    class Twice:
        def __init__(self, sub: DeploymentHandle) -> None:
            self.sub = sub

        async def __call__(self, value: int) -> list[int]:
            return await asyncio.gather(*(self.sub.remote(value + n) for n in range(50)))

    with InputNode() as x:
        sub = add.bind(double.bind(x), x)
    async with serve(Twice.bind(sub)) as graph:
        assert await graph.handle.remote(0) == [3 * n for n in range(50)]


async def test_a_constructor_may_call_its_handles(serve: Serve) -> None:
    @deployment
    class SyncUser:
        def __init__(self, model: DeploymentHandle) -> None:
            self.value = model.forward.remote(2).result(timeout_s=5)

        def get(self) -> int:
            return self.value

    @deployment
    class AsyncUser:
        async def __init__(self, sub: DeploymentHandle) -> None:
            self.value = await sub.remote(2)

        def get(self) -> int:
            return self.value

    with InputNode() as x:
        sub = add.bind(double.bind(x), 1)
    dag = add.bind(SyncUser.bind(Model.bind(10)).get.bind(), AsyncUser.bind(sub).get.bind())
    async with serve(dag) as graph:
        assert await graph.handle.remote() == 25


async def test_a_constructor_may_hand_its_handle_to_a_thread(
    journal: Journal, serve: Serve
) -> None:
    @deployment
    class User:
        async def __init__(self, model: DeploymentHandle, journal: Journal) -> None:
            value = await asyncio.to_thread(lambda: model.remote(2).result(timeout_s=5))
            journal.add(value)

        def __call__(self) -> None: ...

    async with serve(User.bind(Model.bind(10), journal)):
        assert journal.read() == ["12"]


async def test_constructors_along_a_chain_call_each_other(serve: Serve) -> None:
    @deployment
    class Link:
        def __init__(self, before: DeploymentHandle | None = None) -> None:
            self.number = 0 if before is None else before.remote().result(timeout_s=5) + 1

        def __call__(self) -> int:
            return self.number

    node = Link.bind()
    for _ in range(10):
        node = Link.bind(node)
    async with serve(node) as graph:
        assert await graph.handle.remote() == 10


async def test_a_class_node_in_call_arguments_is_a_handle(serve: Serve) -> None:
    @deployment
    async def call(first: DeploymentHandle, value: int, *, more: list[DeploymentHandle]) -> Any:
        assert isinstance(first, DeploymentHandle)
        return [await handle.forward.remote(value) for handle in (first, *more)]

    shared = Model.bind(1)
    with InputNode() as x:
        dag = call.bind(shared, x, more=[Model.bind(10), shared])
    async with serve(dag) as graph:
        assert await graph.handle.remote(3) == [3, 30, 3]


async def test_a_handle_of_a_stopped_graph_says_so(serve: Serve) -> None:
    async with serve(Holder.bind(Model.bind(10))) as graph:
        handle = graph.handle
    async with Graph(Model.bind()) as other:
        assert await other.handle.remote(1) == 2
        with pytest.raises(Exception, match="not started"):
            await handle.remote(1)
