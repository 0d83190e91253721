"""The actor that hosts a replica: the same `Replica` as in-process, behind a server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped,unused-ignore]
import ray

from fastapi_graph.backends.ray.actors import Actors
from fastapi_graph.backends.ray.calls import Calls, identity_of, machine_id
from fastapi_graph.backends.ray.errors import StartFailed
from fastapi_graph.backends.ray.messages import Boot, ReplicaAddress, View
from fastapi_graph.backends.ray.offers import Body
from fastapi_graph.backends.ray.security import server_context
from fastapi_graph.backends.ray.session import find_controller, follow
from fastapi_graph.backends.ray.tunnel import TunnelEnds
from fastapi_graph.dataplane import codec
from fastapi_graph.dataplane.memory import SPARE_AT_MOST_S
from fastapi_graph.dataplane.segments import LEFT_AT_MOST_S, Segments, is_private
from fastapi_graph.dataplane.server import ReplicaServer
from fastapi_graph.dataplane.values import Keeper
from fastapi_graph.directory import Directory
from fastapi_graph.executor import Caller
from fastapi_graph.graph.containers import rebuild
from fastapi_graph.graph.plan import HandleRef
from fastapi_graph.logs import log_to_stderr
from fastapi_graph.replica import Replica

__all__ = ["ReplicaActor"]

logger = logging.getLogger("fastapi_graph")

CLOSE_TIMEOUT_S = 3.0
"""Seconds that the user's `close()` has at least."""


