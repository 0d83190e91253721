"""Deployments that do next to nothing, called through `Graph.handle`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi_graph import Graph, InputNode, deployment


async def echo(value: Any) -> Any:
    return value


async def process(_: Any) -> tuple[int, bool]:
    return os.getpid(), "numpy" in sys.modules


async def increment(values: Any) -> Any:
    return values + 1


def _bind(*functions: Any) -> Any:
    with InputNode() as output:
        for function in functions:
            output = deployment(function).bind(output)
        return output


GRAPHS = {
    "echo": _bind(echo),
    "process": _bind(process),
    "chain": _bind(increment, increment, increment),
}


@contextlib.asynccontextmanager
async def calling(work: str) -> AsyncIterator[Callable[[Any], Awaitable[Any]]]:
    """Start a graph; yield what calls it."""
    async with Graph(GRAPHS[work], name=f"bench-{work}") as graph:
        yield graph.handle.remote
