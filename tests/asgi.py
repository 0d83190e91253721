"""An HTTP client without a server between it and the app: it takes an answer piece by piece."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any, Self

import anyio

__all__ = ["Exchange"]

PATIENCE_S = 20.0


class Exchange:
    """One request, and its answer as the app sends it: nothing is taken before `take()`.

    Args:
        app: The app.
        path: Where the request goes.
        value: Its body, in JSON.
        **headers: Its other headers.
    """

    def __init__(self, app: Any, path: str, value: Any = None, **headers: str) -> None:
        self._app = app
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [
                (b"content-type", b"application/json"),
                *((name.encode(), value.encode()) for name, value in headers.items()),
            ],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
            "state": {},
        }
        self._body: bytes | None = json.dumps(value).encode()
        self._left = asyncio.Event()
        self._send, self._taken = anyio.create_memory_object_stream[Any](0)
        self.task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self.task = asyncio.create_task(self._app(self._scope, self._receive, self._sent))
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.leave()
        assert self.task is not None
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self.task, PATIENCE_S)
        self._send.close()

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _sent(self, message: dict[str, Any]) -> None:
        # As a server does, take what is for a client that has gone, and forget it.
        with contextlib.suppress(anyio.BrokenResourceError):
            await self._send.send(message)

    async def take(self) -> dict[str, Any]:
        """Return the next message."""
        async with asyncio.timeout(PATIENCE_S):
            message: dict[str, Any] = await self._taken.receive()
        return message

    async def start(self) -> int:
        """Take the start of the answer, and return the status."""
        message = await self.take()
        assert message["type"] == "http.response.start"
        return int(message["status"])

    async def piece(self) -> bytes:
        """Return the next piece of the body; nothing is the end."""
        message = await self.take()
        assert message["type"] == "http.response.body"
        return bytes(message["body"])

    async def rest(self) -> bytes:
        """Return all that is left of the body."""
        return b"".join([piece async for piece in self._pieces()])

    async def _pieces(self) -> Any:
        while piece := await self.piece():
            yield piece

    def leave(self) -> None:
        """Close the connection."""
        self._left.set()
        self._taken.close()
