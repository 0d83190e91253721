"""Batches of generators: each step yields one list, with an item for each call.

The generator goes on as soon as one of its readers waits for the next item. So it is never ahead
of the fastest one, and a slow one holds nobody up: what it has not read yet is kept for it, until
that is too much.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Any

import anyio

from fastapi_graph.batching.queue import Batch, BatchQueue, Item
from fastapi_graph.errors import BackPressureError
from fastapi_graph.threads import pump

__all__ = ["UNREAD_AT_MOST", "StreamBatch", "StreamItem"]

UNREAD_AT_MOST = 1024
"""Results that a reader may leave unread; then the batch goes on without it."""


class StreamItem(Item):
    """One call that reads one result after the other."""

    __slots__ = ("_ended", "_gone", "_results")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        super().__init__(loop, function, args, kwargs)
        self._results: deque[Any] = deque()
        self._ended = self._gone = False

    @property
    def left(self) -> bool:
        """Whether nobody reads it any more."""
        return self._gone or self._ended or self.answer.cancelled()

    @property
    def hungry(self) -> bool:
        """Whether its reader waits."""
        return not (self.left or self._results or self.answer.done())

    @property
    def too_slow(self) -> bool:
        """Whether its reader is too far behind."""
        return not self.left and len(self._results) > UNREAD_AT_MOST

    async def read(self) -> AsyncGenerator[Any, None]:
        """Yield each result; raise what the batch has raised for it."""
        while True:
            while not self._results:
                if self._ended:
                    return
                if self.answer.done():
                    self.answer = self.answer.get_loop().create_future()
                if self.batch is not None:
                    self.batch.wake()
                await self.answer
            result = self._results.popleft()
            if isinstance(result, BaseException):
                try:
                    raise result
                finally:
                    del result  # its traceback has this frame
            yield result

    def give(self, result: Any) -> None:
        """Append a result; an exception ends it, and `StopIteration` does so silently."""
        if self.left:
            return
        if isinstance(result, StopIteration) or result is StopIteration:
            self._ended = True
        else:
            self._results.append(result)
            self._ended = isinstance(result, BaseException)
        self._tell()

    def end(self, error: BaseException | None = None) -> None:
        """Say that nothing comes any more, but perhaps an error."""
        if error is not None:
            self.give(error)
        self._ended = True
        self._tell()

    def leave(self) -> None:
        """Say that nobody reads it any more."""
        self._gone = True

    def _tell(self) -> None:
        if not self.answer.done():
            self.answer.set_result(None)


class StreamBatch(Batch):
    """Calls that run as one, and get their results step by step."""

    gave = "yielded"

    def __init__(self, queue: BatchQueue, items: list[Any], size: int) -> None:
        super().__init__(queue, items, size)
        self._hunger: asyncio.Future[None] | None = None

    def wake(self) -> None:
        """Look again for somebody who waits for the next step."""
        if self._hunger is not None and not self._hunger.done():
            self._hunger.set_result(None)

    def leave(self) -> asyncio.Task[None] | None:
        """Go on without a call; return what is being cancelled if it was the last one."""
        self.wake()
        return super().leave()

    async def _compute(self) -> None:
        if self._work.in_thread:
            await self._in_thread(pump, (self._function, self._args, self._kwargs, self._emit), {})
        else:
            async with contextlib.aclosing(self._function(*self._args, **self._kwargs)) as steps:
                async for step in steps:
                    try:
                        await self._emit(step)
                    except anyio.ClosedResourceError:
                        break
        for item in self.items:
            item.end()

    async def _emit(self, step: Any) -> None:
        self._give(step)
        for item in self.items:
            if item.too_slow:
                item.end(
                    BackPressureError(
                        f"{self._work.label}: its reader is {UNREAD_AT_MOST} items behind, and the "
                        f"batch goes on without it (defined at {self._work.where})"
                    )
                )
        while not any(item.hungry for item in self.items):
            if all(item.left for item in self.items):
                raise anyio.ClosedResourceError
            self._hunger = self._queue.loop.create_future()
            await self._hunger
