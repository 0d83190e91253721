"""The request that the current context works on, and what is known of it.

A *request* came in from outside; it has an id that all calls made for it share, in other
processes too. A *scope* is the part of it that a context works for: the whole, or one call. An
*attempt* is one of several at a call.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import secrets
import time
from collections.abc import Awaitable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

from fastapi_graph.context import current_call

__all__ = [
    "Attempt",
    "Request",
    "RequestContext",
    "Scope",
    "current_attempt",
    "current_deadline",
    "current_request",
    "current_scope",
    "get_request_context",
    "outside",
    "scope_of_call",
    "seconds_left",
    "within",
]


_numbers = itertools.count(1)
_process = secrets.token_hex(10)


def _renew() -> None:
    global _process  # noqa: PLW0603 - two processes must not share it
    _process = secrets.token_hex(10)


os.register_at_fork(after_in_child=_renew)


class Request:
    """What came in from outside. It travels to every process that works on it.

    Args:
        request_id: Its id; empty: a new one, made when it is first asked for.
        route: The path that was requested; empty without HTTP.
        multiplexed_model_id: The model that it asks for; empty for none.
    """

    __slots__ = ("_id", "_wire", "multiplexed_model_id", "route")

    def __init__(
        self, request_id: str = "", route: str = "", multiplexed_model_id: str = ""
    ) -> None:
        self._id = request_id
        self.route = route
        self.multiplexed_model_id = multiplexed_model_id
        self._wire: bytes | None = None

    @property
    def request_id(self) -> str:
        """The id that all calls of the request share."""
        if not self._id:
            # Unique and short to make; the first 20 digits are the process.
            self._id = f"{_process}{next(_numbers):012x}"
        return self._id

    def for_model(self, model_id: str) -> Request:
        """Return the same request, asking for this model."""
        return Request(self.request_id, self.route, model_id)

    def encode(self) -> bytes:
        """Return it as bytes, to be sent along with a call."""
        if self._wire is None:
            parts = (self.request_id, self.route, self.multiplexed_model_id)
            self._wire = "\n".join(part.replace("\n", " ") for part in parts).encode()
        return self._wire

    @classmethod
    def decode(cls, data: bytes) -> Request:
        """Return it.

        Raises:
            ValueError: The bytes are no request.
        """
        request_id, route, model_id = data.decode().split("\n")
        request = cls(request_id, route, model_id)
        request._wire = data
        return request


class Scope:
    """What the current context works for, and what it learns of the calls below it.

    One is made for a request, for every handle call, and for what outlives its caller.

    Args:
        request: What came in; None for nothing yet: the first handle call begins a request.
        deadline: When there has to be an answer, by the clock of the event loop; None for
            whenever.
        parent: What learns of fallbacks as well.

    Attributes:
        degraded: The deployments whose fallback answered in their place.
        said: Those of them that the caller in another process has been told.
    """

    __slots__ = ("deadline", "degraded", "parent", "request", "said")

    def __init__(
        self,
        request: Request | None = None,
        deadline: float | None = None,
        parent: Scope | None = None,
    ) -> None:
        self.request = request
        self.deadline = deadline
        self.parent = parent
        self.degraded: tuple[str, ...] = ()
        self.said: tuple[str, ...] = ()

    def degrade(self, names: tuple[str, ...]) -> None:
        """Note that fallbacks have answered for these deployments."""
        scope: Scope | None = self
        while scope is not None:
            scope.degraded = tuple(dict.fromkeys((*scope.degraded, *names)))
            scope = scope.parent


current_scope: ContextVar[Scope | None] = ContextVar("fastapi_graph_scope", default=None)


def scope_of_call(model_id: str = "") -> Scope:
    """Return the scope of a call that begins in the current context.

    Args:
        model_id: The model that it asks for; empty for that of the request.
    """
    outer = current_scope.get()
    if outer is None:
        return Scope(Request(multiplexed_model_id=model_id))
    request = outer.request or Request()
    if model_id:
        request = request.for_model(model_id)
    return Scope(request, outer.deadline, outer)


@contextlib.contextmanager
def within(deadline: float | None) -> Iterator[None]:
    """Let the body, a part of what the current context works for, have another deadline.

    Args:
        deadline: By the clock of the event loop; None for none, whatever there is around it.
    """
    outer = current_scope.get()
    scope = Scope(None if outer is None else outer.request, deadline, outer)
    token = current_scope.set(scope)
    try:
        yield
    finally:
        current_scope.reset(token)


async def outside(awaitable: Awaitable[Any]) -> Any:
    """Await what is not part of the request, though it is awaited in its course.

    A server may start the next request of a connection while it sends or receives for this one,
    with a copy of the context that it finds then.
    """
    token = current_scope.set(None)
    try:
        return await awaitable
    finally:
        current_scope.reset(token)


class Attempt:
    """Which attempt at a call this is, and how many may follow.

    Whoever makes the attempts changes it: the policy that retries, and a client that sends a call
    again after the loss of a replica. A hedge has one of its own, with the same `avoid`.

    Args:
        limit: The call's `max_retries`.
        number: 1 for the first.

    Attributes:
        spent: How many retries have been used.
        avoid: Ids of the replicas that have been sent this call.
        hedges: Whether it is made only where another replica is free at once.
    """

    __slots__ = ("avoid", "hedges", "limit", "number", "spent")

    def __init__(self, limit: int = 0, number: int = 1) -> None:
        self.limit = limit
        self.number = number
        self.spent = 0
        self.avoid: set[str] = set()
        self.hedges = False

    def again(self) -> bool:
        """Use up one retry, and say whether there was one left."""
        self.number += 1
        self.spent += 1
        return self.spent <= self.limit


current_attempt: ContextVar[Attempt | None] = ContextVar("fastapi_graph_attempt", default=None)
"""Set by whoever calls a deployment; whoever runs the call takes it out of the context."""


class RequestContext(NamedTuple):
    """Where the current code runs, and for whom.

    Attributes:
        request_id: Shared by all calls of one request, in every process; over HTTP it is the
            header `x-request-id`, of the request or else made for it.
        route: The path that was requested; empty without HTTP.
        deadline_s: Seconds left until the request has to be answered; None for no deadline.
        deployment: The deployment whose code runs; empty outside of one.
        replica: The replica; in-process, the process.
        attempt: 1, or more for a call that is made again.
        multiplexed_model_id: The model that is asked for; empty for none.
    """

    request_id: str
    route: str
    deadline_s: float | None
    deployment: str
    replica: str
    attempt: int
    multiplexed_model_id: str


def current_request() -> Request | None:
    """Return the request that the current context works for; None for none."""
    scope = current_scope.get()
    return None if scope is None else scope.request


def current_deadline() -> float | None:
    """Return until when, by the clock of the event loop; None for whenever."""
    scope = current_scope.get()
    return None if scope is None else scope.deadline


def seconds_left() -> float | None:
    """Return how much time the current context has; None for no deadline."""
    deadline = current_deadline()
    if deadline is None:
        return None
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:  # in a worker thread
        return deadline - time.monotonic()
    return deadline - loop.time()


def get_request_context() -> RequestContext:
    """Return where the current code runs, and for whom.

    In a deployment, in an endpoint or dependency of a graph's router, and in what they call.
    Elsewhere it is that of a new request each time: a call through a handle begins one, too.
    """
    request, call = current_request() or Request(), current_call.get()
    host = call.host if call is not None else None
    return RequestContext(
        request_id=request.request_id,
        route=request.route,
        deadline_s=seconds_left(),
        deployment=host.name if host is not None else "",
        replica=host.replica_id if host is not None else "",
        attempt=call.attempt if call is not None else 1,
        multiplexed_model_id=request.multiplexed_model_id,
    )