class ReplicaActor:
    """One replica. Made as a Ray actor by the controller, which calls what is public here.

    Args:
        boot: What it is.
    """

    async def __init__(self, boot: Boot) -> None:  # type: ignore[misc]  # Ray awaits it
        self._boot = boot
        # Before Ray's own, which are those of whichever process made the controller.
        sys.path[:] = dict.fromkeys((*boot.sys_path, *sys.path))
        log_to_stderr(boot.client_settings.get("log_format", "text"))
        self._loop = asyncio.get_running_loop()
        self._segments: Segments | None = None
        if shared_memory := boot.client_settings["shared_memory"]:
            segments = Segments(boot.replica_id)
            reserve = await asyncio.to_thread(_object_store_size)
            self._segments = segments if segments.open(reserve) else None
        self._actors = Actors(
            boot.namespace, _here, shared_memory=shared_memory, segments=self._segments
        )
        self._keeper = Keeper()
        self._tasks: set[asyncio.Task[None]] = set()
        self._controller: Any = None
        self._replica: Replica | None = None
        self._server: ReplicaServer | None = None
        self._tunnels: TunnelEnds | None = None
        self._address: ReplicaAddress | None = None
        self._calls: Calls | None = None
        self._views: asyncio.Task[None] | None = None
        if boot.lifetime == "app":
            self._spawn(self._leave_if_orphaned())
        if self._segments is not None:
            self._spawn(self._sweep(self._segments))

    # What the controller calls

    async def start(self) -> ReplicaAddress:
        """Construct the user's object and listen.

        Raises:
            StartFailed: The user's code failed.
        """
        offer = self._boot.offer
        try:
            await self._construct()
        except Exception as error:
            reason = (
                f"{offer.name} (bound at {offer.where}) did not start: "
                f"{type(error).__name__}: {error}"
            )
            raise StartFailed(reason, bytes(codec.encode_exception(error).body)) from None
        self._address = await self._listen()
        return self._address

    async def run(self) -> None:
        """Never return: whoever waits for this learns when the process has died."""
        await asyncio.Event().wait()

    async def address(self) -> ReplicaAddress | None:
        """Return where it listens; None if it has not started."""
        return self._address

    async def check_health(self) -> None:
        """Raise what the user's `check_health()` raises."""
        if self._replica is not None:
            await self._replica.check_health()

    async def reconfigure(self, user_config: bytes) -> None:
        """Pass a new `user_config` to the user's object."""
        if self._replica is not None:
            await self._replica.reconfigure(cloudpickle.loads(user_config))

    async def drain(self, timeout_s: float) -> None:
        """Take no more calls, finish those in progress, close the user's object."""
        if self._server is not None and self._replica is not None:
            deadline = self._loop.time() + timeout_s
            await self._server.drain(timeout_s)
            if pending := self._known.pending:  # calls that nobody waits for
                await asyncio.wait(pending, timeout=max(0.0, deadline - self._loop.time()))
            with contextlib.suppress(TimeoutError):
                left = deadline - self._loop.time()
                async with asyncio.timeout(max(CLOSE_TIMEOUT_S, left)):
                    await self._replica.close()
            await self._server.close()
        if self._tunnels is not None:
            self._tunnels.close()
        if self._calls is not None:
            await self._calls.close()
        if self._segments is not None:
            self._segments.close()

    # What clients call where no socket can be opened

    async def tunnel_open(self, tunnel: str) -> None:
        if self._tunnels is not None:
            self._tunnels.open(tunnel)

    async def tunnel_send(self, tunnel: str, data: bytes) -> None:
        if self._tunnels is not None:
            self._tunnels.send(tunnel, data)

    async def tunnel_receive(self, tunnel: str) -> bytes | None:
        return None if self._tunnels is None else await self._tunnels.receive(tunnel)

    async def tunnel_end(self, tunnel: str) -> None:
        if self._tunnels is not None:
            self._tunnels.end(tunnel)

    # What other processes call for large values

    async def kept(self, number: int) -> list[Any]:
        """Return a reference to a value that is kept, in a list.

        Raises:
            KeyError: It is not kept any more.
        """
        return [await self._actors.reference(self._keeper.get(number))]

    async def deposit(self, value: Any) -> int:
        """Keep the arguments of a call that is about to come, and return their number."""
        return self._keeper.deposit(value)

    # The user's object

    async def _construct(self) -> None:
        boot = self._boot
        body: Body = cloudpickle.loads(boot.offer.body)
        target = body.load()
        config = boot.offer.user_config
        options = body.interface.options.model_copy(
            update={
                # Callers queue, so that a call may go to whichever replica is free first.
                "max_queued_requests": -1,
                "user_config": None if config is None else cloudpickle.loads(config),
            }
        )
        directory = self._directory()
        args, kwargs = rebuild((body.args, body.kwargs), HandleRef, directory.handle)
        replica = Replica(boot.offer.name, options, boot.offer.where, boot.replica_id)
        await replica.construct(target, args, kwargs)
        self._replica = replica

    def _directory(self) -> Directory:
        key, interfaces, plans, virtual = cloudpickle.loads(self._boot.directory)
        self._calls = Calls(
            interfaces,
            self._boot.version,
            self._boot.client_settings,
            suspect=self._suspect,
            actors=self._actors,
        )
        self._known = Directory(
            key,
            interfaces=interfaces.__getitem__,
            plans=plans,
            virtual=virtual,
            caller_of=self._caller,
            home=lambda: self._loop,
        )
        return self._known

    def _caller(self, deployment: str) -> Caller:
        """Return what calls a deployment; the first makes this replica follow the views."""
        assert self._calls is not None
        if self._views is None:
            self._views = self._loop.create_task(
                follow(self._find_controller, self._boot.version, self._use)
            )
        return self._calls.clients[deployment]

    def _use(self, view: View) -> None:
        assert self._calls is not None
        self._calls.use(view, self._boot.secret)

    async def _find_controller(self) -> Any:
        if self._controller is None:
            self._controller = await asyncio.to_thread(
                find_controller, self._boot.graph, self._boot.namespace
            )
        return self._controller

    def _suspect(self, replica_id: str) -> None:
        if self._controller is not None:
            self._controller.suspect.remote(replica_id)

    # Listening

    async def _listen(self) -> ReplicaAddress:
        boot, settings = self._boot, self._boot.client_settings
        assert self._replica is not None
        server = ReplicaServer(
            self._replica,
            identity_of(boot.replica_id, boot.version),
            boot.secret,
            max_message_size=settings["max_message_size"],
            keeper=self._keeper,
            exchange=self._actors,
        )
        host = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        path = ""
        port = 0
        if settings["transport"] != "ray":
            path = _new_socket_path()
            await server.listen_unix(path)
            port = await server.listen_tcp(host, settings["port_range"], server_context())
        self._server = server
        self._tunnels = TunnelEnds(server.link)
        return ReplicaAddress(
            replica_id=boot.replica_id,
            deployment=boot.offer.name,
            version=boot.version,
            host=host,
            port=port,
            unix_path=path,
            machine=machine_id(),
        )

    # The end

    async def _sweep(self, segments: Segments) -> None:
        while True:
            await asyncio.to_thread(segments.sweep)
            for _ in range(math.ceil(2 * LEFT_AT_MOST_S / SPARE_AT_MOST_S)):
                await asyncio.sleep(SPARE_AT_MOST_S / 2)
                await asyncio.to_thread(segments.trim)

    async def _leave_if_orphaned(self) -> None:
        """End the process once it has had neither controller nor client for too long."""
        timeout = self._boot.orphan_timeout_s
        last_seen = time.monotonic()
        while True:
            await asyncio.sleep(timeout / 5)
            if self._server is not None and self._server.clients:
                last_seen = time.monotonic()
                continue
            try:
                async with asyncio.timeout(timeout / 5):
                    await (await self._find_controller()).ping.remote()
            except Exception as error:
                logger.debug("the controller does not answer: %s", error)
                self._controller = None
            else:
                last_seen = time.monotonic()
            if time.monotonic() - last_seen > timeout:
                logger.warning("%s: no controller and no client, it ends", self._boot.replica_id)
                if self._segments is not None:
                    self._segments.close()
                os._exit(0)

    def _spawn(self, coroutine: Any) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _object_store_size() -> int:
    """Return how many bytes the object store of this node may have."""
    here = ray.get_runtime_context().get_node_id()
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["NodeID"] == here:
            return int(node["Resources"].get("object_store_memory", 0))
    return 0


async def _here(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return await coroutine


def _new_socket_path() -> str:
    """Return a path for a unix socket, and remove those of processes that were killed."""
    folder = Path(tempfile.gettempdir()) / f"fastapi_graph-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if not is_private(folder):
        folder = Path(tempfile.mkdtemp(prefix="fastapi_graph-"))  # somebody else was first
    for path in folder.glob("*.sock"):
        pid = path.name.partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            path.unlink(missing_ok=True)
    return str(folder / f"{os.getpid()}-{secrets.token_hex(4)}.sock")
