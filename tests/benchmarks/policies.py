"""Rows about what stands before a deployment."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

from fastapi_graph import Cache, Graph, InputNode, deployment
from tests.benchmarks import seed
from tests.benchmarks.timing import Effort, Row, at_most, duration, pairwise, per_call

ALLOWED_S = 20e-6


async def identity(value: Any) -> Any:
    return value


def cached(effort: Effort) -> Iterator[Row]:
    """A result that is kept."""

    def measure(options: dict[str, Any]) -> Callable[[], float]:
        with InputNode() as value:
            dag = deployment(identity).options(**options).bind(value)
        return lambda: asyncio.run(_per_call(dag, effort.duration / 10))

    measures = {"ours": measure({"cache": Cache(ttl_s=60)}), "theirs": measure({})}
    ours, theirs = pairwise(measures, effort.rounds).values()
    yield Row(
        "a hit of `cache=Cache(...)`, `await handle.remote(...)` with the seed's request",
        "the same without a cache, a function that never waits",
        ours,
        theirs,
        duration,
        at_most(1.0, f"{duration(ALLOWED_S)} in all"),
        compare=lambda ours, _: ours / ALLOWED_S,
    )


async def _per_call(dag: Any, seconds: float) -> float:
    async with Graph(dag) as graph:
        return await per_call(graph.handle.remote, seed.REQUEST, seconds)
