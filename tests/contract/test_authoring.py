"""What can be a deployment, and what can be bound."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from fastapi_graph import DeploymentHandle, Graph, GraphSettings, InputNode, deployment
from tests.contract.conftest import Serve

pytestmark = pytest.mark.anyio


@deployment
def sync_scale(value: float, factor: float = 2) -> float:
    return value * factor


@deployment
async def async_scale(value: float, factor: float = 2) -> float:
    return value * factor


@deployment(max_ongoing_requests=7)
def called_decorator(value: float, factor: float = 2) -> float:
    return value * factor


class Base:
    def inherited(self, value: float) -> str:
        return f"inherited {value}"


@deployment
class Model(Base):
    def __init__(self, weight: float = 1, *, bias: float = 0) -> None:
        self.weight = weight
        self.bias = bias

    def forward(self, value: float) -> float:
        return self.weight * value + self.bias

    async def aforward(self, value: float) -> float:
        return self.weight * value + self.bias

    def __call__(self, value: float) -> str:
        return f"called {self.weight * value}"

    @staticmethod
    def static(value: float) -> str:
        return f"static {value}"

    @classmethod
    def of_class(cls, value: float) -> str:
        return f"{cls.__name__} {value}"


@deployment
class AsyncCall:
    async def __call__(self, value: float) -> str:
        return f"called {value}"


@pytest.mark.parametrize("function", [sync_scale, async_scale, called_decorator])
async def test_function(function: Any, serve: Serve) -> None:
    with InputNode() as x:
        dag = function.bind(x)
    async with serve(dag) as graph:
        assert await graph.handle.remote(3) == 6


@pytest.mark.parametrize("function", [sync_scale, async_scale])
async def test_function_with_keywords_and_constants(function: Any, serve: Serve) -> None:
    with InputNode() as x:
        dag = function.bind(factor=x, value=5)
    async with serve(dag) as graph:
        assert await graph.handle.remote(3) == 15


@pytest.mark.parametrize("function", [sync_scale, async_scale])
async def test_bare_function_is_called_with_the_arguments_of_remote(
    function: Any, serve: Serve
) -> None:
    async with serve(function.bind()) as graph:
        assert await graph.handle.remote(3) == 6
        assert await graph.handle.remote(3, factor=5) == 15


@pytest.mark.parametrize(
    "method, expected",
    [
        ("forward", 7),
        ("aforward", 7),
        ("static", "static 3"),
        ("of_class", "Model 3"),
        ("inherited", "inherited 3"),
    ],
)
async def test_method(method: str, expected: object, serve: Serve) -> None:
    with InputNode() as x:
        dag = getattr(Model.bind(2, bias=1), method).bind(x)
    async with serve(dag) as graph:
        assert await graph.handle.remote(3) == expected


async def test_method_with_keyword(serve: Serve) -> None:
    with InputNode() as x:
        dag = Model.bind().forward.bind(value=x)
    async with serve(dag) as graph:
        assert await graph.handle.remote(3) == 3


@pytest.mark.parametrize(
    "node, expected", [(Model.bind(2), "called 6"), (AsyncCall.bind(), "called 3")]
)
async def test_call_method(node: Any, expected: str, serve: Serve) -> None:
    with InputNode() as x:
        dag = node.__call__.bind(x)
    async with serve(dag) as graph:
        assert await graph.handle.remote(3) == expected


async def test_class_node_as_root_is_a_handle_to_the_instance(serve: Serve) -> None:
    async with serve(Model.bind(2)) as graph:
        assert await graph.handle.remote(3) == "called 6"
        assert await graph.handle.forward.remote(3) == 6
        assert await graph.handle.aforward.remote(value=4) == 8


async def test_graph_without_input(serve: Serve) -> None:
    async with serve(sync_scale.bind(Model.bind(2).forward.bind(4), 10)) as graph:
        assert await graph.handle.remote() == 80


async def test_chain_of_functions_and_methods(serve: Serve) -> None:
    with InputNode() as x:
        dag = async_scale.bind(Model.bind(3).forward.bind(sync_scale.bind(x)), 10)
    async with serve(dag) as graph:
        assert await graph.handle.remote(1) == 60


async def test_two_nodes_of_one_deployment_are_two_instances(serve: Serve) -> None:
    with InputNode() as x:
        one, ten = Model.bind(1), Model.bind(10)
        dag = collect.bind(one.forward.bind(x), ten.forward.bind(x))
    async with serve(dag) as graph:
        assert await graph.handle.remote(2) == [2, 20]


@deployment
def collect(*values: Any, **named: Any) -> list[Any]:
    return [*values, *sorted(named.items())]


async def test_variadic_function(serve: Serve) -> None:
    with InputNode() as x:
        dag = collect.bind(1, x, b=sync_scale.bind(x), a=0)
    async with serve(dag) as graph:
        assert await graph.handle.remote(5) == [1, 5, ("a", 0), ("b", 10)]


async def test_one_node_may_be_in_several_graphs(serve: Serve) -> None:
    with InputNode() as x:
        first = sync_scale.bind(x)
        second = async_scale.bind(first, 5)
    async with serve(first) as one, serve(second) as two:
        assert await one.handle.remote(1) == 2
        assert await two.handle.remote(1) == 10
        assert await one.handle.remote(3) == 6


async def test_options_name_the_deployment(serve: Serve) -> None:
    with InputNode() as x:
        dag = sync_scale.options(name="scaler").bind(x)
    async with serve(dag) as graph:
        assert [status.name for status in graph.status()] == ["scaler"]
        assert await graph.handle_of("scaler").remote(2, 3) == 6


async def test_handle_of_node_name_and_method_node(serve: Serve) -> None:
    with InputNode() as x:
        model = Model.bind(2)
        forward = model.forward.bind(x)
        dag = sync_scale.bind(forward)
    async with serve(dag) as graph:
        assert isinstance(graph.handle_of(model), DeploymentHandle)
        assert await graph.handle_of(model).forward.remote(5) == 10
        assert await graph.handle_of("Model").remote(5) == "called 10"
        assert await graph.handle_of(forward).remote(5) == 10
        assert await graph.handle_of(dag).remote(5) == 10
        assert await graph.handle_of(model).options(method_name="aforward").remote(1) == 2


async def test_subclass_of_a_deployment(serve: Serve) -> None:
    @deployment
    class Louder(Model):  # type: ignore[misc]
        def forward(self, value: float) -> float:
            return super().forward(value) * 100

    with InputNode() as x:
        dag = Louder.bind(2).forward.bind(x)
    async with serve(dag) as graph:
        assert await graph.handle.remote(1) == 200


@deployment
def thread_of_sync() -> int:
    return threading.get_ident()


@deployment
async def thread_of_async() -> int:
    return threading.get_ident()


@deployment
class Threads:
    def sync(self) -> int:
        return threading.get_ident()

    async def not_sync(self) -> int:
        return threading.get_ident()


async def test_sync_code_runs_in_a_thread_and_async_code_on_the_loop(
    in_process: GraphSettings,
) -> None:
    dag = collect.bind(thread_of_sync.bind(), Threads.bind().sync.bind())
    async with Graph(dag, settings=in_process) as graph:
        assert threading.get_ident() not in await graph.handle.remote()
    dag = collect.bind(thread_of_async.bind(), Threads.bind().not_sync.bind())
    async with Graph(dag, settings=in_process) as graph:
        assert await graph.handle.remote() == [threading.get_ident()] * 2
