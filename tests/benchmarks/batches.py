"""Rows about `@batch`: what it costs, and whether a target latency is kept."""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from fastapi_graph import batch
from tests.benchmarks.timing import Effort, Row, at_most, duration, pairwise, per_call

ALLOWED_S = 30e-6
TARGET_S = 0.05
PER_SECOND = 2000
PER_BATCH_S, PER_INPUT_S = 0.005, 0.0002

Predict = Callable[[Any], Awaitable[Any]]


async def identity(value: int) -> int:
    return value


@batch(max_batch_size=1)
async def alone(values: list[int]) -> list[int]:
    return values


async def predict(values: list[int]) -> list[int]:
    await asyncio.sleep(PER_BATCH_S + PER_INPUT_S * len(values))
    return values


def overhead(effort: Effort) -> Iterator[Row]:
    """A call in a batch of its own."""

    def measure(call: Predict) -> Callable[[], float]:
        return lambda: asyncio.run(per_call(call, 1, effort.duration / 10))

    measures = {"ours": measure(alone), "theirs": measure(identity)}
    ours, theirs = pairwise(measures, effort.rounds).values()
    yield Row(
        "`@batch(max_batch_size=1)` on an async function that never waits, per call",
        "the function",
        ours,
        theirs,
        duration,
        at_most(1.0, f"{duration(ALLOWED_S)} more"),
        compare=lambda ours, theirs: (ours - theirs) / ALLOWED_S,
    )


def adaptive(effort: Effort) -> Iterator[Row]:
    """The latency of calls that come at random, faster than the default can do."""

    def measure(make: Callable[[], Predict]) -> Callable[[], float]:
        return lambda: asyncio.run(_latency(make(), effort.duration / 2))

    measures = {
        "ours": measure(lambda: batch(target_latency_s=TARGET_S)(predict)),
        "theirs": measure(lambda: batch(predict)),
    }
    ours, theirs = pairwise(measures, effort.rounds).values()
    yield Row(
        f"`@batch(target_latency_s={TARGET_S})`, 99th percentile of the latency at {PER_SECOND} "
        f"calls/s; a batch takes {duration(PER_BATCH_S)} and {duration(PER_INPUT_S)} per input",
        "`@batch`",
        ours,
        theirs,
        duration,
        at_most(1.0, "ours / target"),
        compare=lambda ours, _: ours / TARGET_S,
    )


async def _latency(call: Predict, seconds: float) -> float:
    """Call at random times; return the 99th percentile of how long a call took."""
    loop = asyncio.get_running_loop()
    chance = random.Random(1)
    latencies: list[float] = []

    async def one(arrival: float) -> None:
        await call(1)
        latencies.append(loop.time() - arrival)

    arrival = loop.time()
    end = arrival + seconds
    async with asyncio.TaskGroup() as group:
        while arrival < end:
            await asyncio.sleep(arrival - loop.time())
            while arrival <= loop.time():
                group.create_task(one(arrival))
                arrival += chance.expovariate(PER_SECOND)
    return statistics.quantiles(latencies, n=100)[-1]
