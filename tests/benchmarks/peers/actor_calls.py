"""Ray async actors that do next to nothing, called by hand."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import ray


@ray.remote
class Actor:
    async def echo(self, value: Any) -> Any:
        return value

    async def process(self, _: Any) -> tuple[int, bool]:
        return os.getpid(), "numpy" in sys.modules

    async def increment(self, values: Any) -> Any:
        return values + 1


def _caller(work: str) -> Callable[[Any], Awaitable[Any]]:
    if work != "chain":
        method: Callable[[Any], Awaitable[Any]] = getattr(Actor.remote(), work).remote
        return method
    first, second, third = (Actor.remote() for _ in range(3))

    async def chain(values: Any) -> Any:
        ref = second.increment.remote(first.increment.remote(values))
        return await third.increment.remote(ref)

    return chain


@contextlib.asynccontextmanager
async def calling(work: str) -> AsyncIterator[Callable[[Any], Awaitable[Any]]]:
    """Start the actors; yield what calls them."""
    ray.init(log_to_driver=False)
    yield _caller(work)
    ray.shutdown()
