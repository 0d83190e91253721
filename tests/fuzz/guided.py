"""The connection machine under atheris, which looks for bytes that reach new code."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import atheris

sys.path.append(str(Path(__file__).parents[2]))

with atheris.instrument_imports(include=["fastapi_graph.dataplane"]):
    from fastapi_graph.dataplane.frames import CallHead, split_payload
    from tests.dataplane.pairs import drain, end, feed, opened

from fastapi_graph.errors import RemoteProtocolError


def receive(data: bytes) -> None:
    """Feed bytes to a machine in a state that the first of them chooses."""
    choice, data = data[:1], data[1:]
    state = choice[0] % 5 if choice else 0
    connection = end(("client", "server")[state % 2]) if state < 2 else opened()[state % 2]
    if state == 4:
        connection = end("client")
        feed(connection, drain(end("server")))
    middle = len(data) // 2
    try:
        for piece in (data[:middle], data[middle:]):
            for message in connection.receive_data(piece):
                with contextlib.suppress(ValueError):
                    CallHead.decode(message.content)
                with contextlib.suppress(ValueError):
                    split_payload(message.content, 0)
        connection.receive_eof()
    except RemoteProtocolError:
        assert connection.state == "closed"


atheris.Setup(sys.argv, receive)
atheris.Fuzz()
