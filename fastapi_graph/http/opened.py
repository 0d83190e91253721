"""A stream that answers somebody outside: within a deadline, and until the graph stops."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

from fastapi_graph.errors import DeadlineExceededError, GraphStoppingError, NodeError
from fastapi_graph.raised import is_cancelled
from fastapi_graph.request import current_deadline
from fastapi_graph.streams import ItemStream

__all__ = ["END", "Opened"]

END = object()
"""What comes after the last item."""


class Opened:
    """A stream whose items are read within the deadline of its request.

    Attributes:
        first: Its first item, or `END`.
    """

    def __init__(self, items: ItemStream, label: str) -> None:
        self.label = label
        self.first: Any = END
        self._items = items
        self._deadline = current_deadline()

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Close the generator at the end, or at the deadline, whatever else may be waited for."""
        loop = asyncio.get_running_loop()
        timer = None if self._deadline is None else loop.call_at(self._deadline, self.close)
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()
            self.close()

    def close(self) -> None:
        """Close the generator, if it has not come to its end."""
        self._items.cancel()

    async def next(self) -> Any:
        """Return the next item, or `END`.

        Raises:
            DeadlineExceededError: It took too long.
            GraphStoppingError: The graph was stopped.
            NodeError: A node raised `CancelledError`.
            Exception: What the generator raised.
        """
        loop = asyncio.get_running_loop()
        if self._deadline is not None and loop.time() >= self._deadline:
            raise DeadlineExceededError(f"{self.label}: the stream took too long")
        try:
            async with asyncio.timeout_at(self._deadline) as scope:
                return await anext(self._items, END)
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise DeadlineExceededError(f"{self.label}: the stream took too long") from error
        except asyncio.CancelledError as error:
            if is_cancelled():
                raise
            if self._items.is_ended_early:
                raise GraphStoppingError(f"{self.label}: it was stopped in mid-stream") from None
            raise NodeError(f"{self.label}: {error!r}, and nobody had cancelled it") from error
