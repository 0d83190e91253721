"""Calls of virtual deployments: a split chooses who gets a call, a shadow copies it.

A virtual deployment is nothing but a caller that holds the callers of its alternatives. So it
is in every process that calls, costs no hop, and may be an alternative itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import math
import operator
import random
import uuid
import weakref
from bisect import bisect
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from fastapi_graph.context import Call, Emit, add_note, current_call
from fastapi_graph.dataplane import codec
from fastapi_graph.dataplane.codec import Payload
from fastapi_graph.dataplane.values import Kept
from fastapi_graph.dataplane.window import Room
from fastapi_graph.errors import BackPressureError, InputError
from fastapi_graph.executor import Caller
from fastapi_graph.graph.plan import Interface, Virtual
from fastapi_graph.graph.virtual import Shadow, Split, StickyBy
from fastapi_graph.raised import is_cancelled
from fastapi_graph.replica import Replica
from fastapi_graph.request import Scope, current_attempt, current_request, current_scope

__all__ = ["VirtualCaller", "rendezvous", "virtual_caller"]

logger = logging.getLogger("fastapi_graph")


class VirtualCaller:
    """Calls a virtual deployment; see `executor.Caller`.

    Attributes:
        traffic: How it has spread calls so far.
    """

    # A large value is fetched before a call: only then is it known who needs it.
    local: Replica | None = None
    keeps = False
    hedges = False
    max_retries = 0
    traffic: dict[str, int]

    async def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError

    async def stream(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], emit: Emit
    ) -> None:
        raise NotImplementedError

    def keep(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Coroutine[Any, Any, Any]:
        return self.call(method, args, kwargs)

    def release(self, kept: Kept) -> None:
        pass


def virtual_caller(
    virtual: Virtual, callers: Sequence[Caller], pending: set[asyncio.Task[Any]]
) -> VirtualCaller:
    """Return what calls a virtual deployment in this process.

    Args:
        virtual: The virtual deployment.
        callers: What calls its alternatives.
        pending: Where calls are noted that nobody waits for, until they have ended.
    """
    rule = virtual.rule
    if isinstance(rule, Split):
        return _SplitCaller(virtual, rule, callers)
    return _ShadowCaller(virtual.interface, rule, callers, pending)


# Split


class _SplitCaller(VirtualCaller):
    def __init__(self, virtual: Virtual, rule: Split, callers: Sequence[Caller]) -> None:
        self.traffic = dict.fromkeys(virtual.alternatives, 0)
        self._callers = callers
        self._names = virtual.alternatives
        self._weights = rule.weights
        self._bounds = list(itertools.accumulate(rule.weights))[:-1]
        self._total = sum(rule.weights)
        self._label = f"{virtual.interface.name} (bound at {virtual.interface.where})"
        self._key = None if rule.sticky_by is None else _reader(rule.sticky_by, self._label)

    async def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return await self._choose(args, kwargs).call(method, args, kwargs)

    async def stream(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], emit: Emit
    ) -> None:
        await self._choose(args, kwargs).stream(method, args, kwargs, emit)

    def _choose(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Caller:
        key = None if self._key is None else self._key(args, kwargs)
        if key is None:
            index = bisect(self._bounds, random.random() * self._total)
        else:
            index = rendezvous(key, self._names, self._weights)
        self.traffic[self._names[index]] += 1
        return self._callers[index]


def rendezvous(key: bytes, names: Sequence[str], weights: Sequence[float]) -> int:
    """Return the index of the name that a key belongs to: the same in every process.

    This is weighted rendezvous hashing (Thaler and Ravishankar 1998; with weights, Schindelhauer
    and Schomaker 2005). Name and key, with a zero byte between them, give a number between 0 and
    1, the first 53 bits of their BLAKE2b hash of 8 bytes; the least `-log(number) / weight` wins.
    A name gets its weight's share of the keys. If its weight rises, keys only move to it, if it
    falls, only away from it, and the order of the names does not matter.

    Args:
        key: The key.
        names: What can be chosen, without repetition.
        weights: Its weights; above 0.
    """

    def cost(index: int) -> float:
        digest = hashlib.blake2b(names[index].encode() + b"\0" + key, digest_size=8).digest()
        number = ((int.from_bytes(digest, "big") >> 11) + 0.5) / 2**53
        return -math.log(number) / weights[index]

    return min(range(len(names)), key=cost)


_Reader = Callable[[tuple[Any, ...], dict[str, Any]], bytes | None]


def _reader(sticky_by: StickyBy, label: str) -> _Reader:
    """Return what reads the key of a call from its arguments."""

    def of_all(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes | None:
        assert callable(sticky_by)
        try:
            key = sticky_by(*args, **kwargs)
        except Exception as error:
            add_note(error, f"in sticky_by of {label}")
            raise
        try:
            return _text(key)
        except TypeError as error:
            raise InputError(f"{label}: sticky_by gave {error}") from None

    def of_first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes | None:
        if not args and not kwargs:
            raise InputError(f"{label}: sticky_by={sticky_by!r}, but the call has no arguments")
        first = args[0] if args else next(iter(kwargs.values()))
        path = (sticky_by,) if isinstance(sticky_by, str | int) else ()
        try:
            if isinstance(sticky_by, str) and not isinstance(first, Mapping):
                key = getattr(first, sticky_by)
            else:
                key = first[sticky_by]
        except (LookupError, AttributeError, TypeError) as error:
            reason = f"there is no {sticky_by!r} in the {type(first).__name__}"
            raise InputError(
                f"{label}: sticky_by={sticky_by!r}, but {reason}", path, reason, first
            ) from error
        try:
            return _text(key)
        except TypeError as error:
            reason = str(error)
            raise InputError(f"{label}: sticky_by gave {reason}", path, reason, first) from None

    return of_all if callable(sticky_by) else of_first


def _text(key: Any) -> bytes | None:
    """Return what of a key is hashed: the same in every process; None for no key.

    Raises:
        TypeError: It cannot be a key.
    """
    if key is None:
        return None
    if isinstance(key, bytes):
        return key
    if isinstance(key, str):
        return key.encode("utf-8", "surrogatepass")
    if isinstance(key, uuid.UUID):
        return str(key).encode()
    try:
        return b"%d" % operator.index(key)
    except TypeError:
        raise TypeError(
            f"{key!r}, a {type(key).__name__}; a key is a str, bytes, an int or a UUID, which are "
            "the same in every process, or None"
        ) from None


# Shadow


class _ShadowCaller(VirtualCaller):
    def __init__(
        self,
        interface: Interface,
        rule: Shadow,
        callers: Sequence[Caller],
        pending: set[asyncio.Task[Any]],
    ) -> None:
        self.traffic = dict.fromkeys(("copied", "failed", "dropped"), 0)
        self._primary, self._secondary = callers
        self._share = rule.share
        self._most = rule.max_ongoing_requests
        self._name = interface.name
        self._what = f"{interface.name} (bound at {interface.where}): an argument"
        self._pending = pending
        # Weakly, like a loop: a loop that was closed leaves tasks that never end.
        self._copies = weakref.WeakSet[asyncio.Task[Any]]()

    async def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._copy(method, args, kwargs, streams=False)
        return await self._primary.call(method, args, kwargs)

    async def stream(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], emit: Emit
    ) -> None:
        self._copy(method, args, kwargs, streams=True)
        await self._primary.stream(method, args, kwargs, emit)

    def _copy(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], *, streams: bool
    ) -> None:
        """Start a copy of a call in the background, unless there are too many already."""
        if self._share < 1 and random.random() >= self._share:
            return
        if len(self._copies) >= self._most:
            self.traffic["dropped"] += 1
            return
        try:
            # Before the primary can change them; to unpickle them has time.
            payload = codec.encode((args, kwargs), self._what).copied()
        except Exception as error:
            self._failed(method, error)
            return
        self.traffic["copied"] += 1
        # Not an eager one: the primary goes first.
        task = asyncio.Task(
            self._run(method, payload, streams=streams),
            loop=asyncio.get_running_loop(),
            name=f"copy of {self._name}",
        )
        self._copies.add(task)
        self._pending.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._copies.discard(task)
        self._pending.discard(task)

    async def _run(self, method: str, payload: Payload, *, streams: bool) -> None:
        # In the task's own context: the copy outlives the request and its deadline.
        current_call.set(Call())
        current_scope.set(Scope(current_request()))
        current_attempt.set(None)
        try:
            args, kwargs = codec.decode(payload, self._what)
            if streams:
                room = Room(math.inf)
                await self._secondary.stream(method, args, kwargs, lambda _: room.use(0))
            else:
                await self._secondary.call(method, args, kwargs)
        except BackPressureError as error:
            self.traffic["dropped"] += 1
            logger.debug("%s: no copy of a call of %s: %s", self._name, method, error)
        except asyncio.CancelledError as error:
            if is_cancelled():
                raise
            self._failed(method, error)
        except Exception as error:
            self._failed(method, error)

    def _failed(self, method: str, error: BaseException) -> None:
        self.traffic["failed"] += 1
        logger.debug("%s: the copy of a call of %s failed: %r", self._name, method, error)
