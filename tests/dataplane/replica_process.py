"""A replica in a process of its own: `python replica_process.py IDENTITY SOCKET`."""

from __future__ import annotations

import asyncio
import os
import sys

from fastapi_graph.dataplane.server import ReplicaServer
from fastapi_graph.graph.options import DeploymentOptions
from fastapi_graph.replica import Replica


class Slow:
    async def work(self, name: int) -> tuple[int, int]:
        await asyncio.sleep(0.01)
        return name, os.getpid()

    async def hang(self) -> None:
        await asyncio.sleep(60)

    async def count(self, stop: int) -> object:
        for number in range(stop):
            yield number


async def main(identity: str, path: str) -> None:
    replica = Replica("Slow", DeploymentOptions(), "app.py:1")
    replica.host(Slow())
    secret = b"the graph's secret"
    server = ReplicaServer(replica, identity.encode(), secret, max_message_size=1 << 26)
    await server.listen_unix(path)
    print("listening", flush=True)
    await asyncio.sleep(60)


asyncio.run(main(*sys.argv[1:]))
