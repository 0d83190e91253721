"""The endpoint of a websocket: its messages are the input of a graph, the items its answers."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import logging
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect, WebSocketException
from pydantic import TypeAdapter
from starlette.exceptions import HTTPException

from fastapi_graph.application import Graph
from fastapi_graph.context import Emit
from fastapi_graph.errors import GraphError, GraphStoppingError
from fastapi_graph.http.incoming import IncomingRequest
from fastapi_graph.http.opened import END, Opened
from fastapi_graph.http.results import Result
from fastapi_graph.http.statuses import http_error
from fastapi_graph.request import within
from fastapi_graph.streams import ItemStream

__all__ = ["SocketEndpoint"]

logger = logging.getLogger("fastapi_graph")

# Messages that are received ahead of the graph: as long as there is room, it is noticed when the
# client leaves.
_AHEAD = 64

# Seconds that a graph has to come to its end when its input has, because the client left.
_GRACE_S = 0.5

_NORMAL, _NOT_OF_THE_TYPE, _REFUSED, _FAILED = 1000, 1007, 1008, 1011  # RFC 6455, 7.4.1
_RESTARTS, _LATER = 1012, 1013  # in IANA's registry of close codes


class SocketEndpoint:
    """What FastAPI calls for a websocket.

    Args:
        graph: The graph that answers.
        callee: What of the graph answers here.
        label: What messages call its output.
        takes: The type of the messages.
        gives: The type of the items.
        timeout_s: Seconds that it may be open; None for no limit.
    """

    def __init__(
        self,
        graph: Graph,
        callee: Any,
        *,
        label: str,
        takes: Any,
        gives: Any,
        timeout_s: float | None,
    ) -> None:
        self.__name__ = f"{label.replace('.', '_').lower()}_socket"
        self._graph = graph
        self._callee = callee
        self._label = label
        self._timeout_s = timeout_s
        self._takes = takes
        self._adapter = None if takes in (Any, str, bytes) else TypeAdapter(takes)
        self._gives = gives
        self._result = Result(gives, label)
        self._reading: set[asyncio.Task[Any]] = set()
        keyword = inspect.Parameter.KEYWORD_ONLY
        self.__signature__ = inspect.Signature(
            [inspect.Parameter("websocket", keyword, annotation=WebSocket)]
        )

    async def __call__(self, websocket: WebSocket) -> None:
        incoming = IncomingRequest(websocket.scope)
        try:
            timeout_s = incoming.timeout_s(self._timeout_s)
        except HTTPException as error:
            raise WebSocketException(1008, error.detail) from None
        await websocket.accept(headers=list(incoming.headers()))
        loop = asyncio.get_running_loop()
        deadline = None if timeout_s is None else loop.time() + timeout_s
        with within(deadline):
            code, reason = await self._talk(websocket, loop)
        if code is not None:
            with contextlib.suppress(RuntimeError, WebSocketDisconnect):  # it has been closed
                await websocket.close(code, reason)

    async def _talk(
        self, websocket: WebSocket, loop: asyncio.AbstractEventLoop
    ) -> tuple[int | None, str]:
        """Let client and graph talk; return how to close, None for a client that has left."""
        inbox: asyncio.Queue[Any] = asyncio.Queue()
        room = asyncio.Semaphore(_AHEAD)

        async def messages(emit: Emit) -> None:
            while (message := await inbox.get()) is not END:
                await emit(message)
                room.release()

        source = ItemStream(messages, loop, f"{self._label}: messages", self._reading)
        receiving = loop.create_task(self._receive(websocket, inbox, room))
        sending = loop.create_task(self._send(websocket, source))
        try:
            await asyncio.wait([receiving, sending], return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                if isinstance(error := receiving.exception(), ValueError):
                    return _NOT_OF_THE_TYPE, "a message is not of the declared type"
                if error is not None:
                    logger.error("%s: receiving failed", self._label, exc_info=error)
                    return _FAILED, ""
                await asyncio.wait([sending], timeout=_GRACE_S)
                return None, ""
            return sending.result()
        finally:
            source.abort()
            receiving.cancel()
            sending.cancel()
            await asyncio.gather(receiving, sending, return_exceptions=True)

    async def _receive(
        self, websocket: WebSocket, inbox: asyncio.Queue[Any], room: asyncio.Semaphore
    ) -> None:
        """Put every message into the inbox, and the end when the client leaves."""
        while (message := await websocket.receive())["type"] != "websocket.disconnect":
            inbox.put_nowait(self._read(message))
            await room.acquire()
        inbox.put_nowait(END)

    def _read(self, message: Any) -> Any:
        """Return a message as the declared type.

        Raises:
            ValueError: It is not of that type.
        """
        text, data = message.get("text"), message.get("bytes")
        if self._takes is bytes:
            return text.encode() if data is None else data
        if self._takes is Any and text is None:
            return data
        said = data.decode() if text is None else text
        if self._adapter is None:
            return said
        try:
            return self._adapter.validate_python(json.loads(said))
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error

    async def _send(self, websocket: WebSocket, source: ItemStream) -> tuple[int | None, str]:
        """Send every item, and return how to close after the last one."""
        opened: Opened | None = None
        sent = 0
        try:
            opened = Opened(self._graph.stream(self._callee, (source,)), self._label)
            with opened.closing():
                while (item := await opened.next()) is not END:
                    await self._send_item(websocket, item)
                    sent += 1
        except WebSocketDisconnect:
            return None, ""
        except Exception as error:
            return self._failure(error, sent)
        return _NORMAL, ""

    async def _send_item(self, websocket: WebSocket, item: Any) -> None:
        said: str | bytes
        if isinstance(item, bytes | bytearray | memoryview):
            said = bytes(item)
        elif isinstance(item, str) and self._gives in (Any, str):
            said = item
        else:
            said = self._result.dump(item).decode()
        try:
            if isinstance(said, bytes):
                await websocket.send_bytes(said)
            else:
                await websocket.send_text(said)
        except RuntimeError as error:
            # What uvloop raises for a transport that is closed already: gunicorn passes it on.
            logger.debug("%s: a message was not sent: %r", self._label, error)
            raise WebSocketDisconnect(1006) from error

    def _failure(self, error: Exception, sent: int) -> tuple[int, str]:
        """Log a failure, and return how the client is told."""
        said = http_error(error, None) if isinstance(error, GraphError) else error
        code, detail = _FAILED, "Internal Server Error"
        if isinstance(error, GraphStoppingError):
            code, detail = _RESTARTS, "Shutting down"
        elif isinstance(said, HTTPException):
            code = _LATER if said.status_code in (503, 504) else _REFUSED
            detail = str(said.detail)
        logger.error(
            "%s: the websocket failed after %d items: %r",
            self._label,
            sent,
            error,
            exc_info=error if code == _FAILED else None,
        )
        return code, detail.encode()[:123].decode(errors="ignore")  # as much as a frame has room
