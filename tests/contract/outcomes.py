"""Random calls that are cancelled, late, refused and lost: each has exactly one outcome."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi_graph import (
    BackPressureError,
    Cache,
    DeadlineExceededError,
    DeploymentHandle,
    Graph,
    ReplicaLostError,
    batch,
    deployment,
)

PATIENCE_S = 30.0
AT_ONCE = 12

EXPECTED = (
    asyncio.CancelledError,
    DeadlineExceededError,
    BackPressureError,
    ReplicaLostError,
    ConnectionError,
)


class Target:
    """Answers in every way there is; what it answers tells which call it was."""

    async def quick(self, number: int) -> int:
        return number

    async def slow(self, number: int) -> int:
        await asyncio.sleep(0.001 * (number % 20))
        return number

    def in_thread(self, number: int) -> int:
        time.sleep(0.001 * (number % 10))
        return number

    async def fails(self, number: int) -> int:
        await asyncio.sleep(0.001 * (number % 3))
        raise ConnectionError(number)

    async def items(self, number: int) -> AsyncIterator[int]:
        for _ in range(number % 5):
            await asyncio.sleep(0.001)
            yield number

    def items_in_thread(self, number: int) -> Iterator[int]:
        for _ in range(number % 5):
            yield number

    @batch(max_batch_size=4, batch_wait_timeout_s=0.005)
    async def batched(self, numbers: list[int]) -> list[Any]:
        await asyncio.sleep(0.002)
        return [ConnectionError(n) if n % 7 == 0 else n for n in numbers]

    @batch(max_batch_size=4, batch_wait_timeout_s=0.005)
    async def batched_items(self, numbers: list[int]) -> AsyncIterator[list[int]]:
        for _ in range(3):
            await asyncio.sleep(0.001)
            yield numbers

    async def die(self) -> None:
        os._exit(1)


class Outer:
    """Calls the target through a handle, with policies of its own."""

    def __init__(self, target: DeploymentHandle) -> None:
        self.target = target
        self.retrying = target.options(retry_on=ConnectionError, retry_backoff_s=0.001)

    async def nested(self, number: int) -> int:
        return await self.target.slow.remote(number)

    async def retried(self, number: int) -> int:
        return await self.retrying.fails.remote(number)

    def waits(self, number: int) -> int:
        return self.target.quick.remote(number).result()

    async def both(self, number: int) -> int:
        calls = self.target.slow.remote(number), self.target.in_thread.remote(number)
        return sum(await asyncio.gather(*calls)) // 2


STREAMS = {"items", "items_in_thread", "batched_items"}
TARGETS = ["quick", "slow", "in_thread", "fails", "batched", *STREAMS]
OUTERS = ["nested", "retried", "waits", "both"]


def graph_of(**options: Any) -> tuple[Any, Any]:
    """Return the outer node and the target, whose limits are low."""
    target = deployment(Target).options(
        max_ongoing_requests=4, max_queued_requests=6, cache=Cache(ttl_s=0.01), **options
    )
    inner = target.bind()
    return deployment(Outer).options(max_ongoing_requests=8).bind(inner), inner


class Caller:
    """Makes random calls, and checks what comes of each.

    Args:
        graph: Runs what `graph_of` gave.
        inner: The target.
        seed: Says which calls.
    """

    def __init__(self, graph: Graph, inner: Any, seed: int) -> None:
        self.outcomes: Counter[str] = Counter()
        self._graph = graph
        self._target = graph.handle_of(inner)
        self._random = random.Random(seed)
        self._number = 0

    async def run(self, count: int) -> None:
        """Make so many calls, some at a time."""
        left = iter(range(count))

        async def work() -> None:
            for _ in left:
                await self._one()

        await asyncio.gather(*(work() for _ in range(AT_ONCE)))

    async def _one(self) -> None:
        source = self._random
        self._number = number = self._number + 1
        name = source.choice(TARGETS + OUTERS)
        handle = self._graph.handle if name in OUTERS else self._target
        if source.random() < 0.3:
            handle = handle.options(timeout_s=source.choice((0.0005, 0.005, 0.02)))
        if source.random() < 0.2:
            handle = handle.options(fallback=number)
        call = getattr(handle, name)
        cancel_after = source.choice((None, None, None, 0.0, 0.001, 0.008))
        stop_at = source.choice((None, None, 1))
        response = call.remote(number)
        if cancel_after is not None:
            asyncio.get_running_loop().call_later(cancel_after, response.cancel)
        try:
            async with asyncio.timeout(PATIENCE_S):
                if name in STREAMS:
                    await self._read(response, number, stop_at)
                else:
                    assert await response == number, f"{name}: the answer to another call"
        except EXPECTED as error:
            assert not asyncio.current_task().cancelling()  # type: ignore[union-attr]
            self.outcomes[type(error).__name__] += 1
        else:
            self.outcomes["answer"] += 1
        if name not in STREAMS:
            await self._again(response, name)

    async def _read(self, items: Any, number: int, stop_at: int | None) -> None:
        count = 0
        async for item in items:
            assert item == number, "an item of another call"
            count += 1
            if count == stop_at:
                await items.aclose()
                return

    async def _again(self, response: Any, name: str) -> None:
        """Await a response once more: its outcome does not change."""
        first, second = [
            repr((await asyncio.gather(response, return_exceptions=True))[0]) for _ in range(2)
        ]
        assert first == second, name

    async def settled(self) -> None:
        """Wait until every slot has been given back, and a call passes."""
        async with asyncio.timeout(PATIENCE_S):
            while any(  # noqa: ASYNC110 - they are counted elsewhere
                status.ongoing or status.queued or status.counts.get("abandoned")
                for status in self._graph.status()
            ):
                await asyncio.sleep(0.01)
            while True:
                try:
                    assert await self._target.quick.remote(-1) == -1
                    break
                except (ReplicaLostError, BackPressureError):
                    await asyncio.sleep(0.1)
