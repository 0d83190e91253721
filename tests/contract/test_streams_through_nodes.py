"""Streams from one node into another."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterable, AsyncIterator, Generator, Iterable, Iterator
from typing import Any

import numpy as np
import pytest

from fastapi_graph import (
    DeploymentHandle,
    DeploymentResponseGenerator,
    GraphDefinitionError,
    GraphSettings,
    InputNode,
    SerializationError,
    deployment,
)
from tests.contract.conftest import Serve
from tests.contract.probes import Journal, here, notes

pytestmark = pytest.mark.anyio


@deployment
async def count(number: int, journal: Journal | None = None, fails: bool = False) -> Any:
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
async def doubled(items: AsyncIterator[int]) -> AsyncIterator[int]:
    async for item in items:
        yield item * 2


@deployment
def sync_doubled(items: Iterable[int]) -> Iterator[int]:
    for item in items:
        yield item * 2


@deployment
async def total(items: AsyncIterable[int]) -> int:
    return sum([item async for item in items])


@deployment
def sync_total(items: Iterator[int]) -> int:
    return sum(items)


COUNTS = pytest.mark.parametrize("counting", [count, sync_count])


@COUNTS
@pytest.mark.parametrize("doubling", [doubled, sync_doubled])
@pytest.mark.parametrize("number", [4, 0])
async def test_a_stream_becomes_a_stream(
    number: int, doubling: Any, counting: Any, serve: Serve
) -> None:
    with InputNode(int) as x:
        dag = doubling.bind(counting.bind(x))
    async with serve(dag) as graph:
        for _ in range(2):
            items = graph.handle.remote(number)
            assert isinstance(items, DeploymentResponseGenerator)
            assert [item async for item in items] == [2 * n for n in range(number)]


@COUNTS
@pytest.mark.parametrize("adding", [total, sync_total])
async def test_a_stream_becomes_a_value(adding: Any, counting: Any, serve: Serve) -> None:
    with InputNode(int) as x:
        dag = adding.bind(sync_doubled.bind(doubled.bind(counting.bind(x))))
    async with serve(dag) as graph:
        assert await graph.handle.remote(5) == 40
        assert await asyncio.gather(*(graph.handle.remote(n) for n in range(10))) == [
            4 * sum(range(n)) for n in range(10)
        ]


async def test_methods_keywords_and_values_beside(serve: Serve) -> None:
    @deployment
    class Source:
        def __init__(self, step: int) -> None:
            self.step = step

        def items(self, number: int) -> Generator[int, None, None]:
            for n in range(number):
                yield n * self.step

    @deployment
    class Sink:
        async def combine(self, left: Any, factor: int, *, right: AsyncIterator[int]) -> list[int]:
            return [a * factor + b async for a in left for b in [await anext(right)]]

    with InputNode(int) as x:
        dag = Sink.bind().combine.bind(
            Source.bind(10).items.bind(x), total.bind(count.bind(x)), right=count.bind(x)
        )
    async with serve(dag) as graph:
        assert await graph.handle.remote(3) == [0, 31, 62]


@dataclasses.dataclass
class Held:
    items: Any
    name: str


async def test_streams_in_containers(serve: Serve) -> None:
    @deployment
    async def lengths(held: Held, others: dict[str, list[Any]]) -> dict[str, list[int]]:
        return {
            held.name: [item async for item in held.items],
            **{
                name: [len([item async for item in stream]) for stream in streams]
                for name, streams in others.items()
            },
        }

    with InputNode(int) as x:
        streams = {"a": [count.bind(x), sync_count.bind(2)], "b": []}
        dag = lengths.bind(Held(count.bind(x), "held"), streams)
    async with serve(dag) as graph:
        assert await graph.handle.remote(3) == {"held": [0, 1, 2], "a": [3, 2], "b": []}


async def test_large_items_and_large_arguments_beside(serve: Serve) -> None:
    @deployment
    async def arrays(number: int) -> AsyncIterator[Any]:
        for n in range(number):
            yield np.full(300_000, n)

    @deployment
    async def added(items: AsyncIterator[Any], others: Any) -> float:
        sums = [float(item.sum()) async for item in items]
        return sum(sums) + float(others.sum())

    with InputNode(int) as x:
        dag = added.bind(arrays.bind(x), np.ones(2_000_000))
    async with serve(dag) as graph:
        assert await graph.handle.remote(3) == 900_000 + 2_000_000


@COUNTS
async def test_a_slow_reader_slows_the_source(
    counting: Any, journal: Journal, serve: Serve, ahead: int
) -> None:
    @deployment
    async def slow(items: AsyncIterator[int], journal: Journal) -> int:
        async for item in items:
            await asyncio.sleep(0.01)
            journal.add(f"read {item}")
            if item == 8:
                break
        return sum(line.startswith("made") for line in journal.read())

    with InputNode(int) as x:
        dag = slow.bind(counting.bind(x, journal), journal)
    async with serve(dag) as graph:
        assert await graph.handle.remote(1000) <= 11 + 2 * ahead  # from node to node in two ways


@COUNTS
@pytest.mark.parametrize("reading", ["async", "sync"])
async def test_who_has_read_enough_closes_the_source(
    reading: str, counting: Any, journal: Journal, serve: Serve, ahead: int
) -> None:
    @deployment
    async def first(items: AsyncIterator[int]) -> int:
        return await anext(items)

    @deployment
    def sync_first(items: Iterator[int]) -> int:
        return next(items)

    with InputNode(int) as x:
        dag = (first if reading == "async" else sync_first).bind(counting.bind(x, journal))
    async with serve(dag) as graph:
        assert await graph.handle.remote(1000) == 0
        await journal.wait_for("closed")
        assert sum(line.startswith("made") for line in journal.read()) <= 2 + 2 * ahead


async def test_a_reader_may_close_the_source_and_go_on(journal: Journal, serve: Serve) -> None:
    @deployment
    async def close(items: Any, journal: Journal) -> str:
        await anext(items)
        await items.aclose()
        await journal.wait_for("closed")
        return f"then {[item async for item in items]}"

    with InputNode(int) as x:
        dag = close.bind(count.bind(x, journal), journal)
    async with serve(dag) as graph:
        assert await graph.handle.remote(1000) == "then []"


@COUNTS
async def test_who_never_reads_closes_the_source(
    counting: Any, journal: Journal, serve: Serve
) -> None:
    @deployment
    async def ignore(items: AsyncIterator[int]) -> str:
        return "done"

    with InputNode(int) as x:
        dag = ignore.bind(counting.bind(x, journal))
    async with serve(dag) as graph:
        assert await graph.handle.remote(1000) == "done"
        async with asyncio.timeout(5):
            while (  # noqa: ASYNC110
                graph._directory.pending or journal.count("closed") != journal.count("made 0")
            ):
                await asyncio.sleep(0.001)


@COUNTS
@pytest.mark.parametrize("adding", [total, sync_total, doubled])
async def test_a_failure_of_the_source_is_raised_in_the_reader(
    adding: Any, counting: Any, serve: Serve
) -> None:
    source, place = counting.bind(3, fails=True), here()
    async with serve(adding.bind(source)) as graph:
        answer = graph.handle.remote()
        if isinstance(answer, DeploymentResponseGenerator):
            assert [await anext(answer) for _ in range(3)] == [0, 2, 4]
            answer = anext(answer)
        with pytest.raises(ValueError, match="after the items") as caught:
            await answer
    assert f"in node {counting.name}" in notes(caught.value)
    assert f"in node {adding.name}" in notes(caught.value)
    assert place in notes(caught.value)


async def test_a_reader_may_catch_the_failure_of_the_source(serve: Serve) -> None:
    @deployment
    async def careful(items: AsyncIterator[int]) -> list[Any]:
        seen: list[Any] = []
        try:
            async for item in items:
                seen.append(item)  # noqa: PERF401 - what came before the failure counts
        except ValueError as error:
            seen.append(str(error))
        return seen

    async with serve(careful.bind(count.bind(2, fails=True))) as graph:
        assert await graph.handle.remote() == [0, 1, "after the items"]


async def test_a_failure_of_the_reader_closes_the_source(journal: Journal, serve: Serve) -> None:
    @deployment
    async def fail(items: AsyncIterator[int]) -> None:
        raise KeyError(await anext(items))

    async with serve(fail.bind(count.bind(1000, journal))) as graph:
        with pytest.raises(KeyError):
            await graph.handle.remote()
        await journal.wait_for("closed")


@COUNTS
async def test_cancelling_the_request_closes_the_source(
    counting: Any, journal: Journal, serve: Serve
) -> None:
    @deployment
    async def hang(items: AsyncIterator[int], journal: Journal) -> None:
        await anext(items)
        journal.add("hangs")
        await asyncio.sleep(60)

    async with serve(hang.bind(counting.bind(1000, journal), journal)) as graph:
        response = graph.handle.remote()
        await journal.wait_for("hangs")
        response.cancel()
        with pytest.raises(asyncio.CancelledError):
            await response
        await journal.wait_for("closed")


async def test_closing_the_last_stream_closes_the_first(journal: Journal, serve: Serve) -> None:
    async with serve(doubled.bind(doubled.bind(count.bind(1000, journal)))) as graph:
        items = graph.handle.remote()
        assert await anext(items) == 0
        await items.aclose()
        await journal.wait_for("closed")


async def test_the_failure_of_another_branch_closes_the_source(
    journal: Journal, serve: Serve
) -> None:
    @deployment
    async def fail(journal: Journal) -> None:
        await journal.wait_for("made 0")
        raise KeyError("elsewhere")

    @deployment
    async def both(items: AsyncIterator[int], other: None) -> None:
        pass

    async with serve(both.bind(count.bind(1000, journal), fail.bind(journal))) as graph:
        with pytest.raises(KeyError):
            await graph.handle.remote()
        await journal.wait_for("closed")


# Through handles


@COUNTS
async def test_an_unawaited_stream_is_an_argument(
    counting: Any, journal: Journal, serve: Serve
) -> None:
    @deployment
    async def first(items: list[AsyncIterator[int]]) -> int:
        return await anext(items[0])

    @deployment
    class All:
        def __init__(self, *handles: DeploymentHandle) -> None: ...

    async with serve(
        All.bind(counting.bind(), total.bind(), doubled.bind(), first.bind())
    ) as graph:
        source = graph.handle_of(counting.name)
        assert await graph.handle_of("total").remote(source.remote(4)) == 6
        items = graph.handle_of("doubled").remote(source.remote(3))
        assert [item async for item in items] == [0, 2, 4]
        assert await graph.handle_of("first").remote([source.remote(1000, journal)]) == 0
        await journal.wait_for("closed")
        with pytest.raises(ValueError, match="after the items"):
            await graph.handle_of("total").remote(source.remote(4, fails=True))


async def test_a_stream_of_a_nested_call(serve: Serve) -> None:
    @deployment
    class Outer:
        def __init__(self, source: DeploymentHandle, sink: DeploymentHandle) -> None:
            self.source = source
            self.sink = sink

        async def __call__(self, number: int) -> int:
            return int(await self.sink.remote(self.source.remote(number)))

        def sync(self, number: int) -> int:
            return int(self.sink.remote(self.source.remote(number)).result())

    async with serve(Outer.bind(count.bind(), total.bind())) as graph:
        assert await graph.handle.remote(4) == 6
        assert await graph.handle.sync.remote(5) == 10


async def test_options_of_a_handle_check_what_streams(serve: Serve) -> None:
    @deployment
    class Model:
        def items(self) -> Iterator[int]:
            yield 1

        def value(self) -> int:
            return 2

    async with serve(Model.bind()) as graph:
        handle = graph.handle
        items = handle.options(method_name="items", stream=True).remote()
        assert [item async for item in items] == [1]
        assert await handle.value.options(stream=False).remote() == 2
        with pytest.raises(GraphDefinitionError, match=r"Model.value> is no generator"):
            handle.options(method_name="value", stream=True)
        with pytest.raises(GraphDefinitionError, match=r"Model.items> is a generator"):
            handle.items.options(stream=False)


# What cannot be


async def test_a_stream_cannot_be_a_result(serialized: GraphSettings, serve: Serve) -> None:
    @deployment
    class Give:
        def __init__(self, source: DeploymentHandle) -> None:
            self.source = source

        async def __call__(self) -> Any:
            return self.source.remote(3)

    async with serve(Give.bind(count.bind())) as graph:
        with pytest.raises(SerializationError, match=r"Give.*holds a stream"):
            await graph.handle.remote()


async def test_items_are_copies(serialized: GraphSettings, serve: Serve) -> None:
    @deployment
    async def growing() -> AsyncIterator[list[int]]:
        items: list[int] = []
        for n in range(3):
            items.append(n)
            yield items

    @deployment
    async def collected(items: AsyncIterator[list[int]]) -> list[list[int]]:
        return [item async for item in items]

    async with serve(collected.bind(growing.bind())) as graph:
        assert await graph.handle.remote() == [[0], [0, 1], [0, 1, 2]]


async def test_an_item_that_cannot_be_sent(serialized: GraphSettings, serve: Serve) -> None:
    @deployment
    async def locks() -> AsyncIterator[Any]:
        yield threading.Lock()

    async with serve(total.bind(locks.bind())) as graph:
        with pytest.raises(SerializationError, match="locks"):
            await graph.handle.remote()
