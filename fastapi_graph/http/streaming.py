"""The endpoint of a route whose output is a stream: items over HTTP, one by one.

The first item is awaited before the answer begins, so that what goes wrong until then has the
status that it has for any other route. What goes wrong later is said at the end of the stream.
Little is read ahead of the client: while it does not take what has been sent, the generator
waits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from fastapi_graph.application import Graph
from fastapi_graph.errors import GraphError
from fastapi_graph.graph import signatures
from fastapi_graph.http.disconnects import client_left, has_left
from fastapi_graph.http.endpoint import GraphEndpoint, Handler
from fastapi_graph.http.forms import (
    EVENTS,
    LINES,
    Chunks,
    Events,
    Form,
    Lines,
    StreamForm,
    asked_for,
)
from fastapi_graph.http.opened import END, Opened
from fastapi_graph.http.statuses import http_error

__all__ = ["StreamEndpoint", "StreamForm"]

logger = logging.getLogger("fastapi_graph")

# Seconds without an item after which a form that can say so says that the stream goes on.
_IDLE_S = 15.0


class StreamEndpoint(GraphEndpoint):
    """What FastAPI calls for a route that gives a stream; see `GraphEndpoint`.

    Args:
        graph: The graph that answers.
        callee: What of the graph answers this route.
        form: How every stream is sent; None: as the request asks, or the items suggest.
        result_type: The declared type of the stream.
        **where: As for `GraphEndpoint`.
    """

    def __init__(
        self,
        graph: Graph,
        callee: Any,
        *,
        form: StreamForm | None,
        result_type: Any,
        **where: Any,
    ) -> None:
        item_type = signatures.item_type(result_type)
        super().__init__(graph, callee, result_type=item_type, **where)
        self._ask = self._open
        self._item_type = item_type
        self._negotiates = form is None
        self._form = form or _form_of(item_type)
        self.shown_options = _documentation(self._form, item_type, self._negotiates)

    @property
    def shown(self) -> Callable[..., Any]:
        """A generator with the same signature: FastAPI documents it as a stream."""

        async def shown() -> AsyncIterator[Any]:
            yield

        shown.__name__, shown.__doc__ = self.__name__, self.__doc__
        item = self._item_type if self._item_type is ServerSentEvent else self._result.annotation
        shown.__signature__ = self.__signature__.replace(  # type: ignore[attr-defined]
            return_annotation=AsyncIterator[item]  # type: ignore[valid-type]
        )
        return shown

    def shortcut(self, standard: Handler, asking: APIRoute | None) -> Handler:
        """Return `standard`: next to a stream, what FastAPI does before it takes no time."""
        return standard

    async def __call__(self, request: Request, response: Response, value: Any = None) -> Any:
        form = self._form_for(request)
        with self._answering(request, response):
            opened = await self._run(request, self._checked(value))
        if isinstance(opened, Response):
            return opened
        assert isinstance(opened, Opened)
        try:
            answer = _StreamResponse(request, opened, form, value, self._body_is_ours)
        except BaseException:
            opened.close()
            raise
        answer.status_code = response.status_code or 200
        if self._negotiates:
            answer.headers["Vary"] = "Accept"
        # FastAPI merges what dependencies have set into its own responses only.
        answer.headers.raw.extend(response.headers.raw)
        return answer

    async def _open(self, args: tuple[Any, ...]) -> Opened:
        """Start the stream and wait for its first item."""
        opened = Opened(self._graph.stream(self._callee, self._opened(args)), self._label)
        opened.first = await opened.next()
        return opened

    def _form_for(self, request: Request) -> Form:
        asked = asked_for(",".join(request.headers.getlist("accept"))) if self._negotiates else None
        if asked == EVENTS or (asked is None and self._form == "sse"):
            return Events(self._result)
        if asked is not None:
            return Lines(self._result, asked)
        if self._form == "jsonl":
            return Lines(self._result)
        return Chunks(self._label, self._item_type)


def _form_of(item_type: Any) -> StreamForm:
    if item_type in (bytes, str):
        return "chunks"
    return "sse" if item_type is ServerSentEvent else "jsonl"


class _Text(StreamingResponse):
    media_type = "text/plain"


class _Bytes(StreamingResponse):
    media_type = "application/octet-stream"


def _documentation(form: StreamForm, item_type: Any, negotiates: bool) -> dict[str, Any]:
    """Return the keywords of `add_api_route` that document a stream's media types."""
    shown: dict[str, Any] = {}
    if form == "sse":
        shown["response_class"] = EventSourceResponse
    elif form == "chunks":
        shown["response_class"] = _Text if item_type is str else _Bytes
    if negotiates:
        # FastAPI documents one media type of a stream in full; the others are named.
        data = {"type": "string", "contentMediaType": "application/json"}
        event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
        others = {EVENTS: event, LINES: {}}
        others.pop({"sse": EVENTS, "jsonl": LINES}.get(form, ""), None)
        content = {media_type: {"itemSchema": item} for media_type, item in others.items()}
        shown["responses"] = {200: {"content": content}}
    return shown


