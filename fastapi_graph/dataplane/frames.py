"""Frames: how messages look on the wire. Bytes in, bytes out, no input or output here.

```
0       4      5       6        10
+-------+------+-------+--------+---------
| size  | kind | flags | number | content
+-------+------+-------+--------+---------
```

Integers are big-endian. `size` counts the content. `number` says which call a frame belongs
to; 0 is the connection itself. A message longer than `CHUNK` is cut into frames that have
`MORE` set but for the last; the content of the first begins with the size of the whole.
"""

from __future__ import annotations

import math
import struct
from enum import IntEnum
from typing import NamedTuple

from fastapi_graph.dataplane.codec import Payload

__all__ = [
    "BUFFERS",
    "CHUNK",
    "HEADER",
    "KEEP",
    "KEPT",
    "MORE",
    "STREAM",
    "WITH_KEPT",
    "WITH_STREAMS",
    "CallHead",
    "Kind",
    "Load",
    "Message",
    "Part",
    "encode_head",
    "header",
    "join_payload",
    "pack_number",
    "payload_of",
    "payload_parts",
    "split_payload",
    "total_size",
    "unpack_number",
]

Part = bytes | bytearray | memoryview
"""A piece of a message's content."""

CHUNK = 256 * 1024

MORE = 1  # more frames of this message follow
BUFFERS = 2  # out-of-band buffers follow the pickle
STREAM = 4  # of a call: its result is a stream of items
KEEP = 8  # of a call: a large result may stay where it was made
KEPT = 16  # of a call or result: the number of a kept value stands for the payload
WITH_KEPT = 32  # of a call: kept values stand for some of its arguments
WITH_STREAMS = 64  # of a call: streams stand for some of its arguments, and follow it

HEADER = struct.Struct("!IBBI")
_TOTAL = struct.Struct("!Q")
_HEAD = struct.Struct("!dHHHB")
_MANY = 255  # attempts are not told apart beyond
_SIZES = struct.Struct("!I")
_LOAD = struct.Struct("!III")
_ALIGN = 16


class Kind(IntEnum):
    """What a message is."""

    CHALLENGE = 1
    AUTH = 2
    WELCOME = 3
    CALL = 4
    RESULT = 5
    ERROR = 6
    ITEM = 7
    CREDIT = 8
    CANCEL = 9
    PING = 10
    PONG = 11
    GOAWAY = 12
    RELEASE = 13
    DEGRADED = 14
    MODELS = 15


class Message(NamedTuple):
    """A whole message.

    Attributes:
        kind: A `Kind`, as a plain integer: this is the hot path.
        flags: Those of the constants above that apply.
        number: Which call it belongs to.
        content: Its bytes; a `bytearray` where it came in several frames.
    """

    kind: int
    flags: int
    number: int
    content: bytes | bytearray


def header(kind: int, flags: int, number: int, size: int) -> bytes:
    """Return the first bytes of a frame with `size` bytes of content."""
    return HEADER.pack(size, kind, flags, number)


def total_size(content: bytes | memoryview) -> int:
    """Return the size of a message from the content of the first of its frames.

    Raises:
        ValueError: There are too few bytes.
    """
    if len(content) < _TOTAL.size:
        raise ValueError("the first frame of a long message is too short to say how long")
    size: int = _TOTAL.unpack_from(content)[0]
    return size


def total(size: int) -> bytes:
    """Return what the content of the first frame of a long message begins with."""
    return _TOTAL.pack(size)


TOTAL_SIZE = _TOTAL.size


class CallHead(NamedTuple):
    """What a call says before its arguments.

    Attributes:
        method: The method to call.
        context: The trace that the call is part of; see `tracing`.
        timeout_s: Seconds left until its deadline when it was sent; infinity for none.
        request: The request that it is made for; see `Request.encode`. Empty for none.
        attempt: 1, or more for a call that is made again.
    """

    method: str
    context: str = ""
    timeout_s: float = math.inf
    request: bytes = b""
    attempt: int = 1

    def encode(self) -> bytes:
        """Return it as bytes."""
        method, context, timeout_s, request, attempt = self
        return encode_head(method.encode(), context.encode(), timeout_s, request, attempt)

    @classmethod
    def decode(cls, content: bytes | bytearray) -> tuple[CallHead, int]:
        """Return it, and where the arguments begin.

        Raises:
            ValueError: The bytes are no such head.
        """
        try:
            timeout_s, method_size, context_size, request_size, attempt = _HEAD.unpack_from(content)
        except struct.error as error:
            raise ValueError(f"a call's head is cut off: {error}") from None
        first = _HEAD.size + method_size
        second = first + context_size
        end = second + request_size
        if len(content) < end:
            raise ValueError("a call's head is cut off")
        method, context = str(content[_HEAD.size : first], "utf-8"), ""
        if context_size:
            context = str(content[first:second], "utf-8")
        return cls(method, context, timeout_s, bytes(content[second:end]), attempt), end


