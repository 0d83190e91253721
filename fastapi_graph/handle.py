"""Handles: how code calls a deployment, or a graph, and waits for the answer.

A handle may be called from any thread and any event loop. The call itself always runs on the
loop on which the graph was started, its *home* loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import weakref
from collections.abc import AsyncIterator, Awaitable, Coroutine, Generator, Iterator, Sequence
from contextvars import copy_context
from typing import Any, Protocol

import anyio

from fastapi_graph.context import Emit, current_call, eager_task
from fastapi_graph.errors import (
    DeadlockError,
    GraphDefinitionError,
    GraphError,
    OptionError,
    ResponseTimeoutError,
)
from fastapi_graph.request import Scope, current_request, current_scope, request_of_context

__all__ = [
    "Callee",
    "DeploymentHandle",
    "DeploymentResponse",
    "DeploymentResponseGenerator",
    "HandleSource",
    "register",
]

logger = logging.getLogger("fastapi_graph")

_AS_BEFORE: Any = object()  # stands for an option that is not given, because None may be


class Callee(Protocol):
    """What a handle calls: a deployment, or a plan of the graph."""

    label: str
    pending: set[asyncio.Task[Any]]
    """Calls that have not finished: a loop refers to its tasks only weakly."""

    def home(self) -> asyncio.AbstractEventLoop:
        """Return the loop that runs the calls.

        Raises:
            GraphNotStartedError: There is none.
            GraphStoppingError: The graph drains, and this call is not part of a request.
        """

    def streams(self, method: str) -> bool:
        """Say whether the method is a generator; raises GraphDefinitionError if unknown."""

    def call(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Coroutine[Any, Any, Any]:
        """Return a coroutine that runs the call, for the home loop."""

    def stream(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], emit: Emit
    ) -> Coroutine[Any, Any, None]:
        """Return a coroutine that runs a generator call and emits its items."""

    def with_options(self, options: dict[str, Any]) -> Callee:
        """Return what makes the same calls with other options; raises OptionError."""


class HandleSource(Protocol):
    """Whoever made a handle, and can find its callee again in this process."""

    key: str

    def callee(self, name: str) -> Callee:
        """Return the callee of this name."""


_sources: weakref.WeakValueDictionary[str, HandleSource] = weakref.WeakValueDictionary()


def register(source: HandleSource) -> None:
    """Let handles that are unpickled in this process find their source by its key."""
    _sources[source.key] = source


class DeploymentHandle:
    """Calls a deployment, or a whole graph.

    `handle.remote(...)` calls the function or the instance; `handle.method.remote(...)` calls
    a method of it. The names are Ray Serve's. A handle is got from `Graph.handle`,
    `Graph.handle_of`, `Depends(graph.provide(...))`, or as an argument of a constructor:

    ```
    class Combiner:
        def __init__(self, m1: DeploymentHandle): ...
    ```
    """

    # In `__dict__` are the handles to methods: found there, they cost no `__getattr__`.
    __slots__ = ("__dict__", "_callee", "_method", "_model_id", "_name", "_options", "_source")

    def __init__(
        self,
        source: HandleSource,
        name: str,
        method: str = "__call__",
        options: dict[str, Any] | None = None,
        model_id: str = "",
    ) -> None:
        self._source = source
        self._name = name
        self._method = method
        self._options = options or {}
        self._model_id = model_id
        callee = source.callee(name)
        self._callee = callee.with_options(self._options) if self._options else callee

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Start a call at once, and return a `DeploymentResponse` for its result.

        For a generator it returns a `DeploymentResponseGenerator`.

        Args:
            *args: Positional arguments. A response of another call, also nested in lists,
                tuples and dicts, is replaced by its value.
            **kwargs: Keyword arguments, likewise.

        Raises:
            GraphNotStartedError: The graph is not running.
            GraphDefinitionError: There is no such method.
        """
        callee = self._callee
        scope = Scope(current_scope.get())
        if callee.streams(self._method):
            return DeploymentResponseGenerator(
                callee, self._method, args, kwargs, scope, self._model_id
            )
        home = callee.home()
        if _holds_response(args) or (kwargs and _holds_response(tuple(kwargs.values()))):
            coroutine = _call_with_values(callee, self._method, args, kwargs)
        else:
            coroutine = callee.call(self._method, args, kwargs)
        if self._model_id:
            coroutine = _for_model(self._model_id, coroutine)
        running = _current_loop()
        if running is home:
            return _start(coroutine, home, callee, scope)
        if running is None:
            return _ThreadResponse(coroutine, home, callee, scope)
        future = asyncio.wrap_future(_submit(coroutine, home, callee, scope))
        response = _TaskResponse(_outcome(future), loop=running, name=callee.label)
        response.scope = scope
        return response

    def options(
        self,
        *,
        method_name: str | None = None,
        stream: bool | None = None,
        multiplexed_model_id: str | None = None,
        timeout_s: float | None = _AS_BEFORE,
        max_retries: int = _AS_BEFORE,
        retry_on: type[Exception] | Sequence[type[Exception]] = _AS_BEFORE,
        retry_backoff_s: float = _AS_BEFORE,
        hedge_after_s: float | None = _AS_BEFORE,
        fallback: Any = _AS_BEFORE,
    ) -> DeploymentHandle:
        """Return a handle that makes its calls with other options than the deployment's.

        On the handle to a graph they are about the whole graph, which has no hedge.

        Args:
            method_name: The method to call; None for the same.
            stream: Whether the method is a generator. A method says so itself: this only checks
                that it is so.
            multiplexed_model_id: The model to ask for; the calls below ask for it too.
            timeout_s: As in `@deployment`, like those that follow.
            max_retries: How often a call may be made again.
            retry_on: After which exceptions.
            retry_backoff_s: Seconds before the first retry.
            hedge_after_s: Seconds until a second attempt.
            fallback: What answers instead; also another handle.

        Raises:
            GraphDefinitionError: There is no such method, or `stream` is not true of it.
            OptionError: A value cannot work.
        """
        given = {
            "timeout_s": timeout_s,
            "max_retries": max_retries,
            "retry_on": retry_on,
            "retry_backoff_s": retry_backoff_s,
            "hedge_after_s": hedge_after_s,
            "fallback": fallback,
        }
        changed = {name: value for name, value in given.items() if value is not _AS_BEFORE}
        model_id = self._model_id if multiplexed_model_id is None else multiplexed_model_id
        if not isinstance(model_id, str):
            raise OptionError(f"{self!r}: multiplexed_model_id={model_id!r} must be a string")
        handle = DeploymentHandle(
            self._source,
            self._name,
            self._method if method_name is None else method_name,
            {**self._options, **changed},
            model_id,
        )
        if stream is not None and stream is not self._callee.streams(handle._method):
            is_, asked = ("no", "stream=True") if stream else ("a", "stream=False")
            raise GraphDefinitionError(
                f"{handle!r} is {is_} generator, so .options({asked}) is wrong: leave it out, "
                + ("or write the method with `yield`" if stream else "and iterate the response")
            )
        return handle

    def __getattr__(self, name: str) -> DeploymentHandle:
        if name.startswith("_") and name != "__call__":
            raise AttributeError(f"'DeploymentHandle' object has no attribute {name!r}")
        self._callee.streams(name)  # an unknown method is an error here, not at the call
        handle = self.__dict__[name] = self._to_method(name)
        return handle

    def _to_method(self, name: str) -> DeploymentHandle:
        return DeploymentHandle(self._source, self._name, name, self._options, self._model_id)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{self!r} is called with .remote(...)")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DeploymentHandle) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[Any, ...]:
        options = tuple((name, id(value)) for name, value in sorted(self._options.items()))
        return self._source, self._name, self._method, options, self._model_id

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (
            self._source.key,
            self._name,
            self._method,
            self._options,
            self._model_id,
        )

    def __repr__(self) -> str:
        method = "" if self._method == "__call__" else f".{self._method}"
        return f"<DeploymentHandle {self._callee.label}{method}>"


