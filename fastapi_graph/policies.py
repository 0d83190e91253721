"""Policies of calls: what a deployment's options ask for around each call of it.

From the outside in: the fallback, the timeout, the cache, retries, a hedge. So a result that is
kept comes before everything else, each of those who wait for one call has its own timeout, and a
fallback is never kept. Around all of them is the deadline of the request, past which nothing is
tried any more. The same policies stand in front of every backend, in every process that calls the
deployment; a deployment whose options ask for none of them has none, and its calls pay for none.
"""

from __future__ import annotations

import asyncio
import logging
import random
import sys
from collections import Counter
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from typing import Any

from fastapi_graph.cache import ResultCache
from fastapi_graph.context import Emit, current_deadline, eager_task
from fastapi_graph.dataplane.values import Kept
from fastapi_graph.errors import DeadlineExceededError, NoReplicaError
from fastapi_graph.executor import Caller
from fastapi_graph.graph.options import DeploymentOptions
from fastapi_graph.graph.plan import HandleRef
from fastapi_graph.graph.signatures import is_stream
from fastapi_graph.handle import DeploymentHandle
from fastapi_graph.replica import Replica
from fastapi_graph.request import Attempt, current_attempt, current_scope, seconds_left
from fastapi_graph.streams import holds_stream

__all__ = ["PolicyCaller", "substitute"]

logger = logging.getLogger("fastapi_graph")

LONGEST_PAUSE_S = 10.0


