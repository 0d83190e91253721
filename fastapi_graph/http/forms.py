"""Forms of a stream over HTTP: Server-Sent Events, JSON lines, or the bytes as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, Protocol

from fastapi.sse import KEEPALIVE_COMMENT, ServerSentEvent, format_sse_event

from fastapi_graph.errors import SerializationError
from fastapi_graph.http.results import Result

__all__ = ["Chunks", "Events", "Form", "Lines", "StreamForm", "asked_for"]

StreamForm = Literal["sse", "jsonl", "chunks"]
"""What `graph_router(stream=...)` takes."""

EVENTS = "text/event-stream"
LINES = "application/jsonl"
NDJSON = "application/x-ndjson"  # the same by an older name

_UNTYPED = Result(Any, "the data of an event")


class Form(Protocol):
    """How the items of one answer are said.

    Attributes:
        headers: What the answer has besides its media type.
        idle: What may be sent while there is no item, or nothing.
    """

    headers: Mapping[str, str]
    idle: bytes

    def media_type(self, first: Any) -> str:
        """Return the media type of an answer with this first item."""

    def item(self, value: Any) -> bytes:
        """Return an item as bytes.

        Raises:
            ResponseValidationError: It is not of the declared type.
            SerializationError: It cannot be said in this form.
        """

    def failure(self, status: int, detail: Any) -> bytes | None:
        """Return how a stream says that it has failed; None if it can only break off."""


class Events:
    """Server-Sent Events, as FastAPI says them: every item is JSON in the `data` of an event."""

    # Proxies, nginx above all, would hold back or keep what they take for a document.
    headers: Mapping[str, str] = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    idle = KEEPALIVE_COMMENT

    def __init__(self, result: Result) -> None:
        self._result = result

    def media_type(self, first: Any) -> str:
        return EVENTS

    def item(self, value: Any) -> bytes:
        if not isinstance(value, ServerSentEvent):
            return format_sse_event(data_str=self._result.dump(value).decode())
        data = value.raw_data
        if value.data is not None:
            data = _UNTYPED.dump(value.data).decode()
        return format_sse_event(
            data_str=data,
            event=value.event,
            id=value.id,
            retry=value.retry,
            comment=value.comment,
        )

    def failure(self, status: int, detail: Any) -> bytes | None:
        return format_sse_event(event="error", data_str=_failure(status, detail))


class Lines:
    """JSON lines: every item is JSON on a line of its own; of an event it is the data."""

    headers: Mapping[str, str] = {}
    idle = b""

    def __init__(self, result: Result, media_type: str = LINES) -> None:
        self._result = result
        self._media_type = media_type

    def media_type(self, first: Any) -> str:
        return self._media_type

    def item(self, value: Any) -> bytes:
        if isinstance(value, ServerSentEvent):
            data = value.data if value.raw_data is None else value.raw_data
            return _UNTYPED.dump(data) + b"\n"
        return self._result.dump(value) + b"\n"

    def failure(self, status: int, detail: Any) -> bytes | None:
        return b'{"error":%b}\n' % _failure(status, detail).encode()


class Chunks:
    """The items as they are: `bytes`, or `str` in UTF-8."""

    headers: Mapping[str, str] = {}
    idle = b""

    def __init__(self, label: str, declared: Any) -> None:
        self._label = label
        self._declared = declared

    def media_type(self, first: Any) -> str:
        is_text = isinstance(first, str) or (first is None and self._declared is str)
        return "text/plain" if is_text else "application/octet-stream"

    def item(self, value: Any) -> bytes:
        if isinstance(value, str):
            return value.encode()
        if isinstance(value, bytes | bytearray | memoryview):
            return bytes(value)
        raise SerializationError(
            f"an item of {self._label} is {type(value).__qualname__}: chunks are bytes or str; "
            "yield these, or pass stream='jsonl' to graph_router"
        )

    def failure(self, status: int, detail: Any) -> bytes | None:
        return None


def _failure(status: int, detail: Any) -> str:
    return json.dumps({"status": status, "detail": detail}, separators=(",", ":"), default=str)


def asked_for(accept: str) -> str | None:
    """Return the media type of a stream that an `Accept` header asks for by name, if any does."""
    best, best_quality = None, 0.0
    for part in accept.split(","):
        media_type, *parameters = (piece.strip().lower() for piece in part.split(";"))
        quality = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                try:
                    quality = float(parameter[2:])
                except ValueError:
                    quality = 0.0
        if media_type in (EVENTS, LINES, NDJSON) and quality > best_quality:
            best, best_quality = media_type, quality
    return best
