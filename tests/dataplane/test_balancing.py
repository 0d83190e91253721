"""Which replica takes a call, and what becomes of it when that one drains or is lost."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fastapi_graph.dataplane.client import DeploymentClient
from fastapi_graph.dataplane.window import LEAST, WINDOW
from fastapi_graph.errors import BackPressureError, NoReplicaError, ReplicaLostError
from tests.dataplane.network import Network, Served, until
from tests.dataplane.nodes import Node
from tests.dataplane.pairs import end
from tests.processes import Program, Start

pytestmark = pytest.mark.anyio

SCRIPT = Path(__file__).with_name("replica_process.py")


def work(client: DeploymentClient, name: Any) -> asyncio.Task[Any]:
    return asyncio.create_task(client.call("work", (name,), {}))


async def connected(client: DeploymentClient, *replicas: Served) -> None:
    """Wait until each of the replicas may be called."""
    await until(lambda: all(served.server.clients for served in replicas))
    await until(lambda: len(client._usable) == len(replicas))


# Limits


async def test_no_more_than_max_ongoing_requests_of_a_replica(network: Network) -> None:
    served = await network.serve()
    client = network.client(served, max_ongoing_requests=2)
    calls = [work(client, n) for n in range(5)]
    await until(lambda: client.queued == 3)
    await until(lambda: served.node.log == ["start 0", "start 1"])
    assert client.ongoing == 2
    served.node.gate.set()
    assert await asyncio.gather(*calls) == list(range(5))
    assert served.node.log == [f"start {n}" for n in range(5)], "first in, first out"
    assert (client.ongoing, client.queued) == (0, 0)


async def test_each_replica_has_its_slots(network: Network) -> None:
    replicas = [await network.serve(Node()) for _ in range(3)]
    client = network.client(*replicas, max_ongoing_requests=2)
    await connected(client, *replicas)
    calls = [work(client, n) for n in range(10)]
    await until(lambda: client.queued == 4)
    await until(lambda: [served.node.running for served in replicas] == [2, 2, 2])
    replicas[1].node.gate.set()
    await until(lambda: client.queued == 0)
    for served in replicas:
        served.node.gate.set()
    assert await asyncio.gather(*calls) == list(range(10))
    assert max(served.node.most for served in replicas) == 2


@pytest.mark.parametrize("queue", [0, 2])
async def test_over_the_queue_is_back_pressure(queue: int, network: Network) -> None:
    served = await network.serve()
    client = network.client(served, max_ongoing_requests=1, max_queued_requests=queue)
    await connected(client, served)
    calls = [work(client, n) for n in range(1 + queue)]
    await until(lambda: client.queued == queue and client.ongoing == 1)
    with pytest.raises(BackPressureError, match=r"Node is at capacity.*app\.py:1"):
        await client.call("work", ("refused",), {})
    with pytest.raises(BackPressureError):
        await client.stream("count", (1,), {}, None)  # type: ignore[arg-type]
    served.node.gate.set()
    assert await asyncio.gather(*calls) == list(range(1 + queue))
    assert await client.call("work", ("again",), {}) == "again"


async def test_the_replica_enforces_the_limits_on_all_its_clients(network: Network) -> None:
    limits = {"max_ongoing_requests": 1, "max_queued_requests": 1}
    served = await network.serve(**limits)
    clients = [network.client(served, **limits) for _ in range(3)]
    first = work(clients[0], "first")
    await until(lambda: served.node.running == 1)
    second = work(clients[1], "second")
    await until(lambda: served.replica.queued == 1)
    with pytest.raises(BackPressureError, match="Node is at capacity"):
        await clients[2].call("work", ("third",), {})
    served.node.gate.set()
    assert await asyncio.gather(first, second) == ["first", "second"]
    assert served.node.most == 1


async def test_a_queued_call_that_is_cancelled_leaves_the_queue(network: Network) -> None:
    served = await network.serve()
    client = network.client(served, max_ongoing_requests=1)
    first = work(client, "first")
    await until(lambda: served.node.running == 1)
    gone, last = work(client, "gone"), work(client, "last")
    await until(lambda: client.queued == 2)
    gone.cancel()
    await until(lambda: client.queued == 1)
    served.node.gate.set()
    assert await asyncio.gather(first, last) == ["first", "last"]
    assert "start gone" not in served.node.log
    assert gone.cancelled()


async def test_a_slot_given_to_a_call_that_was_cancelled_goes_on(network: Network) -> None:
    served = await network.serve()
    client = network.client(served, max_ongoing_requests=1)
    for _ in range(20):
        first = work(client, "first")
        await until(lambda: client.ongoing == 1)
        second, third = work(client, "second"), work(client, "third")
        await until(lambda: client.queued == 2)
        served.node.gate.set()
        await first
        second.cancel()
        assert await third == "third"
        await asyncio.wait([second])
        served.node.gate.clear()
        assert (client.ongoing, client.queued) == (0, 0)


# Which one


async def test_the_replica_with_fewer_calls_is_chosen(network: Network) -> None:
    replicas = [await network.serve(Node()) for _ in range(2)]
    client = network.client(*replicas)
    await connected(client, *replicas)
    calls = [work(client, n) for n in range(20)]
    await until(lambda: sum(served.node.running for served in replicas) == 20)
    assert [served.node.running for served in replicas] == [10, 10]
    replicas[0].node.gate.set()
    await until(lambda: replicas[0].node.running == 0)
    calls += [work(client, n) for n in range(10)]
    await until(lambda: all(call.done() for call in calls[20:]))
    assert replicas[1].node.running == 10, "the idle one has taken all of them"
    replicas[1].node.gate.set()
    await asyncio.gather(*calls)


async def test_of_many_replicas_none_is_left_out(network: Network) -> None:
    replicas = [await network.serve(Node()) for _ in range(6)]
    client = network.client(*replicas)
    await connected(client, *replicas)
    calls = [work(client, n) for n in range(120)]
    await until(lambda: sum(served.node.running for served in replicas) == 120)
    loads = [served.node.running for served in replicas]
    assert min(loads) >= 15, loads
    for served in replicas:
        served.node.gate.set()
    await asyncio.gather(*calls)


# No replica


async def test_a_call_waits_for_a_replica_that_appears(network: Network) -> None:
    client = network.client()
    calls = [work(client, n) for n in range(3)]
    await until(lambda: client.queued == 3)
    served = await network.serve()
    served.node.gate.set()
    network.connect(client, served)
    assert await asyncio.gather(*calls) == [0, 1, 2]


@pytest.mark.parametrize("method", ["call", "stream"])
async def test_a_call_does_not_wait_for_ever(method: str, network: Network) -> None:
    client = network.client(replica_wait_s=0.1)
    start = asyncio.get_running_loop().time()
    emit = () if method == "call" else (None,)
    with pytest.raises(NoReplicaError, match=r"within replica_wait_s=0\.1 \(bound at app\.py:1\)"):
        async with asyncio.timeout(5):
            await getattr(client, method)("work", ("a",), {}, *emit)
    assert 0.09 < asyncio.get_running_loop().time() - start < 2
    assert client.queued == 0


async def test_calls_that_wait_for_a_slot_are_patient(network: Network) -> None:
    served = await network.serve()
    client = network.client(served, replica_wait_s=0.05, max_ongoing_requests=1)
    first = work(client, "first")
    await until(lambda: served.node.running == 1)
    second = work(client, "second")
    await asyncio.sleep(0.2)
    served.node.gate.set()
    assert await asyncio.gather(first, second) == ["first", "second"]


async def test_a_replica_that_comes_back_is_used_again(network: Network) -> None:
    served = await network.serve()
    client = network.client(served, max_retries=0)
    assert await client.call("echo", (1,), {}) == 1
    await served.server.close()
    await until(lambda: network.suspected[:1] == ["replica-0"])
    call = work(client, "later")
    await until(lambda: client.queued == 1)
    await served.server.listen_unix(str(served.address))
    served.node.gate.set()
    assert await call == "later"


# Draining


async def test_calls_in_flight_end_and_new_ones_go_elsewhere(network: Network) -> None:
    old, new = await network.serve(Node()), await network.serve(Node())
    client = network.client(old, max_retries=0)
    calls = [work(client, n) for n in range(8)]
    await until(lambda: old.node.running == 8)
    network.connect(client, new)
    await connected(client, old, new)
    drain = asyncio.create_task(old.server.drain(5))
    calls += [work(client, n) for n in range(8, 16)]  # some are on their way to the old one
    await until(lambda: new.node.running == 8)
    calls += [work(client, n) for n in range(16, 24)]
    await until(lambda: new.node.running == 16)
    assert not drain.done()
    assert old.node.running == 8
    old.node.gate.set()
    await drain
    await old.server.close()
    new.node.gate.set()
    assert await asyncio.gather(*calls) == list(range(24))


async def test_a_stream_of_a_replica_that_drains_goes_on(network: Network) -> None:
    old, new = await network.serve(Node()), await network.serve(Node())
    client = network.client(old, max_retries=0)
    items: list[int] = []
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def emit(item: int) -> None:
        items.append(item)
        reached.set()
        await go_on.wait()

    stream = asyncio.create_task(client.stream("count", (100,), {}, emit))
    await reached.wait()
    network.connect(client, new)
    drain = asyncio.create_task(old.server.drain(5))
    await until(lambda: [peer.draining for peer in client._peers.values()] == [True, False])
    go_on.set()
    await stream
    await drain
    assert items == list(range(100))
    await client.stream("count", (1,), {}, emit)
    assert new.node.log == ["made 0", "closed"]


async def test_who_connects_to_a_replica_that_drains_is_told(network: Network) -> None:
    old, new = await network.serve(Node()), await network.serve(Node())
    await old.server.drain(0)
    client = network.client(old, new, max_retries=0)
    new.node.gate.set()
    async with asyncio.timeout(5):
        assert [await client.call("work", (n,), {}) for n in range(10)] == list(range(10))
    assert old.node.log == []


async def test_draining_ends_after_its_time(network: Network) -> None:
    served = await network.serve()
    client = network.client(served, max_retries=0)
    call = work(client, "a")
    await until(lambda: served.node.running == 1)
    await served.server.drain(0.05)
    assert served.node.log == ["start a", "cancelled a"]
    await served.server.close()
    with pytest.raises(ReplicaLostError):
        await call


async def test_an_answer_that_is_long_leaves_before_a_drained_replica_closes(
    network: Network,
) -> None:
    served = await network.serve()
    client = network.client(served, max_retries=0)
    call = asyncio.create_task(client.call("give", (40 << 20,), {}))
    await until(lambda: served.node.log == ["give"])
    await served.server.drain(5)
    await served.server.close()
    assert len(await call) == 40 << 20


async def test_a_removed_replica_is_not_called_any_more(network: Network) -> None:
    replicas = [await network.serve(Node()) for _ in range(2)]
    client = network.client(*replicas)
    await connected(client, *replicas)
    await client.remove(["replica-0", "unknown"])
    assert client.replica_ids == {"replica-1"}
    replicas[1].node.gate.set()
    await asyncio.gather(*(work(client, n) for n in range(10)))
    assert replicas[0].node.log == []
    await until(lambda: replicas[0].server.clients == 0)
    assert network.suspected == []


# Loss


def program(start: Start, path: Path, number: int) -> Program:
    return start(SCRIPT, f"replica-{number}@v1", path)


async def test_a_replica_that_is_killed_fails_no_call(
    start: Start, network: Network, tmp_path: Path
) -> None:
    paths = [tmp_path / f"process-{number}" for number in range(2)]
    programs = [program(start, path, number) for number, path in enumerate(paths)]
    client = network.client()
    for number, path in enumerate(paths):
        await asyncio.to_thread(programs[number].wait_for, "listening")
        network.connect_to(client, path, b"replica-%d@v1" % number)
    await until(lambda: len(client._usable) == 2)
    by: Counter[int] = Counter()
    ending = asyncio.Event()

    async def caller() -> int:
        count = 0
        while not ending.is_set():
            name, pid = await client.call("work", (count,), {})
            assert name == count
            by[pid] += 1
            count += 1
        return count

    callers = [asyncio.create_task(caller()) for _ in range(16)]
    await until(lambda: min(by[one.pid] for one in programs) > 20)
    programs[0].send(signal.SIGKILL)
    await until(lambda: network.suspected)
    before = by.total()
    await until(lambda: by.total() > before + 100)
    ending.set()
    assert min(await asyncio.gather(*callers)) > 0
    assert set(network.suspected) == {"replica-0"}
    assert client.ongoing == 0


async def test_what_must_not_run_twice_does_not(
    start: Start, network: Network, tmp_path: Path
) -> None:
    first = program(start, tmp_path / "process", 7)
    await asyncio.to_thread(first.wait_for, "listening")
    client = network.client(max_retries=0)
    network.connect_to(client, tmp_path / "process", b"replica-7@v1")
    calls = [asyncio.create_task(client.call("hang", (), {})) for _ in range(5)]
    await until(lambda: client.ongoing == 5)
    await asyncio.sleep(0.05)
    other = await network.serve(Node())
    network.connect(client, other)
    first.send(signal.SIGKILL)
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(outcome, ReplicaLostError)
        assert "replica-7 was lost" in str(outcome)
        assert "max_retries=0" in str(outcome)
    assert other.node.log == []


@pytest.mark.parametrize("max_retries", [1, 3])
async def test_a_call_is_tried_again_as_often_as_is_allowed(
    max_retries: int, network: Network
) -> None:
    served = await network.serve()
    client = network.client(served, max_retries=max_retries)
    call = work(client, "a")
    for attempt in range(1 + max_retries):
        await until(lambda: served.node.log.count("start a") == attempt + 1)  # noqa: B023
        assert not call.done()
        await cut(served)
    with pytest.raises(ReplicaLostError, match=f"max_retries={max_retries}"):
        await call
    await until(lambda: served.node.log.count("cancelled a") == 1 + max_retries)


async def cut(served: Served) -> None:
    """Cut the links of a replica, which goes on."""
    for client in tuple(served.server._clients):
        client.link.abort()
    await until(lambda: not served.server.clients)


async def test_a_stream_is_tried_again_until_its_first_item(network: Network) -> None:
    served = await network.serve(max_ongoing_requests=1)
    client = network.client(served)
    busy = work(client, "busy")
    await until(lambda: served.node.running == 1)
    items: list[int] = []
    go_on = asyncio.Event()

    async def emit(item: int) -> None:
        items.append(item)
        await go_on.wait()

    stream = asyncio.create_task(client.stream("count", (100,), {}, emit))
    await until(lambda: served.replica.queued == 1)
    await cut(served)
    served.node.gate.set()
    assert await busy == "busy"
    await until(lambda: items == [0])
    await cut(served)
    go_on.set()
    with pytest.raises(ReplicaLostError):
        await stream
    assert items == list(range(WINDOW // LEAST))  # what had come
    assert client.ongoing == 0


async def test_calls_that_never_left_cost_no_retry(network: Network, tmp_path: Path) -> None:
    path = tmp_path / "stalled"
    stalled = await Stalled.listen(path)
    client = network.client(max_retries=0)
    network.connect_to(client, path, b"stalled@v1")
    await until(lambda: client._usable)
    calls = [asyncio.create_task(client.call("length", (bytes(20 << 20),), {}))]
    await asyncio.sleep(0.05)  # what fits into the sockets has left
    calls += [asyncio.create_task(client.call("length", (bytes(n),), {})) for n in range(5)]
    await until(lambda: client.ongoing == 6)
    network.connect(client, await network.serve(Node()))
    await until(lambda: len(client._usable) == 2)
    stalled.close()
    assert await asyncio.gather(*calls) == [20 << 20, 0, 1, 2, 3, 4]


class Stalled:
    """A replica that shakes hands, and reads no more."""

    def __init__(self, server: asyncio.Server, transports: list[Any]) -> None:
        self._server = server
        self._transports = transports

    @classmethod
    async def listen(cls, path: Path) -> Stalled:
        transports: list[Any] = []

        class Protocol(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                self.transport: Any = transport
                self.connection = end("server", identity=b"stalled@v1")
                transports.append(transport)
                self.transport.write(self.connection.data_to_send())

            def data_received(self, data: bytes) -> None:
                self.connection.receive_data(data)
                self.transport.write(self.connection.data_to_send())
                self.transport.pause_reading()

        loop = asyncio.get_running_loop()
        return cls(await loop.create_unix_server(Protocol, str(path)), transports)

    def close(self) -> None:
        self._server.close()
        for transport in self._transports:
            transport.abort()


async def test_a_replica_that_does_not_answer_pings_is_passed_over(
    network: Network, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("fastapi_graph.dataplane.peer.TICK_S", 0.02)
    stalled = await Stalled.listen(tmp_path / "stalled")
    served = await network.serve(Node())
    served.node.gate.set()
    client = network.client(served, max_retries=0)
    silent = network.connect_to(client, tmp_path / "stalled", b"stalled@v1")
    await until(lambda: silent.usable and not silent.responsive)
    async with asyncio.timeout(5):
        assert [await client.call("work", (n,), {}) for n in range(20)] == list(range(20))
    (answering,) = (peer for peer in client._peers.values() if peer is not silent)
    assert answering.responsive
    stalled.close()