class PolicyCaller:
    """Calls a deployment, or a graph, as its options ask for; see `Caller`.

    Args:
        base: Makes one attempt at a call.
        label: What messages call it.
        where: `file:line` of its bind.
        options: Those of the deployment, or of a handle to it.
        instead: Answers in its place; None without a fallback.
        cache: Keeps its results; None without a cache.
        counts: Where to count what happens.
        pending: Where to note calls that go on when nobody needs them any more.
    """

    local: Replica | None = None  # a call must not go past the policies
    keeps = False
    hedges = False

    def __init__(
        self,
        base: Caller,
        label: str,
        where: str,
        options: DeploymentOptions,
        *,
        instead: Layer | None,
        cache: ResultCache | None,
        counts: Counter[str],
        pending: set[asyncio.Task[Any]],
    ) -> None:
        self.max_retries = options.max_retries
        self._cache = cache

        def around(layer: Layer) -> Layer:
            if options.timeout_s is not None:
                layer = _Timeout(layer, options.timeout_s, f"{label} (bound at {where})")
            if instead is not None:
                layer = _Fallback(layer, instead, label, counts)
            return layer

        layer: Layer = _Base(base)
        # A stream among the arguments can be read once, so it is neither sent nor kept twice.
        self._once = around(layer)
        if options.hedge_after_s is not None and options.max_retries and base.hedges:
            layer = _Hedge(layer, options.hedge_after_s, label, counts, pending)
        layer = _Retry(layer, options, label, counts)
        if cache is not None:
            layer = _Cached(layer, cache)
        self._again = around(layer)

    def call(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Coroutine[Any, Any, Any]:
        layer = self._once if holds_stream(args) or holds_stream(kwargs) else self._again
        if layer is self._again and self._cache is not None:
            return self._call_unless_kept(self._cache, method, args, kwargs)
        return layer.call(method, args, kwargs)

    async def _call_unless_kept(
        self, cache: ResultCache, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Spare a result that is kept the way through the layers."""
        kept = cache.find(method, args, kwargs)
        return await self._again.call(method, args, kwargs) if kept is None else kept.value

    def stream(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], emit: Emit
    ) -> Coroutine[Any, Any, None]:
        layer = self._once if holds_stream(args) or holds_stream(kwargs) else self._again
        return layer.stream(method, args, kwargs, emit)

    def keep(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Coroutine[Any, Any, Any]:
        return self.call(method, args, kwargs)

    def release(self, kept: Kept) -> None:
        """Do nothing: it keeps no value."""


class Layer:
    """One policy around another, or around the call itself."""

    def __init__(self, inner: Layer) -> None:
        self.inner = inner

    async def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return await self.inner.call(method, args, kwargs)

    async def stream(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], emit: Emit
    ) -> None:
        await self.inner.stream(method, args, kwargs, emit)


class _Base(Layer):
    """What makes the call."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return await self._caller.call(method, args, kwargs)

    async def stream(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], emit: Emit
    ) -> None:
        await self._caller.stream(method, args, kwargs, emit)


class _Hedge(Layer):
    """Makes a second attempt elsewhere when the first takes long; the first answer wins.

    The idea, and its cost of a few percent more calls, is from J. Dean and L. A. Barroso, "The
    Tail at Scale", Communications of the ACM 56(2), 2013.
    """

    def __init__(
        self,
        inner: Layer,
        after_s: float,
        label: str,
        counts: Counter[str],
        pending: set[asyncio.Task[Any]],
    ) -> None:
        super().__init__(inner)
        self._after_s = after_s
        self._label = label
        self._counts = counts
        self._pending = pending

    async def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first = self._begin(method, args, kwargs, None)
        tasks = [first]
        try:
            if not first.done():
                await asyncio.wait(tasks, timeout=self._after_s)
            if first.done():
                return first.result()
            tasks.append(self._begin_elsewhere(method, args, kwargs))
            return await _first_answer(*tasks)
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            raise
        finally:
            for task in tasks:
                self._let_go(task)

    def _begin_elsewhere(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> asyncio.Task[Any]:
        attempt = current_attempt.get()
        assert attempt is not None  # which the first one has used
        other = Attempt(number=attempt.number + 1)
        other.avoid, other.hedges = attempt.avoid, True
        context = copy_context()
        context.run(current_attempt.set, other)
        task = self._begin(method, args, kwargs, context)
        if not (task.done() and isinstance(_failure(task), NoReplicaError)):
            self._counts["hedges"] += 1
        return task

    def _let_go(self, task: asyncio.Task[Any]) -> None:
        """Cancel an attempt that nobody needs, and do not wait until it has ended."""
        if not task.done():
            task.cancel()
            self._pending.add(task)
            task.add_done_callback(self._pending.discard)
        task.add_done_callback(_forget)

    def _begin(
        self,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: Context | None,
    ) -> asyncio.Task[Any]:
        coroutine = self.inner.call(method, args, kwargs)
        return eager_task(asyncio.Task, coroutine, asyncio.get_running_loop(), self._label, context)


async def _first_answer(first: asyncio.Task[Any], second: asyncio.Task[Any]) -> Any:
    """Return what the first of two that succeeds returns; if both fail, raise what `first` did."""
    tasks = (first, second)
    while running := [task for task in tasks if not task.done()]:
        if any(task.done() and _failure(task) is None for task in tasks):
            break
        await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    winner = second if second.done() and _failure(second) is None else first
    return winner.result()


def _failure(task: asyncio.Task[Any]) -> BaseException | None:
    """Return why a task that is done has no result."""
    return asyncio.CancelledError() if task.cancelled() else task.exception()


def _forget(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()  # which is nobody's


class _Retry(Layer):
    """Tries again after the exceptions of `retry_on`; the loss of a replica counts too.

    Pauses double from `retry_backoff_s` on, each with a random part: "full jitter", as in M.
    Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """

    def __init__(
        self, inner: Layer, options: DeploymentOptions, label: str, counts: Counter[str]
    ) -> None:
        super().__init__(inner)
        self._limit = options.max_retries
        self._retry_on = options.retry_on
        self._backoff_s = options.retry_backoff_s
        self._label = label
        self._counts = counts

    async def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        attempt = Attempt(self._limit)
        while True:
            current_attempt.set(attempt)
            try:
                return await self.inner.call(method, args, kwargs)
            except self._retry_on as error:
                if not await self._again(attempt, error):
                    raise
            finally:
                current_attempt.set(None)

    async def stream(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], emit: Emit
    ) -> None:
        attempt = Attempt(self._limit)
        begun = False

        async def emit_first(item: Any) -> None:
            nonlocal begun
            begun = True
            await emit(item)

        while True:
            current_attempt.set(attempt)
            try:
                return await self.inner.stream(method, args, kwargs, emit_first)
            except self._retry_on as error:
                if begun or not await self._again(attempt, error):
                    raise
            finally:
                current_attempt.set(None)

    async def _again(self, attempt: Attempt, error: Exception) -> bool:
        """Wait for the next attempt, and say whether there is one."""
        if not attempt.again():
            return False
        pause = min(self._backoff_s * 2 ** (attempt.spent - 1), LONGEST_PAUSE_S)
        pause *= random.random()
        left = seconds_left()
        if left is not None and left <= pause:
            return False  # past the deadline nobody waits for it
        self._counts["retries"] += 1
        logger.info("%s: attempt %d, after %r", self._label, attempt.number, error)
        await asyncio.sleep(pause)
        return True


class _Cached(Layer):
    """Answers with what is kept; streams pass."""

    def __init__(self, inner: Layer, cache: ResultCache) -> None:
        super().__init__(inner)
        self._cache = cache

    async def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return await self._cache.call(self.inner.call, method, args, kwargs)


class _Timeout(Layer):
    """Lets a call with all its attempts take `timeout_s`, and tells the calls below it."""

    def __init__(self, inner: Layer, timeout_s: float, label: str) -> None:
        super().__init__(inner)
        self._timeout_s = timeout_s
        self._label = label

    async def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return await self._within(self.inner.call(method, args, kwargs))

    async def stream(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], emit: Emit
    ) -> None:
        await self._within(self.inner.stream(method, args, kwargs, emit))

    async def _within(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        outer = current_deadline.get()
        if outer is not None and outer <= deadline:
            return await coroutine  # whoever set it sees to it
        token = current_deadline.set(deadline)
        try:
            async with asyncio.timeout_at(deadline) as scope:
                return await coroutine
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise DeadlineExceededError(
                f"{self._label}: no result within timeout_s={self._timeout_s:g}"
            ) from error
        finally:
            current_deadline.reset(token)


class _Fallback(Layer):
    """Answers with the fallback when the deployment fails, is late, or is over its limits."""

    def __init__(self, inner: Layer, instead: Layer, label: str, counts: Counter[str]) -> None:
        super().__init__(inner)
        self._instead = instead
        self._label = label
        self._counts = counts

    async def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return await self.inner.call(method, args, kwargs)
        except Exception as error:
            self._degrade(error)
            return await self._instead.call(method, args, kwargs)

    async def stream(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], emit: Emit
    ) -> None:
        begun = False

        async def emit_first(item: Any) -> None:
            nonlocal begun
            begun = True
            await emit(item)

        try:
            await self.inner.stream(method, args, kwargs, emit_first)
        except Exception as error:
            if begun:
                raise  # what has been sent cannot be taken back
            self._degrade(error)
            await self._instead.stream(method, args, kwargs, emit)

    def _degrade(self, error: Exception) -> None:
        """Note that the fallback answers; past the request's deadline it does not."""
        left = seconds_left()
        if left is not None and left <= 0:
            raise error
        self._counts["fallbacks"] += 1
        logger.warning("%s: its fallback answers, after %r", self._label, error)
        if (scope := current_scope.get()) is not None:
            scope.degrade((self._label,))


def substitute(fallback: Any, label: str, where: str, caller_of: Callable[[str], Caller]) -> Layer:
    """Return what answers with a fallback.

    Args:
        fallback: A reference to a deployment, a handle, a function or a value.
        label: Whose fallback it is.
        where: `file:line` of its bind.
        caller_of: From a deployment's name to what calls it.
    """
    if isinstance(fallback, HandleRef):
        return _Base(caller_of(fallback.deployment))
    if isinstance(fallback, DeploymentHandle):
        return _Handle(fallback)
    function = fallback if callable(fallback) else _constant(fallback)
    host = Replica(
        f"fallback of {label}", DeploymentOptions(max_ongoing_requests=sys.maxsize), where
    )
    host.host(function)
    return _Function(host, function)


class _Function(Layer):
    """Answers every method with one function, hosted here."""

    def __init__(self, host: Replica, function: Callable[..., Any]) -> None:
        self._host = host
        self._streams = is_stream(function)

    async def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return await self._host.call("__call__", args, kwargs)

    async def stream(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], emit: Emit
    ) -> None:
        if self._streams:
            await self._host.stream("__call__", args, kwargs, emit)
            return
        answer = await self.call(method, args, kwargs)
        for item in answer if isinstance(answer, list | tuple) else [answer]:
            await emit(item)


class _Handle(Layer):
    """Answers with a handle's method of the same name."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    def _method(self, name: str) -> DeploymentHandle:
        return self._handle if name == "__call__" else getattr(self._handle, name)

    async def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return await self._method(method).remote(*args, **kwargs)

    async def stream(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], emit: Emit
    ) -> None:
        async for item in self._method(method).remote(*args, **kwargs):
            await emit(item)


def _constant(value: Any) -> Callable[..., Any]:
    async def answer(*args: Any, **kwargs: Any) -> Any:
        return value

    return answer
