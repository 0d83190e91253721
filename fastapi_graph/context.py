"""What user code runs in: tasks, and the call that the current context is part of."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextvars import Context, ContextVar
from typing import Any, Protocol

__all__ = [
    "Call",
    "Emit",
    "Host",
    "add_note",
    "current_call",
    "eager_task",
    "user_code",
]

Emit = Callable[[Any], Coroutine[Any, Any, None]]
"""Takes the next item of a stream, and returns when its reader wants another."""


class Host(Protocol):
    """Which replica of which deployment runs a call."""

    name: str

    @property
    def replica_id(self) -> str:
        """What tells it from other replicas."""


class Call:
    """One call of user code, and the calls it has started through handles.

    Attributes:
        host: What runs it.
        attempt: 1, or more for a call that is made again.
        ending: What `end()` calls, if anything. Whoever runs the call ends it.
    """

    host: Host | None = None
    attempt = 1
    ending: list[Callable[[], None]] | None = None
    _nested: set[asyncio.Task[Any]] | None = None

    def at_end(self, function: Callable[[], None]) -> None:
        """Let a function be called when the call has ended."""
        if self.ending is None:
            self.ending = []
        self.ending.append(function)

    def end(self) -> None:
        """Call what waits for the end of the call."""
        ending, self.ending = self.ending or (), None
        for function in ending:
            function()

    def started(self, nested: asyncio.Task[Any], pending: set[asyncio.Task[Any]]) -> None:
        """Note a nested call until it has finished, here and in `pending`."""
        if self._nested is None:
            self._nested = set()
        here = self._nested
        here.add(nested)
        pending.add(nested)

        def finished(task: asyncio.Task[Any]) -> None:  # one callback is cheaper than two
            here.discard(task)
            pending.discard(task)

        nested.add_done_callback(finished)

    def cancel_nested(self) -> None:
        """Cancel the nested calls that have not finished: their caller was cancelled."""
        for nested in tuple(self._nested or ()):
            nested.cancel()


current_call: ContextVar[Call | None] = ContextVar("fastapi_graph_call", default=None)


@contextlib.contextmanager
def user_code() -> Iterator[Call]:
    """Run the body as a call: what it starts through handles is nested in it."""
    call = Call()
    token = current_call.set(call)
    try:
        yield call
    finally:
        current_call.reset(token)
        call.end()


if sys.version_info >= (3, 12):

    def eager_task(
        cls: type[asyncio.Task[Any]],
        coroutine: Coroutine[Any, Any, Any],
        loop: asyncio.AbstractEventLoop,
        name: str,
        context: Context | None = None,
    ) -> asyncio.Task[Any]:
        """Return a task of its own that has run up to its first suspension already.

        Args:
            cls: The class of the task.
            coroutine: What it runs.
            loop: Where.
            name: What it is called.
            context: What it runs in; None for a copy of the current context.
        """
        return cls(coroutine, loop=loop, name=name, context=context, eager_start=True)

else:

    def eager_task(
        cls: type[asyncio.Task[Any]],
        coroutine: Coroutine[Any, Any, Any],
        loop: asyncio.AbstractEventLoop,
        name: str,
        context: Context | None = None,
    ) -> asyncio.Task[Any]:
        """Return a task of its own; eager starts exist from Python 3.12 on."""
        return cls(coroutine, loop=loop, name=name, context=context)


def add_note(error: BaseException, note: str) -> None:
    """Add a note to an exception of the user's, once, if it takes one."""
    with contextlib.suppress(Exception):  # a frozen dataclass, for example, does not
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
