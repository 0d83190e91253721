"""`override`: one deployment of one graph is replaced, wherever it is called. And `provide`."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import AsyncMock, MagicMock, Mock

import pytest

from fastapi_graph import (
    DeploymentHandle,
    GraphDefinitionError,
    GraphSettings,
    InputNode,
    deployment,
)
from tests.contract.conftest import Serve
from tests.contract.probes import Journal

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_process")]


@deployment
class Model:
    def __init__(self, journal: Journal | None = None) -> None:
        if journal:
            journal.add("made")

    async def forward(self, value: int) -> Any:
        return value * 10

    def __call__(self, value: int) -> Any:
        return value + 10

    def close(self) -> None: ...


@deployment
async def double(value: int) -> Any:
    return value * 2


@deployment
class Outer:
    def __init__(self, model: DeploymentHandle, function: DeploymentHandle) -> None:
        self.model = model
        self.function = function

    async def run(self, value: int) -> Any:
        return [await self.model.forward.remote(value), await self.function.remote(value)]

    def sync(self, value: int) -> Any:
        return self.model.remote(value).result(timeout_s=5)


class Fake:
    async def forward(self, value: int) -> str:
        return f"fake {value}"

    def __call__(self, value: int) -> str:
        return f"fake call {value}"


async def test_an_instance_answers_in_the_graph_and_its_handles(serve: Serve) -> None:
    model = Model.bind()
    with InputNode() as x:
        dag = model.forward.bind(x)
    async with serve(dag) as graph:
        assert await graph.handle.remote(1) == 10
        with graph.override(model, Fake()):
            assert await graph.handle.remote(1) == "fake 1"
            assert await graph.handle_of(model).forward.remote(2) == "fake 2"
            assert await graph.handle_of(model).remote(3) == "fake call 3"
            result = await asyncio.to_thread(lambda: graph.handle_of(dag).remote(4).result(5))
            assert result == "fake 4"
        assert await graph.handle.remote(1) == 10
        assert await graph.handle_of(model).remote(3) == 13


FAKES = {
    "lambda": lambda value: f"fake {value}",
    "mock": Mock(side_effect=lambda value: f"fake {value}"),
    "async mock": AsyncMock(side_effect=lambda value: f"fake {value}"),
    "magic mock": MagicMock(side_effect=lambda value: f"fake {value}"),
    "deployment": deployment(lambda value: f"fake {value}"),
}


async def async_fake(value: int) -> str:
    await asyncio.sleep(0)
    return f"fake {value}"


@pytest.mark.parametrize("fake", [async_fake, *FAKES.values()], ids=["coroutine", *FAKES])
async def test_a_callable_replaces_a_function(fake: Any, serve: Serve) -> None:
    with InputNode() as x:
        dag = double.bind(x)
    async with serve(dag) as graph:
        with graph.override(dag, fake):
            assert await graph.handle.remote(1) == "fake 1"
            assert await graph.handle_of("double").remote(2) == "fake 2"
        assert await graph.handle.remote(1) == 2


@pytest.mark.parametrize("fake", [async_fake, FAKES["lambda"]], ids=["coroutine", "lambda"])
async def test_a_callable_answers_every_method_of_a_class(fake: Any, serve: Serve) -> None:
    model = Model.bind()
    async with serve(model) as graph:
        with graph.override(model, fake):
            assert await graph.handle.remote(1) == "fake 1"
            assert await graph.handle.forward.remote(2) == "fake 2"


@pytest.mark.parametrize("mock", [AsyncMock, MagicMock, Mock])
async def test_a_mock_has_the_methods_it_is_asked_for(mock: Any, serve: Serve) -> None:
    model = Model.bind()
    fake = mock()
    fake.forward.return_value = "from the mock"
    with InputNode() as x:
        dag = double.bind(model.forward.bind(x))
    async with serve(dag) as graph:
        with graph.override(model, fake):
            assert await graph.handle.remote(5) == "from the mock" * 2
    fake.forward.assert_called_once_with(5)


@pytest.mark.parametrize("spec", [Fake, Model.target])
async def test_a_mock_with_a_spec(spec: Any, serve: Serve) -> None:
    model = Model.bind()
    fake = MagicMock(spec=spec)
    fake.forward.return_value = "from the mock"  # an AsyncMock, as forward is async
    fake.return_value = "called"
    async with serve(model) as graph:
        with graph.override(model, fake):
            assert await graph.handle.forward.remote(5) == "from the mock"
            assert await graph.handle.remote(5) == "called"
    fake.forward.assert_awaited_once_with(5)


@pytest.mark.parametrize("when", ["before", "after"])
async def test_it_reaches_nested_handles(when: str, serve: Serve) -> None:
    model, function = Model.bind(), double.bind()
    with InputNode() as x:
        dag = Outer.bind(model, function).run.bind(x)
    graph = serve(dag)
    if when == "before":
        with graph.override(model, Fake()), graph.override("double", lambda value: value + 0.5):
            async with graph:
                assert await graph.handle.remote(1) == ["fake 1", 1.5]
                assert await graph.handle_of("Outer").sync.remote(1) == "fake call 1"
    else:
        async with graph:
            with graph.override(model, Fake()), graph.override(function, AsyncMock(return_value=7)):
                assert await graph.handle.remote(1) == ["fake 1", 7]
                assert await graph.handle_of("Outer").sync.remote(1) == "fake call 1"
            assert await graph.handle.remote(1) == [10, 2]


async def test_entered_before_the_start_the_constructor_does_not_run(
    journal: Journal, serve: Serve
) -> None:
    model = Model.bind(journal)
    graph = serve(model)
    with graph.override(model, Fake()):
        async with graph:
            assert await graph.handle.forward.remote(1) == "fake 1"
    assert journal.read() == []
    async with graph:
        assert await graph.handle.forward.remote(1) == 10
    assert journal.read() == ["made"]


async def test_left_before_the_stop_what_was_not_constructed_says_so(serve: Serve) -> None:
    model = Model.bind()
    graph = serve(model)
    with graph.override(model, Fake()):
        await graph.start()
    with pytest.raises(Exception, match=r"Model.*override"):
        await graph.handle.forward.remote(1)
    await graph.stop()
    async with graph:
        assert await graph.handle.forward.remote(1) == 10


async def test_entered_after_the_start_the_real_object_is_closed_at_the_stop(
    journal: Journal, serve: Serve
) -> None:
    @deployment
    class Closing:
        def __init__(self, journal: Journal) -> None:
            self.journal = journal

        def __call__(self) -> str:
            return "real"

        def close(self) -> None:
            self.journal.add("closed")

    fake = Mock(return_value="fake")
    graph = serve(Closing.bind(journal))
    await graph.start()
    with graph.override("Closing", fake):
        assert await graph.handle.remote() == "fake"
        await graph.stop()
    assert journal.read() == ["closed"]
    fake.close.assert_not_called()
    async with graph:
        assert await graph.handle.remote() == "real"


async def test_it_is_restored_after_an_error_and_nests(serve: Serve) -> None:
    with InputNode() as x:
        dag = double.bind(x)
    async with serve(dag) as graph:
        with graph.override(dag, lambda value: "outer"):
            with (
                pytest.raises(KeyError),
                graph.override(dag, lambda value: {}["no such key"]),
            ):
                await graph.handle.remote(1)
            assert await graph.handle.remote(1) == "outer"
        assert await graph.handle.remote(1) == 2


async def test_other_graphs_with_the_same_node_are_not_touched(serve: Serve) -> None:
    with InputNode() as x:
        dag = double.bind(x)
    async with serve(dag) as graph, serve(dag) as other:
        with graph.override(dag, lambda value: "fake"):
            assert await graph.handle.remote(1) == "fake"
            assert await other.handle.remote(1) == 2


@pytest.mark.parametrize("by", ["node", "name", "method node"])
async def test_by_node_name_and_method_node(by: str, serve: Serve) -> None:
    model = Model.bind()
    with InputNode() as x:
        dag = model.forward.bind(x)
    async with serve(dag) as graph:
        key = {"node": model, "name": "Model", "method node": dag}[by]
        with graph.override(key, Fake()):
            assert await graph.handle.remote(1) == "fake 1"


async def test_a_fake_that_raises_is_told_apart_like_any_node(serve: Serve) -> None:
    with InputNode() as x:
        dag = double.bind(x)
    async with serve(dag) as graph:
        with (
            graph.override(dag, Mock(side_effect=ValueError("of the fake"))),
            pytest.raises(ValueError, match="of the fake") as caught,
        ):
            await graph.handle.remote(1)
    assert any("double" in note for note in caught.value.__notes__)


async def test_what_cannot_be_a_fake(serve: Serve) -> None:
    model = Model.bind()
    graph = serve(model)
    with pytest.raises(GraphDefinitionError, match=r"Model.*node"), graph.override(model, model):
        pass
    for unknown in ("Modle", Model.bind()):
        with (
            pytest.raises(GraphDefinitionError, match="not a deployment of this graph"),
            graph.override(unknown, Fake()),
        ):
            pass


async def test_a_fake_without_the_method_is_an_error(serve: Serve) -> None:
    class Partial:
        def other(self) -> None: ...

    model = Model.bind()
    async with serve(model) as graph:
        with (
            graph.override(model, Partial()),
            pytest.raises(GraphDefinitionError, match=r"Model.*'forward'"),
        ):
            await graph.handle.forward.remote(1)


# provide


async def test_provide_gives_the_same_object_and_the_handle(serve: Serve) -> None:
    model = Model.bind()
    with InputNode() as x:
        dag = model.forward.bind(x)
    graph = serve(dag)
    assert graph.provide(model) is graph.provide(model)
    assert graph.provide(model) is graph.provide("Model")
    assert graph.provide(dag) is graph.provide(dag)
    assert graph.provide() is graph.provide()
    assert len({graph.provide(), graph.provide(model), graph.provide(dag)}) == 3
    assert serve(dag).provide(model) is not graph.provide(model)
    async with graph:
        assert await graph.provide(model)() == graph.handle_of(model)
        assert await (await graph.provide()()).remote(2) == 20
        assert await (await graph.provide(dag)()).remote(2) == 20
        assert await (await graph.provide(model)()).remote(2) == 12


async def test_handle_of_a_method_node_calls_the_method(serve: Serve) -> None:
    model = Model.bind()
    with InputNode() as x:
        called = model.__call__.bind(x)
        dag = double.bind(model.forward.bind(called))
    async with serve(dag) as graph:
        assert await graph.handle_of(called).remote(1) == 11
        assert graph.handle_of(called) == graph.handle_of(model)
        assert graph.handle_of(dag) == graph.handle_of("double")


async def test_a_provided_handle_sees_the_override(in_process: GraphSettings, serve: Serve) -> None:
    model = Model.bind()
    async with serve(model) as graph:
        handle = await graph.provide(model)()
        with graph.override(model, Fake()):
            assert await handle.forward.remote(1) == "fake 1"
