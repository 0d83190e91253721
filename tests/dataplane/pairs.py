"""Two ends of a connection, joined without a socket."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from fastapi_graph.dataplane.connection import Connection
from fastapi_graph.dataplane.frames import HEADER, Message

SECRET = b"the graph's secret"
IDENTITY = b"replica-1@v1"

Cut = Callable[[bytes], Iterable[bytes]]


def end(role: Any, *, secret: bytes = SECRET, identity: bytes = IDENTITY, **kwargs: Any) -> Any:
    """Return one end."""
    return Connection(role, identity, secret, **kwargs)


def whole(data: bytes) -> Iterator[bytes]:
    yield data


def one_by_one(data: bytes) -> Iterator[bytes]:
    for place in range(len(data)):
        yield data[place : place + 1]


def cut_at_random(seed: int) -> Cut:
    source = random.Random(seed)

    def cut(data: bytes) -> Iterator[bytes]:
        place = 0
        while place < len(data):
            size = source.choice((1, 2, 9, 10, 11, 300, 4096, 1 << 20))
            yield data[place : place + size]
            place += size

    return cut


def drain(connection: Connection) -> bytes:
    """Return all that it has to send."""
    data = b""
    while connection.has_more():
        data += connection.data_to_send()
    return data


def feed(connection: Connection, data: bytes, cut: Cut = whole) -> list[Message]:
    """Give it bytes and return what came of them."""
    return [message for piece in cut(data) for message in connection.receive_data(piece)]


def opened(cut: Cut = whole, **kwargs: Any) -> tuple[Connection, Connection]:
    """Return a client and a server that have shaken hands."""
    client, server = end("client", **kwargs), end("server", **kwargs)
    feed(client, drain(server), cut)
    feed(server, drain(client), cut)
    feed(client, drain(server), cut)
    assert (client.state, server.state) == ("open", "open")
    return client, server


def frame(kind: int, content: bytes = b"", *, flags: int = 0, number: int = 0) -> bytes:
    """Return a frame as no `Connection` might send it."""
    return HEADER.pack(len(content), kind, flags, number) + content


def frames_of(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield kind, flags, number and content of each frame."""
    place = 0
    while place < len(data):
        size, kind, flags, number = HEADER.unpack_from(data, place)
        place += HEADER.size + size
        yield kind, flags, number, data[place - size : place]
