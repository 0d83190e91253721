"""Measure hedged calls: `python -m tests.benchmarks.ray_suite.hedging SECONDS`."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import time
from typing import Any

import uvloop

from fastapi_graph import Graph, deployment

HEDGE_AFTER_S = 0.02
SLOW_SHARE, SLOW_S, USUAL_S = 0.02, 0.5, 0.005
SIDE_BY_SIDE = 4


@deployment(num_replicas=2)
class Model:
    def __init__(self) -> None:
        self.calls = 0

    async def usual(self) -> None:
        await asyncio.sleep(USUAL_S)

    async def with_tail(self) -> None:
        self.calls += 1
        await asyncio.sleep(SLOW_S if random.random() < SLOW_SHARE else USUAL_S)


async def _latencies(handle: Any, seconds: float) -> list[float]:
    latencies: list[float] = []
    end = time.perf_counter() + seconds

    async def call() -> None:
        while (start := time.perf_counter()) < end:
            await handle.remote()
            latencies.append(time.perf_counter() - start)

    await asyncio.gather(*(call() for _ in range(SIDE_BY_SIDE)))
    return latencies


def _p99(latencies: list[float]) -> float:
    return statistics.quantiles(latencies, n=100)[-1]


async def main(seconds: float) -> None:
    async with Graph(Model.bind(), name="hedging") as graph:
        handle = graph.handle
        await _latencies(handle.usual, 1)
        usual = await _latencies(handle.usual, seconds)
        plain = await _latencies(handle.with_tail, seconds)
        hedged = await _latencies(handle.with_tail.options(hedge_after_s=HEDGE_AFTER_S), seconds)
        hedges = graph.status()[0].counts["hedges"]
    figures = {
        "allowed": HEDGE_AFTER_S + statistics.median(usual),
        "plain_p99": _p99(plain),
        "hedged_p99": _p99(hedged),
        "calls": len(hedged),
        "attempts": len(hedged) + hedges,
    }
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    uvloop.run(main(float(sys.argv[1])))
