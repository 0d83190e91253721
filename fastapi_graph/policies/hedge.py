"""Hedges: a second attempt elsewhere."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextvars import Context, copy_context
from typing import Any

from fastapi_graph.context import eager_task
from fastapi_graph.errors import NoReplicaError
from fastapi_graph.policies.layer import Layer
from fastapi_graph.request import Attempt, current_attempt

__all__ = ["Hedge"]


class Hedge(Layer):
    """Makes a second attempt elsewhere when the first takes long; the first answer wins.

    The idea, and its cost of a few percent more calls, is from J. Dean and L. A. Barroso, "The
    Tail at Scale", Communications of the ACM 56(2), 2013.
    """

    def __init__(
        self,
        inner: Layer,
        after_s: float,
        label: str,
        counts: Counter[str],
        pending: set[asyncio.Task[Any]],
    ) -> None:
        super().__init__(inner)
        self._after_s = after_s
        self._label = label
        self._counts = counts
        self._pending = pending

    async def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first = self._begin(method, args, kwargs, None)
        tasks = [first]
        try:
            if not first.done():
                await asyncio.wait(tasks, timeout=self._after_s)
            if first.done():
                return first.result()
            tasks.append(self._begin_elsewhere(method, args, kwargs))
            return await _first_answer(*tasks)
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            raise
        finally:
            for task in tasks:
                self._let_go(task)

    def _begin_elsewhere(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> asyncio.Task[Any]:
        attempt = current_attempt.get()
        assert attempt is not None  # which the first one has used
        other = Attempt(number=attempt.number + 1)
        other.avoid, other.hedges = attempt.avoid, True
        context = copy_context()
        context.run(current_attempt.set, other)
        task = self._begin(method, args, kwargs, context)
        if not (task.done() and isinstance(_failure(task), NoReplicaError)):
            self._counts["hedges"] += 1
        return task

    def _let_go(self, task: asyncio.Task[Any]) -> None:
        """Cancel an attempt that nobody needs, and do not wait until it has ended."""
        if not task.done():
            task.cancel()
            self._pending.add(task)
            task.add_done_callback(self._pending.discard)
        task.add_done_callback(_forget)

    def _begin(
        self,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: Context | None,
    ) -> asyncio.Task[Any]:
        coroutine = self.inner.call(method, args, kwargs)
        return eager_task(asyncio.Task, coroutine, asyncio.get_running_loop(), self._label, context)


async def _first_answer(first: asyncio.Task[Any], second: asyncio.Task[Any]) -> Any:
    """Return what the first of two that succeeds returns; if both fail, raise what `first` did."""
    tasks = (first, second)
    while running := [task for task in tasks if not task.done()]:
        if any(task.done() and _failure(task) is None for task in tasks):
            break
        await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    winner = second if second.done() and _failure(second) is None else first
    return winner.result()


def _failure(task: asyncio.Task[Any]) -> BaseException | None:
    """Return why a task that is done has no result."""
    return asyncio.CancelledError() if task.cancelled() else task.exception()


def _forget(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()  # which is nobody's
