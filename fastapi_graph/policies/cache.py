"""The result cache of a deployment, in each process that calls it.

Identical calls at the same time are one call: its task belongs to none of those who wait for it,
so that one who is cancelled, or late, costs the others nothing. Its deadline is the latest of
theirs.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from contextvars import copy_context
from typing import Any, NamedTuple

from fastapi_graph.context import add_note, current_call, eager_task
from fastapi_graph.dataplane import codec
from fastapi_graph.errors import DeadlineExceededError, SerializationError
from fastapi_graph.graph.options import Cache
from fastapi_graph.models import get_multiplexed_model_id
from fastapi_graph.policies.layer import Layer
from fastapi_graph.raised import contain, twin
from fastapi_graph.request import (
    Scope,
    current_deadline,
    current_request,
    current_scope,
    seconds_left,
)

__all__ = ["Cached", "CachedResult", "ResultCache", "content_of"]

Function = Callable[[str, tuple[Any, ...], dict[str, Any]], Awaitable[Any]]

_PLAIN = frozenset({str, int, bool, bytes, type(None)})


class CachedResult(NamedTuple):
    """A result, and until when it is kept by the clock of the event loop."""

    value: Any
    until: float


class _Flight:
    """A call under way, and how many wait for it."""

    __slots__ = ("failed", "first_deadline", "key", "scope", "task", "waiting")

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.first_deadline = current_deadline()
        self.scope = Scope(current_request(), self.first_deadline)
        self.waiting = 0
        self.failed = False  # and somebody has been told
        self.task: asyncio.Task[Any]

    def join(self) -> None:
        """Let it have until the deadline of the current context, if that is later."""
        deadline = current_deadline()
        if deadline is None or self.scope.deadline is None:
            self.scope.deadline = None
        else:
            self.scope.deadline = max(deadline, self.scope.deadline)

    @property
    def is_late(self) -> bool:
        """Whether the deadline has passed with which it began, and which other processes know."""
        deadline = self.first_deadline
        return deadline is not None and asyncio.get_running_loop().time() >= deadline


class ResultCache:
    """Keeps the results of one deployment.

    Args:
        settings: How many, for how long, under which key.
        label: What messages call the deployment.
        counts: Where to count hits and misses.
        pending: Where to note the calls under way.
    """

    def __init__(
        self,
        settings: Cache,
        label: str,
        counts: Counter[str],
        pending: set[asyncio.Task[Any]],
    ) -> None:
        self._settings = settings
        self._label = label
        self._argument = f"{label}: an argument"
        self._counts = counts
        self._pending = pending
        self._kept: OrderedDict[Hashable, CachedResult] = OrderedDict()
        self._flights: dict[Hashable, _Flight] = {}

    def clear(self) -> None:
        """Forget every result, those to come included."""
        self._kept.clear()
        self._flights.clear()

    def find(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> CachedResult | None:
        """Return the result that is kept for a call, if there is one."""
        return self._find(self._key(method, args, kwargs))

    def _find(self, key: Hashable) -> CachedResult | None:
        kept = self._kept.get(key)
        if kept is None or asyncio.get_running_loop().time() >= kept.until:
            return None
        self._kept.move_to_end(key)
        self._counts["cache_hits"] += 1
        return kept

    async def call(
        self, function: Function, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return the result that is kept, or that of a call which is under way, or of a new one."""
        key = self._key(method, args, kwargs)
        loop = asyncio.get_running_loop()
        while True:
            if (kept := self._find(key)) is not None:
                return kept.value
            flight = self._flights.get(key)
            if flight is None or flight.task.get_loop() is not loop:
                self._counts["cache_misses"] += 1
                return await self._wait_for(self._begin(key, function, method, args, kwargs))
            flight.join()
            try:
                value = await self._wait_for(flight)
            except DeadlineExceededError:
                left = seconds_left()
                if not flight.is_late or (left is not None and left <= 0):
                    raise
            else:
                self._counts["cache_hits"] += 1
                return value

    def _key(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
        model_id = get_multiplexed_model_id()
        if self._settings.key is not None:
            try:
                key = self._settings.key(*args, **kwargs)
            except BaseException as error:
                contain(error, f"the cache key of {self._label}")
                add_note(error, f"in the cache key of {self._label}")
                raise
            try:
                hash(key)
            except TypeError as error:
                raise SerializationError(f"{self._label}: its cache key: {error}") from None
            return method, model_id, key
        said = content_of(args, self._argument)
        if kwargs:
            return method, model_id, said, content_of(kwargs, self._argument)
        return method, model_id, said

    def _begin(
        self,
        key: Hashable,
        function: Function,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> _Flight:
        flight = _Flight(key)
        self._flights[key] = flight

        async def fly() -> Any:
            try:
                value = await function(method, args, kwargs)
            finally:
                is_wanted = self._land(flight)
            if is_wanted and not flight.scope.degraded:
                self._keep(key, value)
            return value

        context = copy_context()
        context.run(current_call.set, None)  # it is nobody's nested call
        context.run(current_scope.set, flight.scope)
        loop = asyncio.get_running_loop()
        flight.task = eager_task(asyncio.Task, fly(), loop, self._label, context)
        self._pending.add(flight.task)
        flight.task.add_done_callback(self._pending.discard)
        return flight

    def _land(self, flight: _Flight) -> bool:
        """Let nobody join a call any more; say whether anybody could until now."""
        if self._flights.get(flight.key) is not flight:
            return False
        del self._flights[flight.key]
        return True

    def _keep(self, key: Hashable, value: Any) -> None:
        until = asyncio.get_running_loop().time() + self._settings.ttl_s
        self._kept[key] = CachedResult(value, until)
        self._kept.move_to_end(key)
        while len(self._kept) > self._settings.max_size:
            self._kept.popitem(last=False)

    async def _wait_for(self, flight: _Flight) -> Any:
        flight.waiting += 1
        try:
            value = await asyncio.shield(flight.task)
        except Exception as error:
            # Notes and a traceback are added to what is raised, so it is never shared.
            shared, flight.failed = flight.failed, True
            if not shared:
                raise
            raise twin(error) from error.__cause__
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                self._land(flight)  # whoever comes now begins anew
                flight.task.cancel()
        if flight.scope.degraded and (scope := current_scope.get()) is not None:
            scope.degrade(flight.scope.degraded)
        return value


def content_of(value: Any, what: str) -> Hashable:
    """Return what is equal for values that say the same, and for no others.

    Raises:
        SerializationError: It can be neither compared nor pickled.
    """
    kind = type(value)
    if kind in _PLAIN:
        return kind, value  # 1, 1.0 and True are equal to Python, not to a model
    if kind is float:
        return kind, value or str(value)  # nor are 0.0 and -0.0
    if kind is tuple or kind is list:
        said = [
            (type(part), part) if type(part) in _PLAIN else content_of(part, what) for part in value
        ]
        return kind, *said
    if kind is dict:
        return kind, frozenset(
            [(content_of(key, what), content_of(part, what)) for key, part in value.items()]
        )
    payload = codec.encode(value, what)
    return kind, bytes(payload.body), tuple(bytes(buffer) for buffer in payload.buffers)


class Cached(Layer):
    """Answers with what is kept; streams pass."""

    def __init__(self, inner: Layer, cache: ResultCache) -> None:
        super().__init__(inner)
        self._cache = cache

    async def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return await self._cache.call(self.inner.call, method, args, kwargs)
