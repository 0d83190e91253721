"""Rows about what stands before a deployment."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from fastapi_graph import BackPressureError, Cache, Graph, InputNode, deployment
from tests.benchmarks import seed
from tests.benchmarks.timing import Effort, Row, at_most, duration, pairwise, per_call

ALLOWED_S = 20e-6
SLOTS, WORK_S = 16, 0.02


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


def overloaded(effort: Effort) -> Iterator[Row]:
    """Ten times as many callers as slots; who is refused comes again a little later."""
    for spread_s in (0.0, WORK_S / 2):
        measures: dict[str, Callable[[], float]] = {
            "ours": lambda s=spread_s: asyncio.run(_p99(10 * SLOTS, s, effort.duration / 2)),
            "theirs": lambda s=spread_s: asyncio.run(_p99(SLOTS, s, effort.duration / 2)),
        }
        ours, theirs = pairwise(measures, effort.rounds).values()
        takes = duration(WORK_S)
        if spread_s:
            takes = f"{duration(WORK_S - spread_s)} to {duration(WORK_S + spread_s)}"
        yield Row(
            f"99th percentile of the accepted calls, {10 * SLOTS} callers of a deployment that "
            f"takes {takes} with `max_ongoing_requests={SLOTS}, max_queued_requests={SLOTS // 2}`",
            f"the same with {SLOTS} callers",
            ours,
            theirs,
            duration,
            at_most(2.0),
        )


async def _p99(callers: int, spread_s: float, seconds: float) -> float:
    @deployment(max_ongoing_requests=SLOTS, max_queued_requests=SLOTS // 2)
    async def work() -> None:
        await asyncio.sleep(random.uniform(WORK_S - spread_s, WORK_S + spread_s))

    accepted: list[float] = []
    async with Graph(work.bind()) as graph:
        end = time.perf_counter() + seconds

        async def call() -> None:
            while (start := time.perf_counter()) < end:
                try:
                    await graph.handle.remote()
                    accepted.append(time.perf_counter() - start)
                except BackPressureError:
                    await asyncio.sleep(random.uniform(0, WORK_S))

        await asyncio.gather(*(call() for _ in range(callers)))
    return statistics.quantiles(accepted, n=100)[-1]


async def _per_call(dag: Any, seconds: float) -> float:
    async with Graph(dag) as graph:
        return await per_call(graph.handle.remote, seed.REQUEST, seconds)
