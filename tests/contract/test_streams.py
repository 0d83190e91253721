"""Generator deployments: items one by one."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from fastapi_graph import (
    DeadlockError,
    DeploymentHandle,
    DeploymentResponseGenerator,
    GraphSettings,
    InputNode,
    SerializationError,
    deployment,
)
from tests.contract.conftest import Serve
from tests.contract.probes import PATIENCE_S, Journal, here, notes

pytestmark = pytest.mark.anyio


@deployment
def sync_count(number: int, journal: Journal | None = None, fails: bool = False) -> Iterator[int]:
    try:
        for n in range(number):
            if journal:
                journal.add(f"made {n}")
            yield n
        if fails:
            raise ValueError("after the items")
    finally:
        if journal:
            journal.add("closed")


@deployment
async def async_count(
    number: int, journal: Journal | None = None, fails: bool = False
) -> AsyncIterator[int]:
    try:
        for n in range(number):
            if journal:
                journal.add(f"made {n}")
            yield n
        if fails:
            raise ValueError("after the items")
    finally:
        if journal:
            journal.add("closed")


@deployment
class Counter:
    def __init__(self, start: int) -> None:
        self.start = start

    def sync(self, number: int) -> Iterator[int]:
        yield from range(self.start, self.start + number)

    async def not_sync(self, number: int) -> AsyncIterator[int]:
        for n in range(self.start, self.start + number):
            yield n

    async def __call__(self, number: int) -> AsyncIterator[int]:
        yield self.start


@deployment
def double(value: int) -> int:
    return value * 2


COUNTS = pytest.mark.parametrize("count", [sync_count, async_count])


@COUNTS
@pytest.mark.parametrize("number", [0, 1, 5])
async def test_async_for(count: Any, number: int, serve: Serve) -> None:
    async with serve(count.bind()) as graph:
        items = graph.handle.remote(number)
        assert isinstance(items, DeploymentResponseGenerator)
        assert [item async for item in items] == list(range(number))
        assert [item async for item in items] == []


@COUNTS
async def test_for_in_a_thread(count: Any, serve: Serve) -> None:
    async with serve(count.bind()) as graph:
        assert await asyncio.to_thread(lambda: list(graph.handle.remote(4))) == [0, 1, 2, 3]


@COUNTS
async def test_items_of_the_loop_may_be_read_in_a_thread_and_back(count: Any, serve: Serve) -> None:
    async with serve(count.bind()) as graph:
        items = graph.handle.remote(4)
        assert await anext(items) == 0
        assert await asyncio.to_thread(next, items) == 1
        assert [item async for item in items] == [2, 3]


@COUNTS
async def test_from_another_loop(count: Any, serve: Serve) -> None:
    async with serve(count.bind()) as graph:

        async def main() -> list[int]:
            return [item async for item in graph.handle.remote(3)]

        assert await asyncio.to_thread(lambda: asyncio.run(main())) == [0, 1, 2]


async def test_methods(serve: Serve) -> None:
    async with serve(Counter.bind(10)) as graph:
        assert [item async for item in graph.handle.sync.remote(2)] == [10, 11]
        assert [item async for item in graph.handle.not_sync.remote(2)] == [10, 11]
        assert [item async for item in graph.handle.remote(2)] == [10]


@COUNTS
async def test_a_graph_whose_output_is_a_generator(count: Any, serve: Serve) -> None:
    with InputNode() as x:
        dag = count.bind(double.bind(x))
    async with serve(dag) as graph:
        items = graph.handle.remote(2)
        assert isinstance(items, DeploymentResponseGenerator)
        assert [item async for item in items] == [0, 1, 2, 3]


async def test_a_graph_whose_output_is_a_generator_method_beside_other_nodes(serve: Serve) -> None:
    @deployment
    async def repeat(values: list[int]) -> AsyncIterator[int]:
        for value in values:
            yield value

    with InputNode() as x:
        dag = repeat.bind([double.bind(x), double.bind(double.bind(x))])
    async with serve(dag) as graph:
        assert [item async for item in graph.handle.remote(3)] == [6, 12]


@COUNTS
async def test_never_far_ahead(count: Any, journal: Journal, serve: Serve, ahead: int) -> None:
    async with serve(count.bind()) as graph:
        items = graph.handle.remote(100, journal)
        async with contextlib.aclosing(items):
            for n in range(10):
                assert await anext(items) == n
                await asyncio.sleep(0.005)
                made = sum(line.startswith("made") for line in journal.read())
                assert made <= n + 1 + ahead


@COUNTS
@pytest.mark.parametrize("how", ["aclose", "cancel", "drop"])
async def test_an_early_end_closes_the_generator(
    how: str, count: Any, journal: Journal, serve: Serve, ahead: int
) -> None:
    async with serve(count.bind()) as graph:
        items = graph.handle.remote(100, journal)
        assert await anext(items) == 0
        if how == "aclose":
            await items.aclose()
        elif how == "cancel":
            assert items.cancel() is True
        else:
            del items
        await journal.wait_for("closed")
        assert sum(line.startswith("made") for line in journal.read()) <= 2 + ahead


class Stubborn:
    async def __call__(self, journal: Journal) -> AsyncIterator[int]:
        for n in range(3):
            try:
                yield n
            finally:
                journal.add("closed")
            journal.add("waits")
            try:
                await asyncio.sleep(PATIENCE_S)
            except asyncio.CancelledError:
                journal.add("goes on")

    async def ping(self) -> str:
        return "pong"


async def test_a_generator_that_goes_on_when_it_is_cancelled_is_closed(
    journal: Journal, serve: Serve
) -> None:
    stubborn = deployment(Stubborn).options(max_ongoing_requests=1)
    async with serve(stubborn.bind()) as graph:
        items = graph.handle.remote(journal)
        assert await anext(items) == 0
        await journal.wait_for("waits")
        items.cancel()
        await journal.wait_for("goes on")
        async with asyncio.timeout(PATIENCE_S):
            assert await graph.handle.ping.remote() == "pong"
        assert journal.read() == ["closed", "waits", "goes on", "closed"]


@COUNTS
async def test_aclose_waits_for_the_finally(count: Any, journal: Journal, serve: Serve) -> None:
    async with serve(count.bind()) as graph:
        items = graph.handle.remote(100, journal)
        assert await anext(items) == 0
        await items.aclose()
        assert journal.count("closed") == 1
        assert [item async for item in items] == []
        assert items.cancel() is False


@COUNTS
async def test_an_early_end_in_a_thread_closes_the_generator(
    count: Any, journal: Journal, serve: Serve
) -> None:
    async with serve(count.bind()) as graph:

        def in_thread() -> None:
            for item in graph.handle.remote(100, journal):
                if item == 3:
                    break

        await asyncio.to_thread(in_thread)
        await journal.wait_for("closed")


@COUNTS
async def test_an_exception_comes_after_the_items(count: Any, serve: Serve) -> None:
    node, place = count.bind(), here()
    async with serve(node) as graph:
        items = graph.handle.remote(3, fails=True)
        for n in range(3):
            assert await anext(items) == n
        with pytest.raises(ValueError, match="after the items") as caught:
            await anext(items)
    assert count.name in notes(caught.value)
    assert place in notes(caught.value)


@COUNTS
async def test_an_exception_in_a_thread_comes_after_the_items(count: Any, serve: Serve) -> None:
    async with serve(count.bind()) as graph:

        def in_thread() -> list[int]:
            seen: list[int] = []
            with pytest.raises(ValueError, match="after the items"):
                seen.extend(graph.handle.remote(2, fails=True))
            return seen

        assert await asyncio.to_thread(in_thread) == [0, 1]


async def test_a_failure_before_the_generator_is_raised_at_the_first_item(serve: Serve) -> None:
    @deployment
    async def fail() -> int:
        raise ValueError("before the items")

    async with serve(async_count.bind(fail.bind())) as graph:
        with pytest.raises(ValueError, match="before the items"):
            await anext(graph.handle.remote())


async def test_a_nested_stream(serve: Serve) -> None:
    @deployment
    class Outer:
        def __init__(self, inner: DeploymentHandle) -> None:
            self.inner = inner

        async def total(self, number: int) -> int:
            return sum([item async for item in self.inner.remote(number)])

        def sync_total(self, number: int) -> int:
            return sum(self.inner.remote(number))

        async def doubled(self, number: int) -> AsyncIterator[int]:
            async for item in self.inner.remote(number):
                yield item * 2

    async with serve(Outer.bind(async_count.bind())) as graph:
        assert await graph.handle.total.remote(4) == 6
        assert await graph.handle.sync_total.remote(4) == 6
        assert [item async for item in graph.handle.doubled.remote(3)] == [0, 2, 4]


async def test_cancelling_a_consumer_closes_the_nested_generator(
    journal: Journal, serve: Serve
) -> None:
    @deployment
    async def consume(inner: DeploymentHandle, journal: Journal) -> None:
        async for item in inner.not_sync.remote(journal):
            journal.add(f"consumed {item}")
            await asyncio.sleep(60)

    @deployment
    class Endless:
        async def not_sync(self, journal: Journal) -> AsyncIterator[int]:
            try:
                while True:
                    yield 1
            finally:
                journal.add("closed")

    async with serve(consume.bind(Endless.bind(), journal)) as graph:
        response = graph.handle.remote()
        await journal.wait_for("consumed 1")
        response.cancel()
        with pytest.raises(asyncio.CancelledError):
            await response
        await journal.wait_for("closed")


async def test_an_unawaited_response_is_an_argument(serve: Serve) -> None:
    async with serve(sync_count.bind(double.bind(0))) as graph:
        number = graph.handle_of("double").remote(2)
        items = graph.handle_of("sync_count").remote(number)
        assert [item async for item in items] == [0, 1, 2, 3]


async def test_for_on_the_loop_is_an_error(serve: Serve) -> None:
    async with serve(async_count.bind()) as graph:
        items = graph.handle.remote(2)
        with pytest.raises(DeadlockError, match="async_count"):
            next(items)
        assert [item async for item in items] == [0, 1]


async def test_a_sync_generator_stays_in_one_thread(
    in_process: GraphSettings, serve: Serve
) -> None:
    @deployment
    def threads() -> Iterator[int]:
        for _ in range(5):
            yield threading.get_ident()

    async with serve(threads.bind()) as graph:
        seen = {item async for item in graph.handle.remote()}
    assert len(seen) == 1
    assert threading.get_ident() not in seen


async def test_items_are_serialised(serialized: GraphSettings, serve: Serve) -> None:
    @deployment
    async def stream() -> AsyncIterator[Any]:
        items: list[int] = []
        for n in range(3):
            items.append(n)
            yield items
        yield threading.Lock()

    async with serve(stream.bind()) as graph:
        items = graph.handle.remote()
        assert [await anext(items) for _ in range(3)] == [[0], [0, 1], [0, 1, 2]]
        with pytest.raises(SerializationError, match="stream"):
            await anext(items)