def encode_head(
    method: bytes, context: bytes, timeout_s: float, request: bytes, attempt: int
) -> bytes:
    """Return the bytes of a `CallHead`, without making one: this is the hot path."""
    sizes = len(method), len(context), len(request)
    return _HEAD.pack(timeout_s, *sizes, min(attempt, _MANY)) + method + context + request


def pack_number(number: int) -> bytes:
    """Return a number as content: that of a kept value, or how much room a stream gets."""
    return _SIZES.pack(number)


def unpack_number(content: Part, start: int = 0) -> int:
    """Return what `pack_number()` was given.

    Raises:
        ValueError: There are too few bytes.
    """
    try:
        number: int = _SIZES.unpack_from(content, start)[0]
    except struct.error as error:
        raise ValueError(f"a number is cut off: {error}") from None
    return number


class Load(NamedTuple):
    """How busy a replica is.

    Attributes:
        ongoing: Calls that run, of all its clients.
        queued: Calls that wait.
        abandoned: Threads that go on for calls which were cancelled, and hold their slots.
    """

    ongoing: int
    queued: int
    abandoned: int = 0

    def encode(self) -> bytes:
        """Return it as bytes."""
        return _LOAD.pack(*self)

    @classmethod
    def decode(cls, content: bytes | bytearray) -> Load:
        """Return it.

        Raises:
            ValueError: The bytes are no load.
        """
        try:
            return cls(*_LOAD.unpack(content))
        except struct.error as error:
            raise ValueError(f"a replica's load is cut off: {error}") from None


def join_payload(payload: Payload, start: int = 0) -> list[Part]:
    """Return the parts of a payload that has buffers, to be sent with `BUFFERS`.

    Args:
        payload: The payload.
        start: How many bytes of the message come before it. Buffers are aligned in the whole
            message, because that is what has memory of its own where it arrives.
    """
    body, buffers = payload
    sizes = [len(body), *(len(buffer) for buffer in buffers)]
    table = struct.pack(f"!I{len(sizes)}Q", len(buffers), *sizes)
    parts: list[Part] = [table]
    offset = start + len(table)
    for part in (body, *buffers):
        pad = -offset % _ALIGN
        parts += (b"\0" * pad, part)
        offset += pad + len(part)
    return parts


def split_payload(content: bytes | bytearray | memoryview, start: int) -> Payload:
    """Return the payload with buffers that begins at `start` of a message.

    Raises:
        ValueError: The bytes are no such payload.
    """
    view = memoryview(content)
    try:
        (count,) = _SIZES.unpack_from(view, start)
        sizes = struct.unpack_from(f"!{count + 1}Q", view, start + _SIZES.size)
    except struct.error as error:
        raise ValueError(f"a payload's table is cut off: {error}") from None
    parts: list[memoryview] = []
    offset = start + _SIZES.size + 8 * len(sizes)
    for size in sizes:
        offset += -offset % _ALIGN
        parts.append(view[offset : offset + size])
        offset += size
    if offset != len(view):
        raise ValueError("a payload's table does not fit its bytes")
    return Payload(parts[0], tuple(parts[1:]))


def payload_parts(payload: Payload) -> tuple[int, tuple[Part, ...]]:
    """Return a payload as flags and content of a message of its own."""
    if payload.buffers:
        return BUFFERS, tuple(join_payload(payload.copied()))
    return 0, (payload.body,)


def payload_of(message: Message) -> Payload:
    """Return the payload that is all of a message.

    Raises:
        ValueError: The bytes are no such payload.
    """
    if message.flags & BUFFERS:
        return split_payload(message.content, 0)
    return Payload(message.content, ())
