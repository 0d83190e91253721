"""What the replicas of these tests host."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
from opentelemetry import trace

from fastapi_graph.request import current_deadline

__all__ = ["Angry", "Node", "Rotten", "Unpicklable"]


class Node:
    """Notes what is called, and waits where it is told to."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.log: list[str] = []
        self.running = 0
        self.most = 0

    async def echo(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and not kwargs else (args, kwargs)

    async def trace(self) -> str:
        span = trace.get_current_span().get_span_context()
        return f"{span.trace_id:032x} {span.span_id:016x}"

    def sync_echo(self, value: Any) -> Any:
        return value

    async def work(self, name: str) -> str:
        self.log.append(f"start {name}")
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.log.append(f"cancelled {name}")
            raise
        finally:
            self.running -= 1
        return name

    async def give(self, size: int) -> bytes:
        self.log.append("give")
        return bytes(size)

    async def ones(self, size: int) -> Any:
        return np.ones(size)

    async def length(self, data: Any) -> int:
        return len(data)

    async def fill(self, values: Any) -> Any:
        values += 1  # only where they may be changed
        return values

    async def are_aligned(self, values: list[Any]) -> bool:
        return all(value.flags.aligned and value.flags.writeable for value in values)

    async def fail(self, text: str) -> None:
        error = KeyError(text)
        error.add_note("a note of the node")
        raise error

    async def fail_at_length(self, size: int) -> None:
        raise KeyError("x" * size)

    async def end(self, error: BaseException) -> None:
        raise error

    async def be_angry(self, reason: str) -> None:
        raise Angry(reason=reason)

    async def time_left(self) -> float | None:
        deadline = current_deadline()
        return None if deadline is None else deadline - asyncio.get_running_loop().time()

    async def rotten(self) -> Any:
        return Rotten()

    async def unpicklable(self) -> Any:
        return Unpicklable()

    async def count(self, stop: int) -> AsyncIterator[int]:
        try:
            for number in range(stop):
                self.log.append(f"made {number}")
                yield number
        finally:
            self.log.append("closed")

    def sync_count(self, stop: int) -> Iterator[int]:
        try:
            for number in range(stop):
                self.log.append(f"made {number}")
                yield number
        finally:
            self.log.append("closed")

    async def compute(self, stop: int) -> AsyncIterator[int]:
        for number in range(stop):
            time.sleep(0.02)  # noqa: ASYNC251 - as models do
            yield number

    async def blocks(self, size: int, stop: int) -> AsyncIterator[bytes]:
        for number in range(stop):
            self.log.append(f"made {number}")
            yield bytes(size)

    async def odd_items(self, kind: str) -> AsyncIterator[Any]:
        yield 1
        yield {"rotten": Rotten, "unpicklable": Unpicklable}[kind]()
        yield 3

    async def fail_after(self, count: int) -> AsyncIterator[int]:
        for number in range(count):
            yield number
        raise KeyError("no more")

    async def blobs(self, sizes: list[int]) -> AsyncIterator[bytes]:
        for size in sizes:
            yield bytes(size)


class Rotten:
    """Can be pickled, but not unpickled."""

    def __reduce__(self) -> Any:
        return _burst, ()


def _burst() -> None:
    raise LookupError("it has gone off")


class Unpicklable:
    def __reduce__(self) -> Any:
        raise ValueError("never")


class Angry(Exception):
    """Takes keywords, and travels nevertheless."""

    def __init__(self, *, reason: str) -> None:
        super().__init__(f"because of {reason}")
        self.reason = reason
