"""The server side: a replica's calls, as they come in over its links."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import ssl
from pathlib import Path
from typing import Any

import anyio

from fastapi_graph.context import eager_task
from fastapi_graph.dataplane import codec
from fastapi_graph.dataplane.codec import Payload
from fastapi_graph.dataplane.connection import Connection
from fastapi_graph.dataplane.frames import (
    BUFFERS,
    KEEP,
    KEPT,
    STREAM,
    WITH_KEPT,
    WITH_STREAMS,
    CallHead,
    Kind,
    Load,
    Message,
    Part,
    pack_number,
    payload_parts,
    split_payload,
    unpack_number,
)
from fastapi_graph.dataplane.protocol import Link
from fastapi_graph.dataplane.relays import Incoming, attach, stream_number
from fastapi_graph.dataplane.tracing import attach_trace
from fastapi_graph.dataplane.values import KEPT_AT_MOST, LARGE, Exchange, Keeper, Kept
from fastapi_graph.dataplane.window import Room, cost
from fastapi_graph.errors import (
    DeadlineExceededError,
    LocalProtocolError,
    NodeError,
    SerializationError,
)
from fastapi_graph.graph.containers import rebuild
from fastapi_graph.raised import is_cancelled
from fastapi_graph.replica import Replica
from fastapi_graph.request import Attempt, Request, Scope, current_attempt, current_scope
from fastapi_graph.streams import ItemStream

__all__ = ["ReplicaServer"]

logger = logging.getLogger("fastapi_graph")

TLS_HANDSHAKE_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 5.0  # for clients to take what has been sent to them


class ReplicaServer:
    """Lets clients call a replica.

    Args:
        replica: What they call.
        identity: Which replica of which version it is; clients must mean the same.
        secret: What clients must have.
        max_message_size: Bytes that a call may have.
        keeper: Keeps large values, and those that were deposited.
        exchange: Moves large values; None: they travel like small ones.
        max_connections: Links that may be open at once; more are refused.
    """

    def __init__(
        self,
        replica: Replica,
        identity: bytes,
        secret: bytes,
        *,
        max_message_size: int,
        keeper: Keeper | None = None,
        exchange: Exchange | None = None,
        max_connections: int = 4096,
    ) -> None:
        self.replica = replica
        self.keeper = Keeper() if keeper is None else keeper
        self.exchange = exchange
        self.draining = False
        self._identity = identity
        self._secret = secret
        self._max_message_size = max_message_size
        self._max_connections = max_connections
        self._servers: list[asyncio.Server] = []
        self._unix_path: Path | None = None
        self._clients: set[_Client] = set()
        if replica.models is not None:
            replica.models.listeners.append(self._say_models)
        self._idle: asyncio.Event | None = None
        self._left: asyncio.Event | None = None

    @property
    def clients(self) -> int:
        """How many links are open."""
        return sum(client.link.is_open for client in self._clients)

    @property
    def calls(self) -> int:
        """How many calls have not been answered."""
        return sum(len(client.calls) for client in self._clients)

    def link(self) -> Link:
        """Return a new link, for a transport that a client has opened."""
        client = _Client(self)
        connection = Connection(
            "server", self._identity, self._secret, max_message_size=self._max_message_size
        )
        client.link = Link(connection, client)
        return client.link

    async def listen_unix(self, path: str) -> None:
        """Listen on a unix socket that only this user may open."""
        before = os.umask(0o177)
        try:
            server = await asyncio.get_running_loop().create_unix_server(self._accept, path)
        finally:
            os.umask(before)
        self._unix_path = Path(path)
        self._servers.append(server)

    async def listen_tcp(
        self, host: str, ports: tuple[int, int] | None, context: ssl.SSLContext | None
    ) -> int:
        """Listen on a TCP port, and return it.

        Args:
            host: Address to bind.
            ports: First and last port to try; None for any.
            context: For TLS.

        Raises:
            OSError: Every port is taken.
        """
        loop = asyncio.get_running_loop()
        for port in range(ports[0], ports[1] + 1) if ports else (0,):
            try:
                server = await loop.create_server(
                    self._accept,
                    host,
                    port,
                    ssl=context,
                    ssl_handshake_timeout=TLS_HANDSHAKE_TIMEOUT_S if context else None,
                )
            except OSError as error:
                last = error
                continue
            self._servers.append(server)
            bound: int = server.sockets[0].getsockname()[1]
            return bound
        raise OSError(f"no free port of {ports} on {host}: {last}")

    def _accept(self) -> asyncio.Protocol:
        if len(self._clients) >= self._max_connections:
            logger.warning(
                "%s: a connection is refused, %d are open", self.replica.name, len(self._clients)
            )
            return _Refused()
        return self.link()

    async def drain(self, timeout_s: float) -> None:
        """Take no more calls, and wait until those in progress have been answered.

        Args:
            timeout_s: Seconds after which those that are left are cancelled.
        """
        self.draining = True
        for client in self._clients:
            client.say_goodbye()
        self._idle = asyncio.Event()
        if self.calls:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._idle.wait()
        await self._cancel_calls()

    async def close(self) -> None:
        """Close every link and listen no more; calls in progress are cancelled."""
        for server in self._servers:
            server.close()
        for client in tuple(self._clients):
            client.link.close()
        await self._cancel_calls()
        self._left = asyncio.Event()
        if self._clients:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._left.wait()
        for client in tuple(self._clients):
            client.link.abort()
        if self._unix_path is not None:
            self._unix_path.unlink(missing_ok=True)

    async def _cancel_calls(self) -> None:
        tasks = [task for client in self._clients for task in client.calls.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=1)

    def connected(self, client: _Client) -> None:
        """Note that there is a link; where TLS fails, there never is."""
        self._clients.add(client)

    def _say_models(self, model_ids: list[str]) -> None:
        for client in self._clients:
            client.say_models(model_ids)

    def forget(self, client: _Client) -> None:
        """Note that a link has been lost."""
        self._clients.discard(client)
        if self._left is not None and not self._clients:
            self._left.set()

    def answered(self) -> None:
        """Note that a call has ended."""
        if self._idle is not None and not self.calls:
            self._idle.set()


class _Refused(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


class _Client:
    """A client as the server sees it: one link, and the calls that came over it."""

    link: Link

    def __init__(self, server: ReplicaServer) -> None:
        self.calls: dict[int, asyncio.Task[None]] = {}
        self._server = server
        self._replica = server.replica
        self._kept: set[int] = set()
        self._streams: dict[int, Room] = {}
        self._incoming: dict[int, Incoming] = {}
        self._reading: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.get_running_loop()

    def connected(self, link: Link) -> None:
        self._server.connected(self)

    def opened(self, link: Link) -> None:
        if self._server.draining:
            self.say_goodbye()
        if (models := self._replica.models) is not None:
            self.say_models(models.model_ids)

    def lost(self, link: Link, error: Exception | None) -> None:
        self._server.forget(self)
        self.cancel_all()

    def cancel_all(self) -> None:
        """Cancel every call: nobody waits for an answer."""
        for number in tuple(self.calls):
            self._cancel(number)
        for number in self._kept:
            self._server.keeper.release(number)
        self._kept.clear()

    def say_goodbye(self) -> None:
        """Tell the client to send its calls elsewhere."""
        if self.link.is_open:
            self.link.send(Kind.GOAWAY, 0, 0)

    def say_models(self, model_ids: list[str]) -> None:
        """Tell the client which models the replica holds."""
        if self.link.is_open:
            self.link.send(Kind.MODELS, 0, 0, "\n".join(model_ids).encode())

    def received(self, messages: list[Message]) -> None:
        for message in messages:
            kind = message.kind
            if kind == Kind.CALL:
                self._start(message)
            elif kind == Kind.CANCEL:
                self._cancel(message.number)
            elif kind == Kind.CREDIT:
                if (room := self._streams.get(message.number)) is not None:
                    room.grant(message.content)
            elif kind == Kind.ITEM or kind == Kind.RESULT or kind == Kind.ERROR:
                if (incoming := self._incoming.get(message.number)) is not None:
                    incoming.received(message)
            elif kind == Kind.RELEASE:
                self._kept.discard(message.number)
                self._release(message.number)
            elif kind == Kind.PING:
                replica = self._replica
                load = Load(replica.ongoing, replica.queued, replica.abandoned)
                self.link.send(Kind.PONG, 0, 0, load.encode())

    def _release(self, number: int) -> None:
        if number <= KEPT_AT_MOST:
            self._server.keeper.release(number)
        elif self._server.exchange is not None:
            self._server.exchange.discard(number)

    async def _deposited(self, number: int, what: str) -> Any:
        if number <= KEPT_AT_MOST:
            return self._server.keeper.release(number)
        exchange = self._server.exchange
        return None if exchange is None else await exchange.collect(number, what)

    def _start(self, message: Message) -> None:
        number = message.number
        if self._server.draining:
            self.link.send(Kind.GOAWAY, 0, number)
            return
        task = eager_task(asyncio.Task, self._serve(message), self._loop, self._replica.name)
        if not task.done():
            self.calls[number] = task
            task.add_done_callback(lambda task: self._ended(number, task))

    def _ended(self, number: int, task: asyncio.Task[None]) -> None:
        self.calls.pop(number, None)
        if task.cancelled():
            self._confirm(number)
        self._server.answered()

    def _cancel(self, number: int) -> None:
        task = self.calls.get(number)
        if task is not None:
            task.cancel()
            if (room := self._streams.get(number)) is not None:
                room.close()
        else:  # it was answered already, or never came whole
            self._confirm(number)

    def _confirm(self, number: int) -> None:
        """Tell the client that a call it has cancelled has come to an end."""
        if self.link.is_open:
            self.link.send(Kind.CANCEL, 0, number)

    async def _serve(self, message: Message) -> None:
        """Run one call and answer it."""
        _, flags, number, content = message
        label, method = self._replica.name, "__call__"
        streams: dict[int, ItemStream] = {}
        try:
            head, start = CallHead.decode(content)
            method = head.method
            if method != "__call__":
                label = f"{label}.{method}"
            if flags & KEPT:
                what = self._what(label, "an argument")
                deposited = await self._deposited(unpack_number(content, start), what)
                if deposited is None:
                    raise SerializationError(f"{label}: the arguments are not there any more")
                args, kwargs = deposited
            else:
                if flags & BUFFERS:
                    payload = split_payload(content, start)
                else:
                    payload = Payload(memoryview(content)[start:], ())
                args, kwargs = codec.decode(payload, self._what(label, "an argument"))
            if flags & WITH_KEPT:
                args, kwargs = await self._fetched((args, kwargs))
            if flags & WITH_STREAMS:
                what = self._what(label, "an item of an argument")
                args, kwargs = attach(
                    (args, kwargs), lambda index: self._open(number, index, what, streams)
                )
            if head.context:
                attach_trace(head.context)
            if head.attempt > 1:
                current_attempt.set(Attempt(number=head.attempt))
            scope = Scope(Request.decode(head.request) if head.request else None)
            if head.timeout_s != math.inf:
                if head.timeout_s <= 0:
                    raise DeadlineExceededError(f"{label}: the deadline passed before it started")
                scope.deadline = self._loop.time() + head.timeout_s
            current_scope.set(scope)
            if flags & STREAM:
                await self._stream(number, method, args, kwargs, label, scope)
                self._say_degraded(number, scope)
                self.link.send(Kind.RESULT, 0, number)
                return
            result = await self._replica.call(method, args, kwargs)
            payload = codec.encode(result, self._what(label, "the result"))
            self._say_degraded(number, scope)
            exchange = self._server.exchange
            if flags & KEEP and exchange and payload.size >= LARGE:
                keeper = self._server.keeper
                kept = keeper.reserve()
                keeper.keep(kept, await exchange.put(kept, result, payload))
                self._kept.add(kept)
                self.link.send(Kind.RESULT, KEPT, number, pack_number(kept))
            else:
                self._answer(Kind.RESULT, number, payload)
        except asyncio.CancelledError as error:
            if is_cancelled():
                raise  # the client does not wait
            self._fail(number, error)  # the node, or what pickles its result, has raised it
        except Exception as error:
            self._replica.contain(error, method)
            self._fail(number, error)
        except BaseException as error:
            # In a task it would end the actor's event loop, and every other call with it.
            where = f"(bound at {self._replica.where})"
            self._fail(number, NodeError(f"{label} raised {error!r} {where}"))
        finally:
            for stream_, stream in streams.items():
                del self._incoming[stream_]
                stream.abort()

    def _open(self, call: int, index: int, what: str, streams: dict[int, ItemStream]) -> ItemStream:
        """Return a stream among the arguments of a call, and note it."""
        number = stream_number(call, index)
        incoming = self._incoming[number] = Incoming(self._tell, number, what)
        stream = ItemStream(incoming.emit_all, self._loop, what, self._reading)
        streams[number] = stream
        return stream

    def _tell(self, kind: int, flags: int, number: int, *parts: Part) -> None:
        if self.link.is_open:
            self.link.send(kind, flags, number, *parts)

    async def _stream(
        self,
        number: int,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        label: str,
        scope: Scope,
    ) -> None:
        room = self._streams[number] = Room()
        what = self._what(label, "an item")

        async def emit(item: Any) -> None:
            if room.closed:  # and the generator has not minded that it was cancelled
                raise anyio.ClosedResourceError
            self._say_degraded(number, scope)
            flags, parts = payload_parts(codec.encode(item, what))
            self.link.send(Kind.ITEM, flags, number, *parts)
            await room.use(cost(*parts))

        try:
            await self._replica.stream(method, args, kwargs, emit)
        finally:
            del self._streams[number]

    def _say_degraded(self, number: int, scope: Scope) -> None:
        """Say, before the answer, which deployments below had a fallback answer for them."""
        if scope.degraded and scope.degraded != scope.said:
            scope.said = scope.degraded
            self.link.send(Kind.DEGRADED, 0, number, "\n".join(scope.degraded).encode())

    def _what(self, label: str, part: str) -> str:
        return f"{label} (bound at {self._replica.where}): {part}"

    async def _fetched(self, arguments: Any) -> Any:
        """Return arguments with the values that other replicas keep."""
        wanted: dict[Kept, Any] = {}
        rebuild(arguments, Kept, lambda kept: wanted.setdefault(kept, kept))
        exchange = self._server.exchange
        assert exchange is not None
        values = await asyncio.gather(*map(exchange.fetch, wanted))
        found = dict(zip(wanted, values, strict=True))
        return rebuild(arguments, Kept, found.__getitem__)

    def _answer(self, kind: int, number: int, payload: Payload) -> None:
        flags, parts = payload_parts(payload)
        self.link.send(kind, flags, number, *parts)

    def _fail(self, number: int, error: BaseException) -> None:
        short = NodeError(f"{type(error).__qualname__}: it is too long to be sent")
        for form in (error, short):
            with contextlib.suppress(LocalProtocolError):  # too long, or the client has gone
                self._answer(Kind.ERROR, number, codec.encode_exception(form))
                return
