"""Fallbacks: what answers when a deployment does not."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from fastapi_graph.context import Emit
from fastapi_graph.errors import GraphDefinitionError
from fastapi_graph.executor import Caller
from fastapi_graph.graph.containers import fresh
from fastapi_graph.graph.options import DeploymentOptions
from fastapi_graph.graph.plan import HandleRef
from fastapi_graph.graph.signatures import is_stream
from fastapi_graph.handle import DeploymentHandle
from fastapi_graph.policies.layer import Base, Emitting, Layer
from fastapi_graph.replica import Replica
from fastapi_graph.request import current_scope, seconds_left
from fastapi_graph.streams import streams_in

__all__ = ["Fallback", "substitute"]

logger = logging.getLogger("fastapi_graph")


class Fallback(Layer):
    """Answers with the fallback when the deployment fails, is late, or is over its limits."""

    def __init__(self, inner: Layer, instead: Layer, label: str, counts: Counter[str]) -> None:
        super().__init__(inner)
        self._instead = instead
        self._label = label
        self._counts = counts

    async def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return await self.inner.call(method, args, kwargs)
        except Exception as error:
            self._degrade(error, args, kwargs)
            return await self._instead.call(method, args, kwargs)

    async def stream(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], emit: Emit
    ) -> None:
        emitting = Emitting(emit)
        try:
            await self.inner.stream(method, args, kwargs, emitting)
        except Exception as error:
            if emitting.begun:
                raise
            self._degrade(error, args, kwargs)
            await self._instead.stream(method, args, kwargs, emit)

    def _degrade(self, error: Exception, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note that the fallback answers.

        Past the request's deadline it does not, nor where it would get the rest of a stream.
        """
        left = seconds_left()
        if left is not None and left <= 0:
            raise error
        if any(stream.begun for stream in streams_in((args, kwargs))):
            raise error
        self._counts["fallbacks"] += 1
        logger.warning("%s: its fallback answers, after %r", self._label, error)
        if (scope := current_scope.get()) is not None:
            scope.degrade((self._label,))


def substitute(fallback: Any, label: str, where: str, caller_of: Callable[[str], Caller]) -> Layer:
    """Return what answers with a fallback.

    Args:
        fallback: A reference to a deployment, a handle, a function or a value.
        label: Whose fallback it is.
        where: `file:line` of its bind.
        caller_of: From a deployment's name to what calls it.
    """
    if isinstance(fallback, HandleRef):
        return Base(caller_of(fallback.deployment))
    if isinstance(fallback, DeploymentHandle):
        return _Handle(fallback)
    function = fallback if callable(fallback) else _constant(fallback)
    host = Replica(
        f"fallback of {label}", DeploymentOptions(max_ongoing_requests=sys.maxsize), where
    )
    host.host(function)
    return _Function(host, function)


class _Function(Layer):
    """Answers every method with one function, hosted here."""

    def __init__(self, host: Replica, function: Callable[..., Any]) -> None:
        self._host = host
        self._streams = is_stream(function)

    async def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._streams:
            raise GraphDefinitionError(
                f"the {self._host.name} is a generator, and {method!r} is none: it has to return "
                f"(bound at {self._host.where})"
            )
        return await self._host.call("__call__", args, kwargs)

    async def stream(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], emit: Emit
    ) -> None:
        if self._streams:
            await self._host.stream("__call__", args, kwargs, emit)
            return
        answer = await self.call(method, args, kwargs)
        for item in answer if isinstance(answer, list | tuple) else [answer]:
            await emit(item)


class _Handle(Layer):
    """Answers with a handle's method of the same name."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    def _method(self, name: str) -> DeploymentHandle:
        return self._handle if name == "__call__" else getattr(self._handle, name)

    async def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return await self._method(method).remote(*args, **kwargs)

    async def stream(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], emit: Emit
    ) -> None:
        async for item in self._method(method).remote(*args, **kwargs):
            await emit(item)


def _constant(value: Any) -> Callable[..., Any]:
    async def answer(*args: Any, **kwargs: Any) -> Any:
        return fresh(value)

    return answer
