"""What the headers of an HTTP request say to a graph, and what those of the answer say back.

| header of the request | meaning |
| --- | --- |
| `x-request-id` | the request's id; without one, or with one that cannot be, it gets a new one |
| `x-request-timeout-seconds` | its deadline, where that is earlier than the router's |
| `serve_multiplexed_model_id` | the model that it asks for; Ray Serve's name |

| header of the answer | meaning |
| --- | --- |
| `x-request-id` | the request's id |
| `x-graph-degraded` | the deployments whose fallback has answered for them |
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, MutableMapping
from typing import Any

from fastapi import HTTPException
from starlette.types import Message, Send

from fastapi_graph.request import Request, Scope, current_scope, outside

__all__ = ["IncomingRequest", "incoming_of"]

_REQUEST_ID = b"x-request-id"
_TIMEOUT = b"x-request-timeout-seconds"
# HTTP servers that refuse underscores in names let the second form pass.
_MODEL_ID = frozenset({b"serve_multiplexed_model_id", b"serve-multiplexed-model-id"})
_READ = frozenset({_REQUEST_ID, _TIMEOUT, *_MODEL_ID})
_DEGRADED = b"x-graph-degraded"

# What may be written into logs and sent back as it is.
_IS_ID = re.compile(rb"[\x21-\x7e]{1,128}").fullmatch

_INCOMING = "fastapi_graph.incoming"


class IncomingRequest:
    """One HTTP request, as its headers describe it. The current context works on it from now on.

    Args:
        scope: Its ASGI scope.
    """

    __slots__ = ("_request", "_scope", "_timeout")

    def __init__(self, scope: MutableMapping[str, Any]) -> None:
        request_id = model_id = ""
        self._timeout: bytes | None = None
        for name, value in scope["headers"]:
            if name not in _READ:
                continue
            if name == _TIMEOUT:
                self._timeout = value
            elif name == _REQUEST_ID:
                request_id = value.decode() if _IS_ID(value) else ""
            elif not model_id:
                model_id = value.decode("latin-1")
        self._request = Request(request_id, scope["path"], model_id)
        self._scope = Scope(self._request)
        current_scope.set(self._scope)
        scope[_INCOMING] = self

    def timeout_s(self, limit: float | None) -> float | None:
        """Return the seconds that the request may take.

        Args:
            limit: Those of the router; the header can only shorten them. None for no limit.

        Raises:
            HTTPException: The header says no number of seconds (400).
        """
        if self._timeout is None:
            return limit
        try:
            asked = float(self._timeout)
        except ValueError:
            asked = math.nan
        if not 0 < asked < math.inf:
            raise HTTPException(400, "x-request-timeout-seconds must be a number above 0")
        return asked if limit is None else min(asked, limit)

    def headers(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield what the answer says of the request."""
        yield _REQUEST_ID, self._request.request_id.encode()
        if self._scope.degraded:
            yield _DEGRADED, ", ".join(self._scope.degraded).encode("ascii", "backslashreplace")

    def saying(self, send: Send) -> Send:
        """Return a `send` that adds the headers of the answer, unless it has them."""

        async def say(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                there = {name for name, _ in headers}
                headers += [header for header in self.headers() if header[0] not in there]
                message["headers"] = headers
            await outside(send(message))

        return say


def incoming_of(scope: MutableMapping[str, Any]) -> IncomingRequest | None:
    """Return the request that this scope is already known to be."""
    return scope.get(_INCOMING)
