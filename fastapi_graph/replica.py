"""One hosted user object, the same under every backend.

It runs async code on the event loop and sync code in worker threads, and enforces the
deployment's limits: `max_ongoing_requests` calls at once, then a first-in-first-out queue of
`max_queued_requests`, then `BackPressureError`. The slot of a sync call whose caller was
cancelled is held until its thread ends, because the thread cannot be stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import math
import os
from collections import deque
from collections.abc import Callable
from typing import Any

import anyio
from anyio import CapacityLimiter

from fastapi_graph.batching.batched import unfinished
from fastapi_graph.context import Call, Emit, add_note, current_call, user_code
from fastapi_graph.errors import (
    BackPressureError,
    GraphDefinitionError,
    GraphNotStartedError,
)
from fastapi_graph.graph.options import DeploymentOptions
from fastapi_graph.graph.signatures import Kind, kind_of
from fastapi_graph.models import ModelCache
from fastapi_graph.multiplexing import models_of
from fastapi_graph.raised import contain, is_failure
from fastapi_graph.request import current_attempt
from fastapi_graph.threads import forget_finalizer, in_thread, pump

__all__ = ["Replica"]

logger = logging.getLogger("fastapi_graph")


class Replica:
    """Hosts one function or instance of a class, with the limits of its deployment.

    Args:
        name: The deployment's name.
        options: The deployment's options.
        where: `file:line` at which it was bound.
        replica_id: What tells it from other replicas; by default its process does.

    Attributes:
        async_methods: What `find_async()` has found already.
        ongoing: How many slots are taken. Below `limit`, whoever adds one has taken a slot, and
            gives it back with `leave()`.
        limit: How many slots there are.
        queue: Who waits for one.
        models: The models that the object keeps, if it is multiplexed.
    """

    def __init__(
        self, name: str, options: DeploymentOptions, where: str, replica_id: str = ""
    ) -> None:
        self.name = name
        self._replica_id = replica_id
        self.options = options
        self.where = where
        self.ongoing = 0
        self.limit = options.max_ongoing_requests
        self.queue: deque[asyncio.Future[None]] = deque()
        self.async_methods: dict[str, Callable[..., Any]] = {}
        self._abandoned: set[asyncio.Future[Any]] = set()
        # Slots bound the number of threads; anyio's default limiter is shared by the whole
        # process and would let nested synchronous waits starve each other.
        self._threads = CapacityLimiter(math.inf)
        self._object: Any = None
        self.models: ModelCache | None = None
        self._methods: dict[str, tuple[Callable[..., Any], Kind]] = {}

    @property
    def replica_id(self) -> str:
        """What tells it from other replicas."""
        return self._replica_id or f"{self.name}:{os.getpid()}"

    @property
    def queued(self) -> int:
        """How many calls wait for a slot."""
        return len(self.queue)

    @property
    def abandoned(self) -> int:
        """How many threads go on for calls that were cancelled; each holds its slot."""
        return len(self._abandoned)

    async def construct(
        self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Make the hosted object: an instance of a class, or the function itself.

        A sync constructor runs in a worker thread; `async def __init__` on the loop. Then
        `reconfigure(user_config)` and `check_health()` are called where they exist.

        Raises:
            Exception: Whatever the user's code raises.
        """
        self.ongoing = 0  # on a loop that has ended, calls may have been left
        self.queue.clear()
        with user_code() as call:
            call.host = self
            if not inspect.isclass(target):
                self.host(target)
            elif inspect.iscoroutinefunction(getattr(target, "__init__", None)):
                hosted: Any = target.__new__(target, *args, **kwargs)
                await hosted.__init__(*args, **kwargs)
                self.host(hosted)
            else:
                await self._construct_in_thread(target, args, kwargs)
            if self.options.user_config is not None:
                await self.reconfigure(self.options.user_config)
        await self.check_health()

    async def _construct_in_thread(
        self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        worker = asyncio.ensure_future(self._in_thread(target, args, kwargs))
        try:
            self.host(await asyncio.shield(worker))
        except asyncio.CancelledError:
            # The thread cannot be stopped, and what it makes has to be closed.
            with contextlib.suppress(Exception):
                self.host(await worker)
            raise

    def host(self, hosted: Any) -> None:
        """Host an object that exists already."""
        self._object = hosted
        self.models = models_of(hosted)
        self._methods.clear()
        self.async_methods.clear()

    async def reconfigure(self, user_config: Any) -> None:
        """Pass `user_config` to the object's `reconfigure()`.

        Raises:
            GraphDefinitionError: The object has no such method.
        """
        reconfigure = getattr(self._object, "reconfigure", None)
        if not callable(reconfigure):
            raise GraphDefinitionError(
                f"{self.name} has a user_config but no reconfigure(user_config) method "
                f"(bound at {self.where})"
            )
        await self._run(reconfigure, user_config)

    async def check_health(self) -> None:
        """Call the object's `check_health()`, if it has one.

        Raises:
            TimeoutError: It took longer than `health_check_timeout_s`.
            Exception: Whatever it raises: the object is not healthy.
        """
        check = getattr(self._object, "check_health", None)
        if callable(check):
            with user_code() as call:
                call.host = self
                async with asyncio.timeout(self.options.health_check_timeout_s):
                    await self._run(check)

    @property
    def checks_health(self) -> bool:
        """Whether the object has a `check_health()`."""
        return callable(getattr(self._object, "check_health", None))

    async def close(self) -> None:
        """Let go of the object: its `close()`, else its `__del__()`, sync or async, runs once.

        Threads that a cancelled call has left in it are waited for first, for
        `graceful_shutdown_timeout_s` at most. What it raises is logged, so that the others are
        closed too.
        """
        hosted, self._object = self._object, None
        self._methods.clear()
        self.async_methods.clear()
        if hosted is None:
            return
        loop = asyncio.get_running_loop()
        until = loop.time() + self.options.graceful_shutdown_timeout_s
        if left := self._abandoned | unfinished(hosted):
            await asyncio.wait(left, timeout=until - loop.time())
        if inspect.isroutine(hosted):
            return
        try:
            with user_code() as call:
                call.host = self
                if callable(close := getattr(hosted, "close", None)):
                    await self._run(close)
                elif callable(finalizer := getattr(hosted, "__del__", None)):
                    await self._run(finalizer)
                    forget_finalizer(hosted)
        except BaseException as error:
            if not is_failure(error):
                raise
            logger.exception("%s: close failed (bound at %s)", self.name, self.where)
        models, self.models = self.models, None
        if models is not None:
            await models.close(max(0.0, until - loop.time()))

    def _find(self, method: str) -> tuple[Callable[..., Any], Kind]:
        hosted = self._object
        if hosted is None:
            raise GraphNotStartedError(
                f"{self.name} is not constructed (bound at {self.where}): its graph is starting, "
                "or was started while an override stood in for it"
            )
        function = hosted if method == "__call__" else getattr(hosted, method, None)
        if not callable(function):
            raise GraphDefinitionError(
                f"{self.name} has no method {method!r} (bound at {self.where})"
            )
        found = function, kind_of(function)
        self._methods[method] = found
        if found[1] == "async":
            self.async_methods[method] = function
        return found

    def find_async(self, method: str) -> Callable[..., Any] | None:
        """Return the method if it is async: then it may be awaited without `call()`, in a slot."""
        function, kind = self._methods.get(method) or self._find(method)
        return function if kind == "async" else None

    def leave(self) -> None:
        """Give a slot back: to the first in the queue, if there is one."""
        while self.queue:
            turn = self.queue.popleft()
            if not turn.done():
                turn.set_result(None)  # the slot goes to the first in the queue
                return
        self.ongoing -= 1

    async def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a method under the limits and return its result.

        Raises:
            BackPressureError: The queue is full.
            Exception: Whatever the user's code raises, with a note that names this deployment.
        """
        try:
            function, kind = self._methods[method]
        except KeyError:
            function, kind = self._find(method)
        if self.ongoing >= self.limit:
            await self._wait_for_slot()
        else:
            self.ongoing += 1
        call = self._begin()
        token = current_call.set(call)
        release = True
        try:
            if kind == "async":
                return await function(*args, **kwargs)
            worker = asyncio.ensure_future(self._in_thread(function, args, kwargs))
            try:
                result = await asyncio.shield(worker)
            except asyncio.CancelledError:
                if not worker.done():
                    release = False
                    self._abandon(worker)
                raise
            return await result if inspect.isawaitable(result) else result
        except BaseException as error:
            self.contain(error, method)
            if isinstance(error, asyncio.CancelledError):
                call.cancel_nested()
            raise
        finally:
            current_call.reset(token)
            if call.ending is not None:
                call.end()
            if release:
                self.leave()

    async def stream(
        self,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        emit: Emit,
    ) -> None:
        """Run a generator method under the limits, and `emit` each item before the next.

        If this is cancelled or `emit` raises, the generator is closed: its `finally` runs.
        """
        function, kind = self._find(method)
        if self.ongoing >= self.limit:
            await self._wait_for_slot()
        else:
            self.ongoing += 1
        call = self._begin()
        token = current_call.set(call)
        release = True
        try:
            if kind == "async stream":
                async with contextlib.aclosing(function(*args, **kwargs)) as items:
                    async for item in items:
                        await emit(item)
                return
            release = False
            await self._stream_in_thread(function, args, kwargs, emit)
        except BaseException as error:
            self.contain(error, method)
            if isinstance(error, asyncio.CancelledError):
                call.cancel_nested()
            raise
        finally:
            current_call.reset(token)
            if call.ending is not None:
                call.end()
            if release:
                self.leave()

    def _begin(self) -> Call:
        """Return the call that begins, which has the attempt that was set for it."""
        call = Call()
        call.host = self
        if (attempt := current_attempt.get()) is not None:
            call.attempt = attempt.number
            current_attempt.set(None)  # the calls that this one makes are not attempts at it
        return call

    def contain(self, error: BaseException, method: str) -> None:
        """Say on an exception of the user's code in which deployment it was raised.

        Raises:
            NodeError: It is none that anybody would handle; this is in its place.
        """
        label = self.name if method == "__call__" else f"{self.name}.{method}"
        what = f"deployment {label} (bound at {self.where})"
        contain(error, what)
        if isinstance(error, Exception):
            add_note(error, f"raised in {what}")

    async def _wait_for_slot(self) -> None:
        limit = self.options.max_queued_requests
        if 0 <= limit <= len(self.queue):
            raise BackPressureError(
                f"{self.name} is at capacity: {self.ongoing} ongoing of "
                f"max_ongoing_requests={self.limit}, {len(self.queue)} waiting of "
                f"max_queued_requests={limit} (bound at {self.where})"
            )
        turn = asyncio.get_running_loop().create_future()
        self.queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave()  # the slot was passed on in the moment of the cancellation
            else:
                with contextlib.suppress(ValueError):
                    self.queue.remove(turn)
            raise

    def _abandon(self, worker: asyncio.Future[Any]) -> None:
        """Leave a thread to itself; its slot is given back when it ends."""
        self._abandoned.add(worker)
        worker.add_done_callback(self._abandoned_ended)

    async def _stream_in_thread(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        emit: Emit,
    ) -> None:
        """Run a generator in a thread; cancelled, close it after the item it is working on."""
        emitting: asyncio.Task[Any] | None = None
        closing = False

        async def emit_unless_closing(item: Any) -> None:
            nonlocal emitting
            if closing:
                raise anyio.ClosedResourceError
            emitting = asyncio.current_task()
            try:
                await emit(item)
            except asyncio.CancelledError:
                raise anyio.ClosedResourceError from None
            finally:
                emitting = None

        pumped = (function, args, kwargs, emit_unless_closing)
        worker = asyncio.ensure_future(self._in_thread(pump, pumped, {}))
        worker.add_done_callback(lambda _: self.leave())
        try:
            await asyncio.shield(worker)
        except asyncio.CancelledError:
            closing = True
            if (call := current_call.get()) is not None:
                call.cancel_nested()  # which the generator may be waiting for
            if emitting is not None:
                emitting.cancel()
            # Whoever reads the items does not wait for this; cancelled again, it is left alone.
            self._abandoned.add(worker)
            worker.add_done_callback(self._abandoned.discard)
            await asyncio.wait([worker])
            raise

    def _abandoned_ended(self, worker: asyncio.Future[Any]) -> None:
        self._abandoned.discard(worker)
        self.leave()
        if not worker.cancelled() and (error := worker.exception()) is not None:
            logger.debug("%s: an abandoned call failed: %r", self.name, error)

    async def _in_thread(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        where = f"bound at {self.where}"
        return await in_thread(
            function, args, kwargs, limiter=self._threads, who=self.name, where=where
        )

    async def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        if inspect.iscoroutinefunction(function):
            return await function(*args)
        result = await self._in_thread(function, args, {})
        return await result if inspect.isawaitable(result) else result
