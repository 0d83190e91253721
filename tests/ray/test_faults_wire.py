"""Peers of a replica that leave in the middle of a call, or were never its peers."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Any

import pytest
import ray

from fastapi_graph import DeploymentHandle, Graph, deployment
from fastapi_graph.backends.ray.calls import identity_of
from fastapi_graph.backends.ray.controller import controller_name
from fastapi_graph.backends.ray.messages import ReplicaAddress
from fastapi_graph.dataplane.connection import Connection
from fastapi_graph.dataplane.frames import HEADER, Kind, header
from tests import cluster
from tests.contract.probes import Journal
from tests.ray.test_faults import CALLERS, Load, pids_of, serve

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120), pytest.mark.usefixtures("ray_cluster")]

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@deployment(max_ongoing_requests=1000)
class Inner:
    def __init__(self, journal: Journal) -> None:
        self.journal = journal

    async def __call__(self, value: int) -> int:
        await asyncio.sleep(0.02)
        return value

    async def work(self, name: str) -> None:
        self.journal.add(f"{name} inside")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.journal.add(f"{name} cancelled inside")
            raise

    async def pid(self) -> int:
        return os.getpid()


@deployment(max_ongoing_requests=1000)
class Outer:
    def __init__(self, inner: DeploymentHandle, journal: Journal) -> None:
        self.inner = inner
        self.journal = journal

    async def __call__(self, value: int) -> int:
        found: int = await self.inner.remote(value)
        return found

    async def work(self, name: str) -> None:
        try:
            await self.inner.work.remote(name)
        except asyncio.CancelledError:
            self.journal.add(f"{name} cancelled outside")
            raise


async def test_a_caller_that_leaves_cancels_its_nodes(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    node = Outer.bind(Inner.bind(journal), journal)
    async with serve(node) as graph, Load(graph.handle, lambda number: number) as load:

        async def call(name: str) -> None:
            await graph.handle.work.remote(name)

        tasks = [asyncio.create_task(call(str(number))) for number in range(CALLERS)]
        for number in range(CALLERS):
            await journal.wait_for(f"{number} inside")
        stays = tasks.pop()
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=5)
        assert all(task.cancelled() for task in tasks)
        for number in range(CALLERS - 1):
            await journal.wait_for(f"{number} cancelled inside")
            await journal.wait_for(f"{number} cancelled outside")
        await load.go_on()
        assert not stays.done()
        assert not any(line.startswith(f"{CALLERS - 1} cancelled") for line in journal.read())
        stays.cancel()
        await asyncio.wait([stays])
        await journal.wait_for(f"{CALLERS - 1} cancelled inside")


async def addresses_of(graph: Graph, deployment: str) -> tuple[ReplicaAddress, ...]:
    actor: Any = ray.get_actor(controller_name(graph.name), cluster.NAMESPACE)
    (view,) = (await actor.status.remote()).values()
    found: tuple[ReplicaAddress, ...] = view.deployments[deployment].replicas
    return found


async def connect(address: ReplicaAddress, transport: str) -> Streams:
    if transport == "unix":
        return await asyncio.open_unix_connection(address.unix_path)
    return await asyncio.open_connection(address.host, address.port)


async def answer_to(streams: Streams, data: bytes) -> bytes:
    """Send bytes and return all that comes until the replica closes."""
    reader, writer = streams
    writer.write(data)
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(5):
            return await reader.read()
    return b""


async def leave(streams: Streams) -> None:
    streams[1].transport.abort()
    with contextlib.suppress(ConnectionError):
        await streams[1].wait_closed()


GARBAGE = {
    "another protocol": b"GET / HTTP/1.1\r\nHost: replica\r\n\r\n",
    "zeros": b"\0" * 1000,
    "noise": bytes(range(255, -1, -1)) * 40,
    "a huge length": HEADER.pack(0xFFFF_FFFF, Kind.AUTH, 0, 0),
    "a call before the handshake": header(Kind.CALL, 0, 1, 100) + b"c" * 100,
}


@pytest.mark.parametrize("transport", ["unix", "tcp"])
async def test_strangers_disturb_nobody(transport: str, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    node = Inner.bind(journal)
    async with serve(node) as graph, Load(graph.handle, lambda number: number) as load:
        before = await pids_of(graph.handle_of(node), 1)
        call = graph.handle.work.remote("long")
        await journal.wait_for("long inside")
        (address,) = await addresses_of(graph, "Inner")
        for data in GARBAGE.values():
            streams = await connect(address, transport)
            said = await answer_to(streams, data)
            assert len(said) <= 64 + HEADER.size, "more than a challenge"
            await leave(streams)
        # In the middle of a frame, and without a word.
        silent = [await connect(address, transport) for _ in range(100)]
        for number, streams in enumerate(silent):
            streams[1].write((header(Kind.AUTH, 0, 0, 64) + b"n" * 64)[: number % 70])
        await load.go_on()
        for streams in silent:
            await leave(streams)
        for wrong in (
            Connection("client", identity_of(address.replica_id, address.version), b"w" * 32),
            Connection("client", identity_of("another", address.version), b""),
        ):
            streams = await connect(address, transport)
            wrong.receive_data(await streams[0].readexactly(HEADER.size + 48))
            assert await answer_to(streams, wrong.data_to_send()) == b""
            await leave(streams)
        await load.go_on()
        assert journal.read() == ["long inside"]  # it was not disturbed either
        call.cancel()
        assert await pids_of(graph.handle_of(node), 1) == before
        (status,) = graph.status()
        assert (status.restarts, status.error) == (0, "")
