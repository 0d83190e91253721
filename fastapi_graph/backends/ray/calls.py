"""Calls to the deployments of one version, from a web process or from a replica."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastapi_graph.backends.ray.actors import Actors
from fastapi_graph.backends.ray.messages import ReplicaAddress, View
from fastapi_graph.backends.ray.security import client_context
from fastapi_graph.backends.ray.tunnel import open_tunnel
from fastapi_graph.dataplane.client import DeploymentClient
from fastapi_graph.dataplane.peer import Dial, Peer
from fastapi_graph.dataplane.protocol import Link
from fastapi_graph.graph.plan import Interface

__all__ = ["Calls", "identity_of", "machine_id"]

CONNECT_TIMEOUT_S = 5.0


def identity_of(replica_id: str, version: str) -> bytes:
    """Return what the handshake binds."""
    return f"{replica_id}@{version}".encode()


def machine_id() -> str:
    """Identify this host and its file system: where it is equal, unix sockets reach."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    with contextlib.suppress(OSError):
        folder = Path(tempfile.gettempdir()).stat()
        return f"{boot.read_text().strip()}:{folder.st_dev}:{folder.st_ino}"
    return ""


class Calls:
    """A client for each deployment, kept true to what the controller says.

    It belongs to one event loop.

    Args:
        interfaces: By the deployment's name.
        version: The version of the graph.
        settings: The settings of the data plane, as plain data.
        suspect: Told the id of a replica whose connection was lost.
        actors: Calls replicas through Ray itself.
    """

    def __init__(
        self,
        interfaces: Mapping[str, Interface],
        version: str,
        settings: Mapping[str, Any],
        suspect: Callable[[str], None],
        actors: Actors,
    ) -> None:
        self._actors = actors
        self._version = version
        self._settings = settings
        self._secret = b""
        self._machine = machine_id()
        self._transport = settings["transport"]
        self._closing: set[asyncio.Task[None]] = set()
        self.clients = {
            name: DeploymentClient(
                interface,
                replica_wait_s=settings["replica_wait_s"],
                suspect=suspect,
                exchange=actors,
            )
            for name, interface in interfaces.items()
        }

    def use(self, view: View, secret: bytes) -> None:
        """Send calls to the replicas of a view from now on."""
        self._secret = secret
        for name, client in self.clients.items():
            shown = view.deployments.get(name)
            wanted = {address.replica_id: address for address in shown.replicas} if shown else {}
            gone = client.replica_ids - wanted.keys()
            if gone:
                self._spawn(client.remove(gone, drain=True))
            for replica_id in wanted.keys() - client.replica_ids:
                client.add(self._peer(wanted[replica_id], client))

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.ensure_future(coroutine)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Let go of every replica."""
        for task in self._closing:
            task.cancel()
        await asyncio.gather(
            *(client.remove(client.replica_ids) for client in self.clients.values()),
            *self._closing,
            return_exceptions=True,
        )

    def _peer(self, address: ReplicaAddress, client: DeploymentClient) -> Peer:
        return Peer(
            address.replica_id,
            identity_of(address.replica_id, self._version),
            self._secret,
            self._dial(address),
            client,
            max_message_size=self._settings["max_message_size"],
        )

    def _dial(self, address: ReplicaAddress) -> Dial:
        async def dial(factory: Callable[[], Link]) -> Link:
            if self._transport != "ray":
                try:
                    async with asyncio.timeout(CONNECT_TIMEOUT_S):
                        return await self._connect(address, factory)
                except OSError:
                    if self._transport == "direct":
                        raise
            return await open_tunnel(
                address.replica_id,
                self._actors.call,
                factory,
                wanted=self._transport == "ray",
            )

        return dial

    async def _connect(self, address: ReplicaAddress, factory: Callable[[], Link]) -> Link:
        loop = asyncio.get_running_loop()
        if self._machine and self._machine == address.machine:
            # Else it is on another file system, or another user's.
            with contextlib.suppress(FileNotFoundError, PermissionError):
                _, link = await loop.create_unix_connection(factory, address.unix_path)
                return link
        _, link = await loop.create_connection(
            factory, address.host, address.port, ssl=client_context()
        )
        return link
