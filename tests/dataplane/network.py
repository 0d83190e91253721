"""Real replicas behind real sockets, and clients of theirs."""

# ruff: noqa: ASYNC110 - what is polled has no event

from __future__ import annotations

import asyncio
import dataclasses
import pickle
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from fastapi_graph.dataplane.client import DeploymentClient
from fastapi_graph.dataplane.connection import Connection
from fastapi_graph.dataplane.frames import CallHead, Message
from fastapi_graph.dataplane.peer import Peer
from fastapi_graph.dataplane.protocol import Link
from fastapi_graph.dataplane.server import ReplicaServer
from fastapi_graph.dataplane.values import Exchange
from fastapi_graph.graph.options import DeploymentOptions
from fastapi_graph.graph.plan import Interface
from fastapi_graph.replica import Replica
from tests.dataplane.nodes import Node
from tests.dataplane.pairs import SECRET

MAX_MESSAGE_SIZE = 64 << 20
WHERE = "app.py:1"


async def until(condition: Callable[[], Any], what: str = "") -> None:
    """Wait until something is so."""
    try:
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0.001)
    except TimeoutError:
        pytest.fail(f"it has not come: {what or condition}")


def parts_of(method: str, *arguments: Any) -> tuple[bytes, bytes]:
    """Return the content of a call."""
    return CallHead(method).encode(), pickle.dumps((arguments, {}), 5)


@dataclasses.dataclass(frozen=True)
class Certificates:
    """Of a server, and of the authority that signed it."""

    authority: Path
    certificate: Path
    key: Path

    def server(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key)
        return context

    def client(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.authority)


