"""Clients that leave before they have been answered.

Under uvicorn an endpoint goes on for a client that has gone, unless it looks. To look means to
receive, and that must not take a part of the body from whoever reads it later.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from typing import ClassVar

from fastapi import Request, Response
from starlette.types import Message, Receive

from fastapi_graph.request import outside

__all__ = ["RECEIVE", "Rereadable", "Watch", "client_left", "has_left"]

logger = logging.getLogger("fastapi_graph")

# A request that takes longer than once or twice this is watched for its client leaving.
_WATCH_AFTER_S = 0.05

# How often it is asked whether the body has been read.
_LOOK_AGAIN_S = 0.2

# In a request's scope: its `Rereadable`.
RECEIVE = "fastapi_graph.receive"


class Rereadable:
    """A `receive` that gives its first message again after `take()`.

    `Request.body()` costs more than the rest of reading a small body, but whoever handles an
    exception of the endpoint has the same request and may want its body.

    Attributes:
        beyond: The `receive` of the server.
        ended: Whether the whole body has been received.
    """

    __slots__ = ("_taken", "beyond", "ended")

    def __init__(self, receive: Receive) -> None:
        self.beyond = receive
        self.ended = False
        self._taken: Message | None = None

    async def __call__(self) -> Message:
        if self._taken is None:
            message: Message = await outside(self.beyond())
            self.ended = not message.get("more_body", False)
            return message
        message, self._taken = self._taken, None
        return message

    async def take(self) -> Message:
        """Receive the first message, to be given again."""
        message: Message = await outside(self.beyond())
        self._taken = message
        self.ended = not message.get("more_body", False)
        return message


def _quiet_receive(request: Request, body_is_ours: bool) -> Receive | None:
    """Return what may be received from without taking a body from anybody, or None.

    Args:
        request: The request.
        body_is_ours: Whether nobody but the caller reads the body.
    """
    tracked: Rereadable | None = request.scope.get(RECEIVE)
    if tracked is None:  # in a route class of the user's own
        return request.receive if body_is_ours else None
    if body_is_ours or tracked.ended or not _has_body(request):
        return tracked.beyond
    return None


async def _has_gone(receive: Receive) -> bool:
    """Wait until the client leaves; False if that cannot be known."""
    try:
        while (await receive())["type"] != "http.disconnect":
            pass
    except Exception as error:
        logger.debug("cannot watch for the client leaving: %r", error)
        return False
    return True


async def has_left(request: Request, body_is_ours: bool) -> bool:
    """Wait until the client leaves; while others may read its body, do not look.

    Args:
        request: The request.
        body_is_ours: Whether nobody but the caller reads the body.
    """
    while (receive := _quiet_receive(request, body_is_ours)) is None:  # noqa: ASYNC110 - no event
        await asyncio.sleep(_LOOK_AGAIN_S)
    return await _has_gone(receive)


class Watch:
    """Cancels the current task when the client of a request leaves.

    Under uvicorn an endpoint goes on for a client that has gone, unless it looks. Most
    requests are over before that is worth a task: a sweep over all of them, every
    `_WATCH_AFTER_S`, begins to look at those it meets for the second time.
    """

    __slots__ = ("_body_is_ours", "_gone", "_met", "_others", "_request", "_task", "_watcher")

    _open: ClassVar[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, set[Watch]]] = (
        weakref.WeakKeyDictionary()
    )

    def __init__(self, request: Request, body_is_ours: bool) -> None:
        self._request = request
        self._body_is_ours = body_is_ours
        self._task = asyncio.current_task()
        self._watcher: asyncio.Task[None] | None = None
        self._met = self._gone = False
        loop = asyncio.get_running_loop()
        watches = self._open.get(loop)
        if watches is None:
            watches = self._open[loop] = set()
            loop.call_later(_WATCH_AFTER_S, self._sweep, loop)
        watches.add(self)
        self._others = watches

    @classmethod
    def _sweep(cls, loop: asyncio.AbstractEventLoop) -> None:
        watches = cls._open[loop]
        if not watches:
            del cls._open[loop]  # the next request begins anew
            return
        for watch in watches:
            if watch._met and watch._watcher is None:
                watch._look(loop)
            watch._met = True
        loop.call_later(_WATCH_AFTER_S, cls._sweep, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        receive = _quiet_receive(self._request, self._body_is_ours)
        if receive is not None:
            self._watcher = loop.create_task(self._listen(receive))

    async def _listen(self, receive: Receive) -> None:
        if not await _has_gone(receive):
            return
        self._gone = True
        if self._task is not None:
            self._task.cancel()

    def client_left(self) -> bool:
        """Say whether it cancelled the task, and take that back."""
        if self._gone and self._task is not None:
            self._task.uncancel()
        return self._gone

    def stop(self) -> None:
        """Look no longer."""
        self._others.discard(self)
        if self._watcher is not None:
            self._watcher.cancel()


def _has_body(request: Request) -> bool:
    return "content-length" in request.headers or "transfer-encoding" in request.headers


def client_left(request: Request) -> Response:
    """Log that the client left, and return the answer that nobody receives."""
    # Nobody receives it; it is what middleware and access logs see.
    logger.warning("499 %s %s: the client left", request.method, request.url.path)
    return Response(status_code=499)
