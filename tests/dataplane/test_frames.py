"""Calls' heads, and payloads with buffers."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastapi_graph.dataplane.codec import Payload
from fastapi_graph.dataplane.frames import (
    HEADER,
    CallHead,
    Kind,
    header,
    join_payload,
    split_payload,
    total,
    total_size,
)


def joined(*parts: bytes, start: int = 0) -> bytes:
    return b"".join(join_payload(Payload(parts[0], parts[1:]), start))


def test_a_header_says_size_kind_flags_and_number() -> None:
    assert header(Kind.CALL, 3, 0xFFFF_FFFF, 256) == b"\0\0\1\0\x04\x03\xff\xff\xff\xff"
    assert HEADER.size == 10


def test_a_total() -> None:
    assert total_size(total(1 << 40) + b"...") == 1 << 40
    with pytest.raises(ValueError, match="too short"):
        total_size(b"\0" * 7)


@given(
    st.text(max_size=100),
    st.text(max_size=100),
    st.floats(allow_nan=False),
    st.binary(max_size=100),
    st.integers(1, 255),
)
def test_a_head_and_where_the_arguments_begin(
    method: str, context: str, timeout_s: float, request: bytes, attempt: int
) -> None:
    head = CallHead(method, context, timeout_s, request, attempt)
    content = head.encode()
    assert CallHead.decode(content + b"arguments") == (head, len(content))
    assert CallHead.decode(bytearray(content)) == (head, len(content))


@pytest.mark.parametrize("size", range(len(CallHead("méthode", "context", 1.5, b"id").encode())))
def test_a_head_that_is_cut_off(size: int) -> None:
    with pytest.raises(ValueError, match="cut off"):
        CallHead.decode(CallHead("méthode", "context", 1.5, b"id").encode()[:size])


def test_more_attempts_than_a_head_can_say() -> None:
    assert CallHead.decode(CallHead("f", attempt=1000).encode())[0].attempt == 255


def test_a_head_that_is_not_text() -> None:
    with pytest.raises(ValueError, match="utf-8"):
        CallHead.decode(struct.pack("!dHHHB", 0, 1, 0, 0, 1) + b"\xff")


BYTES = st.binary(max_size=60)


@given(BYTES, st.lists(BYTES, max_size=5), BYTES)
def test_a_payload_with_buffers_comes_back(
    body: bytes, buffers: list[bytes], before: bytes
) -> None:
    content = before + joined(body, *buffers, start=len(before))
    for form in (content, bytearray(content)):
        payload = split_payload(form, len(before))
        assert bytes(payload.body) == body
        assert [bytes(buffer) for buffer in payload.buffers] == buffers


@pytest.mark.parametrize("start", [0, 1, 19])
def test_buffers_are_aligned_and_share_the_memory_of_the_message(start: int) -> None:
    content = bytearray(bytes(start) + joined(b"b", b"one", b"", b"three", start=start))
    _, (one, empty, three) = split_payload(content, start)
    for buffer in (one, three):
        assert content.find(bytes(buffer)) % 16 == 0
    assert not empty
    one[:] = b"ONE"
    assert b"ONE" in content


def table(*sizes: int, count: int | None = None, rest: bytes = b"") -> bytes:
    count = len(sizes) - 1 if count is None else count
    return struct.pack(f"!I{len(sizes)}Q", count, *sizes) + rest


BAD_TABLES = {
    "nothing": b"",
    "half a count": b"\0\0",
    "a count alone": b"\0\0\0\1",
    "a size too few": table(1, 1, count=2),
    "a huge count": table(1, 1, count=0xFFFF_FFFF),
    "a huge size": table(1 << 63, 0, rest=b"\0" * 32),
    "sizes that wrap around": table((1 << 64) - 16, 16, rest=b"\0" * 64),
    "a size too large": table(4, 5, rest=b"\0" * 12 + b"body" + b"\0" * 12 + b"four"),
    "a size too small": table(4, 3, rest=b"\0" * 12 + b"body" + b"\0" * 12 + b"four"),
    "no padding": table(4, 4, rest=b"body" + b"four"),
    "something behind": joined(b"body", b"buffer") + b"\0",
    "the last byte is missing": joined(b"body", b"buffer")[:-1],
}


@pytest.mark.parametrize("content", BAD_TABLES.values(), ids=BAD_TABLES)
def test_a_bad_table(content: bytes) -> None:
    with pytest.raises(ValueError, match="table"):
        split_payload(content, 0)


@given(st.binary(max_size=200), st.integers(0, 250))
def test_any_bytes_are_a_payload_or_a_value_error(content: bytes, start: int) -> None:
    try:
        body, buffers = split_payload(content, start)
    except ValueError:
        return
    assert len(body) + sum(map(len, buffers)) <= len(content)


@given(st.binary(max_size=100))
def test_any_bytes_are_a_head_or_a_value_error(content: bytes) -> None:
    try:
        head, start = CallHead.decode(content)
    except ValueError:
        return
    assert start <= len(content)
    assert len(head.method.encode()) + len(head.context.encode()) <= start
