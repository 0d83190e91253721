"""From any thread and any event loop to the one on which a graph runs, its *home* loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Awaitable, Coroutine
from contextvars import Context
from typing import Any

from fastapi_graph.context import current_call, eager_task
from fastapi_graph.errors import DeadlockError, ResponseTimeoutError

__all__ = ["current_loop", "outcome", "refuse_to_block", "start", "submit", "wait"]


def start(
    kind: type[asyncio.Task[Any]],
    coroutine: Coroutine[Any, Any, Any],
    home: asyncio.AbstractEventLoop,
    label: str,
    pending: set[asyncio.Task[Any]],
    context: Context | None = None,
) -> asyncio.Task[Any]:
    """Start a call on the home loop, from the home loop.

    Args:
        kind: Of which class the task is.
        coroutine: What runs the call.
        home: The loop.
        label: What messages call it.
        pending: Calls that have not finished: a loop refers to its tasks only weakly.
        context: What it runs in; None for a copy of the current context.
    """
    task = eager_task(kind, coroutine, home, label, context)
    try:
        if not task.done():
            if (call := current_call.get()) is not None:
                call.started(task, pending)
            else:
                pending.add(task)
                task.add_done_callback(pending.discard)
        return task
    finally:
        # The traceback of a task that has failed at once leads to this frame: if that led to the
        # task, every such failure would leave a cycle to the garbage collector.
        del task


def submit(
    kind: type[asyncio.Task[Any]],
    coroutine: Coroutine[Any, Any, Any],
    home: asyncio.AbstractEventLoop,
    label: str,
    pending: set[asyncio.Task[Any]],
    context: Context | None = None,
) -> concurrent.futures.Future[Any]:
    """Start a call on the home loop, from elsewhere, in a copy of the caller's context."""

    async def begin() -> Any:
        return await start(kind, coroutine, home, label, pending, context)

    outer = begin()
    try:
        return asyncio.run_coroutine_threadsafe(outer, home)
    except RuntimeError:  # the loop has been closed
        outer.close()
        coroutine.close()
        raise


async def outcome(awaitable: Awaitable[Any]) -> Any:
    """Await it: what is awaitable becomes a coroutine."""
    return await awaitable


def current_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop that runs in this thread, if there is one."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def refuse_to_block(home: asyncio.AbstractEventLoop, label: str) -> None:
    """Raise `DeadlockError` on the home loop, which a synchronous wait would block."""
    if current_loop() is home:
        raise DeadlockError(
            f"{label}: waiting here would block the event loop that computes the result; "
            "`await` the response, or move this code to a synchronous function, which runs "
            "in a worker thread"
        )


def wait(future: concurrent.futures.Future[Any], timeout_s: float | None, label: str) -> Any:
    """Wait for a result in synchronous code; see `DeploymentResponse.result`."""
    try:
        return future.result(timeout_s)
    except concurrent.futures.CancelledError:
        raise asyncio.CancelledError(f"{label}: the call was cancelled") from None
    except TimeoutError:
        if future.done():
            raise
        raise ResponseTimeoutError(f"{label}: no result within {timeout_s} s") from None
