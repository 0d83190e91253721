"""What answers when a deployment fails, is late or is over its limits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from fastapi_graph import (
    DeadlineExceededError,
    DeploymentHandle,
    GraphDefinitionError,
    GraphSettings,
    InputNode,
    OptionError,
    batch,
    deployment,
    get_request_context,
)
from tests.contract.conftest import Serve
from tests.contract.probes import Gate, Journal, Waits, budget

pytestmark = pytest.mark.anyio


async def fails(name: str) -> str:
    raise ConnectionError(name)


async def short(name: str) -> str:
    return name[:1]


def short_in_thread(name: str) -> str:
    return name[:1]


FALLBACKS = [
    ("nothing", "nothing"),
    (short, "a"),
    (short_in_thread, "a"),
    (deployment(short).bind(), "a"),
]


@pytest.mark.parametrize("fallback, expected", FALLBACKS)
async def test_fallback(fallback: Any, expected: str, serve: Serve) -> None:
    with InputNode() as x:
        dag = deployment(fails).options(fallback=fallback).bind(x)
    async with serve(dag) as graph:
        response = graph.handle.remote("abc")
        assert await response == expected
        assert response.degraded == ("fails",)
        status = {status.name: status.counts for status in graph.status()}
        assert status["fails"]["fallbacks"] == 1


async def test_a_fallback_is_seen_from_above(serve: Serve) -> None:
    @deployment
    class Asks:
        def __init__(self, model: DeploymentHandle) -> None:
            self.model = model

        async def __call__(self, name: str) -> str:
            response = self.model.remote(name)
            return f"{await response} {response.degraded}"

        async def plain(self, name: str) -> str:
            return name

    node = Asks.bind(deployment(fails).options(fallback="nothing").bind())
    async with serve(node) as graph:
        response, other = graph.handle.remote("abc"), graph.handle.plain.remote("abc")
        assert await response == "nothing ('fails',)"
        assert response.degraded == ("fails",)
        await other
        assert other.degraded == ()


async def test_a_fallback_for_lateness_and_for_full_queues(journal: Journal, serve: Serve) -> None:
    gate = Gate.bind()
    node = Waits.options(
        timeout_s=30, max_ongoing_requests=1, max_queued_requests=0, fallback=None
    ).bind(gate, journal, budget.bind())
    async with serve(node) as graph:
        first = graph.handle.remote("a")
        await journal.wait_for("start a")
        full = graph.handle.remote("b")
        await full
        assert full.degraded == ("Waits",)
        await graph.handle_of(gate).open.remote()
        await first
        assert first.degraded == ()


async def test_past_the_deadline_no_fallback_answers(journal: Journal, serve: Serve) -> None:
    with InputNode() as x:
        node = Waits.options(fallback=short).bind(Gate.bind(), journal, budget.bind())
        dag = node.__call__.bind(x)
    async with serve(dag) as graph:
        with pytest.raises(DeadlineExceededError):
            await graph.handle.options(timeout_s=0.1).remote("a")
        late = graph.handle_of(node).options(timeout_s=0.1).remote("b")
        assert await late == "b"
        assert late.degraded == ("Waits",)


async def test_fallback_of_a_handle(serve: Serve) -> None:
    one, other = deployment(fails).bind(), deployment(short).bind()
    with InputNode() as x:
        dag = deployment(fails).options(name="unused").bind(x)
    async with serve({"/": dag, "/one": one, "/other": other}) as graph:
        handle = graph.handle_of(one).options(fallback=graph.handle_of(other))
        response = handle.remote("abc")
        assert await response == "a"
        assert response.degraded == ("fails",)
        assert await handle.options(fallback="never").remote("abc") == "never"


async def test_a_fallback_that_fails_is_the_failure(serve: Serve) -> None:
    async def fails_too(name: str) -> str:
        raise KeyError(name)

    async with serve(deployment(fails).options(fallback=fails_too).bind()) as graph:
        with pytest.raises(KeyError):
            await graph.handle.remote("abc")


async def generates(name: str) -> AsyncIterator[str]:
    yield name


@pytest.mark.parametrize(
    "fallback, expected",
    [(["x", "y"], ["x", "y"]), ("x", ["x"]), (short, ["a"]), (generates, ["ab"])],
)
async def test_fallback_of_a_stream(fallback: Any, expected: list[str], serve: Serve) -> None:
    @deployment(fallback=fallback)
    async def breaks(name: str) -> AsyncIterator[str]:
        raise ConnectionError(name)
        yield name

    async with serve(breaks.bind()) as graph:
        items = graph.handle.remote("ab")
        assert [item async for item in items] == expected
        assert items.degraded == ("breaks",)


async def test_a_fallback_does_not_get_the_rest_of_a_stream(
    backend: GraphSettings, serve: Serve
) -> None:
    @deployment
    async def numbers(count: int) -> AsyncIterator[int]:
        for number in range(count):
            yield number

    @deployment(fallback=0)
    async def total(items: AsyncIterator[int], fail: str) -> int:
        if fail == "early":
            raise ConnectionError
        async for _ in items:
            raise ConnectionError
        return 1

    with InputNode() as x:
        dag = total.bind(numbers.bind(x[0]), x[1])
    async with serve(dag) as graph:
        if backend.backend == "inprocess":  # on Ray, items are fetched ahead of the reader
            assert await graph.handle.remote(3, "early") == 0
        with pytest.raises(ConnectionError):
            await graph.handle.remote(3, "late")


async def test_a_stream_says_that_a_fallback_below_has_answered(serve: Serve) -> None:
    @deployment
    class Streams:
        def __init__(self, below: DeploymentHandle) -> None:
            self.below = below

        async def __call__(self) -> AsyncIterator[str]:
            yield "first"
            yield await self.below.remote("abc")

    node = Streams.bind(deployment(fails).options(fallback="nothing").bind())
    async with serve(node) as graph:
        items = graph.handle.remote()
        assert [item async for item in items] == ["first", "nothing"]
        assert items.degraded == ("fails",)


async def test_a_batch_says_that_a_fallback_below_has_answered(serve: Serve) -> None:
    @deployment
    class Batches:
        def __init__(self, below: DeploymentHandle) -> None:
            self.below = below

        @batch(max_batch_size=2)
        async def __call__(self, names: list[str]) -> list[Any]:
            await self.below.remote(names[0])
            return [get_request_context().deployment for _ in names]

    node = Batches.bind(deployment(fails).options(fallback="nothing").bind())
    async with serve(node) as graph:
        responses = [graph.handle.remote("a"), graph.handle.remote("b")]
        assert await asyncio.gather(*responses) == ["Batches"] * 2
        assert [response.degraded for response in responses] == [("fails",)] * 2


async def test_a_node_is_no_fallback_of_a_handle(serve: Serve) -> None:
    async with serve(deployment(short).bind()) as graph:
        with pytest.raises(OptionError, match=r"is a node; pass a handle to it, graph.handle_of"):
            graph.handle.options(fallback=deployment(fails).bind())


async def test_a_constant_is_not_shared(in_process: GraphSettings, serve: Serve) -> None:
    async with serve(deployment(fails).bind()) as graph:
        handle = graph.handle.options(fallback=[])
        (await handle.remote("a")).append("mine")
        assert await handle.remote("a") == []


def test_fallbacks_that_cannot_be() -> None:
    from fastapi_graph import Graph

    class Model:
        def predict(self, value: str) -> str:
            return value

    class Other:
        def guess(self, value: str) -> str:
            return value

    def number(value: str) -> int:
        return len(value)

    with InputNode() as x:
        value = deployment(number).bind(x)
    for target, fallback, message in [
        (fails, number, "its fallback .*number gives int, but fails gives str"),
        (fails, 1, "its fallback 1 gives int"),
        (fails, value, "number .bound at .* is a value"),
        (fails, deployment(number).bind(), "number gives int"),
        (Model, deployment(Other).bind(), "Other .bound at .* has no method predict"),
    ]:
        with pytest.raises(GraphDefinitionError, match=message):
            Graph(deployment(target).options(fallback=fallback).bind())