def make_certificates(folder: Path) -> Certificates:
    """Make an authority and a certificate for 127.0.0.1."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    names = Certificates(*(folder / name for name in ("ca.pem", "cert.pem", "key.pem")))
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    new += ["-nodes", "-days", "2"]
    authority = [*new, "-subj", "/CN=Authority", "-keyout", "ca.key", "-out", "ca.pem"]
    authority += ["-addext", "keyUsage=critical,keyCertSign,cRLSign"]
    server = [*new, "-CA", "ca.pem", "-CAkey", "ca.key", "-subj", "/CN=replica"]
    server += ["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=CA:FALSE"]
    server += ["-keyout", "key.pem", "-out", "cert.pem"]
    for command in (authority, server):
        made = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stderr
    return names


@dataclasses.dataclass
class Served:
    """A replica that listens.

    Attributes:
        address: Path of a unix socket, or a TCP port.
    """

    node: Any
    replica: Replica
    server: ReplicaServer
    identity: bytes
    address: Path | int

    @property
    def replica_id(self) -> str:
        return self.identity.decode().partition("@")[0]

    async def stop(self) -> None:
        await self.server.close()
        await self.replica.close()


class Network:
    """Makes replicas and clients, and closes them."""

    def __init__(
        self, folder: Path, transport: str, certificates: Callable[[], Certificates]
    ) -> None:
        self.suspected: list[str] = []
        self.served: list[Served] = []
        self._folder = folder
        self._transport = transport
        self._certificates = certificates() if transport == "tls" else None
        self._clients: list[DeploymentClient] = []
        self._strangers: list[Stranger] = []

    async def serve(
        self,
        node: Any = None,
        *,
        max_connections: int = 4096,
        exchange: Exchange | None = None,
        **options: Any,
    ) -> Served:
        """Start a replica."""
        number = len(self.served)
        node = Node() if node is None else node
        replica = Replica("Node", DeploymentOptions(**options), WHERE)
        replica.host(node)
        identity = b"replica-%d@v1" % number
        server = ReplicaServer(
            replica,
            identity,
            SECRET,
            max_message_size=MAX_MESSAGE_SIZE,
            exchange=exchange,
            max_connections=max_connections,
        )
        address: Path | int
        if self._transport == "unix":
            address = self._folder / f"{number}.sock"
            await server.listen_unix(str(address))
        else:
            context = self._certificates.server() if self._certificates else None
            address = await server.listen_tcp("127.0.0.1", None, context)
        self.served.append(Served(node, replica, server, identity, address))
        return self.served[-1]

    def client(
        self,
        *replicas: Served,
        replica_wait_s: float = 5.0,
        exchange: Exchange | None = None,
        **options: Any,
    ) -> DeploymentClient:
        """Return a client of these replicas."""
        interface = Interface("Node", DeploymentOptions(**options), WHERE, {}, is_class=True)
        client = DeploymentClient(
            interface,
            replica_wait_s=replica_wait_s,
            suspect=self.suspected.append,
            exchange=exchange,
        )
        self._clients.append(client)
        for served in replicas:
            self.connect(client, served)
        return client

    def connect(
        self,
        client: DeploymentClient,
        served: Served,
        *,
        secret: bytes = SECRET,
        identity: bytes | None = None,
    ) -> Peer:
        """Let a client use a replica."""
        return self.connect_to(client, served.address, identity or served.identity, secret=secret)

    def connect_to(
        self,
        client: DeploymentClient,
        address: Path | int,
        identity: bytes,
        *,
        secret: bytes = SECRET,
    ) -> Peer:
        """Let a client use whatever listens there."""

        async def dial(factory: Callable[[], Link]) -> Link:
            transport, link = await self.open(factory, address)
            assert not transport.is_closing()
            return link

        peer = Peer(
            identity.decode().partition("@")[0],
            identity,
            secret,
            dial,
            client,
            max_message_size=MAX_MESSAGE_SIZE,
        )
        client.add(peer)
        return peer

    async def open(self, factory: Any, address: Path | int) -> tuple[Any, Any]:
        """Open a connection, without a byte of ours over it."""
        loop = asyncio.get_running_loop()
        if isinstance(address, Path):
            return await loop.create_unix_connection(factory, str(address))
        context = self._certificates.client() if self._certificates else None
        return await loop.create_connection(factory, "127.0.0.1", address, ssl=context)

    async def stranger(self, served: Served) -> Stranger:
        """Open a connection that the test speaks over by hand."""
        _, stranger = await self.open(lambda: Stranger(served.identity), served.address)
        self._strangers.append(stranger)
        return self._strangers[-1]

    async def close(self) -> None:
        for stranger in self._strangers:
            stranger.transport.abort()
        for client in self._clients:
            await client.remove(client.replica_ids)
        for served in self.served:
            await served.stop()


class Stranger(asyncio.Protocol):
    """A client that a test speaks for, byte by byte."""

    def __init__(self, identity: bytes) -> None:
        self.connection = Connection("client", identity, SECRET)
        self.got: list[Message] = []
        self.ended = asyncio.Event()
        self.opened = asyncio.Event()
        self.challenged = asyncio.Event()
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.got += self.connection.receive_data(data)
        self.challenged.set()
        if self.connection.state == "open":
            self.opened.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()

    def flush(self) -> None:
        while self.connection.has_more():
            self.transport.write(self.connection.data_to_send())

    async def shake_hands(self) -> None:
        async with asyncio.timeout(5):
            await self.challenged.wait()
            self.flush()
            await self.opened.wait()
        self.got.clear()

    async def wait_closed(self, timeout_s: float = 5) -> None:
        async with asyncio.timeout(timeout_s):
            await self.ended.wait()


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Certificates]:
    """Make certificates when they are asked for first."""
    made: list[Certificates] = []

    def certificates() -> Certificates:
        if not made:
            made.append(make_certificates(tmp_path_factory.mktemp("certificates")))
        return made[0]

    return certificates


@pytest.fixture
def transport() -> str:
    """How replicas are reached; modules for which it matters have another."""
    return "unix"


@pytest.fixture
async def network(
    tmp_path: Path, transport: str, certificates: Callable[[], Certificates]
) -> AsyncIterator[Network]:
    network = Network(tmp_path, transport, certificates)
    yield network
    await network.close()