def _restore(
    key: str, name: str, method: str, options: dict[str, Any], model_id: str
) -> DeploymentHandle:
    source = _sources.get(key)
    if source is None:
        raise GraphError(f"a handle to {name} was unpickled where its graph does not exist")
    return DeploymentHandle(source, name, method, options, model_id)


class DeploymentResponse:
    """The result of a call that has been started.

    `await response` gives the value or raises what the call raised, as often as you like;
    cancelling the task that awaits it cancels the call. It may be passed, unawaited, to
    another `.remote()`. Dropped, it completes all the same, and a failure is logged.
    """

    __slots__ = ()
    scope: Scope

    @property
    def degraded(self) -> tuple[str, ...]:
        """The deployments whose `fallback` has answered for them until now; empty for none."""
        return self.scope.degraded

    def result(self, timeout_s: float | None = None) -> Any:
        """Wait for the value in synchronous code.

        Args:
            timeout_s: Seconds to wait at most; the call goes on after that.

        Raises:
            ResponseTimeoutError: It took longer than `timeout_s`.
            DeadlockError: Called on the event loop that computes the value; `await` instead.
            Exception: Whatever the call raised.
        """
        raise NotImplementedError

    def cancel(self) -> bool:
        """Cancel the call and what it has started; False if it has finished already."""
        raise NotImplementedError

    def done(self) -> bool:
        """Say whether the call has finished."""
        raise NotImplementedError

    def __await__(self) -> Generator[Any, None, Any]:
        raise NotImplementedError


