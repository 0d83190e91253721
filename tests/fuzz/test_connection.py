"""Random and damaged bytes for the connection machine, as long as FUZZ_SECONDS says.

A failure shows the seed; FUZZ_SEED=... runs it again.
"""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastapi_graph.dataplane.codec import Payload
from fastapi_graph.dataplane.connection import Connection
from fastapi_graph.dataplane.frames import (
    CHUNK,
    HEADER,
    MORE,
    CallHead,
    Kind,
    Message,
    join_payload,
    split_payload,
    total,
)
from fastapi_graph.errors import RemoteProtocolError
from tests.dataplane.pairs import drain, end, feed, frame, opened

SECONDS = float(os.environ.get("FUZZ_SECONDS", "60"))
SEED = os.environ.get("FUZZ_SEED")

TESTS = 4
pytestmark = pytest.mark.timeout(SECONDS + 60)


@pytest.fixture
def rounds() -> Callable[[], Iterator[random.Random]]:
    """Give sources of chance for a part of the time."""

    def rounds() -> Iterator[random.Random]:
        if SEED is not None:
            yield random.Random(int(SEED))
            return
        deadline = time.monotonic() + SECONDS / TESTS
        while time.monotonic() < deadline:
            seed = random.SystemRandom().getrandbits(48)
            try:
                yield random.Random(seed)
            except GeneratorExit:
                print(f"FUZZ_SEED={seed}")
                raise

    return rounds


def length(source: random.Random) -> int:
    """Return a size of a message; those at which something changes come often."""
    if source.random() < 0.9:
        return source.choice((0, 1, 7, 8, 9, 100, 255, 256, 257))
    return source.choice((CHUNK - 8, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK - 8))


