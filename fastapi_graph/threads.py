"""User code in worker threads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import anyio
from anyio import CapacityLimiter, from_thread, to_thread

from fastapi_graph.context import Emit
from fastapi_graph.errors import NodeError

__all__ = ["forget_finalizer", "in_thread", "pump"]


async def in_thread(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    limiter: CapacityLimiter,
    who: str,
    where: str,
) -> Any:
    """Run a function in a worker thread and return its result.

    Args:
        function: What to run.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        limiter: Bounds the threads; never anyio's default one, which the process shares.
        who: What a message calls the function.
        where: Where a message says that it is.

    Raises:
        NodeError: It raised what would end the whole process.
        Exception: What it raised.
    """

    def run() -> Any:
        try:
            return function(*args, **kwargs)
        except (SystemExit, KeyboardInterrupt) as error:
            # On the loop, in a task, it would end the whole server.
            raise NodeError(f"{who} raised {error!r} ({where})") from error

    return await to_thread.run_sync(run, limiter=limiter)


def pump(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    emit: Emit,
) -> None:
    """Run a generator in this worker thread, and `emit` each item on the loop.

    The whole generator stays in one thread, so that locks and thread-locals work in it. It is
    closed when `emit` raises anyio's `ClosedResourceError`.
    """
    with contextlib.closing(function(*args, **kwargs)) as items:
        for item in items:
            try:
                from_thread.run(emit, item)
            except anyio.ClosedResourceError:
                return  # nobody reads any more


def forget_finalizer(hosted: Any) -> None:
    """Keep the interpreter from running `__del__` once more, and a coroutine one in vain."""
    cls = type(hosted)
    with contextlib.suppress(TypeError):  # a class that fixes its layout
        hosted.__class__ = type(cls.__name__, (cls,), {"__slots__": (), "__del__": lambda _: None})
