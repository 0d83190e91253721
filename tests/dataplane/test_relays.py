"""Streams among the arguments of a call, between a client and real replicas."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastapi_graph.context import Emit
from fastapi_graph.dataplane import codec
from fastapi_graph.dataplane.frames import WITH_STREAMS, CallHead, Kind, Message, pack_number
from fastapi_graph.dataplane.relays import StreamRef, attach, detach, stream_number
from fastapi_graph.dataplane.window import LEAST, WINDOW
from fastapi_graph.errors import LocalProtocolError, ReplicaLostError, SerializationError
from fastapi_graph.streams import ItemStream
from tests.dataplane.network import MAX_MESSAGE_SIZE, Network, until
from tests.dataplane.nodes import Node, Rotten, Unpicklable

pytestmark = pytest.mark.anyio


class Reader(Node):
    """Takes streams."""

    async def total(self, items: AsyncIterator[int]) -> int:
        return sum([item async for item in items])

    def sync_total(self, items: Iterator[int]) -> int:
        return sum(items)

    async def first(self, items: AsyncIterator[int]) -> int:
        return await anext(items)

    async def first_and_wait(self, items: AsyncIterator[int]) -> int:
        self.log.append(f"read {await anext(items)}")
        await self.gate.wait()
        return 1

    async def wait_and_read(self, items: AsyncIterator[int]) -> int:
        self.log.append("begun")
        await self.gate.wait()
        return await anext(items)

    async def wait_and_count(self, items: AsyncIterator[int]) -> int:
        self.log.append("begun")
        await self.gate.wait()
        return len([item async for item in items])

    async def read_one_and_close(self, items: Any) -> str:
        await anext(items)
        await items.aclose()
        return "closed"

    async def together(self, left: Any, rights: list[Any]) -> list[Any]:
        return [[a, *[await anext(right) for right in rights]] async for a in left]

    async def same(self, left: Any, right: Any) -> bool:
        return left is right

    async def doubled(self, items: AsyncIterator[int]) -> AsyncIterator[int]:
        async for item in items:
            yield item * 2

    async def sizes(self, items: AsyncIterator[Any]) -> list[int]:
        return [len(item) async for item in items]


class Source:
    """A stream, and what has become of it."""

    def __init__(self, items: Any, error: BaseException | None = None) -> None:
        self.made: list[Any] = []
        self.closed = False
        self.pending: set[asyncio.Task[Any]] = set()

        async def source(emit: Emit) -> None:
            try:
                for item in items:
                    self.made.append(item)
                    await emit(item)
                if error is not None:
                    raise error
            finally:
                self.closed = True

        self.stream = ItemStream(source, asyncio.get_running_loop(), "source", self.pending)


Reading = Callable[..., Any]


@pytest.fixture
async def reading(network: Network) -> Any:
    served = await network.serve(Reader())
    return network.client(served), served


@pytest.mark.parametrize("method", ["total", "sync_total"])
@pytest.mark.parametrize("count", [0, 1, 50])
async def test_a_stream_is_an_argument(count: int, method: str, reading: Any) -> None:
    client, _ = reading
    source = Source(range(count))
    assert await client.call(method, (source.stream,), {}) == sum(range(count))
    assert await client.call(method, (), {"items": Source(range(3)).stream}) == 3
    assert source.closed


async def test_several_streams_take_turns(reading: Any) -> None:
    client, _ = reading
    left, one, two = Source(range(3)), Source("abc"), Source("xyz")
    assert await client.call("together", (left.stream, [one.stream, two.stream]), {}) == [
        [0, "a", "x"],
        [1, "b", "y"],
        [2, "c", "z"],
    ]
    many = [
        client.call("together", (Source(range(9)).stream, [Source(range(9)).stream]), {})
        for _ in range(50)
    ]
    assert await asyncio.gather(*many) == [[[n, n] for n in range(9)]] * 50


async def test_a_stream_that_is_given_twice_is_one(reading: Any) -> None:
    client, _ = reading
    source = Source(range(3))
    assert await client.call("same", (source.stream, source.stream), {}) is True
    await source.stream.aclose()


async def test_a_stream_becomes_a_stream(reading: Any) -> None:
    client, _ = reading
    got: list[int] = []

    async def emit(item: int) -> None:
        got.append(item)

    await client.stream("doubled", (Source(range(4)).stream,), {}, emit)
    assert got == [0, 2, 4, 6]


@pytest.mark.parametrize("item, most", [(0, WINDOW // LEAST + 3), (bytes(WINDOW), 4)])
async def test_little_is_made_ahead_of_the_reader(item: Any, most: int, reading: Any) -> None:
    client, served = reading
    source = Source([item] * 1000)
    call = asyncio.create_task(client.call("first_and_wait", (source.stream,), {}))
    await until(lambda: f"read {item}" in served.node.log)
    await asyncio.sleep(0.02)
    assert most // 2 <= len(source.made) <= most
    served.node.gate.set()
    assert await call == 1
    await source.stream.aclose()


async def test_a_reader_that_closes_a_stream_closes_its_source(reading: Any) -> None:
    client, _ = reading
    source = Source(range(1000))
    assert await client.call("read_one_and_close", (source.stream,), {}) == "closed"
    await until(lambda: source.closed)


async def test_a_failure_travels_with_its_notes(reading: Any) -> None:
    client, _ = reading
    error = KeyError("up there")
    error.add_note("a note of the source")
    with pytest.raises(KeyError, match="up there") as caught:
        await client.call("total", (Source(range(2), error).stream,), {})
    assert "a note of the source" in caught.value.__notes__
    assert await client.call("echo", (1,), {}) == 1


async def test_a_source_that_was_cancelled_is_no_regular_end(reading: Any) -> None:
    client, _ = reading
    source = Source(range(2), asyncio.CancelledError())
    with pytest.raises(asyncio.CancelledError):
        await client.call("total", (source.stream,), {})
    assert await client.call("echo", (1,), {}) == 1


@pytest.mark.parametrize(
    "item, error", [(Unpicklable(), SerializationError), (Rotten(), SerializationError)]
)
async def test_an_item_that_does_not_travel(item: Any, error: Any, reading: Any) -> None:
    client, _ = reading
    source = Source([1, item, 3])
    with pytest.raises(error, match="an argument"):
        await client.call("total", (source.stream,), {})
    await source.stream.aclose()


async def test_items_of_any_size(reading: Any) -> None:
    client, _ = reading
    sizes = [0, 10, 300_000, 5_000_000, 3]
    assert await client.call("sizes", (Source(map(bytes, sizes)).stream,), {}) == sizes
    source = Source([bytes(MAX_MESSAGE_SIZE + 1)])
    with pytest.raises(LocalProtocolError, match="too long"):
        await client.call("sizes", (source.stream,), {})


async def test_cancelling_a_call_reads_no_more(reading: Any) -> None:
    client, served = reading
    source = Source(range(1000))
    call = asyncio.create_task(client.call("first_and_wait", (source.stream,), {}))
    await until(lambda: "read 0" in served.node.log)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await source.stream.aclose()
    (connected,) = served.server._clients
    assert not connected._incoming
    await until(lambda: not connected._reading)


async def test_a_call_that_has_read_is_not_made_again(network: Network) -> None:
    served = [await network.serve(Reader()) for _ in range(2)]
    client = network.client(*served)
    source = Source(range(1000))
    call = asyncio.create_task(client.call("first_and_wait", (source.stream,), {}))
    await until(lambda: any("read 0" in each.node.log for each in served))
    (busy,) = [each for each in served if each.node.log]
    await busy.stop()
    with pytest.raises(ReplicaLostError, match="had read a stream, which cannot begin again"):
        await call
    await source.stream.aclose()


async def test_a_call_that_was_refused_is_made_elsewhere_with_its_stream(network: Network) -> None:
    served = [await network.serve(Reader()) for _ in range(2)]
    client = network.client(*served)
    await until(lambda: len(client._usable) == 2)
    served[0].server.draining = True  # and has told nobody
    for _ in range(20):
        assert await client.call("total", (Source(range(4)).stream,), {}) == 6


# By hand


async def called(network: Network, method: str = "wait_and_read") -> tuple[Any, Any]:
    served = await network.serve(Reader())
    stranger = await network.stranger(served)
    await stranger.shake_hands()
    arguments = codec.encode(((StreamRef(0),), {}), "arguments").body
    head = CallHead(method).encode()
    stranger.connection.send(Kind.CALL, WITH_STREAMS, 7, head, arguments)
    stranger.flush()
    await until(lambda: "begun" in served.node.log)
    return stranger, served


async def test_the_server_takes_no_more_than_it_has_asked_for(network: Network) -> None:
    stranger, served = await called(network, "wait_and_count")
    await until(lambda: stranger.got)
    assert stranger.got == [Message(Kind.CREDIT, 0, 8, pack_number(WINDOW))]
    stranger.got.clear()
    for item in range(100):
        body = codec.encode(item, "an item").body
        stranger.connection.send(Kind.ITEM, 0, 8, body)
    stranger.connection.send(Kind.RESULT, 0, 8)
    stranger.connection.send(Kind.RESULT, 0, 8)
    stranger.connection.send(Kind.PING, 0, 0)
    stranger.flush()
    await until(lambda: any(message.kind == Kind.PONG for message in stranger.got))
    served.node.gate.set()
    await until(lambda: any(message.kind == Kind.RESULT for message in stranger.got))
    answer = next(message for message in stranger.got if message.kind == Kind.RESULT)
    assert answer.number == 7
    assert codec.decode(codec.Payload(answer.content, ()), "the result") == WINDOW // LEAST


async def test_items_of_no_stream_are_ignored(network: Network) -> None:
    stranger, served = await called(network)
    for kind in (Kind.ITEM, Kind.RESULT, Kind.ERROR):
        for number in (0, 7, 9):
            stranger.connection.send(kind, 0, number, b"rubbish")
    stranger.connection.send(Kind.ITEM, 0, 8, codec.encode("it", "an item").body)
    stranger.flush()
    served.node.gate.set()
    await until(lambda: any(message.kind == Kind.RESULT for message in stranger.got))


async def test_rubbish_for_an_item_fails_its_call_alone(network: Network) -> None:
    stranger, served = await called(network)
    stranger.connection.send(Kind.ITEM, 2, 8, b"rubbish")
    stranger.flush()
    served.node.gate.set()
    await until(lambda: any(message.kind == Kind.ERROR for message in stranger.got))
    stranger.got.clear()
    stranger.connection.send(Kind.PING, 0, 0)
    stranger.flush()
    await until(lambda: stranger.got and stranger.got[-1].kind == Kind.PONG)


# References


@given(st.integers(1, 0xFFFF_FFFF), st.integers(0, 100))
def test_the_numbers_of_streams_follow_that_of_the_call(call: int, index: int) -> None:
    number = stream_number(call, index)
    assert 1 <= number <= 0xFFFF_FFFF
    assert (number - call - index - 1) % 0xFFFF_FFFF == 0
    assert stream_number(number, 0) == stream_number(call, index + 1)


async def test_what_is_detached_is_attached_again() -> None:
    one, two = Source(()), Source(())
    arguments = (1, [one.stream, {"a": two.stream, "b": one.stream}])
    detached, streams = detach(arguments)
    assert detached == (1, [StreamRef(0), {"a": StreamRef(1), "b": StreamRef(0)}])
    assert codec.decode(codec.encode(detached, ""), "") == detached
    assert attach(detached, streams.__getitem__) == arguments
    with contextlib.suppress(StopAsyncIteration):
        await anext(one.stream)
        await anext(two.stream)


async def test_a_stream_where_nobody_looks_for_it() -> None:
    source = Source(())
    with pytest.raises(SerializationError, match="the thing holds a stream"):
        codec.encode({frozenset({source.stream})}, "the thing")
