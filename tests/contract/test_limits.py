"""max_ongoing_requests and max_queued_requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from fastapi_graph import BackPressureError, DeploymentHandle, Graph, InputNode, deployment
from tests.contract.conftest import Serve
from tests.contract.probes import Gate, Journal

pytestmark = pytest.mark.anyio


@deployment
class Limited:
    def __init__(self, gate: DeploymentHandle, journal: Journal) -> None:
        self.gate = gate
        self.journal = journal
        self.running = 0

    async def _async(self, name: Any) -> Any:
        self.running += 1
        self.journal.add(f"start {name}")
        self.journal.add(f"running {self.running}")
        try:
            await self.gate.wait.remote()
        finally:
            self.running -= 1
        return name

    async def async_(self, name: Any) -> Any:
        return await self._async(name)

    def sync(self, name: Any) -> Any:
        self.running += 1
        self.journal.add(f"start {name}")
        self.journal.add(f"running {self.running}")
        self.gate.wait.remote().result(timeout_s=5)
        self.running -= 1
        return name

    async def async_stream(self, name: Any) -> AsyncIterator[Any]:
        yield await self._async(name)

    def sync_stream(self, name: Any) -> Iterator[Any]:
        yield self.sync(name)

    async def fail(self) -> None:
        raise ValueError("wrong")

    def sync_fail(self) -> None:
        raise ValueError("wrong")


async def settled(graph: Graph, ongoing: int, queued: int) -> None:
    await asyncio.sleep(0.001)  # for tasks that were made just now
    async with asyncio.timeout(5):
        while True:
            (status,) = (status for status in graph.status() if status.name == "Limited")
            if (status.ongoing, status.queued) == (ongoing, queued):
                return
            await asyncio.sleep(0.001)


def limited(journal: Journal, **options: Any) -> tuple[Any, Any]:
    gate = Gate.bind()
    return Limited.options(**options).bind(gate, journal), gate


async def answer(response: Any) -> Any:
    if hasattr(response, "__aiter__"):
        return [item async for item in response]
    return [await response]


METHODS = ["async_", "sync", "async_stream", "sync_stream"]


@pytest.mark.parametrize("method", METHODS)
async def test_no_more_than_max_ongoing_requests_run(
    method: str, journal: Journal, serve: Serve
) -> None:
    node, gate = limited(journal, max_ongoing_requests=2)
    async with serve(node) as graph:
        call = getattr(graph.handle, method)
        answers = [asyncio.create_task(answer(call.remote(n))) for n in range(5)]
        await settled(graph, ongoing=2, queued=3)
        await journal.wait_for("running 2")
        assert sum(line.startswith("start") for line in journal.read()) == 2
        await graph.handle_of(gate).open.remote()
        assert await asyncio.gather(*answers) == [[n] for n in range(5)]
        await settled(graph, ongoing=0, queued=0)
    assert "running 3" not in journal.read()


@pytest.mark.parametrize("method", METHODS)
async def test_the_queue_is_first_in_first_out(method: str, journal: Journal, serve: Serve) -> None:
    node, gate = limited(journal, max_ongoing_requests=1)
    async with serve(node) as graph:
        call = getattr(graph.handle, method)
        answers = [asyncio.create_task(answer(call.remote(n))) for n in range(6)]
        await settled(graph, ongoing=1, queued=5)
        await graph.handle_of(gate).open.remote()
        await asyncio.gather(*answers)
    started = [line for line in journal.read() if line.startswith("start")]
    assert started == [f"start {n}" for n in range(6)]


@pytest.mark.parametrize("method", ["async_", "sync"])
async def test_a_node_that_ends_passes_its_slot_on(
    method: str, journal: Journal, serve: Serve
) -> None:
    node, gate = limited(journal, max_ongoing_requests=1)
    with InputNode() as x:
        dag = getattr(node, method).bind(name=x)
    async with serve(dag) as graph:
        answers = [graph.handle.remote(n) for n in range(6)]
        await settled(graph, ongoing=1, queued=5)
        await graph.handle_of(gate).open.remote()
        assert await asyncio.gather(*answers) == list(range(6))
        await settled(graph, ongoing=0, queued=0)
    started = [line for line in journal.read() if line.startswith("start")]
    assert started == [f"start {n}" for n in range(6)]
    assert "running 2" not in journal.read()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("queue", [0, 1])
async def test_over_the_queue_is_back_pressure(
    method: str, queue: int, journal: Journal, serve: Serve
) -> None:
    node, gate = limited(journal, max_ongoing_requests=1, max_queued_requests=queue)
    async with serve(node) as graph:
        call = getattr(graph.handle, method)
        accepted = [asyncio.create_task(answer(call.remote(n))) for n in range(1 + queue)]
        await settled(graph, ongoing=1, queued=queue)
        with pytest.raises(BackPressureError, match=r"Limited.*test_limits\.py:\d+") as caught:
            await answer(call.remote("refused"))
        assert caught.value.retry_after_s > 0
        await graph.handle_of(gate).open.remote()
        await asyncio.gather(*accepted)
        assert await answer(call.remote("again")) == ["again"]
    assert "start refused" not in journal.read()


async def test_back_pressure_deep_in_a_graph_reaches_the_caller(
    journal: Journal, serve: Serve
) -> None:
    node, gate = limited(journal, max_ongoing_requests=1, max_queued_requests=0)
    async with serve(node.async_.bind("only")) as graph:
        first = graph.handle.remote()
        await settled(graph, ongoing=1, queued=0)
        with pytest.raises(BackPressureError):
            await graph.handle.remote()
        await graph.handle_of(gate).open.remote()
        assert await first == "only"


@pytest.mark.parametrize("method", ["fail", "sync_fail"])
async def test_a_failure_gives_its_slot_back(method: str, journal: Journal, serve: Serve) -> None:
    node, _ = limited(journal, max_ongoing_requests=1, max_queued_requests=0)
    async with serve(node) as graph:
        for _ in range(3):
            with pytest.raises(ValueError, match="wrong"):
                await getattr(graph.handle, method).remote()


@pytest.mark.parametrize("method", METHODS)
async def test_a_cancelled_call_gives_its_slot_back(
    method: str, journal: Journal, serve: Serve
) -> None:
    node, gate = limited(journal, max_ongoing_requests=1)
    async with serve(node) as graph:
        call = getattr(graph.handle, method)
        first = asyncio.create_task(answer(call.remote("first")))
        await journal.wait_for("start first")
        second = asyncio.create_task(answer(call.remote("second")))
        await settled(graph, ongoing=1, queued=1)
        first.cancel()
        await journal.wait_for("start second")
        await graph.handle_of(gate).open.remote()
        assert await second == ["second"]
        with pytest.raises(asyncio.CancelledError):
            await first
        await settled(graph, ongoing=0, queued=0)


@pytest.mark.parametrize("method", METHODS)
async def test_a_cancelled_queued_call_never_runs(
    method: str, journal: Journal, serve: Serve
) -> None:
    node, gate = limited(journal, max_ongoing_requests=1, max_queued_requests=1)
    async with serve(node) as graph:
        call = getattr(graph.handle, method)
        first = asyncio.create_task(answer(call.remote("first")))
        await settled(graph, ongoing=1, queued=0)
        gone = asyncio.create_task(answer(call.remote("gone")))
        await settled(graph, ongoing=1, queued=1)
        gone.cancel()
        await settled(graph, ongoing=1, queued=0)  # its place in the queue is free
        third = asyncio.create_task(answer(call.remote("third")))
        await settled(graph, ongoing=1, queued=1)
        await graph.handle_of(gate).open.remote()
        assert await asyncio.gather(first, third) == [["first"], ["third"]]
        with pytest.raises(asyncio.CancelledError):
            await gone
    assert "start gone" not in journal.read()


@pytest.mark.usefixtures("in_process")  # it looks into the node from outside
async def test_a_sync_method_that_returns_an_awaitable_keeps_its_slot(serve: Serve) -> None:
    running: list[int] = []
    most: list[int] = []

    @deployment(max_ongoing_requests=1)
    class Lazy:
        def __call__(self) -> Any:
            return self.later()

        async def later(self) -> None:
            running.append(1)
            most.append(len(running))
            await asyncio.sleep(0.01)
            running.pop()

    async with serve(Lazy.bind()) as graph:
        await asyncio.gather(*(graph.handle.remote() for _ in range(3)))
    assert most == [1, 1, 1]
