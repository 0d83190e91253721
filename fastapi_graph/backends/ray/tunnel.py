"""Connections through Ray's actor calls, where no socket can be opened.

The same bytes as over a socket, so every feature works over a tunnel; each trip costs an actor
call, which is some twenty times slower.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi_graph.dataplane.protocol import Link

__all__ = ["CallReplica", "TunnelEnds", "open_tunnel"]

logger = logging.getLogger("fastapi_graph")

CallReplica = Callable[..., Awaitable[Any]]
"""Calls a method of a replica's actor: name of the actor, name of the method, arguments."""

POLL_S = 20.0
SILENCE_S = 60.0
HIGH_WATER = 1 << 20


class _Pipe(asyncio.Transport):
    """A transport that gathers what is written until somebody fetches it."""

    def __init__(self, link: Link, peer: str) -> None:
        super().__init__({"peername": peer})
        self.link = link
        self._buffer: list[bytes] = []
        self._size = 0
        self._high = HIGH_WATER
        self._paused = False
        self._closing = False
        self._lost = False
        self._wake = asyncio.Event()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = HIGH_WATER if high is None else high

    def get_write_buffer_size(self) -> int:
        return self._size

    def write(self, data: Any) -> None:
        self._buffer.append(bytes(data))
        self._size += len(data)
        if self._size > self._high and not self._paused:
            self._paused = True
            self.link.pause_writing()
        self._wake.set()

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        self._closing = True
        self._wake.set()

    def abort(self) -> None:
        self.close()
        asyncio.get_running_loop().call_soon(self.end, None)

    def end(self, error: Exception | None) -> None:
        """Tell the link, once, that there is no connection any more."""
        self._closing = True
        self._wake.set()
        if not self._lost:
            self._lost = True
            self.link.connection_lost(error)

    async def fetch(self) -> bytes | None:
        """Return what has been written, as soon as there is something; None at the end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(POLL_S):
                while not self._buffer and not self._closing:
                    self._wake.clear()
                    await self._wake.wait()
        data = b"".join(self._buffer)
        self._buffer.clear()
        self._size = 0
        if self._paused:
            self._paused = False
            self.link.resume_writing()
        return data if data or not self._closing else None

    def deliver(self, data: bytes) -> None:
        """Pass on what the peer has written."""
        if data and not self._lost:
            self.link.data_received(data)


class TunnelEnds:
    """The ends of tunnels in a replica.

    Args:
        new_link: Makes the link of a new connection.
    """

    def __init__(self, new_link: Callable[[], Link]) -> None:
        self._new_link = new_link
        self._pipes: dict[str, tuple[_Pipe, asyncio.TimerHandle]] = {}

    def open(self, tunnel: str) -> None:
        """Make the connection of a new tunnel."""
        pipe = _Pipe(self._new_link(), f"tunnel {tunnel}")
        self._pipes[tunnel] = pipe, self._silence(tunnel)
        pipe.link.connection_made(pipe)

    def send(self, tunnel: str, data: bytes) -> None:
        """Take bytes of a client."""
        if (pipe := self._heard(tunnel)) is not None:
            pipe.deliver(data)

    async def receive(self, tunnel: str) -> bytes | None:
        """Return bytes for a client, or None when the connection has ended."""
        pipe = self._heard(tunnel)
        data = None if pipe is None else await pipe.fetch()
        if data is None:
            self.end(tunnel)
        return data

    def end(self, tunnel: str) -> None:
        """Note that a client has gone."""
        found = self._pipes.pop(tunnel, None)
        if found is not None:
            found[1].cancel()
            found[0].end(None)

    def close(self) -> None:
        """End every tunnel."""
        for tunnel in tuple(self._pipes):
            self.end(tunnel)

    def _heard(self, tunnel: str) -> _Pipe | None:
        """Return the pipe of a client that is still there."""
        found = self._pipes.get(tunnel)
        if found is None:
            return None
        pipe, silence = found
        silence.cancel()
        self._pipes[tunnel] = pipe, self._silence(tunnel)
        return pipe

    def _silence(self, tunnel: str) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(SILENCE_S, self.end, tunnel)


_warned: set[str] = set()


async def open_tunnel(
    replica_id: str, call: CallReplica, factory: Callable[[], Link], *, wanted: bool
) -> Link:
    """Open a connection through actor calls.

    Args:
        replica_id: Which replica.
        call: Calls its actor.
        factory: Makes the link.
        wanted: Whether the settings ask for it; otherwise there is a warning.
    """
    link = factory()
    pipe = _Pipe(link, f"tunnel to {replica_id}")
    tunnel = secrets.token_hex(8)

    async def send() -> None:
        while (data := await pipe.fetch()) is not None:
            if data:
                await call(replica_id, "tunnel_send", tunnel, data)
        await call(replica_id, "tunnel_end", tunnel)

    async def receive() -> None:
        while (data := await call(replica_id, "tunnel_receive", tunnel)) is not None:
            if not wanted:
                _warn(replica_id)  # now that it answers: one that is dead needs no advice
            pipe.deliver(data)

    async def both() -> None:
        tasks = [asyncio.ensure_future(send()), asyncio.ensure_future(receive())]
        error: BaseException | None = None
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            error = next((task.exception() for task in done), None)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            pipe.end(error if isinstance(error, Exception) else None)

    await call(replica_id, "tunnel_open", tunnel)
    link.connection_made(pipe)
    task = asyncio.ensure_future(both())
    _running.add(task)
    task.add_done_callback(_running.discard)
    return link


_running: set[asyncio.Task[None]] = set()


def _warn(replica_id: str) -> None:
    if replica_id in _warned:
        return
    _warned.add(replica_id)
    logger.warning(
        "%s cannot be reached by a direct connection; its calls go through Ray, which is "
        "much slower: let processes of the cluster reach each other by TCP (port_range), or "
        "set transport='ray' if this is meant",
        replica_id,
    )
