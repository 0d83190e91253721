"""Calls of replicas' actors through Ray itself: tunnels, and large values.

On one machine large values go through shared memory, and between machines through Ray's object
store.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from fastapi_graph.dataplane import codec
from fastapi_graph.dataplane.codec import Payload
from fastapi_graph.dataplane.segments import Segments
from fastapi_graph.dataplane.values import KEPT_AT_MOST, LARGE, Kept, KeptLost

__all__ = ["Actors"]

T = TypeVar("T")


class Actors:
    """Calls actors of replicas by name. It implements `Exchange`.

    Args:
        namespace: Ray namespace of the graph's actors.
        run: Runs a coroutine where Ray's calls may be made.
        shared_memory: Whether large values may go through it.
        segments: The shared memory of this replica, if it has any.
    """

    def __init__(
        self,
        namespace: str,
        run: Callable[[Coroutine[Any, Any, Any]], Awaitable[Any]],
        *,
        shared_memory: bool,
        segments: Segments | None = None,
    ) -> None:
        self._namespace = namespace
        self._shared_memory = shared_memory
        self._run = run
        self._segments = segments
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

    async def put(self, number: int, value: Any, payload: Payload) -> Any:
        """Return what stands for a copy of a value, in shared memory or in the object store."""
        if not payload.buffers:
            return await asyncio.to_thread(self._put, number, value, payload)
        # At once: the buffers are memory of the node, which its next call may use again.
        if (segment := self._write(number, payload)) is not None:
            return segment
        buffers = tuple(memoryview(bytearray(buffer)) for buffer in payload.buffers)
        value = codec.decode(Payload(payload.body, buffers), "a large value")
        # In a thread: where the store is full, it waits until there is room.
        return await asyncio.to_thread(ray.put, value)

    def _put(self, number: int, value: Any, payload: Payload) -> Any:
        segment = self._write(number, payload)
        return ray.put(value) if segment is None else segment

    def _write(self, number: int, payload: Payload) -> _Segment | None:
        if self._segments is not None and self._segments.write(str(number), payload):
            return _Segment(self._segments, str(number))
        return None

    async def reference(self, stored: Any) -> Any:
        """Return a reference to what `put()` has returned."""
        if not isinstance(stored, _Segment):
            return stored
        if stored.reference is None:  # nobody on another machine has asked for it yet
            stored.reference = await asyncio.to_thread(stored.put)
        return stored.reference

    async def fetch(self, kept: Kept) -> Any:
        """Return a value that a replica keeps; arrays from another machine are read-only.

        Raises:
            KeptLost: It is not there any more.
        """
        if self._shared_memory and (payload := Segments(kept.replica_id).read(str(kept.number))):
            return await _decoded(payload, f"a value that replica {kept.replica_id} keeps")
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

    async def deposit(self, replica_id: str, value: Any, payload: Payload) -> int:
        """Bring a value to a replica and return its number there.

        Raises:
            OSError: The replica cannot be reached.
        """
        number = secrets.randbits(31) + KEPT_AT_MOST + 1
        if self._shared_memory and await asyncio.to_thread(
            Segments(replica_id).bring, number, payload
        ):
            return number
        deposited: int = await self._run(self._deposit(replica_id, value))
        return deposited

    async def _deposit(self, replica_id: str, value: Any) -> Any:
        reference = await asyncio.to_thread(ray.put, value)
        return await self._call(replica_id, "deposit", (reference,))

    async def collect(self, number: int, what: str) -> Any:
        """Return what was brought to this replica's shared memory; None if it is not there.

        Raises:
            SerializationError: It cannot be unpickled.
        """
        payload = None if self._segments is None else self._segments.take(number)
        return None if payload is None else await _decoded(payload, what)

    def discard(self, number: int) -> None:
        """Remove what was brought to this replica's shared memory."""
        if self._segments is not None:
            self._segments.forget(number)


async def _decoded(payload: Payload, what: str) -> Any:
    """Return the value of a payload; what is not mostly buffers takes long, and has a thread."""
    if len(payload.body) < LARGE:
        return codec.decode(payload, what)
    return await asyncio.to_thread(codec.decode, payload, what)


class _Segment:
    """A value in shared memory, until this is dropped."""

    def __init__(self, segments: Segments, name: str) -> None:
        self.reference: Any = None
        self._segments = segments
        self._name = name
        self._process = os.getpid()

    def put(self) -> Any:
        """Return a reference to a copy of the value in the object store.

        Raises:
            KeyError: It is not there any more.
        """
        payload = self._segments.read(self._name)
        if payload is None:
            raise KeyError(self._name)
        return ray.put(codec.decode(payload, "a large value"))

    def __del__(self) -> None:
        if os.getpid() == self._process:  # and not a child of it
            self._segments.remove(self._name)
