"""Large values: they stay with the replica that made them until somebody needs them.

What travels in their place is (replica, number). How the bytes get from one process to
another is the backend's business: it implements `Exchange`.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable
from typing import Any, Protocol

from fastapi_graph.dataplane.codec import Payload

__all__ = ["KEPT_AT_MOST", "LARGE", "Exchange", "Keeper", "Kept", "KeptLost"]

LARGE = 2 << 20
"""Bytes of out-of-band memory from which a value takes the way of large ones."""

DEPOSITED_AT_MOST_S = 60.0
KEPT_AT_MOST = 0x7FFF_FFFF
"""The largest number of a value that is kept; what is brought without has larger ones."""


@dataclasses.dataclass(frozen=True)
class Kept:
    """Stands for a value that a replica keeps.

    Attributes:
        replica_id: Which replica.
        number: Which of its values.
    """

    replica_id: str
    number: int


class KeptLost(Exception):
    """A value is not there any more: the replica that kept it has died.

    Args:
        kept: The value.
    """

    def __init__(self, kept: Kept) -> None:
        super().__init__(kept)
        self.kept = kept


class Exchange(Protocol):
    """Moves large values between processes."""

    def put(self, number: int, value: Any, payload: Payload) -> Awaitable[Any]:
        """Return what stands for a copy of a value in this process; dropping it frees it.

        The buffers of the payload have been copied when this suspends for the first time.

        Args:
            number: Under which it is going to be kept.
            value: The value.
            payload: The same, encoded.
        """

    def fetch(self, kept: Kept) -> Awaitable[Any]:
        """Return the value that a replica keeps.

        Raises:
            KeptLost: It is not there any more.
        """

    def deposit(self, replica_id: str, value: Any, payload: Payload) -> Awaitable[int]:
        """Bring a value to a replica and return its number there.

        Raises:
            OSError: The replica cannot be reached.
        """

    def collect(self, number: int, what: str) -> Awaitable[Any]:
        """Return what was brought to this process without being kept; None if it is not there.

        Args:
            number: Its number.
            what: What messages call it.

        Raises:
            SerializationError: It cannot be unpickled.
        """

    def discard(self, number: int) -> None:
        """Let go of what was brought to this process without being kept."""


class Keeper:
    """What a replica keeps, by number."""

    def __init__(self) -> None:
        self._values: dict[int, Any] = {}
        self._number = 0

    def __len__(self) -> int:
        return len(self._values)

    def reserve(self) -> int:
        """Return a number that is free; `KEPT_AT_MOST` is the last one."""
        self._number = self._number % KEPT_AT_MOST + 1
        return self._number

    def keep(self, number: int, value: Any) -> None:
        """Keep what stands for a value until it is released."""
        self._values[number] = value

    def deposit(self, value: Any) -> int:
        """Keep the arguments of a call that is about to come, and return their number.

        Nobody may be left to release them: if the call does not come, they go after a while.
        """
        number = self.reserve()
        self.keep(number, value)
        loop = asyncio.get_running_loop()
        loop.call_later(DEPOSITED_AT_MOST_S, self._values.pop, number, None)
        return number

    def get(self, number: int) -> Any:
        """Return what is kept under a number.

        Raises:
            KeyError: Nothing is.
        """
        return self._values[number]

    def release(self, number: int) -> Any:
        """Keep it no longer; return it, or None if it is not there."""
        return self._values.pop(number, None)
