"""Streams among the arguments of a call: their items follow it over the connection.

In the arguments a `StreamRef` stands for each of them. The number of a stream is that of its
call and what comes after, so both ends know it. The server asks for each item with CREDIT, and
the client answers with ITEM, or with RESULT or ERROR at the end. So nothing is read from a
stream before the server has begun the call, and never more than one item is on its way. A
reader that has had enough is announced with RELEASE.
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
from fastapi_graph.dataplane.frames import Kind, Message, Part, payload_of, payload_parts
from fastapi_graph.errors import LocalProtocolError, NodeError
from fastapi_graph.graph.containers import rebuild
from fastapi_graph.streams import ItemStream, streams_in

__all__ = ["Incoming", "Relays", "StreamRef", "attach", "detach", "stream_number"]

Send = Callable[..., None]
"""Sends a message: its kind, flags, number and content."""

_END = object()


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
    """Sends the items of one stream, each when it is asked for."""

    def __init__(self, stream: ItemStream, tell: Send, number: int, what: str) -> None:
        self.begun = False
        self._stream = stream
        self._tell = tell
        self._number = number
        self._what = what
        self._task: asyncio.Task[None] | None = None

    def received(self, message: Message) -> None:
        """Take what the server says of the stream."""
        if message.kind == Kind.RELEASE:
            self._stream.cancel()
        elif self._task is None or self._task.done():
            self.begun = True
            self._task = asyncio.create_task(self._send_next(), name=self._what)

    def stop(self) -> None:
        """Send nothing more."""
        if self._task is not None:
            self._task.cancel()

    async def _send_next(self) -> None:
        try:
            item = await anext(self._stream, _END)
            if item is _END:
                self._tell(Kind.RESULT, 0, self._number)
                return
            flags, parts = payload_parts(codec.encode(item, self._what))
            self._tell(Kind.ITEM, flags, self._number, *parts)
        except asyncio.CancelledError as error:
            if (task := asyncio.current_task()) is not None and task.cancelling():
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
        self._asked: asyncio.Future[Message] | None = None

    def received(self, message: Message) -> None:
        """Take an item, or the end, if it was asked for."""
        if self._asked is not None and not self._asked.done():
            self._asked.set_result(message)

    async def emit_all(self, emit: Emit) -> None:
        """Ask for each item, and emit it.

        Raises:
            SerializationError: An item cannot be unpickled.
            Exception: What the stream raised.
        """
        ended = False
        try:
            while True:
                self._asked = asyncio.get_running_loop().create_future()
                self._tell(Kind.CREDIT, 0, self._number)
                message = await self._asked
                if message.kind != Kind.ITEM:
                    ended = True
                    break
                await emit(codec.decode(payload_of(message), self._what))
        finally:
            if not ended:
                self._tell(Kind.RELEASE, 0, self._number)
        if message.kind == Kind.ERROR:
            error = codec.decode_exception(Payload(message.content, ()))
            try:
                raise error from error.__cause__
            finally:
                del error  # its traceback has this frame
