"""Peers that are slow, that are many, or that do not keep to the protocol."""

from __future__ import annotations

import asyncio
import itertools
import ssl
from typing import Any

import pytest

from fastapi_graph.dataplane.client import DeploymentClient
from fastapi_graph.dataplane.connection import MAGIC
from fastapi_graph.dataplane.frames import CHUNK, HEADER, MORE, CallHead, Kind, total
from fastapi_graph.dataplane.protocol import Link
from fastapi_graph.errors import NoReplicaError, RemoteProtocolError
from tests.dataplane.network import Network, Served, Stranger, parts_of, until
from tests.dataplane.pairs import end, frame

pytestmark = pytest.mark.anyio

MIB = 1 << 20


@pytest.fixture(params=["unix", "tcp", "tls"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def limit_links(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make links with other limits."""

    def limit_links(**limits: Any) -> None:
        defaults = Link.__init__.__kwdefaults__
        for name, value in limits.items():
            assert name in defaults
            monkeypatch.setitem(defaults, name, value)

    return limit_links


class Undisturbed:
    """A client whose calls go on, whatever others do; `async with` it."""

    def __init__(self, network: Network, served: Served) -> None:
        self._client: DeploymentClient = network.client(served, max_retries=0)
        self._served = served

    async def __aenter__(self) -> None:
        self._long = asyncio.create_task(self._client.call("work", ("undisturbed",), {}))
        await until(lambda: "start undisturbed" in self._served.node.log)

    async def __aexit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if kind is None:
            assert await self._client.call("echo", (1,), {}) == 1
        self._served.node.gate.set()
        assert await self._long == "undisturbed"


# Bytes that are none of the protocol

BEFORE = {
    "another protocol": b"GET / HTTP/1.1\r\nHost: replica\r\n\r\n",
    "zeros": b"\0" * 100,
    "a huge length": HEADER.pack(0xFFFF_FFFF, Kind.AUTH, 0, 0),
    "a wrong proof": frame(Kind.AUTH, b"n" * 64),
    "an empty proof": frame(Kind.AUTH),
    "a call": frame(Kind.CALL, b"".join(parts_of("echo", 1)), number=1),
    "its own challenge": frame(Kind.CHALLENGE, MAGIC + b"n" * 32),
}


@pytest.mark.parametrize("data", BEFORE.values(), ids=BEFORE)
async def test_who_does_not_shake_hands_is_refused(
    data: bytes, network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    served = await network.serve()
    async with Undisturbed(network, served):
        stranger = await network.stranger(served)
        stranger.transport.write(data)
        await stranger.wait_closed()
        assert stranger.connection.state == "handshake"
        await until(lambda: "is disconnected: the peer sent" in caplog.text)
        assert served.server.clients == 1


AFTER = {
    "an unknown kind": frame(99, number=1),
    "a goodbye": frame(Kind.GOAWAY, number=1),
    "a huge length": HEADER.pack(0xFFFF_FFFF, Kind.CALL, 0, 1),
    "a long chunk": HEADER.pack(CHUNK + 1, Kind.CALL, MORE, 1),
    "a huge message": frame(Kind.CALL, total(1 << 50), flags=MORE, number=1),
    "a message without a total": frame(Kind.CALL, b"", flags=MORE, number=1),
}


@pytest.mark.parametrize("data", AFTER.values(), ids=AFTER)
async def test_who_breaks_the_protocol_later_is_disconnected(
    data: bytes, network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    served = await network.serve()
    async with Undisturbed(network, served):
        stranger = await network.stranger(served)
        await stranger.shake_hands()
        stranger.connection.send(Kind.CALL, 0, 1, *parts_of("work", "hostile"))
        stranger.flush()
        await until(lambda: "start hostile" in served.node.log)
        stranger.transport.write(data)
        await stranger.wait_closed()
        await until(lambda: "cancelled hostile" in served.node.log)
        await until(lambda: "is disconnected: the peer sent" in caplog.text)
        assert served.server.clients == 1


@pytest.mark.parametrize("how", ["abort", "close"])
@pytest.mark.parametrize("state", ["handshake", "open"])
async def test_who_dies_within_a_frame_leaves_nothing(
    state: str, how: str, network: Network
) -> None:
    served = await network.serve()
    async with Undisturbed(network, served):
        stranger = await network.stranger(served)
        if state == "open":
            await stranger.shake_hands()
            stranger.connection.send(Kind.CALL, 0, 1, b"a" * (3 * CHUNK))
            stranger.transport.write(stranger.connection.data_to_send())
            stranger.transport.write(stranger.connection.data_to_send()[:99])
        else:
            stranger.transport.write(frame(Kind.AUTH, b"n" * 64)[:50])
        await asyncio.sleep(0.01)
        getattr(stranger.transport, how)()
        await stranger.wait_closed()
        await until(lambda: len(served.server._clients) == 1)


BAD_CALLS = {
    "no head": (0, b""),
    "half a head": (0, CallHead("echo").encode()[:9]),
    "a head that is not text": (0, b"\0" * 9 + b"\2\0\0\xff\xff"),
    "no arguments": (0, CallHead("echo").encode()),
    "no pickle": (0, CallHead("echo").encode() + b"garbage"),
    "no pair": (0, CallHead("echo").encode() + b"\x80\x05K\x01."),
    "no table": (2, CallHead("echo").encode() + b"\x80\x05K\x01."),
    "a bad table": (2, CallHead("echo").encode() + b"\0\0\0\1" + b"\xff" * 16),
}


@pytest.mark.parametrize("flags, content", BAD_CALLS.values(), ids=BAD_CALLS)
async def test_a_call_that_makes_no_sense_fails_alone(
    flags: int, content: bytes, network: Network
) -> None:
    served = await network.serve()
    stranger = await network.stranger(served)
    await stranger.shake_hands()
    for number, flag in ((1, flags), (2, flags | 4)):
        stranger.connection.send(Kind.CALL, flag, number, content)
    stranger.connection.send(Kind.CALL, 0, 3, *parts_of("echo", 1))
    stranger.flush()
    await until(lambda: len(stranger.got) == 3)
    assert [(message.kind, message.number) for message in stranger.got] == [
        (Kind.ERROR, 1),
        (Kind.ERROR, 2),
        (Kind.RESULT, 3),
    ]


async def test_credit_and_cancel_of_no_call_do_no_harm(network: Network) -> None:
    served = await network.serve()
    stranger = await network.stranger(served)
    await stranger.shake_hands()
    for kind, number in itertools.product((Kind.CREDIT, Kind.CANCEL, Kind.PONG), (0, 1, 2)):
        stranger.connection.send(kind, 0, number)
    stranger.connection.send(Kind.PING, 0, 0)
    stranger.flush()
    await until(lambda: [m.kind for m in stranger.got] == [*[Kind.CANCEL] * 3, Kind.PONG])


@pytest.mark.parametrize("wrong", [{"secret": b"another"}, {"identity": b"replica-0@v2"}])
async def test_a_client_with_another_secret_or_version_never_gets_in(
    wrong: dict[str, bytes], network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    served = await network.serve()
    client = network.client(replica_wait_s=0.2)
    peer = network.connect(client, served, **wrong)
    with pytest.raises(NoReplicaError):
        await client.call("echo", (1,), {})
    assert not peer.usable
    assert "means another replica" in caplog.text
    assert served.server.clients == 0


async def test_a_server_that_talks_nonsense_is_no_replica(
    network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    if network._transport == "tls":
        pytest.skip("as over any other")
    served = await network.serve()
    client = network.client(served, replica_wait_s=5)
    assert await client.call("echo", (1,), {}) == 1
    for side in tuple(served.server._clients):
        side.link._transport.write(b"HTTP/1.1 500 Internal Server Error\r\n\r\n")
    await until(lambda: "is disconnected" in caplog.text)
    assert await client.call("echo", (2,), {}) == 2, "it has connected again"


# Slow ones


@pytest.mark.parametrize("data", [b"", b"\0", frame(Kind.AUTH, b"n" * 64)[:-1]])
async def test_a_handshake_must_not_take_long(
    data: bytes, network: Network, limit_links: Any, caplog: pytest.LogCaptureFixture
) -> None:
    limit_links(handshake_timeout_s=0.1)
    served = await network.serve()
    async with Undisturbed(network, served):
        stranger = await network.stranger(served)
        stranger.transport.write(data)
        await stranger.wait_closed()
        assert "the handshake took too long" in caplog.text
        assert len(served.server._clients) == 1
        await asyncio.sleep(0.15)  # who is in may stay


def stop_reading(stranger: Stranger) -> None:
    stranger.transport.pause_reading()


@pytest.mark.parametrize("size", [10 * MIB, 100_000, 0])
async def test_a_client_that_does_not_read_is_cut_off(
    size: int, network: Network, limit_links: Any, caplog: pytest.LogCaptureFixture
) -> None:
    limit = 4 * MIB if size else MIB
    limit_links(max_buffered=limit)
    served = await network.serve(max_ongoing_requests=100_000)
    async with Undisturbed(network, served):
        stranger = await network.stranger(served)
        await stranger.shake_hands()
        stop_reading(stranger)
        (side,) = (side for side in served.server._clients if not side.calls)
        most = 0
        for number in range(1, 2000):
            if size:
                stranger.connection.send(Kind.CALL, 0, number, *parts_of("give", size))
                stranger.flush()
            else:  # nothing comes back but headers: they count too
                stranger.transport.write(frame(Kind.PING) * 5_000)
            await asyncio.sleep(0)
            most = max(most, side.link.connection.buffered)
            if "reads too slowly" in caplog.text:
                break
        assert limit < most <= limit + size + CHUNK
        assert caplog.text.count("reads too slowly") == 1
        await until(lambda: served.server.clients == 1)


async def test_a_client_that_reads_now_and_then_is_not_cut_off(
    network: Network, limit_links: Any
) -> None:
    limit_links(max_buffered=8 * MIB)
    served = await network.serve()
    stranger = await network.stranger(served)
    await stranger.shake_hands()
    for number in range(1, 21):
        stop_reading(stranger)
        stranger.connection.send(Kind.CALL, 0, number, *parts_of("give", 2 * MIB))
        stranger.flush()
        await asyncio.sleep(0.005)
        stranger.transport.resume_reading()
        await until(lambda: len(stranger.got) == number)  # noqa: B023


async def test_who_has_gone_without_reading_leaves_nothing(network: Network) -> None:
    # A unix socket and TCP can be closed in one direction alone.
    if network._transport == "tls":
        pytest.skip("TLS cannot")
    served = await network.serve()
    stranger = await network.stranger(served)
    await stranger.shake_hands()
    stop_reading(stranger)
    stranger.connection.send(Kind.CALL, 0, 1, *parts_of("give", 20 * MIB))
    stranger.connection.send(Kind.CALL, 0, 2, *parts_of("work", "a"))
    stranger.flush()
    await until(lambda: "start a" in served.node.log)
    stranger.transport.write_eof()
    await until(lambda: "cancelled a" in served.node.log)
    await until(lambda: not served.server._clients)


async def test_closing_does_not_wait_for_who_does_not_read(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastapi_graph.dataplane.server.CLOSE_TIMEOUT_S", 0.1)
    served = await network.serve()
    stranger = await network.stranger(served)
    await stranger.shake_hands()
    stop_reading(stranger)
    stranger.connection.send(Kind.CALL, 0, 1, *parts_of("give", 20 * MIB))
    stranger.flush()
    await until(lambda: served.node.log == ["give"])
    async with asyncio.timeout(5):
        await served.server.close()
    await until(lambda: not served.server._clients)


# Many


async def test_no_more_than_max_connections(
    network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    served = await network.serve(max_connections=3)
    async with Undisturbed(network, served):
        strangers = [await network.stranger(served) for _ in range(2)]
        for stranger in strangers:
            await stranger.shake_hands()
        refused = await network.stranger(served)
        await refused.wait_closed()
        assert not refused.challenged.is_set()
        assert "Node: a connection is refused, 3 are open" in caplog.text
        strangers.pop().transport.abort()
        await until(lambda: served.server.clients == 2)
        strangers.append(await network.stranger(served))
        await strangers[-1].shake_hands()


# TLS


@pytest.mark.parametrize("transport", ["tls"])
async def test_connections_on_which_tls_fails_do_not_count(network: Network) -> None:
    served = await network.serve(max_connections=2)
    loop = asyncio.get_running_loop()
    for _ in range(5):
        plain, protocol = await loop.create_connection(
            lambda: Stranger(b""), "127.0.0.1", served.address
        )
        plain.write(b"GET / HTTP/1.1\r\n\r\n")
        await protocol.wait_closed()
    client = network.client(served)
    assert await client.call("echo", (1,), {}) == 1


@pytest.mark.parametrize("transport", ["tls"])
async def test_a_server_of_another_authority_is_refused(network: Network) -> None:
    served = await network.serve()
    with pytest.raises(ssl.SSLCertVerificationError):
        await asyncio.get_running_loop().create_connection(
            asyncio.Protocol, "127.0.0.1", served.address, ssl=ssl.create_default_context()
        )
    await until(lambda: not served.server._clients)


# A link by itself


class Owner:
    def __init__(self) -> None:
        self.told: list[Any] = []

    def connected(self, link: Link) -> None:
        self.told.append("connected")

    def opened(self, link: Link) -> None:
        self.told.append("opened")

    def received(self, messages: Any) -> None:
        self.told += messages

    def lost(self, link: Link, error: Exception | None) -> None:
        self.told.append(error)


async def test_a_link_says_why_it_was_lost(network: Network) -> None:
    served = await network.serve()
    owner = Owner()
    await network.open(lambda: Link(end("client"), owner), served.address)  # of another identity
    await until(lambda: len(owner.told) == 2)
    assert owner.told[0] == "connected"
    assert isinstance(owner.told[1], RemoteProtocolError | OSError)


async def test_what_is_sent_over_a_link_that_was_cut_is_dropped(network: Network) -> None:
    served = await network.serve()
    owner = Owner()
    connection = end("client", identity=served.identity)
    _, link = await network.open(lambda: Link(connection, owner), served.address)
    await until(lambda: "opened" in owner.told)
    link.abort()
    assert not link.is_open
    link.send(Kind.PING, 0, 0)
    assert connection.buffered == 0
    await until(lambda: owner.told == ["connected", "opened", None])
