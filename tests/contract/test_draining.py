"""Stop while requests are in flight: they finish, for a while, and new ones are refused."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from fastapi_graph import (
    DeploymentHandle,
    Graph,
    GraphNotStartedError,
    GraphStoppingError,
    InputNode,
    deployment,
)
from tests.contract.conftest import Serve
from tests.contract.probes import Gate, Journal


@deployment
async def double(value: int) -> int:
    return value * 2


@deployment
class Waiting:
    """Waits at a gate, in two nested calls, and then calls once more."""

    def __init__(self, gate: DeploymentHandle, journal: Journal) -> None:
        self.gate = gate
        self.journal = journal

    async def __call__(self, value: int) -> int:
        self.journal.add("begins")
        try:
            await self.gate.wait.remote()
        except asyncio.CancelledError:
            self.journal.add("cancelled")
            raise
        await self.gate.wait.remote()  # a nested call that begins while the graph drains
        self.journal.add("ends")
        return value * 2

    def sync(self, value: int) -> int:
        self.journal.add("begins")
        self.gate.wait.remote().result(timeout_s=5)
        self.gate.wait.remote().result(timeout_s=5)
        self.journal.add("ends")
        return value * 2

    async def open(self) -> None:
        await self.gate.open.remote()


async def is_stopping(graph: Graph) -> None:
    """Wait until new requests are refused."""
    async with asyncio.timeout(5):
        while True:
            try:
                await graph.handle_of("double").remote(0)
            except GraphStoppingError:
                return
            await asyncio.sleep(0.001)


@deployment
class Opener:
    """Opens the gate when told to, from within a request that began before the stop."""

    def __init__(self, gate: DeploymentHandle, path: Journal) -> None:
        self.gate = gate
        self.path = path

    async def __call__(self) -> None:
        await self.path.wait_for("open")
        await self.gate.open.remote()


@pytest.mark.anyio
@pytest.mark.parametrize("method", ["__call__", "sync"])
@pytest.mark.parametrize("within", ["handle", "graph"])
async def test_requests_in_flight_finish_and_new_ones_are_refused(
    method: str, within: str, journal: Journal, serve: Serve
) -> None:
    gate = Gate.bind()
    waiting, opener = Waiting.bind(gate, journal), Opener.bind(gate, journal)
    with InputNode() as x:
        dag = double.bind(getattr(waiting, method).bind(double.bind(x)))
    graph = serve({"/a": dag, "/b": opener})
    await graph.start()
    whole = serve_root(graph, dag)
    opening = graph.handle_of(opener).remote()
    if within == "handle":
        in_flight, expected = graph.handle_of(waiting).options(method_name=method).remote(1), 2
    else:
        in_flight, expected = whole.remote(1), 8
    await journal.wait_for("begins")
    stopping = asyncio.create_task(graph.stop())
    await is_stopping(graph)
    with pytest.raises(GraphStoppingError, match="is stopping"):
        await whole.remote(1)
    with pytest.raises(GraphStoppingError):
        await asyncio.to_thread(lambda: graph.handle_of(waiting).remote(1))
    assert not stopping.done()
    journal.add("open")
    assert await in_flight == expected
    await opening
    await stopping
    assert journal.read() == ["begins", "open", "ends"]
    with pytest.raises(GraphNotStartedError):
        await whole.remote(1)


def serve_root(graph: Graph, dag: Any) -> DeploymentHandle:
    """Return the handle to one of the outputs of a graph."""
    return DeploymentHandle(graph._directory, graph.callee_of(dag).name)


@pytest.mark.anyio
@pytest.mark.parametrize("where", ["loop", "thread", "other loop"])
async def test_requests_over_the_shutdown_timeout_are_cancelled(
    where: str, journal: Journal, serve: Serve
) -> None:
    cls = Waiting.options(graceful_shutdown_timeout_s=0.05)
    node = cls.bind(Gate.options(graceful_shutdown_timeout_s=0).bind(), journal)
    graph = serve(node)
    await graph.start()

    async def call() -> Any:
        return await graph.handle.remote(1)

    in_flight = asyncio.create_task(
        {
            "loop": call,
            "thread": lambda: asyncio.to_thread(lambda: graph.handle.remote(1).result(5)),
            "other loop": lambda: asyncio.to_thread(lambda: asyncio.run(call())),
        }[where]()
    )
    await journal.wait_for("begins")
    await graph.stop()
    with pytest.raises((asyncio.CancelledError, GraphStoppingError)):
        await in_flight
    assert journal.read() == ["begins", "cancelled"]


@pytest.mark.anyio
async def test_what_was_cancelled_has_ended_before_objects_are_closed(
    journal: Journal, serve: Serve
) -> None:
    @deployment(graceful_shutdown_timeout_s=0)
    class Model:
        def __init__(self, journal: Journal) -> None:
            self.journal = journal

        async def __call__(self) -> None:
            self.journal.add("begins")
            try:
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(0.02)
                self.journal.add("cleaned up")

        def close(self) -> None:
            self.journal.add("closed")

    graph = serve(Model.bind(journal))
    await graph.start()
    response = graph.handle.remote()
    await journal.wait_for("begins")
    await graph.stop()
    with pytest.raises((asyncio.CancelledError, GraphStoppingError)):
        await response
    assert journal.read() == ["begins", "cleaned up", "closed"]


@pytest.mark.anyio
@pytest.mark.usefixtures("in_process")  # it looks into the node from outside
async def test_a_thread_over_the_shutdown_timeout_does_not_keep_the_graph(serve: Serve) -> None:
    begun, go_on = threading.Event(), threading.Event()

    @deployment(graceful_shutdown_timeout_s=0.02)
    def block() -> None:
        begun.set()
        go_on.wait(5)

    graph = serve(block.bind())
    await graph.start()
    response = graph.handle.remote()
    assert await asyncio.to_thread(begun.wait, 5)
    await graph.stop()
    assert not go_on.is_set()
    with pytest.raises((asyncio.CancelledError, GraphStoppingError)):
        await response
    go_on.set()


@pytest.mark.anyio
async def test_a_graph_may_start_again_after_it_cancelled_requests(
    journal: Journal, serve: Serve
) -> None:
    cls = Waiting.options(graceful_shutdown_timeout_s=0)
    gate = Gate.options(graceful_shutdown_timeout_s=0).bind()
    graph = serve(cls.bind(gate, journal))
    async with graph:
        lost = graph.handle.remote(1)
        await journal.wait_for("begins")
    with pytest.raises((asyncio.CancelledError, GraphStoppingError)):
        await lost
    async with graph:
        await graph.handle_of(gate).open.remote()
        assert await graph.handle.remote(1) == 2


@pytest.mark.anyio
async def test_a_start_while_it_stops_waits_for_the_stop(journal: Journal, serve: Serve) -> None:
    gate = Gate.bind()
    waiting, opener = Waiting.bind(gate, journal), Opener.bind(gate, journal)
    with InputNode() as x:
        graph = serve({"/a": double.bind(waiting.__call__.bind(x)), "/b": opener})
    await graph.start()
    opening, in_flight = graph.handle_of(opener).remote(), graph.handle_of(waiting).remote(1)
    await journal.wait_for("begins")
    stopping = asyncio.create_task(graph.stop())
    await is_stopping(graph)
    starting = asyncio.create_task(graph.start())
    journal.add("open")
    await asyncio.gather(stopping, starting, opening)
    assert await in_flight == 2
    assert await graph.handle_of("double").remote(1) == 2
    await graph.stop()
