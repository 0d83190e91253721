"""Two machines joined without a socket."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict, deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastapi_graph.dataplane.connection import HANDSHAKE_LIMIT, MAGIC, Connection
from fastapi_graph.dataplane.frames import CHUNK, HEADER, MORE, Kind, Message, total
from fastapi_graph.errors import LocalProtocolError, RemoteProtocolError
from tests.dataplane.pairs import (
    Cut,
    cut_at_random,
    drain,
    end,
    feed,
    frame,
    frames_of,
    one_by_one,
    opened,
    whole,
)

CUTS = {"whole": whole, "one by one": one_by_one, "at random": cut_at_random(1)}
MIB = 1 << 20

BOTH_WAYS = (
    Kind.RESULT,
    Kind.ERROR,
    Kind.ITEM,
    Kind.CREDIT,
    Kind.CANCEL,
    Kind.RELEASE,
    Kind.PING,
    Kind.PONG,
)
TO_SERVER = (*BOTH_WAYS, Kind.CALL)
TO_CLIENT = (*BOTH_WAYS, Kind.GOAWAY, Kind.DEGRADED, Kind.MODELS)


@pytest.fixture(params=CUTS)
def cut(request: pytest.FixtureRequest) -> Cut:
    return CUTS[request.param]


# The handshake


def test_both_ends_say_that_the_connection_is_open(cut: Cut) -> None:
    client, server = end("client"), end("server")
    assert not client.has_more()
    assert feed(client, drain(server), cut) == []
    assert feed(server, drain(client), cut) == [Message(Kind.WELCOME, 0, 0, b"")]
    assert feed(client, drain(server), cut) == [Message(Kind.WELCOME, 0, 0, b"")]
    assert (client.state, server.state) == ("open", "open")
    assert not client.has_more()
    assert not server.has_more()


def test_calls_may_come_with_the_last_bytes_of_the_handshake(cut: Cut) -> None:
    client, server = end("client"), end("server")
    feed(client, drain(server))
    auth = drain(client)
    long = frame(Kind.CALL, b"a" * (HANDSHAKE_LIMIT + 1), number=1)
    welcome, call = feed(server, auth + long, cut)
    assert welcome.kind == Kind.WELCOME
    assert call == (Kind.CALL, 0, 1, b"a" * (HANDSHAKE_LIMIT + 1))
    server.send(Kind.RESULT, 0, 1, b"b")
    assert [message.kind for message in feed(client, drain(server), cut)] == [
        Kind.WELCOME,
        Kind.RESULT,
    ]


@pytest.mark.parametrize("other", [{"secret": b"another"}, {"identity": b"replica-2@v1"}])
def test_another_secret_or_identity_is_refused_by_the_server(
    other: dict[str, bytes], cut: Cut
) -> None:
    client, server = end("client", **other), end("server")
    feed(client, drain(server))
    with pytest.raises(RemoteProtocolError, match="wrong proof"):
        feed(server, drain(client), cut)
    assert server.state == "closed"
    assert not server.has_more(), "it proves nothing to a stranger"
    with pytest.raises(RemoteProtocolError, match="during the handshake"):
        client.receive_eof()


def test_a_server_without_the_secret_is_refused_by_the_client(cut: Cut) -> None:
    client = end("client")
    feed(client, drain(end("server")))
    drain(client)
    with pytest.raises(RemoteProtocolError, match="wrong proof"):
        feed(client, frame(Kind.WELCOME, b"p" * 32), cut)
    assert client.state == "closed"


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_proof_of_another_size_is_wrong(size: int) -> None:
    client = end("client")
    feed(client, drain(end("server")))
    with pytest.raises(RemoteProtocolError, match="wrong proof"):
        feed(client, frame(Kind.WELCOME, b"p" * size))


def test_what_was_recorded_of_another_session_is_refused() -> None:
    client, server = end("client"), end("server")
    challenge = drain(server)
    feed(client, challenge)
    auth = drain(client)
    feed(server, auth)
    welcome = drain(server)
    with pytest.raises(RemoteProtocolError, match="wrong proof"):
        feed(end("server"), auth)
    again = end("client")
    feed(again, challenge)
    with pytest.raises(RemoteProtocolError, match="wrong proof"):
        feed(again, welcome)


def test_a_proof_that_is_sent_back_is_refused() -> None:
    client, server = end("client"), end("server")
    feed(client, drain(server))
    ((_, _, _, auth),) = frames_of(drain(client))
    with pytest.raises(RemoteProtocolError, match="wrong proof"):
        feed(client, frame(Kind.WELCOME, auth[32:]))
    # A stranger lets the server prove itself, to use that proof as his own.
    client, other = end("client"), end("server")
    feed(client, drain(other))
    feed(other, drain(client))
    ((_, _, _, proof),) = frames_of(drain(other))
    with pytest.raises(RemoteProtocolError, match="wrong proof"):
        feed(end("server"), frame(Kind.AUTH, auth[:32] + proof))


def test_a_proof_for_one_role_is_none_for_the_other() -> None:
    # Both ends have one nonce, so that nothing but the role tells the proofs apart.
    client = end("client", random=bytes)
    server = end("server", random=bytes)
    feed(client, drain(server))
    ((_, _, _, auth),) = frames_of(drain(client))
    feed(server, frame(Kind.AUTH, auth))
    ((_, _, _, welcome),) = frames_of(drain(server))
    assert auth[32:] != welcome


@pytest.mark.parametrize(
    "content",
    [
        MAGIC.replace(b"2", b"1") + b"n" * 32,
        b"HTTP/1.1 400 Bad Request\r\n" + b"n" * 22,
        MAGIC + b"n" * 31,
        MAGIC + b"n" * 33,
        b"",
    ],
)
def test_another_protocol_or_version_is_refused(content: bytes, cut: Cut) -> None:
    client = end("client")
    with pytest.raises(RemoteProtocolError, match="another protocol, or another version"):
        feed(client, frame(Kind.CHALLENGE, content), cut)
    assert not client.has_more()


@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\0\x01\0\x01", b"\0" * 10, b"\xff" * 10]
)
def test_garbage_is_refused(role: str, data: bytes, cut: Cut) -> None:
    connection = end(role)
    with pytest.raises(RemoteProtocolError):
        feed(connection, data + b"\0" * 10, cut)
    assert connection.state == "closed"


@pytest.mark.parametrize("kind", [0, *Kind, max(Kind) + 1, 255])
@pytest.mark.parametrize("role", ["client", "server"])
def test_nothing_but_the_handshake_before_it_has_succeeded(role: str, kind: int) -> None:
    connection = end(role)
    with pytest.raises(RemoteProtocolError):
        feed(connection, frame(kind, b"n" * 64))
    assert connection.state == "closed"


def test_no_call_before_the_welcome() -> None:
    client, server = end("client"), end("server")
    feed(client, drain(server))
    with pytest.raises(RemoteProtocolError, match="belong to the handshake"):
        feed(client, frame(Kind.RESULT, b"", number=1))
    for connection in (end("client"), server):
        with pytest.raises(LocalProtocolError, match="handshake"):
            connection.send(Kind.PING, 0, 0)


@pytest.mark.parametrize("more", [{"flags": MORE}, {"number": 1}])
def test_flags_and_numbers_do_not_belong_to_the_handshake(more: dict[str, int]) -> None:
    with pytest.raises(RemoteProtocolError, match="handshake"):
        feed(end("client"), frame(Kind.CHALLENGE, MAGIC + b"n" * 32, **more))


def test_a_second_challenge_is_refused() -> None:
    client = end("client")
    challenge = drain(end("server"))
    with pytest.raises(RemoteProtocolError, match="handshake"):
        feed(client, challenge + challenge)


def test_the_handshake_does_not_come_again() -> None:
    client, server = opened()
    for connection, kind in ((client, Kind.WELCOME), (server, Kind.AUTH)):
        with pytest.raises(RemoteProtocolError, match="does not take"):
            feed(connection, frame(kind, b"n" * 64))


@pytest.mark.parametrize("role", ["client", "server"])
def test_frames_of_the_handshake_are_small(role: str) -> None:
    connection = end(role)
    # The header alone will do: nothing is collected.
    with pytest.raises(RemoteProtocolError, match=f"at most {HANDSHAKE_LIMIT}"):
        feed(connection, HEADER.pack(HANDSHAKE_LIMIT + 1, Kind.AUTH, 0, 0))


# Messages


def numbered(role: str, seed: int, count: int = 40) -> list[tuple[int, int, int, bytes]]:
    """Return messages of all sizes for an end, some of them long."""
    source = random.Random(seed)
    kinds = TO_SERVER if role == "server" else TO_CLIENT
    sizes = (0, 1, 100, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK - 8, 700_000)
    messages = []
    for place in range(count):
        kind = source.choice(kinds)
        if kind == Kind.CANCEL:  # ends a long message
            kind = Kind.PING
        size = source.choice(sizes[:3] if source.random() < 0.8 else sizes)
        messages.append((int(kind), source.choice((0, 2, 4)), place % 7, source.randbytes(size)))
    return messages


def by_call(messages: Any) -> dict[int, list[tuple[int, int, bytes]]]:
    calls = defaultdict(list)
    for kind, flags, number, content in messages:
        calls[number].append((kind, flags, bytes(content)))
    return calls


@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize("seed", range(5))
def test_messages_of_a_call_come_in_order_however_they_are_cut(role: str, seed: int) -> None:
    sent = numbered(role, seed)
    outcomes = []
    for cut in (whole, cut_at_random(seed)):
        ends = dict(zip(("client", "server"), opened(), strict=True))
        receiver = ends.pop(role)
        (sender,) = ends.values()
        got = []
        for message in sent:
            sender.send(*message)
            if random.Random(seed).random() < 0.3:
                got += feed(receiver, sender.data_to_send(), cut)
        got += feed(receiver, drain(sender), cut)
        assert by_call(got) == by_call(sent)
        receiver.receive_eof()
        outcomes.append(got)
    assert outcomes[0] == outcomes[1]


def test_one_byte_at_a_time(cut: Cut) -> None:
    client, server = opened()
    sent = [(Kind.CALL, 0, 1, b"abc"), (Kind.PING, 0, 0, b""), (Kind.CALL, 2, 2, b"d" * 700)]
    for message in sent:
        client.send(*message)
    client.send(Kind.CALL, 4, 3, b"e" * (CHUNK + 5))
    sent.append((Kind.CALL, 4, 3, b"e" * (CHUNK + 5)))
    assert feed(server, drain(client), cut) == sent


def test_trailing_bytes_are_kept_for_later() -> None:
    client, server = opened()
    client.send(Kind.CALL, 0, 1, b"first")
    client.send(Kind.CALL, 0, 2, b"second")
    data = drain(client)
    for place in range(len(data) + 1):
        _, server = opened()
        before = server.receive_data(data[:place])
        after = server.receive_data(data[place:])
        assert [bytes(message.content) for message in before + after] == [b"first", b"second"]


def test_no_bytes_are_no_message() -> None:
    client, server = opened()
    assert client.receive_data(b"") == server.receive_data(b"") == []


def test_the_parts_of_a_message_are_joined() -> None:
    client, server = opened()
    client.send(Kind.CALL, 0, 1, b"a", bytearray(b"b"), memoryview(b"c"))
    client.send(Kind.CALL, 0, 2, b"a" * CHUNK, memoryview(b"b"))
    assert sorted(bytes(m.content) for m in feed(server, drain(client))) == [
        b"a" * CHUNK + b"b",
        b"abc",
    ]


def test_a_long_message_is_one_that_may_be_changed() -> None:
    client, server = opened()
    client.send(Kind.CALL, 0, 1, b"a" * (2 * CHUNK))
    (message,) = feed(server, drain(client))
    assert isinstance(message.content, bytearray)


def test_nothing_is_longer_than_a_chunk() -> None:
    client, server = opened()
    client.send(Kind.CALL, 0, 1, b"a" * (3 * CHUNK))
    sizes = [len(content) for _, _, _, content in frames_of(drain(client))]
    assert sizes == [CHUNK, CHUNK, CHUNK, 8]
    with pytest.raises(RemoteProtocolError, match=f"at most {CHUNK}"):
        feed(server, HEADER.pack(CHUNK + 1, Kind.CALL, 0, 2))


def test_a_short_message_does_not_wait_for_a_long_one() -> None:
    client, server = opened()
    client.send(Kind.CALL, 0, 1, bytes(50 * MIB))
    feed(server, client.data_to_send())
    client.send(Kind.CALL, 0, 2, b"short")
    data = client.data_to_send()
    assert len(data) <= CHUNK + 2 * HEADER.size + 5
    assert [message.number for message in feed(server, data)] == [2]
    assert [message.number for message in feed(server, drain(client))] == [1]


def test_long_messages_of_several_calls_take_turns() -> None:
    client, server = opened()
    sizes = {1: 20, 2: 3, 3: 6}
    for number, chunks in sizes.items():
        client.send(Kind.CALL, 0, number, bytes(chunks * CHUNK - 8))
    turns = []
    while client.has_more():
        turns += [number for _, _, number, _ in frames_of(client.data_to_send())]
    assert turns[:9] == [1, 2, 3] * 3
    assert turns[9:15] == [1, 3] * 3
    assert turns[15:] == [1] * 14
    assert server.state == "open"


def test_messages_of_a_call_do_not_overtake_a_long_one() -> None:
    client, server = opened()
    server.send(Kind.ITEM, 0, 1, bytes(3 * CHUNK))
    server.send(Kind.RESULT, 0, 2)
    server.send(Kind.ITEM, 0, 1, b"short")
    server.send(Kind.ITEM, 0, 1, bytes(2 * CHUNK))
    server.send(Kind.RESULT, 0, 1)
    got = feed(client, drain(server))
    assert [(kind, number, len(content)) for kind, _, number, content in got] == [
        (Kind.RESULT, 2, 0),
        (Kind.ITEM, 1, 3 * CHUNK),
        (Kind.ITEM, 1, 5),
        (Kind.ITEM, 1, 2 * CHUNK),
        (Kind.RESULT, 1, 0),
    ]


# Limits


@pytest.mark.parametrize("cut", [whole, cut_at_random(2)])
def test_a_message_of_the_greatest_size(cut: Cut) -> None:
    client, server = opened(max_message_size=MIB)
    client.send(Kind.CALL, 0, 1, bytes(MIB))
    (message,) = feed(server, drain(client), cut)
    assert len(message.content) == MIB


def test_a_message_that_is_too_long_is_the_senders_fault() -> None:
    client, server = opened(max_message_size=MIB)
    with pytest.raises(LocalProtocolError, match=f"{MIB + 1} bytes is too long; at most {MIB}"):
        client.send(Kind.CALL, 0, 1, bytes(MIB), b"1")
    assert not client.has_more()
    assert client.buffered == 0
    client.send(Kind.CALL, 0, 1, b"the connection goes on")
    assert len(feed(server, drain(client))) == 1


def test_a_limit_below_a_chunk_holds_too() -> None:
    client, _ = opened(max_message_size=1000)
    client.send(Kind.CALL, 0, 1, bytes(1000))
    with pytest.raises(LocalProtocolError, match="too long"):
        client.send(Kind.CALL, 0, 2, bytes(1001))
    _, server = opened(max_message_size=1000)
    with pytest.raises(RemoteProtocolError, match="at most 1000"):
        feed(server, frame(Kind.CALL, bytes(1001), number=1))


def test_a_message_that_would_be_too_long_is_refused_with_its_first_bytes(cut: Cut) -> None:
    _, server = opened(max_message_size=MIB)
    with pytest.raises(RemoteProtocolError, match=f"{1 << 60} bytes; at most {MIB}"):
        feed(server, frame(Kind.CALL, total(1 << 60) + b"a", flags=MORE, number=1), cut)


def long(*contents: bytes, size: int, last: int = 0) -> bytes:
    """Return the frames of a long message of call 1."""
    contents = (total(size) + contents[0], *contents[1:])
    flags = [MORE] * (len(contents) - 1) + [last]
    return b"".join(
        frame(Kind.CALL, content, flags=flag, number=1)
        for content, flag in zip(contents, flags, strict=True)
    )


def test_a_long_message_made_by_hand() -> None:
    _, server = opened()
    assert feed(server, long(b"ab", b"", b"cd", size=4)) == [(Kind.CALL, 0, 1, b"abcd")]


@pytest.mark.parametrize(
    "data",
    [
        long(b"ab", b"c", size=4),
        long(b"ab", b"cde", size=4),
        long(b"ab", b"cd", size=4, last=MORE),
        long(b"", b"", size=0, last=MORE),
        frame(Kind.CALL, b"short", flags=MORE, number=1),
        long(b"a", b"b", size=3, last=MORE) + frame(Kind.CREDIT, b"c", number=1),
        long(b"a", b"b", size=3, last=MORE) + frame(Kind.CALL, b"c", flags=2, number=1),
    ],
    ids=[
        "too little",
        "too much",
        "no end",
        "empty and no end",
        "no total",
        "another kind within",
        "other flags within",
    ],
)
def test_a_long_message_that_does_not_add_up(data: bytes, cut: Cut) -> None:
    _, server = opened()
    with pytest.raises(RemoteProtocolError):
        feed(server, data, cut)
    assert server.state == "closed"


@pytest.mark.parametrize("kind", [0, *Kind, max(Kind) + 1, 255])
def test_kinds_go_in_one_direction(kind: int) -> None:
    for connection, kinds in zip(opened(), (TO_CLIENT, TO_SERVER), strict=True):
        if kind in kinds:
            assert feed(connection, frame(kind, number=1)) == [(kind, 0, 1, b"")]
            continue
        with pytest.raises(RemoteProtocolError, match=f"kind {kind} "):
            feed(connection, frame(kind, number=1))


def test_a_closed_connection_takes_and_sends_nothing() -> None:
    client, server = opened()
    client.receive_eof()
    with pytest.raises(RemoteProtocolError):
        feed(server, b"\xff" * 20)
    for connection in (client, server):
        with pytest.raises(LocalProtocolError, match="closed"):
            connection.receive_data(b"a")
        with pytest.raises(LocalProtocolError, match="closed"):
            connection.send(Kind.PING, 0, 0)


# The end


def test_eof_between_messages() -> None:
    for connection in opened():
        connection.receive_eof()
        assert connection.state == "closed"


@pytest.mark.parametrize("size", [1, 9, 10, 14])
def test_eof_within_a_frame(size: int) -> None:
    _, server = opened()
    assert feed(server, frame(Kind.CALL, b"12345", number=1)[:size]) == []
    with pytest.raises(RemoteProtocolError, match="middle of a message"):
        server.receive_eof()
    assert server.state == "closed"


def test_eof_between_the_frames_of_a_message() -> None:
    client, server = opened()
    client.send(Kind.CALL, 0, 1, bytes(2 * CHUNK))
    feed(server, client.data_to_send())
    with pytest.raises(RemoteProtocolError, match="middle of a message"):
        server.receive_eof()


@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize("data", [b"", b"\0\0"])
def test_eof_within_the_handshake(role: str, data: bytes) -> None:
    connection = end(role)
    feed(connection, data)
    with pytest.raises(RemoteProtocolError, match="during the handshake"):
        connection.receive_eof()
    assert connection.state == "closed"


# Calls that nobody wants any more


@pytest.mark.parametrize("chunks", [0, 1, 2])
def test_a_long_call_is_dropped_wherever_it_is(chunks: int, cut: Cut) -> None:
    client, server = opened()
    client.send(Kind.CALL, 0, 1, bytes(4 * CHUNK))
    client.send(Kind.CALL, 0, 2, bytes(CHUNK + 1))
    data = b"".join(client.data_to_send() for _ in range(chunks))
    client.drop(1)
    assert client.unsent() <= {2}
    client.send(Kind.CANCEL, 0, 1)
    client.send(Kind.CALL, 0, 1, b"again")
    got = feed(server, data + drain(client), cut)
    kinds = [(message.kind, message.number, len(message.content)) for message in got]
    assert sorted(kinds) == [
        (Kind.CALL, 1, 5),
        (Kind.CALL, 2, CHUNK + 1),
        (Kind.CANCEL, 1, 0),
    ]
    server.receive_eof()  # nothing is left of it
    assert client.buffered == 0


def test_dropping_what_is_not_there() -> None:
    client, server = opened()
    client.send(Kind.CALL, 0, 1, b"short")
    client.drop(1)
    client.drop(2)
    assert [message.number for message in feed(server, drain(client))] == [1]


def test_a_call_that_has_left_is_cancelled_by_a_message() -> None:
    client, server = opened()
    client.send(Kind.CALL, 0, 1, bytes(CHUNK + 1))
    data = drain(client)
    client.drop(1)
    client.send(Kind.CANCEL, 0, 1)
    assert [message.kind for message in feed(server, data + drain(client))] == [
        Kind.CALL,
        Kind.CANCEL,
    ]


def test_what_has_not_left_whole_is_unsent() -> None:
    client, _ = opened()
    client.send(Kind.CALL, 0, 1, bytes(2 * CHUNK))
    client.send(Kind.CALL, 0, 2, b"short")
    client.send(Kind.CALL, 0, 3)
    client.send(Kind.CREDIT, 0, 4)  # of a call that has left
    assert client.unsent() == {1, 2, 3}
    client.data_to_send()
    assert client.unsent() == {1}
    client.data_to_send()
    client.data_to_send()
    assert client.unsent() == frozenset()


def test_buffered_counts_all_that_waits() -> None:
    client, _ = opened()
    client.send(Kind.CALL, 0, 1, bytes(2 * CHUNK))
    for number in range(2, 102):
        client.send(Kind.PING, 0, number)
    everything = client.buffered
    assert everything >= 2 * CHUNK + 100 * HEADER.size
    client.data_to_send()
    assert CHUNK <= client.buffered <= everything - CHUNK
    drain(client)
    assert client.buffered == 0
    client.send(Kind.CALL, 0, 1, bytes(2 * CHUNK))
    client.drop(1)
    assert client.buffered == 0


# Anything at all


class Recorder:
    """An end in some state, with the bytes that would lead on from there."""

    def __init__(self, role: str, steps: int) -> None:
        self.connection: Connection = end(role)
        other = end("server" if role == "client" else "client")
        ends = deque([other, self.connection] if role == "client" else [self.connection, other])
        for _ in range(steps):
            sender, receiver = ends
            feed(receiver, drain(sender))
            ends.rotate()


STATES = st.builds(Recorder, st.sampled_from(["client", "server"]), st.integers(0, 3))
FRAMES = st.builds(
    frame,
    st.one_of(st.sampled_from(Kind), st.integers(0, 255)),
    st.one_of(st.binary(max_size=300), st.integers(0, 50).map(lambda n: total(n) + b"c" * 20)),
    flags=st.one_of(st.sampled_from([0, MORE, 2, 4]), st.integers(0, 255)),
    number=st.one_of(st.integers(0, 3), st.integers(0, 0xFFFF_FFFF)),
)
BYTES = st.lists(st.one_of(FRAMES, st.binary(max_size=300)), max_size=6).map(b"".join)


@settings(max_examples=400, deadline=None)
@given(STATES, BYTES, st.integers(0, 1000))
def test_any_bytes_are_taken_or_refused(state: Recorder, data: bytes, seed: int) -> None:
    connection = state.connection
    before = connection.state
    try:
        messages = feed(connection, data, cut_at_random(seed))
    except RemoteProtocolError:
        assert connection.state == "closed"
        return
    if before == "handshake":
        assert not messages, "only who has the secret gets so far"
        assert connection.state == "handshake"
    try:
        connection.receive_eof()
    except RemoteProtocolError:
        pass
    assert connection.state == "closed"


MESSAGES = st.lists(
    st.tuples(
        st.sampled_from([Kind.CALL, Kind.CREDIT, Kind.PING, Kind.ITEM, Kind.RESULT]),
        st.sampled_from([0, 2, 4, 8, 16, 64]),
        st.integers(0, 4),
        st.builds(
            bytes.__mul__,
            st.binary(min_size=1, max_size=3),
            st.sampled_from([0, 1, 100, CHUNK // 3, CHUNK // 2, CHUNK]),
        ),
    ),
    max_size=12,
)


@settings(max_examples=100, deadline=None)
@given(MESSAGES, st.lists(st.integers(0, 3), max_size=12), st.integers(0, 1000))
def test_random_messages_come_through(
    messages: list[tuple[int, int, int, bytes]], flushes: list[int], seed: int
) -> None:
    client, server = opened()
    cut = cut_at_random(seed)
    got: list[Message] = []
    for message, times in itertools.zip_longest(messages, flushes):
        if message is not None:
            client.send(*message)
        for _ in range(times or 0):
            got += feed(server, client.data_to_send(), cut)
    got += feed(server, drain(client), cut)
    assert by_call(got) == by_call(messages)
    assert client.buffered == 0
    server.receive_eof()