class _TaskResponse(asyncio.Task[Any], DeploymentResponse):
    """A response in async code. Being a task, it suits gather, wait, timeouts and groups."""

    __slots__ = ("scope",)

    def result(self, timeout_s: float | None = None) -> Any:
        if self.done():
            return super().result()
        home = self.get_loop()
        _refuse_to_block(home, self.get_name())
        future = asyncio.run_coroutine_threadsafe(_outcome(self), home)
        return _wait(future, timeout_s, self.get_name())

    def __await__(self) -> Generator[Any, None, Any]:
        if self.done() or _current_loop() is self.get_loop():
            return super().__await__()
        future = asyncio.run_coroutine_threadsafe(_outcome(self), self.get_loop())
        return asyncio.wrap_future(future).__await__()

    def cancel(self, msg: Any = None) -> bool:
        if self.done() or _current_loop() is self.get_loop():
            return super().cancel(msg)
        self.get_loop().call_soon_threadsafe(super().cancel, msg)
        return True


class _ThreadResponse(DeploymentResponse):
    """A response in synchronous code, away from the home loop."""

    __slots__ = ("_future", "_home", "_label", "_read", "scope")

    def __init__(
        self,
        coroutine: Coroutine[Any, Any, Any],
        home: asyncio.AbstractEventLoop,
        callee: Callee,
        scope: Scope,
    ) -> None:
        self.scope = scope
        self._home = home
        self._label = callee.label
        self._read = True  # until there is something to read
        self._future = _submit(coroutine, home, callee, scope)
        self._read = False

    def result(self, timeout_s: float | None = None) -> Any:
        if not self._future.done():
            _refuse_to_block(self._home, self._label)
        self._read = True
        return _wait(self._future, timeout_s, self._label)

    def cancel(self) -> bool:
        return self._future.cancel()

    def done(self) -> bool:
        return self._future.done()

    def __await__(self) -> Generator[Any, None, Any]:
        self._read = True
        return asyncio.wrap_future(self._future).__await__()

    def __del__(self) -> None:
        if not getattr(self, "_read", True):
            label = self._label
            self._future.add_done_callback(lambda future: _log_failure(future, label))


def _log_failure(future: concurrent.futures.Future[Any], label: str) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        logger.error("%s: failed, and nobody read its response", label, exc_info=error)


def _start(
    coroutine: Coroutine[Any, Any, Any],
    home: asyncio.AbstractEventLoop,
    callee: Callee,
    scope: Scope,
) -> asyncio.Task[Any]:
    """Start a call on the home loop, from the home loop."""
    context = copy_context()
    context.run(current_scope.set, scope)
    task = eager_task(_TaskResponse, coroutine, home, callee.label, context)
    task.scope = scope  # type: ignore[attr-defined]
    if not task.done():
        if (call := current_call.get()) is not None:
            call.started(task, callee.pending)
        else:
            callee.pending.add(task)
            task.add_done_callback(callee.pending.discard)
    return task


def _submit(
    coroutine: Coroutine[Any, Any, Any],
    home: asyncio.AbstractEventLoop,
    callee: Callee,
    scope: Scope,
) -> concurrent.futures.Future[Any]:
    """Start a call on the home loop, from elsewhere, in a copy of the caller's context."""

    async def begin() -> Any:
        return await _start(coroutine, home, callee, scope)

    outer = begin()
    try:
        return asyncio.run_coroutine_threadsafe(outer, home)
    except RuntimeError:  # the loop has been closed
        outer.close()
        coroutine.close()
        raise