class _BrokenOff(Exception):
    """Tells the server to end the connection: the client must not take the stream for whole."""


class _StreamResponse(StreamingResponse):
    """Sends a stream, and closes its generator when the client leaves."""

    def __init__(
        self, request: Request, opened: Opened, form: Form, value: Any, body_is_ours: bool
    ) -> None:
        self._request = request
        self._opened = opened
        self._form = form
        self._value = value
        self._body_is_ours = body_is_ours
        first = None if opened.first is END else opened.first
        self._first = b"" if opened.first is END else form.item(first)
        self._saying = self._said()
        super().__init__(self._saying, headers=form.headers, media_type=form.media_type(first))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._opened.closing():
            sending = asyncio.ensure_future(self.stream_response(send))
            leaving = asyncio.ensure_future(has_left(self._request, self._body_is_ours))
            try:
                await self._settle(sending, leaving)
            finally:
                sending.cancel()
                leaving.cancel()
                await asyncio.gather(sending, leaving, return_exceptions=True)
                await self._saying.aclose()
        if self.background is not None:
            await self.background()

    async def _settle(self, sending: asyncio.Future[Any], leaving: asyncio.Future[Any]) -> None:
        """Wait until all has been sent, or the client has left."""
        await asyncio.wait([sending, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not sending.done() and leaving.result():
            client_left(self._request)
            return
        try:
            await sending
        except OSError:  # so a server says that there is nobody to send to
            client_left(self._request)

    async def _said(self) -> AsyncGenerator[bytes, None]:
        """Yield what is sent."""
        reading: asyncio.Future[Any] | None = None
        item, chunk, sent = self._opened.first, self._first, 0
        try:
            while item is not END:
                if chunk:
                    yield chunk
                sent += 1
                if not self._form.idle:
                    item = await self._opened.next()
                else:
                    reading = asyncio.ensure_future(self._opened.next())
                    while not (await asyncio.wait([reading], timeout=_IDLE_S))[0]:
                        yield self._form.idle
                    item = reading.result()
                chunk = b"" if item is END else self._form.item(item)
        except Exception as error:
            self._opened.close()
            said = self._failure(error, sent)
            if said is None:
                raise _BrokenOff(f"{self._opened.label}: broken off in mid-stream") from None
            yield said
        finally:
            if reading is not None:
                reading.cancel()

    def _failure(self, error: Exception, sent: int) -> bytes | None:
        """Log a failure in mid-stream, and return how the client is told."""
        said = http_error(error, self._value) if isinstance(error, GraphError) else error
        status, detail = 500, "Internal Server Error"
        if isinstance(said, HTTPException):
            status, detail = said.status_code, said.detail
        logger.error(
            "%s: the stream failed after %d items: %s",
            self._opened.label,
            sent,
            detail if status < 500 else repr(error),
            exc_info=error if status == 500 else None,
        )
        return self._form.failure(status, detail)
