"""Streams over HTTP on real servers: clients that leave, and clients that read slowly."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path
from socket import SHUT_RDWR
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosedError
from websockets.sync.client import connect

from tests.faults.servers import Server, gunicorn, read_all, uvicorn, wait_until

STREAMS = """
from collections.abc import AsyncIterator, Iterator

made = 0

@deployment
async def endless(value: int) -> AsyncIterator[str]:
    global made
    made = 0
    say("node", value, "begins")
    try:
        while True:
            made += 1
            yield "x" * 10_000
    finally:
        say("node", value, "was closed")

@deployment
def endless_in_thread(value: int) -> Iterator[str]:
    try:
        while True:
            time.sleep(0.01)
            yield "x"
    finally:
        say("node", value, "was closed")

@deployment
async def idle(value: int) -> AsyncIterator[str]:
    try:
        yield "x"
        await asyncio.sleep(60)
    finally:
        say("node", value, "was closed")

@deployment
async def fails(value: int) -> AsyncIterator[bytes]:
    yield b"begun"
    raise ValueError("secret weights")

@deployment
async def slow(value: int) -> AsyncIterator[int]:
    for n in range(value):
        yield n
        await asyncio.sleep(0.3)

@app.get("/made")
async def count():
    return made

for stream in (endless, endless_in_thread, idle, fails, slow):
    with InputNode(int) as x:
        dag = stream.bind(x)
    app.include_router(graph_router(dag), prefix=f"/{stream.name}")
"""

SERVERS = {"uvicorn": uvicorn, "gunicorn": gunicorn}
KINDS = pytest.mark.parametrize("kind", SERVERS)


@KINDS
def test_a_client_that_leaves_closes_the_generator(kind: str, tmp_path: Path) -> None:
    with SERVERS[kind](tmp_path, STREAMS) as server:
        for number, path in enumerate(("/endless", "/endless_in_thread", "/idle")):
            connection = server.send(path, str(number).encode())
            assert b"200 OK" in connection.recv(1024)
            connection.close()
            server.logged(f"node {number} was closed", timeout_s=1)
            server.logged(f"499 POST {path}: the client left", timeout_s=1)
        assert "Traceback" not in server.log


@KINDS
def test_a_slow_client_slows_the_generator(kind: str, tmp_path: Path) -> None:
    with SERVERS[kind](tmp_path, STREAMS) as server:
        connection = server.send("/endless", b"7")
        assert b"200 OK" in connection.recv(1024)

        def made() -> int:
            return int(httpx.get(f"{server.url}/made").json())

        def settled() -> bool:
            before = made()
            time.sleep(0.1)
            return made() == before

        wait_until(settled, what="the generator waits")
        # What the buffers of both sockets hold, and no more: an unread stream would never end.
        stopped = made()
        assert stopped * 10_000 < 20e6
        while len(connection.recv(1 << 20)) and made() == stopped:
            pass
        assert made() > stopped
        connection.close()
        server.logged("node 7 was closed", timeout_s=1)


@KINDS
def test_chunks_that_break_off_are_an_incomplete_body(kind: str, tmp_path: Path) -> None:
    with (
        SERVERS[kind](tmp_path, STREAMS) as server,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        server.post("/fails", 1)
    assert "ValueError: secret weights" in server.log
    assert re.search(r"fails: the stream failed after 1 items", server.log)


@KINDS
def test_a_stop_lets_a_stream_finish(kind: str, tmp_path: Path) -> None:
    with SERVERS[kind](tmp_path, STREAMS) as server:
        connection = server.send("/slow", b"3")
        first = connection.recv(1024)
        assert b"200 OK" in first
        server.process.send_signal(signal.SIGTERM)
        answer = first + read_all(connection)
        assert answer.count(b"\n\r\n") >= 3
        assert answer.endswith(b"0\r\n\r\n")
        assert server.process.wait(10) in (0, -signal.SIGTERM)
        assert "Traceback" not in server.log


def items_of(server: Server, path: str, value: int) -> list[str]:
    with httpx.stream("POST", f"{server.url}{path}", json=value, timeout=8) as response:
        return list(response.iter_lines())


@KINDS
def test_the_whole_stream_arrives(kind: str, tmp_path: Path) -> None:
    with SERVERS[kind](tmp_path, STREAMS) as server:
        assert items_of(server, "/slow", 2) == ["0", "1"]


SOCKETS = """
from collections.abc import AsyncIterator

@deployment
async def shout(messages: AsyncIterator[str]) -> AsyncIterator[str]:
    try:
        async for message in messages:
            yield message.upper()
            if message == "sleep":
                await asyncio.sleep(60)
            if message == "fail":
                raise ValueError("secret weights")
            while message == "flood":
                yield "x" * 10_000
    finally:
        say("node", "was closed")

with InputNode(AsyncIterator[str]) as x:
    dag = shout.bind(x)
app.include_router(graph_router(dag, websocket="/ws"), prefix="/g")
"""


def socket_of(server: Server) -> Any:
    return connect(f"ws://127.0.0.1:{server.port}/g/ws", open_timeout=8, close_timeout=1)


@KINDS
def test_a_websocket(kind: str, tmp_path: Path) -> None:
    with SERVERS[kind](tmp_path, SOCKETS) as server:
        with socket_of(server) as socket:
            for message in ("a", "b"):
                socket.send(message)
                assert socket.recv(8) == message.upper()
            socket.send("fail")
            assert socket.recv(8) == "FAIL"
            with pytest.raises(ConnectionClosedError):
                socket.recv(8)
            assert (socket.close_code, socket.close_reason) == (1011, "Internal Server Error")
        server.logged("shout: the websocket failed after 3 items")
        assert "ValueError: secret weights" in server.log


@KINDS
@pytest.mark.parametrize("message", ["idle", "sleep", "flood"])
def test_a_client_of_a_websocket_that_leaves(message: str, kind: str, tmp_path: Path) -> None:
    with SERVERS[kind](tmp_path, SOCKETS) as server:
        with socket_of(server) as socket:
            socket.send(message)
            assert socket.recv(8) == message.upper()
            socket.socket.shutdown(SHUT_RDWR)  # without a word
        server.logged("node was closed", timeout_s=1)
        assert "Traceback" not in server.log
