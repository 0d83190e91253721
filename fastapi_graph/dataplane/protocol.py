"""The shell around a connection: an `asyncio.Protocol` that moves bytes, and nothing else."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from typing import Protocol, cast

from fastapi_graph.dataplane.connection import Connection
from fastapi_graph.dataplane.frames import Kind, Message, Part
from fastapi_graph.errors import RemoteProtocolError

__all__ = ["Link", "Receiver"]

logger = logging.getLogger("fastapi_graph")

SILENCE_MS = 10_000  # after which what was sent and not acknowledged ends the connection
AT_ONCE = 4  # messages that are dealt with in one round of the event loop
HIGH_WATER = 1 << 20  # bytes in the transport above which we wait for the peer


class Receiver(Protocol):
    """Who gets what comes over a link. No method may block or raise."""

    def connected(self, link: Link) -> None:
        """Note that there is a transport, and that `lost` will be called."""

    def opened(self, link: Link) -> None:
        """Note that the handshake has succeeded."""

    def received(self, messages: list[Message]) -> None:
        """Take messages."""

    def lost(self, link: Link, error: Exception | None) -> None:
        """Note that nothing more will come; called once, also if it was never open."""


class Link(asyncio.Protocol):
    """Joins a connection to a transport.

    What is sent within one round of the event loop leaves in one write.

    Args:
        connection: The state machine.
        receiver: Who gets the messages.
        max_buffered: Bytes that may wait for a slow peer before the link is cut.
        handshake_timeout_s: Seconds after which a link that is not open is cut.
    """

    def __init__(
        self,
        connection: Connection,
        receiver: Receiver,
        *,
        max_buffered: int = 512 << 20,
        handshake_timeout_s: float = 10.0,
    ) -> None:
        self.connection = connection
        self.is_open = False
        self.peer = ""
        self._receiver = receiver
        self._max_buffered = max_buffered
        self._handshake_timeout_s = handshake_timeout_s
        self._timeout: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None
        self._paused = False
        self._scheduled = False
        self._delivering = False
        self._backlog: deque[Message] = deque()
        self._closing = False
        self._aborted = False
        self._error: Exception | None = None
        self._loop = asyncio.get_running_loop()

    # What the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast("asyncio.Transport", transport)  # uvloop's is none
        transport.set_write_buffer_limits(high=HIGH_WATER)
        self.peer = str(transport.get_extra_info("peername") or "a unix socket")
        _notice_silence(transport.get_extra_info("socket"))
        self._receiver.connected(self)
        self._timeout = self._loop.call_later(self._handshake_timeout_s, self._too_slow)
        self._flush()

    def data_received(self, data: bytes) -> None:
        try:
            messages = self.connection.receive_data(data)
        except RemoteProtocolError as error:
            self._refuse(error)
            return
        if not self.is_open:
            if messages and messages[0].kind == Kind.WELCOME:
                del messages[0]
                self.is_open = True
                self._cancel_timeout()
                self._flush()
                self._receiver.opened(self)
            else:
                self._flush()
        if self._backlog or len(messages) > AT_ONCE:
            self._backlog += messages
            if not self._delivering:
                self._deliver()
        elif messages:
            self._receiver.received(messages)

    def _deliver(self) -> None:
        """Pass on a few messages, and the others in the next round of the event loop.

        Between two rounds, what the first have led to is sent: the next process need not wait
        until the last one has been dealt with.
        """
        backlog = self._backlog
        # A part of them, at least: what is left never grows beyond a few reads.
        count = min(max(AT_ONCE, len(backlog) // 8), len(backlog))
        few = [backlog.popleft() for _ in range(count)]
        self._delivering = bool(backlog)
        if backlog:
            self._loop.call_soon(self._deliver)
        self._receiver.received(few)

    def eof_received(self) -> None:
        self.is_open = False
        try:
            self.connection.receive_eof()
        except RemoteProtocolError as error:
            self._error = error
        self.abort()  # closing would wait until a peer that has gone takes what is for it

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        self._cancel_timeout()
        if self._backlog:
            self._receiver.received(list(self._backlog))
            self._backlog.clear()
        self._receiver.lost(self, exc or self._error)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._flush()

    # What its owner calls

    def send(self, kind: int, flags: int, number: int, *parts: Part) -> None:
        """Send a message, with all others of this round of the event loop.

        Once the link has been aborted, it goes nowhere.

        Raises:
            LocalProtocolError: The connection is not open, or the message is too long.
        """
        connection = self.connection
        if connection.buffered > self._max_buffered:
            self._flush()  # it may be that the peer has only had no chance yet to take it
            if self._paused and connection.buffered > self._max_buffered and not self._aborted:
                waiting = connection.buffered
                logger.warning("%s: reads too slowly, %d bytes wait", self.peer, waiting)
                self.abort()
        if self._aborted:
            return
        connection.send(kind, flags, number, *parts)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._flush)

    def close(self) -> None:
        """Close once everything has been sent."""
        self._closing = True
        self._flush()

    def abort(self) -> None:
        """Close at once."""
        self._aborted = True
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()

    def _flush(self) -> None:
        self._scheduled = False
        transport, connection = self._transport, self.connection
        if transport is None or transport.is_closing():
            return
        while connection.has_more() and not self._paused and not transport.is_closing():
            transport.write(connection.data_to_send())
        if self._closing and not connection.has_more():
            transport.close()

    def _refuse(self, error: RemoteProtocolError) -> None:
        logger.warning("%s is disconnected: %s", self.peer, error)
        self._error = error
        self.is_open = False
        self.abort()

    def _too_slow(self) -> None:
        if not self.is_open:
            self._refuse(RemoteProtocolError("the handshake took too long"))

    def _cancel_timeout(self) -> None:
        if self._timeout is not None:
            self._timeout.cancel()
            self._timeout = None


def _notice_silence(connected: socket.socket | None) -> None:
    """Let the kernel end a TCP connection to a host that does not answer any more."""
    if connected is None or connected.family not in (socket.AF_INET, socket.AF_INET6):
        return
    for level, name, value in (
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 5),
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 2),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", 3),
        (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", SILENCE_MS),
    ):
        option = getattr(socket, name, None)  # some are Linux's own
        if option is not None:
            connected.setsockopt(level, option, value)
