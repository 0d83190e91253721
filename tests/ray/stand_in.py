"""A small actor with the interface of a replica's; `body` says how it behaves."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

from fastapi_graph.backends.ray.errors import StartFailed
from fastapi_graph.backends.ray.messages import Boot, ReplicaAddress


class StandIn:
    async def __init__(self, boot: Boot) -> None:
        self.boot = boot
        self.listener: socket.socket | None = None
        self.journal = Path(boot.client_settings["journal"])
        self.note("made")

    def note(self, what: str) -> None:
        with (self.journal / self.boot.replica_id).open("a") as file:
            file.write(f"{what} {os.getpid()}\n")

    async def start(self) -> ReplicaAddress:
        self.note("start")
        if self.boot.offer.body == b"fail":
            raise StartFailed("B did not start: ValueError", b"encoded")
        if self.boot.offer.body == b"slow":
            await asyncio.sleep(1000)
        self.listener = socket.create_server(("127.0.0.1", 0))
        address = await self.address()
        assert address is not None
        return address

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def check_health(self) -> None:
        self.note("check")
        if self.boot.offer.body == b"sick":
            raise ValueError("sick")
        if self.boot.offer.body == b"hang":
            await asyncio.sleep(1000)

    async def reconfigure(self, user_config: bytes) -> None:
        self.note(f"reconfigure:{user_config.decode()}")

    async def drain(self, timeout_s: float) -> None:
        self.note(f"drain:{timeout_s:g}")

    async def address(self) -> ReplicaAddress | None:
        if self.listener is None:
            return None
        boot, port = self.boot, self.listener.getsockname()[1]
        return ReplicaAddress(
            boot.replica_id, boot.offer.name, boot.version, "127.0.0.1", port, "", "m"
        )
