"""Calls over real sockets, on both event loops: a client, a link, a server, a replica."""

from __future__ import annotations

import asyncio
import time
import traceback
from typing import Any

import numpy as np
import pytest
from opentelemetry import trace

from fastapi_graph.dataplane.client import DeploymentClient
from fastapi_graph.dataplane.frames import CHUNK, STREAM, Kind
from fastapi_graph.dataplane.window import LEAST, WINDOW
from fastapi_graph.errors import (
    DeadlineExceededError,
    GraphDefinitionError,
    LocalProtocolError,
    NodeError,
    SerializationError,
)
from fastapi_graph.request import within
from tests.dataplane.network import MAX_MESSAGE_SIZE, Network, parts_of, until
from tests.dataplane.nodes import Angry, Rotten, Unpicklable

pytestmark = pytest.mark.anyio

LOOPS = {"asyncio": ("asyncio", {}), "uvloop": ("asyncio", {"use_uvloop": True})}


@pytest.fixture(scope="module", params=LOOPS)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return LOOPS[request.param]


@pytest.fixture(params=["unix", "tcp", "tls"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def items_of(client: DeploymentClient, method: str, *args: Any) -> list[Any]:
    items: list[Any] = []

    async def emit(item: Any) -> None:
        items.append(item)

    await client.stream(method, args, {}, emit)
    return items


async def test_calls(network: Network) -> None:
    client = network.client(await network.serve())
    assert await client.call("echo", (1,), {}) == 1
    assert await client.call("echo", (1, "two"), {"three": [3.0]}) == ((1, "two"), {"three": [3.0]})
    assert await client.call("sync_echo", (None,), {}) is None
    assert client.ongoing == 0


async def test_many_at_once_get_each_its_own_answer(network: Network) -> None:
    client = network.client(await network.serve(), max_ongoing_requests=50)
    answers = await asyncio.gather(*(client.call("echo", (n,), {}) for n in range(300)))
    assert answers == list(range(300))


async def test_an_error_has_its_type_its_notes_and_its_traceback(network: Network) -> None:
    client = network.client(await network.serve())
    with pytest.raises(KeyError, match="missing") as caught:
        await client.call("fail", ("missing",), {})
    notes = caught.value.__notes__
    assert notes[0] == "a note of the node"
    assert "raised in deployment Node.fail (bound at app.py:1)" in notes
    cause = "".join(traceback.format_exception(caught.value.__cause__))
    assert "in fail" in cause
    assert "raise error" in cause
    assert await client.call("echo", ("and it goes on",), {}) == "and it goes on"


async def test_an_error_whose_constructor_takes_keywords(network: Network) -> None:
    client = network.client(await network.serve())
    with pytest.raises(Angry, match="because of hunger") as caught:
        await client.call("be_angry", ("hunger",), {})
    assert caught.value.reason == "hunger"


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
async def test_a_node_cannot_end_its_replica(error: BaseException, network: Network) -> None:
    client = network.client(await network.serve())
    with pytest.raises(NodeError, match=type(error).__name__):
        await client.call("end", (error,), {})
    assert await client.call("echo", (1,), {}) == 1


async def test_a_node_that_cancels_itself_is_answered(network: Network) -> None:
    client = network.client(await network.serve())
    call = asyncio.create_task(client.call("end", (asyncio.CancelledError(),), {}))
    async with asyncio.timeout(5):
        await asyncio.wait([call])
    assert call.cancelled()
    assert await client.call("echo", (1,), {}) == 1


async def test_an_unknown_method(network: Network) -> None:
    client = network.client(await network.serve())
    with pytest.raises(GraphDefinitionError, match="no method 'nothing'"):
        await client.call("nothing", (), {})


async def test_a_deadline_travels_as_the_time_that_is_left(network: Network) -> None:
    client = network.client(await network.serve())
    assert await client.call("time_left", (), {}) is None
    now = asyncio.get_running_loop().time()
    with within(now + 7):
        assert 6 < await client.call("time_left", (), {}) <= 7
    with within(now - 1), pytest.raises(DeadlineExceededError, match="before it started"):
        await client.call("time_left", (), {})
    assert await client.call("time_left", (), {}) is None


# Streams


@pytest.mark.parametrize("method", ["count", "sync_count"])
async def test_streams(method: str, network: Network) -> None:
    served = await network.serve()
    client = network.client(served)
    assert await items_of(client, method, 20) == list(range(20))
    assert await items_of(client, method, 0) == []
    assert served.node.log.count("closed") == 2
    assert (client.ongoing, served.server.calls) == (0, 0)


@pytest.mark.parametrize(
    "method, args, ahead",
    [
        ("count", (), WINDOW // LEAST),
        ("sync_count", (), WINDOW // LEAST),
        ("blocks", (WINDOW // 3,), 3),
        ("blocks", (WINDOW + 1,), 1),
    ],
)
async def test_a_generator_is_a_window_ahead_of_its_reader(
    method: str, args: tuple[int, ...], ahead: int, network: Network
) -> None:
    served = await network.serve()
    client = network.client(served)
    log = served.node.log
    read = 0
    most = 0

    async def emit(item: Any) -> None:
        nonlocal read, most
        await asyncio.sleep(0.005)  # it would have the time
        most = max(most, sum(line.startswith("made") for line in log) - read)
        read += 1

    await client.stream(method, (*args, 40), {}, emit)
    assert read == 40
    assert ahead // 2 < most <= ahead  # a thread on a busy machine may not get as far


async def test_an_item_that_takes_time_is_sent_at_once(network: Network) -> None:
    served = await network.serve()
    client = network.client(served)
    started = time.perf_counter()
    arrived: list[float] = []

    async def emit(item: int) -> None:
        arrived.append(time.perf_counter() - started)

    await client.stream("compute", (10,), {}, emit)
    assert arrived[0] < arrived[-1] - 0.1


@pytest.mark.parametrize("method", ["count", "sync_count"])
async def test_a_generator_whose_reader_has_enough_is_closed(method: str, network: Network) -> None:
    served = await network.serve()
    client = network.client(served)

    async def emit(item: int) -> None:
        if item == 20:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        await client.stream(method, (1000,), {}, emit)
    await until(lambda: "closed" in served.node.log)
    assert "made 40" not in served.node.log
    assert (client.ongoing, served.server.calls) == (0, 0)


async def test_a_stream_that_fails(network: Network) -> None:
    client = network.client(await network.serve())
    items: list[int] = []

    async def emit(item: int) -> None:
        items.append(item)

    with pytest.raises(KeyError, match="no more"):
        await client.stream("fail_after", (3,), {}, emit)
    assert items == [0, 1, 2]


@pytest.mark.parametrize("kind", ["rotten", "unpicklable"])
async def test_an_item_that_does_not_travel_ends_its_stream_alone(
    kind: str, network: Network
) -> None:
    served = await network.serve()
    client = network.client(served)
    other = asyncio.create_task(client.call("work", ("other",), {}))
    with pytest.raises(SerializationError, match=r"Node"):
        await items_of(client, "odd_items", kind)
    await until(lambda: served.server.calls == 1)
    served.node.gate.set()
    assert await other == "other"


async def test_long_items_and_short_ones_stay_in_order(network: Network) -> None:
    client = network.client(await network.serve())
    sizes = [3 * CHUNK, 0, CHUNK + 1, 1, 5 * CHUNK, CHUNK]
    assert [len(item) for item in await items_of(client, "blobs", sizes)] == sizes


# Cancelling


async def test_cancelling_a_call_reaches_the_node(network: Network) -> None:
    served = await network.serve()
    client = network.client(served)
    call = asyncio.create_task(client.call("work", ("a",), {}))
    other = asyncio.create_task(client.call("work", ("b",), {}))
    await until(lambda: len(served.node.log) == 2)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await until(lambda: "cancelled a" in served.node.log)
    served.node.gate.set()
    assert await other == "b"
    assert (client.ongoing, served.server.calls, served.replica.ongoing) == (0, 0, 0)


@pytest.mark.parametrize("method", ["count", "sync_count"])
async def test_cancelling_a_stream_closes_the_generator(method: str, network: Network) -> None:
    served = await network.serve()
    client = network.client(served)
    reached = asyncio.Event()

    async def emit(item: int) -> None:
        reached.set()
        await asyncio.sleep(60)

    call = asyncio.create_task(client.stream(method, (100,), {}, emit))
    await reached.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await until(lambda: served.node.log[-1] == "closed")
    assert "made 40" not in served.node.log
    await until(lambda: served.replica.ongoing == 0)


async def test_a_stream_that_is_cancelled_amid_an_item_harms_no_other_call(
    network: Network,
) -> None:
    served = await network.serve()
    client = network.client(served, max_retries=0)
    other = asyncio.create_task(client.call("work", ("other",), {}))
    for number in range(20):
        stream = asyncio.create_task(items_of(client, "blobs", [600_000] * 1000))
        await asyncio.sleep(0.001 * number)
        stream.cancel()
        await asyncio.wait([stream])
    served.node.gate.set()
    async with asyncio.timeout(5):
        assert await other == "other"


async def test_an_error_that_is_too_long_to_be_sent_is_an_error(network: Network) -> None:
    client = network.client(await network.serve())
    with pytest.raises(NodeError, match="KeyError: it is too long"):
        async with asyncio.timeout(20):
            await client.call("fail_at_length", (MAX_MESSAGE_SIZE,), {})
    assert await client.call("echo", (1,), {}) == 1


async def test_a_trace_goes_on_in_the_replica(network: Network) -> None:
    served = await network.serve()
    client = network.client(served)
    assert await client.call("trace", (), {}) == f"{0:032x} {0:016x}"
    span = trace.NonRecordingSpan(
        trace.SpanContext(0xABC, 0xDEF, is_remote=True, trace_flags=trace.TraceFlags(1))
    )
    with trace.use_span(span):
        assert await client.call("trace", (), {}) == f"{0xABC:032x} {0xDEF:016x}"
    assert await client.call("trace", (), {}) == f"{0:032x} {0:016x}"


@pytest.mark.parametrize("method", ["work", "count"])
async def test_a_caller_that_vanishes_cancels_its_calls(method: str, network: Network) -> None:
    served = await network.serve()
    client = network.client(served)
    other = asyncio.create_task(client.call("work", ("other",), {}))
    await until(lambda: served.node.log == ["start other"])
    stranger = await network.stranger(served)
    await stranger.shake_hands()
    flags, argument = (STREAM, 100) if method == "count" else (0, "a")
    stranger.connection.send(Kind.CALL, flags, 1, *parts_of(method, argument))
    stranger.flush()
    await until(lambda: served.server.calls == 2)
    stranger.transport.abort()
    ended = "closed" if method == "count" else "cancelled a"
    await until(lambda: ended in served.node.log)
    assert served.server.clients == 1
    served.node.gate.set()
    assert await other == "other"


async def test_a_long_call_half_sent_is_taken_back(network: Network) -> None:
    served = await network.serve()
    client = network.client(served)
    await client.call("echo", (0,), {})
    for _ in range(5):
        call = asyncio.create_task(client.call("length", (bytes(40 << 20),), {}))
        await asyncio.sleep(0.005)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        (peer,) = client._peers.values()
        assert not peer._link.connection.unsent(), "the rest of it stays here"
        assert await client.call("length", (bytes(3 * CHUNK),), {}) == 3 * CHUNK
    assert (served.server.clients, served.server.calls) == (1, 0)
    assert network.suspected == []


# What does not travel


async def test_a_result_that_cannot_be_unpickled_fails_its_own_call(network: Network) -> None:
    served = await network.serve()
    client = network.client(served)
    other = asyncio.create_task(client.call("work", ("other",), {}))
    with pytest.raises(SerializationError, match=r"Node .*: the result .* gone off"):
        await client.call("rotten", (), {})
    with pytest.raises(SerializationError, match=r"Node.unpicklable .*: the result .* never"):
        await client.call("unpicklable", (), {})
    served.node.gate.set()
    assert await other == "other"
    assert network.suspected == []


async def test_an_argument_that_does_not_travel_fails_its_own_call(network: Network) -> None:
    client = network.client(await network.serve())
    with pytest.raises(SerializationError, match=r"Node.echo .*: an argument .* gone off"):
        await client.call("echo", (Rotten(),), {})
    with pytest.raises(SerializationError, match=r"Node .*: an argument .* never"):
        await client.call("echo", (Unpicklable(),), {})
    assert await client.call("echo", (1,), {}) == 1
    assert (client.ongoing, network.suspected) == (0, [])


async def test_what_is_too_long_fails_its_own_call(network: Network) -> None:
    client = network.client(await network.serve())
    for method, argument in (("length", bytes(MAX_MESSAGE_SIZE)), ("give", MAX_MESSAGE_SIZE)):
        with pytest.raises(LocalProtocolError, match=f"at most {MAX_MESSAGE_SIZE} are allowed"):
            await client.call(method, (argument,), {})
    assert await client.call("echo", (1,), {}) == 1
    assert (client.ongoing, network.suspected) == (0, [])


# Large values


async def test_large_arrays_may_be_changed_on_both_sides(network: Network) -> None:
    client = network.client(await network.serve())
    values = np.arange(5 << 20, dtype="float32")
    result = await client.call("fill", (values,), {})
    np.testing.assert_array_equal(result, values + 1)
    result += 1
    assert values[-1] == (5 << 20) - 1, "the caller's own is as it was"


async def test_arrays_are_aligned(network: Network) -> None:
    client = network.client(await network.serve())
    for size in (10, 1 << 20):
        values = [np.zeros(size), np.zeros(3, "uint8"), np.zeros(size, "complex128")]
        assert await client.call("are_aligned", (values,), {})
        for value in await client.call("echo", (values,), {}):
            assert value.flags.aligned
            assert value.flags.writeable


async def test_a_short_call_does_not_wait_for_a_long_one(network: Network) -> None:
    client = network.client(await network.serve())
    await client.call("echo", (0,), {})
    order: list[str] = []

    async def call(name: str, method: str, argument: Any) -> None:
        await client.call(method, (argument,), {})
        order.append(name)

    async with asyncio.TaskGroup() as group:
        group.create_task(call("long", "length", bytes(50 << 20)))
        await asyncio.sleep(0)
        for _ in range(5):
            group.create_task(call("short", "echo", 1))
    assert order == ["short"] * 5 + ["long"]