async def _outcome(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def _current_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _refuse_to_block(home: asyncio.AbstractEventLoop, label: str) -> None:
    if _current_loop() is home:
        raise DeadlockError(
            f"{label}: waiting here would block the event loop that computes the result; "
            "`await` the response, or move this code to a synchronous function, which runs "
            "in a worker thread"
        )


def _wait(future: concurrent.futures.Future[Any], timeout_s: float | None, label: str) -> Any:
    try:
        return future.result(timeout_s)
    except concurrent.futures.CancelledError:
        raise asyncio.CancelledError(f"{label}: the call was cancelled") from None
    except TimeoutError:
        if future.done():
            raise
        raise ResponseTimeoutError(f"{label}: no result within {timeout_s} s") from None


def _holds_response(values: tuple[Any, ...] | list[Any]) -> bool:
    for value in values:
        kind = type(value)
        if kind is str or kind is int or kind is float:
            continue
        if isinstance(value, DeploymentResponse):
            return True
        if (kind is list or kind is tuple) and _holds_response(value):
            return True
        if kind is dict and _holds_response(tuple(value.values())):
            return True
    return False


async def _values_of(value: Any) -> Any:
    """Return `value` with every response in it replaced by its value."""
    if isinstance(value, DeploymentResponse):
        # Shielded: whoever gets the value does not own the call that computes it.
        return await asyncio.shield(asyncio.ensure_future(_outcome(value)))
    kind = type(value)
    if (kind is list or kind is tuple) and _holds_response(value):
        return kind([await _values_of(item) for item in value])
    if kind is dict and _holds_response(tuple(value.values())):
        return {key: await _values_of(item) for key, item in value.items()}
    return value


async def _call_with_values(
    callee: Callee, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    args, kwargs = await _values_of(args), await _values_of(kwargs)
    return await callee.call(method, args, kwargs)


async def _for_model(model_id: str, coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a call, in a context of its own, that asks for a model."""
    current_request.set(request_of_context().for_model(model_id))
    return await coroutine


async def _ended(tasks: list[asyncio.Task[Any]]) -> None:
    if tasks:
        await asyncio.wait(tasks)


_END = object()


class DeploymentResponseGenerator:
    """The items of a generator call that has been started: `async for`, or `for` in a thread.

    The generator is never more than one item ahead of its reader. An exception of the
    generator is raised after the items before it. When it is cancelled, closed or dropped,
    the generator is closed: its `finally` runs.
    """

    def __init__(
        self,
        callee: Callee,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        scope: Scope,
        model_id: str = "",
    ) -> None:
        self.scope = scope
        self._home = callee.home()
        self._label = callee.label
        self._cancelled = False
        send, receive = anyio.create_memory_object_stream[Any](0)
        self._receive = receive

        tasks = self._tasks = list[asyncio.Task[Any]]()

        async def pump() -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.append(task)
            if model_id:
                current_request.set(request_of_context().for_model(model_id))
            with send, receive:
                await callee.stream(
                    method, await _values_of(args), await _values_of(kwargs), send.send
                )

        def close(_: object) -> None:
            # Here and not in `__del__`: in a reference cycle, the stream may be finalised first.
            send.close()
            receive.close()

        self._pump: asyncio.Task[Any] | concurrent.futures.Future[Any]
        if _current_loop() is self._home:
            self._pump = _start(pump(), self._home, callee, scope)
        else:
            self._pump = _submit(pump(), self._home, callee, scope)
        self._pump.add_done_callback(close)  # a pump that is cancelled early never begins

    @property
    def degraded(self) -> tuple[str, ...]:
        """The deployments whose `fallback` has answered for them until now; empty for none."""
        return self.scope.degraded

    async def _next(self) -> Any:
        try:
            return await self._receive.receive()
        except asyncio.CancelledError:
            self.cancel()  # whoever waits for an item owns the call, as with a response
            raise
        except (anyio.EndOfStream, anyio.ClosedResourceError):
            pump = self._pump
            if isinstance(pump, concurrent.futures.Future):
                pump = asyncio.ensure_future(_outcome(asyncio.wrap_future(pump)))
            try:
                await asyncio.shield(pump)
            except asyncio.CancelledError:
                if not (self._cancelled and pump.cancelled()):
                    raise  # somebody else has ended it, and there may have been more items
            return _END

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        if _current_loop() is self._home:
            item = await self._next()
        else:
            future = asyncio.run_coroutine_threadsafe(self._next(), self._home)
            item = await asyncio.wrap_future(future)
        if item is _END:
            raise StopAsyncIteration
        return item

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        _refuse_to_block(self._home, self._label)
        future = asyncio.run_coroutine_threadsafe(self._next(), self._home)
        item = _wait(future, None, self._label)
        if item is _END:
            raise StopIteration
        return item

    def cancel(self) -> bool:
        """Close the generator; False if it has finished already."""
        if self._pump.done():
            return False
        self._cancelled = True
        if self._home.is_closed():
            return False
        self._home.call_soon_threadsafe(self._receive.close)
        self._home.call_soon_threadsafe(self._pump.cancel)
        return True

    async def aclose(self) -> None:
        """Close the generator and wait until it is closed."""
        if not self.cancel():
            return
        if _current_loop() is self._home:
            await _ended(self._tasks)
        else:
            future = asyncio.run_coroutine_threadsafe(_ended(self._tasks), self._home)
            await asyncio.wrap_future(future)

    def __del__(self) -> None:
        if hasattr(self, "_pump"):
            self.cancel()
