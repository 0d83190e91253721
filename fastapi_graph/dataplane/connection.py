"""The state machine of one connection. Bytes in, messages out; it never touches a socket.

A connection is between a *client*, which calls, and a *server*, which answers:

1. The server sends CHALLENGE with its nonce.
2. The client sends AUTH: its own nonce, and proof that it has the secret.
3. The server sends WELCOME: proof that it has the secret too. The connection is open.
4. CALL goes to the server, and GOAWAY to the client. RESULT, ERROR and ITEM answer a call, and
   go the other way for the streams among its arguments; so CREDIT and RELEASE go both ways, too.
   CANCEL goes to the server, and comes back once the call has ended without another answer.
   PING and PONG go both ways.

Each proof is an HMAC over both nonces, the role and the identity of the replica, so that it is
good for this connection only. Until a connection is open, frames are small and of the
handshake, and nothing that came in is unpickled.

Short messages are sent in order. Long ones are cut into chunks, and those of different calls
take turns; messages of one call never overtake each other.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections import deque
from collections.abc import Callable
from typing import Literal, NoReturn

from fastapi_graph.dataplane.frames import (
    CHUNK,
    HEADER,
    MORE,
    TOTAL_SIZE,
    Kind,
    Message,
    Part,
    header,
    total,
    total_size,
)
from fastapi_graph.errors import LocalProtocolError, RemoteProtocolError

__all__ = ["Connection", "State"]

State = Literal["handshake", "open", "closed"]

MAGIC = b"fastapi_graph/2\n"
NONCE_SIZE = 32
HANDSHAKE_LIMIT = 256  # bytes of content in a frame before the connection is open
DEFAULT_MAX_MESSAGE_SIZE = 1 << 30

_BOTH = (
    Kind.RESULT,
    Kind.ERROR,
    Kind.ITEM,
    Kind.CREDIT,
    Kind.RELEASE,
    Kind.CANCEL,
    Kind.PING,
    Kind.PONG,
)
_EXPECTED = {
    "client": frozenset({*_BOTH, Kind.GOAWAY, Kind.DEGRADED, Kind.MODELS}),
    "server": frozenset({*_BOTH, Kind.CALL}),
}


class Connection:
    """One end of a connection.

    Args:
        role: Which end.
        identity: What both ends must mean: the replica and its version.
        secret: What both ends must have.
        max_message_size: Bytes that a message may have; a longer one is an error of whoever
            sends it.
        random: Returns that many random bytes; for tests.
    """

    def __init__(
        self,
        role: Literal["client", "server"],
        identity: bytes,
        secret: bytes,
        *,
        max_message_size: int = DEFAULT_MAX_MESSAGE_SIZE,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.state: State = "handshake"
        self._role = role
        self._identity = identity
        self._secret = secret
        self._max = max_message_size
        self._frame_limit = min(CHUNK, max_message_size)
        self._expected = _EXPECTED[role]
        self._nonce = random(NONCE_SIZE)
        self._proof = b""
        # In: bytes of a frame that has not come whole, and how many it needs; long messages.
        self._rest = bytearray()
        self._need = HEADER.size
        self._partial: dict[int, tuple[int, int, bytearray, int]] = {}
        # Out: what may be sent at once, and long messages by the call they belong to.
        self._ready: list[Part] = []
        self._long: dict[int, deque[_Outgoing]] = {}
        self.buffered = 0
        if role == "server":
            self._put(Kind.CHALLENGE, 0, 0, (MAGIC, self._nonce))

    # Receiving

    def receive_data(self, data: bytes) -> list[Message]:
        """Take bytes from the peer and return the messages that are whole now.

        A message of kind WELCOME says that the connection is open, on both ends.

        Raises:
            RemoteProtocolError: The peer broke the protocol; the connection is closed.
        """
        if self.state == "closed":
            raise LocalProtocolError("the connection is closed")
        rest = self._rest
        source: bytes | bytearray = data
        if rest:
            rest += data
            if len(rest) < self._need:
                return []
            source = rest
        try:
            return self._parse(source)
        except ValueError as error:
            self._fail(str(error))

    def _parse(self, source: bytes | bytearray) -> list[Message]:
        messages: list[Message] = []
        offset, end = 0, len(source)
        size_of_header = HEADER.size
        need = size_of_header
        unpack = HEADER.unpack_from
        is_open = self.state == "open"
        limit = self._frame_limit if is_open else HANDSHAKE_LIMIT
        while end - offset >= size_of_header:
            size, kind, flags, number = unpack(source, offset)
            if size > limit:
                self._fail(f"a frame of {size} bytes; at most {limit} are allowed")
            start = offset + size_of_header
            stop = start + size
            if stop > end:
                need = stop - offset
                break
            offset = stop
            content = bytes(source[start:stop])
            if not is_open:
                messages += self._shake_hands(kind, flags, number, content)
                is_open = bool(messages)
                limit = self._frame_limit if is_open else HANDSHAKE_LIMIT
                continue
            if kind not in self._expected:
                self._fail(f"a message of kind {kind} that the {self._role} does not take")
            if flags & MORE or number in self._partial:
                whole = self._gather(kind, flags, number, content)
                if whole is not None:
                    messages.append(whole)
            else:
                messages.append(Message(kind, flags, number, content))
        self._need = need
        self._rest = bytearray(source[offset:]) if offset < end else bytearray()
        return messages

    def _gather(self, kind: int, flags: int, number: int, content: bytes) -> Message | None:
        """Take one frame of a long message; return the message with its last frame."""
        begun = self._partial.get(number)
        if kind == Kind.CANCEL and begun is not None:
            del self._partial[number]  # of a call that was cancelled before it was whole
            return Message(kind, flags, number, content)
        if begun is None:
            size = total_size(content)
            if size > self._max:
                self._fail(f"a message of {size} bytes; at most {self._max} are allowed")
            buffer = bytearray()
            begun = (kind, flags & ~MORE, buffer, size)
            content = content[TOTAL_SIZE:]
            self._partial[number] = begun
        kind_of_first, flags_of_first, buffer, size = begun
        if kind != kind_of_first or flags & ~MORE != flags_of_first:
            self._fail(f"a frame of kind {kind} amid a message of kind {kind_of_first}")
        buffer += content
        done = not flags & MORE
        if len(buffer) > size or done != (len(buffer) == size):
            self._fail(f"a message of {len(buffer)} bytes that was to have {size}")
        if not done:
            return None
        del self._partial[number]
        return Message(kind, flags_of_first, number, buffer)

    def receive_eof(self) -> None:
        """Note that the peer has closed.

        Raises:
            RemoteProtocolError: It did so in the middle of a frame, or of the handshake.
        """
        state, self.state = self.state, "closed"
        if state == "handshake":
            raise RemoteProtocolError("the peer closed during the handshake")
        if state == "open" and (self._rest or self._partial):
            raise RemoteProtocolError("the peer closed in the middle of a message")

    def _fail(self, reason: str) -> NoReturn:
        self.state = "closed"
        raise RemoteProtocolError(f"the peer sent {reason}")

    # The handshake

    def _shake_hands(self, kind: int, flags: int, number: int, content: bytes) -> list[Message]:
        if flags or number:
            self._fail("a frame that does not belong to the handshake")
        if self._role == "client":
            if kind == Kind.CHALLENGE and not self._proof:
                if len(content) != len(MAGIC) + NONCE_SIZE or not content.startswith(MAGIC):
                    self._fail("another protocol, or another version of it")
                nonce = content[len(MAGIC) :]
                self._proof = self._prove(b"server", nonce, self._nonce)
                mine = self._prove(b"client", nonce, self._nonce)
                self._put(Kind.AUTH, 0, 0, (self._nonce, mine))
                return []
            if kind == Kind.WELCOME and self._proof:
                if not hmac.compare_digest(content, self._proof):
                    self._fail("a wrong proof: it does not have the graph's secret")
                self.state = "open"
                return [Message(Kind.WELCOME, 0, 0, b"")]
        elif kind == Kind.AUTH:
            nonce, proof = content[:NONCE_SIZE], content[NONCE_SIZE:]
            if not hmac.compare_digest(proof, self._prove(b"client", self._nonce, nonce)):
                self._fail("a wrong proof: it lacks the graph's secret, or means another replica")
            self._put(Kind.WELCOME, 0, 0, (self._prove(b"server", self._nonce, nonce),))
            self.state = "open"
            return [Message(Kind.WELCOME, 0, 0, b"")]
        return self._fail(f"a message of kind {kind} during the handshake")

    def _prove(self, role: bytes, server_nonce: bytes, client_nonce: bytes) -> bytes:
        text = b"%b|%b%b|%b" % (role, server_nonce, client_nonce, self._identity)
        return hmac.new(self._secret, text, hashlib.sha256).digest()

    # Sending

    def send(self, kind: int, flags: int, number: int, *parts: Part) -> None:
        """Queue a message.

        Args:
            kind: Its `Kind`.
            flags: Its flags.
            number: Which call it belongs to.
            *parts: Its content.

        Raises:
            LocalProtocolError: The connection is not open, or the message is too long.
        """
        if self.state != "open":
            raise LocalProtocolError(f"a message cannot be sent: the connection is {self.state}")
        self._put(kind, flags, number, parts)

    def _put(self, kind: int, flags: int, number: int, parts: tuple[Part, ...]) -> None:
        size = sum(map(len, parts))
        if size > self._max:
            raise LocalProtocolError(
                f"a message of {size} bytes is too long; at most {self._max} are allowed"
            )
        if size <= CHUNK and number not in self._long:
            self._ready.append(HEADER.pack(size, kind, flags, number))
            self._ready += parts
            self.buffered += size + HEADER.size  # a peer may make us send empty messages only
            return
        outgoing = _Outgoing(kind, flags, number, parts, size)
        self._long.setdefault(number, deque()).append(outgoing)
        self.buffered += outgoing.left

    def drop(self, number: int) -> None:
        """Forget what has been queued of long messages of a call, which nobody wants now."""
        for outgoing in self._long.pop(number, ()):
            self.buffered -= outgoing.left

    def unsent(self) -> frozenset[int]:
        """Return the calls that have not left whole."""
        calls = set(self._long)
        ready, offset = b"".join(self._ready), 0
        while offset < len(ready):
            size, kind, _, number = HEADER.unpack_from(ready, offset)
            if kind == Kind.CALL:
                calls.add(number)
            offset += HEADER.size + size
        return frozenset(calls)

    def has_more(self) -> bool:
        """Say whether there is something to send."""
        return bool(self._ready or self._long)

    def data_to_send(self) -> bytes:
        """Return the bytes to send next: all short messages, and a chunk of a long one."""
        ready = self._ready
        if self._long:
            number, queue = next(iter(self._long.items()))
            del self._long[number]
            outgoing = queue[0]
            outgoing.add_chunk(ready)
            if not outgoing.left:
                queue.popleft()
            if queue:
                self._long[number] = queue  # at the end: the others come first
        data = b"".join(ready)
        ready.clear()
        self.buffered = sum(o.left for queue in self._long.values() for o in queue)
        return data


class _Outgoing:
    """A long message on its way, a chunk at a time."""

    __slots__ = ("_flags", "_kind", "_number", "_view", "_whole", "left")

    def __init__(
        self, kind: int, flags: int, number: int, parts: tuple[Part, ...], size: int
    ) -> None:
        self._kind = kind
        self._flags = flags
        self._number = number
        self._whole = size > CHUNK
        content = (total(size), *parts) if self._whole else parts
        self._view = memoryview(b"".join(content))
        self.left = len(self._view)

    def add_chunk(self, ready: list[Part]) -> None:
        """Append the next frame."""
        chunk = self._view[len(self._view) - self.left :][:CHUNK]
        self.left -= len(chunk)
        flags = self._flags | (MORE if self.left else 0)
        ready += (header(self._kind, flags, self._number, len(chunk)), bytes(chunk))
