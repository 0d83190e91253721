"""How far the items of a stream may be ahead of whoever takes them at the other end.

The sender begins with `WINDOW` bytes of room, or none where it waits to be asked. An item takes
its size of it, and a small one `LEAST`; whoever takes items gives the room back with CREDIT, for
several at once. So a stream of small items is sent in batches, up to sixteen ahead, and one of
large items one by one. HTTP/2 has the same for its streams (RFC 9113, section 5.2).
"""

from __future__ import annotations

import asyncio
import contextlib

from fastapi_graph.dataplane.frames import Part, unpack_number

__all__ = ["LEAST", "WINDOW", "Room", "Taken", "cost"]

WINDOW = 64 * 1024
LEAST = WINDOW // 16
TURN_S = 0.001
"""Seconds after which a source that never waits has had its turn of the event loop."""


def cost(*parts: Part) -> int:
    """Return how much room an item takes; as much as there is at most, so that it fits."""
    return min(max(sum(map(len, parts)), LEAST), WINDOW)


class Room:
    """What is left of the window, where the items are sent.

    Attributes:
        closed: Whether nobody takes items any more.
    """

    def __init__(self, size: float = WINDOW) -> None:
        self.closed = False
        self._size = size
        self._more = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._went_on = self._loop.time()

    def grant(self, content: bytes | bytearray) -> None:
        """Take the content of a CREDIT; one that has none grants nothing."""
        with contextlib.suppress(ValueError):
            self._size += unpack_number(content)
            self._more.set()

    def close(self) -> None:
        """Let nothing be sent any more."""
        self.closed = True
        self._more.set()

    async def use(self, size: int) -> None:
        """Note that an item was sent, and wait until another one may be, or none."""
        self._size -= size
        if self._size > 0 and self._loop.time() > self._went_on + TURN_S:
            await asyncio.sleep(0)  # what takes time to make is sent at once, and lets others run
            self._went_on = self._loop.time()
        while self._size <= 0 and not self.closed:
            self._more.clear()
            await self._more.wait()
            self._went_on = self._loop.time()


class Taken:
    """What has been taken, where the items arrive."""

    def __init__(self) -> None:
        self._size = 0

    def add(self, size: int) -> int:
        """Note that an item was taken; return the room to give back now, which may be none."""
        self._size += size
        if self._size < WINDOW // 2:
            return 0
        taken, self._size = self._size, 0
        return taken
