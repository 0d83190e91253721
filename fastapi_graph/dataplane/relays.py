"""Streams among the arguments of a call: their items follow it over the connection.

In the arguments a `StreamRef` stands for each of them. The number of a stream is that of its
call and what comes after, so both ends know it. The server asks for items with CREDIT, as many
as its window has room for, and the client answers with ITEM, and with RESULT or ERROR at the end.
So nothing is read from a stream before the server has begun the call. A reader that has had
enough is announced with RELEASE.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

from fastapi_graph.context import Emit
from fastapi_graph.dataplane import codec
from fastapi_graph.dataplane.codec import Payload
from fastapi_graph.dataplane.frames import (
    Kind,
    Message,
    Part,
    pack_number,
    payload_of,
    payload_parts,
)
from fastapi_graph.dataplane.window import WINDOW, Room, Taken, cost
from fastapi_graph.errors import LocalProtocolError, NodeError
from fastapi_graph.graph.containers import rebuild
from fastapi_graph.raised import is_cancelled
from fastapi_graph.streams import ItemStream, streams_in

__all__ = ["Incoming", "Relays", "StreamRef", "attach", "detach", "stream_number"]

Send = Callable[..., None]
"""Sends a message: its kind, flags, number and content."""


@dataclasses.dataclass(frozen=True)
class StreamRef:
    """Stands in arguments for a stream."""

    index: int


def detach(arguments: Any) -> tuple[Any, list[ItemStream]]:
    """Return arguments with references in place of streams, and the streams."""
    streams = streams_in(arguments)
    refs = {stream: StreamRef(index) for index, stream in enumerate(streams)}
    return rebuild(arguments, ItemStream, refs.__getitem__), streams


def attach(arguments: Any, stream_of: Callable[[int], ItemStream]) -> Any:
    """Return arguments with streams in place of the references to them."""
    found: dict[int, ItemStream] = {}

    def put(ref: StreamRef) -> ItemStream:
        if ref.index not in found:
            found[ref.index] = stream_of(ref.index)
        return found[ref.index]

    return rebuild(arguments, StreamRef, put)


def stream_number(call: int, index: int) -> int:
    """Return the number of a stream among the arguments of a call."""
    return (call + index) % 0xFFFF_FFFF + 1


class Carrier(Protocol):
    """What sends the items: a peer."""

    def relay(self, number: int, relay: Relay) -> None:
        """Pass on what comes for a stream from now on."""

    def end_relay(self, number: int) -> None:
        """Pass it on no more."""

    def tell(self, kind: int, flags: int, number: int, *parts: Part) -> None:
        """Send a message, if there is a connection."""


class Relays:
    """The client's side: sends the items of a call's streams as they are asked for.

    Args:
        streams: The streams among the arguments.
        what: What messages call an item.
    """

    def __init__(self, streams: list[ItemStream], what: str) -> None:
        self._streams = streams
        self._what = what
        self._carrier: Carrier | None = None
        self._relays: dict[int, Relay] = {}

    @property
    def begun(self) -> bool:
        """Whether something has been read, so that the call cannot be made again."""
        return any(relay.begun for relay in self._relays.values())

    def start(self, carrier: Carrier, call: int) -> int:
        """Send items of this call from now on, and return the last number that is taken."""
        self._carrier = carrier
        number = call
        for index, stream in enumerate(self._streams):
            number = stream_number(call, index)
            self._relays[number] = relay = Relay(stream, carrier.tell, number, self._what)
            carrier.relay(number, relay)
        return number

    def stop(self) -> None:
        """Send nothing more; a stream of which nothing has been read can be sent again."""
        for number, relay in self._relays.items():
            relay.stop()
            if self._carrier is not None:
                self._carrier.end_relay(number)
        self._relays.clear()


class Relay:
    """Sends the items of one stream, as they are asked for."""

    def __init__(self, stream: ItemStream, tell: Send, number: int, what: str) -> None:
        self.begun = False
        self._stream = stream
        self._tell = tell
        self._number = number
        self._what = what
        self._room = Room(0)
        self._task: asyncio.Task[None] | None = None

    def received(self, message: Message) -> None:
        """Take what the server says of the stream."""
        if message.kind == Kind.RELEASE:
            self._stream.cancel()
            return
        self._room.grant(message.content)
        if self._task is None:
            self.begun = True
            self._task = asyncio.create_task(self._send_all(), name=self._what)

    def stop(self) -> None:
        """Send nothing more."""
        if self._task is not None:
            self._task.cancel()

    async def _send_all(self) -> None:
        try:
            async for item in self._stream:
                flags, parts = payload_parts(codec.encode(item, self._what))
                self._tell(Kind.ITEM, flags, self._number, *parts)
                await self._room.use(cost(*parts))
            self._tell(Kind.RESULT, 0, self._number)
        except asyncio.CancelledError as error:
            if is_cancelled():
                raise
            self._fail(error)  # somebody has ended the stream
        except Exception as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        short = NodeError(f"{type(error).__qualname__}: it is too long to be sent")
        for form in (error, short):
            with contextlib.suppress(LocalProtocolError):
                self._tell(Kind.ERROR, 0, self._number, codec.encode_exception(form).body)
                return


class Incoming:
    """The server's side of one stream: asks for its items.

    Args:
        tell: Sends to the client.
        number: The stream's number.
        what: What messages call an item.
    """

    def __init__(self, tell: Send, number: int, what: str) -> None:
        self._tell = tell
        self._number = number
        self._what = what
        self._inbox = asyncio.Queue[Message]()
        self._asked = 0  # the room that has been granted and not been used
        self._ended = False

    def received(self, message: Message) -> None:
        """Take an item, or the end, if it was asked for."""
        is_item = message.kind == Kind.ITEM
        if self._ended or (is_item and self._asked <= 0):
            return
        self._asked -= cost(message.content)
        self._ended = not is_item
        self._inbox.put_nowait(message)

    async def emit_all(self, emit: Emit) -> None:
        """Ask for items, and emit them.

        Raises:
            SerializationError: An item cannot be unpickled.
            Exception: What the stream raised.
        """
        taken, room = Taken(), WINDOW
        try:
            while True:
                if room:
                    self._asked += room
                    self._tell(Kind.CREDIT, 0, self._number, pack_number(room))
                message = await self._inbox.get()
                if message.kind != Kind.ITEM:
                    break
                await emit(codec.decode(payload_of(message), self._what))
                room = taken.add(cost(message.content))
        finally:
            if not self._ended:
                self._tell(Kind.RELEASE, 0, self._number)
        if message.kind == Kind.ERROR:
            error = codec.decode_exception(Payload(message.content, ()))
            try:
                raise error from error.__cause__
            finally:
                del error  # its traceback has this frame
