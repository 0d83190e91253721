"""Layers: policies around a call, each around another."""

from __future__ import annotations

from typing import Any

from fastapi_graph.context import Emit
from fastapi_graph.executor import Caller

__all__ = ["Base", "Emitting", "Layer"]


class Layer:
    """One policy around another, or around the call itself."""

    def __init__(self, inner: Layer) -> None:
        self.inner = inner

    async def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return await self.inner.call(method, args, kwargs)

    async def stream(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], emit: Emit
    ) -> None:
        await self.inner.stream(method, args, kwargs, emit)


class Base(Layer):
    """What makes the call."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return await self._caller.call(method, args, kwargs)

    async def stream(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], emit: Emit
    ) -> None:
        await self._caller.stream(method, args, kwargs, emit)


class Emitting:
    """An `emit` that knows whether a stream has begun: what has been sent cannot be taken back."""

    def __init__(self, emit: Emit) -> None:
        self.begun = False
        self._emit = emit

    async def __call__(self, item: Any) -> None:
        self.begun = True
        await self._emit(item)
