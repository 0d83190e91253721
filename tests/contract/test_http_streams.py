"""Generators as the answer to an HTTP request: what becomes of the generator."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from fastapi import FastAPI, Request

from fastapi_graph import Graph, GraphSettings, InputNode, deployment, graph_router
from tests.asgi import Exchange
from tests.contract.conftest import Serve
from tests.contract.probes import Gate, Journal

pytestmark = pytest.mark.anyio


@deployment
def sync_count(number: int, journal: Journal) -> Iterator[int]:
    try:
        for n in range(number):
            journal.add(f"made {n}")
            yield n
    finally:
        journal.add("closed")


@deployment
async def async_count(number: int, journal: Journal) -> AsyncIterator[int]:
    try:
        for n in range(number):
            journal.add(f"made {n}")
            yield n
    finally:
        journal.add("closed")


COUNTS = pytest.mark.parametrize("count", [async_count, sync_count])
FORMS = pytest.mark.parametrize(
    "accept, first", [("*/*", b"0\n"), ("text/event-stream", b"data: 0\n\n")]
)


def app_of(graph: Graph) -> FastAPI:
    app = FastAPI()
    app.include_router(graph_router(graph), prefix="/g")
    return app


def counting(count: Any, journal: Journal) -> Any:
    with InputNode(int) as x:
        return count.bind(x, journal)


@COUNTS
@FORMS
async def test_items_come_one_by_one(
    count: Any, accept: str, first: bytes, journal: Journal, serve: Serve
) -> None:
    async with serve(counting(count, journal)) as graph:
        async with Exchange(app_of(graph), "/g", 40, accept=accept) as exchange:
            assert await exchange.start() == 200
            assert await exchange.piece() == first
            assert journal.count("closed") == 0
            rest = b"".join(first.replace(b"0", b"%d" % n) for n in range(1, 40))
            assert await exchange.rest() == rest
        await journal.wait_for("closed")


@COUNTS
@FORMS
async def test_a_slow_client_slows_the_generator(
    count: Any, accept: str, first: bytes, journal: Journal, serve: Serve, ahead: int
) -> None:
    async with serve(counting(count, journal)) as graph:
        async with Exchange(app_of(graph), "/g", 1000, accept=accept) as exchange:
            assert await exchange.start() == 200
            for n in range(5):
                assert await exchange.piece() == first.replace(b"0", b"%d" % n)
                await asyncio.sleep(0.01)
                # One is being sent, one has been read, and the generator is ahead.
                made = sum(line.startswith("made") for line in journal.read())
                assert made <= n + 3 + ahead
        await journal.wait_for("closed")


@COUNTS
@FORMS
async def test_a_client_that_leaves_closes_the_generator(
    count: Any, accept: str, first: bytes, journal: Journal, serve: Serve, caplog: Any
) -> None:
    async with (
        serve(counting(count, journal)) as graph,
        Exchange(app_of(graph), "/g", 100_000, accept=accept) as exchange,
    ):
        assert await exchange.start() == 200
        assert await exchange.piece() == first
        exchange.leave()
        async with asyncio.timeout(1):
            await journal.wait_for("closed")
    assert "499 POST /g: the client left" in caplog.text


async def test_a_client_that_leaves_an_idle_stream(journal: Journal, serve: Serve) -> None:
    @deployment
    async def once(value: int, journal: Journal) -> AsyncIterator[int]:
        try:
            yield value
            await asyncio.sleep(60)
        finally:
            journal.add("closed")

    async with (
        serve(counting(once, journal)) as graph,
        Exchange(app_of(graph), "/g", 1) as exchange,
    ):
        assert await exchange.start() == 200
        assert await exchange.piece() == b"1\n"
        exchange.leave()
        async with asyncio.timeout(1):
            await journal.wait_for("closed")


async def test_a_client_that_leaves_a_graph_without_an_input(
    journal: Journal, serve: Serve
) -> None:
    async with (
        serve(async_count.bind(100_000, journal)) as graph,
        Exchange(app_of(graph), "/g", "unread", **{"content-length": "8"}) as exchange,
    ):
        assert await exchange.start() == 200
        assert await exchange.piece() == b"0\n"
        exchange.leave()
        async with asyncio.timeout(1):
            await journal.wait_for("closed")


async def test_a_driver_may_read_the_body_late(in_process: GraphSettings, journal: Journal) -> None:
    @deployment
    class Driver:
        async def __call__(self, request: Request) -> AsyncIterator[str]:
            try:
                yield "first"
                yield (await request.body()).decode()
                await asyncio.sleep(60)
            finally:
                journal.add("closed")

    async with (
        Graph(Driver.bind()) as graph,
        Exchange(app_of(graph), "/g", "text", **{"content-length": "6"}) as exchange,
    ):
        assert await exchange.start() == 200
        assert await exchange.piece() == b"first"
        assert await exchange.piece() == b'"text"'
        exchange.leave()
        async with asyncio.timeout(1):
            await journal.wait_for("closed")


async def test_a_client_that_leaves_before_the_first_item(journal: Journal, serve: Serve) -> None:
    @deployment
    async def never(value: int, journal: Journal) -> AsyncIterator[int]:
        try:
            journal.add("begun")
            await asyncio.sleep(60)
            yield value
        finally:
            journal.add("closed")

    async with (
        serve(counting(never, journal)) as graph,
        Exchange(app_of(graph), "/g", 1) as exchange,
    ):
        await journal.wait_for("begun")
        exchange.leave()
        async with asyncio.timeout(1):
            await journal.wait_for("closed")


def settings_of(backend: GraphSettings, **others: Any) -> GraphSettings:
    return GraphSettings(**{**backend.model_dump(), **others})


async def test_the_deadline_covers_the_whole_stream(
    journal: Journal, backend: GraphSettings
) -> None:
    @deployment
    async def slower(value: int, journal: Journal) -> AsyncIterator[int]:
        try:
            yield value
            await asyncio.sleep(60)
        finally:
            journal.add("closed")

    settings = settings_of(backend, request_timeout_s=0.3)
    async with (
        Graph(counting(slower, journal), settings=settings) as graph,
        Exchange(app_of(graph), "/g", 1) as exchange,
    ):
        assert await exchange.start() == 200
        assert await exchange.piece() == b"1\n"
        said = b'{"error":{"status":504,"detail":"The request took too long"}}\n'
        assert await exchange.rest() == said
        async with asyncio.timeout(1):
            await journal.wait_for("closed")


async def test_the_deadline_closes_the_generator_of_a_client_that_does_not_read(
    journal: Journal, backend: GraphSettings
) -> None:
    settings = settings_of(backend, request_timeout_s=0.2)
    async with (
        Graph(counting(async_count, journal), settings=settings) as graph,
        Exchange(app_of(graph), "/g", 100_000) as exchange,
    ):
        assert await exchange.start() == 200
        async with asyncio.timeout(2):
            await journal.wait_for("closed")
        assert (await exchange.rest()).endswith(b'"The request took too long"}}\n')


async def test_a_stop_lets_a_stream_finish(journal: Journal, serve: Serve) -> None:
    graph = serve(counting(async_count, journal))
    await graph.start()
    async with Exchange(app_of(graph), "/g", 5) as exchange:
        assert await exchange.start() == 200
        assert await exchange.piece() == b"0\n"
        stopping = asyncio.create_task(graph.stop())
        await asyncio.sleep(0.05)
        assert not stopping.done()
        async with Exchange(app_of(graph), "/g", 5) as another:
            assert await another.start() == 503
        assert await exchange.rest() == b"1\n2\n3\n4\n"
        await stopping


async def test_a_stop_ends_a_stream_that_does_not_finish(journal: Journal, serve: Serve) -> None:
    endless = async_count.options(graceful_shutdown_timeout_s=0.1)
    graph = serve(counting(endless, journal))
    await graph.start()
    async with Exchange(app_of(graph), "/g", 100_000) as exchange:
        assert await exchange.start() == 200
        assert await exchange.piece() == b"0\n"
        stopping = asyncio.create_task(graph.stop())
        await journal.wait_for("closed")
        said = b'{"error":{"status":503,"detail":"Shutting down"}}\n'
        assert (await exchange.rest()).endswith(said)
        await stopping


async def test_a_full_deployment_is_a_503_before_the_first_item(serve: Serve) -> None:
    @deployment(max_ongoing_requests=1, max_queued_requests=0)
    async def hold(gate: Any) -> AsyncIterator[int]:
        yield 1
        await gate.wait.remote()
        yield 2

    gate = Gate.bind()
    async with serve(hold.bind(gate)) as graph:
        app = app_of(graph)
        async with contextlib.AsyncExitStack() as stack:
            first = await stack.enter_async_context(Exchange(app, "/g"))
            assert await first.start() == 200
            assert await first.piece() == b"1\n"
            second = await stack.enter_async_context(Exchange(app, "/g"))
            message = await second.take()
            assert message["status"] == 503
            assert (b"retry-after", b"1") in message["headers"]
            await graph.handle_of(gate).open.remote()
            assert await first.rest() == b"2\n"