def session(source: random.Random, role: str) -> bytes:
    """Return bytes that an end in this role may get, the handshake excepted."""
    kinds = [Kind.RESULT, Kind.ERROR, Kind.ITEM, Kind.CREDIT, Kind.RELEASE, Kind.CANCEL]
    kinds += [Kind.PING, Kind.PONG, Kind.GOAWAY if role == "client" else Kind.CALL]
    sender = opened()[role == "client"]
    data = b""
    for _ in range(source.randrange(12)):
        content = source.randbytes(3) * (length(source) // 3)
        sender.send(source.choice(kinds), source.choice((0, 2, 4)), source.randrange(4), content)
        if source.random() < 0.3:
            data += sender.data_to_send()
    return data + drain(sender)


def damaged(source: random.Random, data: bytes) -> bytes:
    """Return the bytes with some of them changed, lost, doubled or moved."""
    changed = bytearray(data)
    for _ in range(source.choice((0, 1, 1, 1, 2, 5))):
        place = source.randrange(len(changed) + 1)
        if source.random() < 0.5:
            place = min(place, 30)  # where the headers are
        size = source.choice((1, 1, 2, 4, 10, 300))
        match source.randrange(7):
            case 0 if changed:
                changed[place % len(changed)] ^= 1 << source.randrange(8)
            case 1:
                changed[place : place + size] = source.randbytes(size)
            case 2:
                del changed[place : place + size]
            case 3:
                changed[place:place] = changed[place : place + size]
            case 4:
                del changed[place:]
            case 5:
                changed[place:place] = odd_frame(source)
            case _:
                changed += source.randbytes(size)
    return bytes(changed)


def odd_frame(source: random.Random) -> bytes:
    content = source.choice((b"", source.randbytes(9), total(source.randrange(20)) + b"c" * 9))
    if source.random() < 0.1:
        return HEADER.pack(source.getrandbits(32), source.randrange(max(Kind) + 2), 0, 0)
    flags = source.choice((0, MORE, MORE, 2, source.randrange(256)))
    return frame(source.randrange(max(Kind) + 2), content, flags=flags, number=source.randrange(4))


def outcome(connection: Connection, pieces: Iterator[bytes]) -> tuple[list[Message], str]:
    """Return what came of bytes, and the error with which it ended."""
    messages: list[Message] = []
    try:
        for piece in pieces:
            messages += connection.receive_data(piece)
        connection.receive_eof()
    except RemoteProtocolError as error:
        assert connection.state == "closed"
        return messages, str(error)
    assert connection.state == "closed"
    return messages, ""


def pieces_of(source: random.Random, data: bytes) -> Iterator[bytes]:
    place = 0
    while place < len(data):
        size = source.choice((1, 1, 2, 9, 10, 11, 300, CHUNK))
        yield data[place : place + size]
        place += size


Rounds = Callable[[], Iterator[random.Random]]


def test_damaged_bytes_are_refused_in_the_same_way_however_they_are_cut(rounds: Rounds) -> None:
    for source in rounds():
        role = source.choice(("client", "server"))
        data = damaged(source, session(source, role))
        results = []
        for cut in (iter([data]), pieces_of(source, data)):
            connection = opened()[role == "server"]
            results.append(outcome(connection, cut))
        (at_once, error), (in_pieces, same) = results
        assert error == same
        # What comes with the bytes that are refused is not looked at any more.
        assert at_once in (in_pieces, []) if error else at_once == in_pieces


def test_who_does_not_have_the_secret_does_not_get_in(rounds: Rounds) -> None:
    for source in rounds():
        role = source.choice(("client", "server"))
        client, server = end("client"), end("server", secret=b"another")
        if role == "server":
            client, server = end("client", secret=b"another"), end("server")
        feed(client, challenge := drain(server))
        auth = drain(client)
        connection = client if role == "client" and source.random() < 0.5 else end(role)
        stranger = source.choice((challenge, auth, frame(Kind.WELCOME, auth[-32:]), b""))
        data = damaged(source, stranger + source.choice((b"", session(source, role))))
        messages, error = outcome(connection, pieces_of(source, data))
        assert messages == []
        assert error
        assert not connection.has_more() or role == "client" or connection.buffered < 100


def test_whatever_is_sent_comes_through_unless_it_is_taken_back(rounds: Rounds) -> None:
    for source in rounds():
        client, server = opened()
        wire = bytearray()
        sent: dict[int, list[bytes]] = {}
        got: dict[int, list[bytes]] = {}
        dropped: set[int] = set()

        def deliver(
            data: bytes,
            server: Connection = server,
            got: dict[int, list[bytes]] = got,
            dropped: set[int] = dropped,
        ) -> None:
            for kind, _, number, content in server.receive_data(data):
                if kind == Kind.CANCEL:
                    assert number in dropped
                else:
                    got.setdefault(number, []).append(bytes(content))

        for number in range(1, source.randrange(2, 40)):
            call = source.choice((number, number, 1 + number // 2))
            if call in dropped:
                continue
            if source.random() < 0.15:
                client.drop(call)
                client.send(Kind.CANCEL, 0, call)
                dropped.add(call)
                continue
            content = source.randbytes(2) * (length(source) // 2)
            client.send(Kind.CALL, source.choice((0, 2, 4)), call, content)
            sent.setdefault(call, []).append(content)
            assert client.buffered >= 0
            while source.random() < 0.5:
                wire += client.data_to_send()
            size = source.choice((0, 1, 10, 1000, CHUNK))
            deliver(bytes(wire[:size]))
            del wire[:size]
        deliver(bytes(wire) + drain(client))
        server.receive_eof()
        assert client.buffered == 0
        assert client.unsent() == frozenset()
        for number, contents in sent.items():
            if number in dropped:
                assert got.get(number, []) == contents[: len(got.get(number, []))]
            else:
                assert got[number] == contents


def test_damaged_payloads_and_heads_are_value_errors(rounds: Rounds) -> None:
    for source in rounds():
        buffers = tuple(source.randbytes(length(source)) for _ in range(source.randrange(4)))
        payload = Payload(source.randbytes(length(source)), buffers)
        head = CallHead(source.choice(("__call__", "méthode")), "context", source.random())
        for content in (head.encode(), b"".join(join_payload(payload))):
            data = damaged(source, content)
            for function in (CallHead.decode, lambda data: split_payload(data, 0)):
                try:
                    result: Any = function(data)
                except ValueError:
                    continue
                assert len(result) in (2, 3)


@pytest.mark.skipif(not importlib.util.find_spec("atheris"), reason="needs atheris")
def test_guided_by_coverage() -> None:
    script = Path(__file__).with_name("guided.py")
    done = subprocess.run(
        [sys.executable, script, f"-max_total_time={max(1, int(SECONDS / TESTS))}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
