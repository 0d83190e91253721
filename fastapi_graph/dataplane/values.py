"""Large values: they stay with the replica that made them until somebody needs them.

What travels in their place is (replica, number). How the bytes get from one process to
another is the backend's business: it implements `Exchange`.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable
from typing import Any, Protocol

__all__ = ["LARGE", "Exchange", "Keeper", "Kept", "KeptLost"]

LARGE = 2 << 20
"""Bytes of out-of-band memory from which a value takes the way of large ones."""

DEPOSITED_AT_MOST_S = 60.0


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

    def put(self, value: Any) -> Awaitable[Any]:
        """Return what stands for a copy of a value in this process; dropping it frees it."""

    def fetch(self, kept: Kept) -> Awaitable[Any]:
        """Return the value that a replica keeps.

        Raises:
            KeptLost: It is not there any more.
        """

    def deposit(self, replica_id: str, value: Any) -> Awaitable[int]:
        """Bring a value to a replica and return its number there.

        Raises:
            OSError: The replica cannot be reached.
        """


class Keeper:
    """What a replica keeps, by number."""

    def __init__(self) -> None:
        self._values: dict[int, Any] = {}
        self._number = 0

    def __len__(self) -> int:
        return len(self._values)

    def keep(self, value: Any) -> int:
        """Keep what stands for a value until it is released, and return its number."""
        self._number = self._number % 0xFFFF_FFFF + 1
        self._values[self._number] = value
        return self._number

    def deposit(self, value: Any) -> int:
        """Keep the arguments of a call that is about to come, and return their number.

        Nobody may be left to release them: if the call does not come, they go after a while.
        """
        number = self.keep(value)
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
