"""Calls of replicas' actors through Ray itself: tunnels, and large values."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from fastapi_graph.dataplane.values import Kept, KeptLost

__all__ = ["Actors"]

T = TypeVar("T")


class Actors:
    """Calls actors of replicas by name. It implements `Exchange`: large values ride the store.

    Args:
        namespace: Ray namespace of the graph's actors.
        run: Runs a coroutine where Ray's calls may be made.
    """

    def __init__(
        self, namespace: str, run: Callable[[Coroutine[Any, Any, Any]], Awaitable[Any]]
    ) -> None:
        self._namespace = namespace
        self._run = run
        self._handles: dict[str, Any] = {}

    async def call(self, replica_id: str, method: str, *args: Any) -> Any:
        """Call a method of a replica's actor.

        Raises:
            OSError: It cannot be reached.
        """
        return await self._run(self._call(replica_id, method, args))

    async def _call(self, replica_id: str, method: str, args: tuple[Any, ...]) -> Any:
        try:
            actor = self._handles.get(replica_id)
            if actor is None:
                actor = await asyncio.to_thread(ray.get_actor, replica_id, self._namespace)
                self._handles[replica_id] = actor
            return await getattr(actor, method).remote(*args)
        except (ValueError, RayActorError) as error:
            self._handles.pop(replica_id, None)
            raise OSError(f"the actor {replica_id} cannot be reached: {error}") from error

    async def put(self, value: Any) -> Any:
        """Return a reference to a copy of a value in the object store."""
        # In a thread: where the store is full, it waits until there is room.
        return await asyncio.to_thread(ray.put, value)

    async def fetch(self, kept: Kept) -> Any:
        """Return a value that a replica keeps; arrays in it are read-only.

        Raises:
            KeptLost: It is not there any more.
        """
        return await self._run(self._fetch(kept))

    async def _fetch(self, kept: Kept) -> Any:
        try:
            # In a list, or Ray would fetch the value to pass it on.
            (reference,) = await self._call(kept.replica_id, "kept", (kept.number,))
            return await reference
        except RayTaskError as error:
            if isinstance(getattr(error, "cause", None), KeyError):
                raise KeptLost(kept) from None
            raise
        except (OSError, RayError) as error:
            raise KeptLost(kept) from error

    async def deposit(self, replica_id: str, value: Any) -> int:
        """Bring a value to a replica and return its number there.

        Raises:
            OSError: The replica cannot be reached.
        """
        number: int = await self._run(self._deposit(replica_id, value))
        return number

    async def _deposit(self, replica_id: str, value: Any) -> Any:
        return await self._call(replica_id, "deposit", (await self.put(value),))
