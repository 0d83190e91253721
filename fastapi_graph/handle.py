"""Handles: how code calls a deployment, or a graph, and waits for the answer.

A handle may be called from any thread and any event loop. The call itself always runs on the
loop on which the graph was started, its *home* loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import weakref
from collections.abc import Coroutine, Generator, Sequence
from contextvars import Context, copy_context
from typing import Any, Protocol

from fastapi_graph.context import Emit
from fastapi_graph.errors import GraphDefinitionError, GraphError, OptionError
from fastapi_graph.loops import current_loop, outcome, refuse_to_block, start, submit, wait
from fastapi_graph.request import Scope, current_scope, scope_of_call
from fastapi_graph.streams import ItemStream, streams_in

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
                tuples and dicts, is replaced by its value; the
                items of a generator call are read by this one.
            **kwargs: Keyword arguments, likewise.

        Raises:
            GraphNotStartedError: The graph is not running.
            GraphDefinitionError: There is no such method.
        """
        callee = self._callee
        scope = scope_of_call(self._model_id)
        context = copy_context()
        context.run(current_scope.set, scope)
        if callee.streams(self._method):
            return DeploymentResponseGenerator(callee, self._method, args, kwargs, scope, context)
        home = callee.home()
        if _holds_calls(args) or (kwargs and _holds_calls(tuple(kwargs.values()))):
            coroutine = _call_with_values(callee, self._method, args, kwargs)
        else:
            coroutine = callee.call(self._method, args, kwargs)
        running = current_loop()
        if running is None:
            return _ThreadResponse(coroutine, home, callee, scope, context)
        begin: Any = start if running is home else submit
        begun = begin(_TaskResponse, coroutine, home, callee.label, callee.pending, context)
        try:
            if running is not home:
                future = asyncio.wrap_future(begun)
                begun = _TaskResponse(outcome(future), loop=running, name=callee.label)
            begun.scope = scope
            return begun
        finally:
            del begun  # no cycle through the traceback of a call that has failed at once

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
        model_id: Any = self._model_id if multiplexed_model_id is None else multiplexed_model_id
        if not isinstance(model_id, str) or not model_id.isprintable():
            raise OptionError(
                f"{self!r}: multiplexed_model_id={model_id!r} must be a string of printable "
                "characters"
            )
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
        return (
            isinstance(other, DeploymentHandle)
            and self._identity() == other._identity()
            and self._options == other._options
        )

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[Any, ...]:
        return self._source, self._name, self._method, frozenset(self._options), self._model_id

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
            try:
                return super().result()
            finally:
                del self  # no cycle through the traceback of its exception
        home = self.get_loop()
        refuse_to_block(home, self.get_name())
        future = asyncio.run_coroutine_threadsafe(outcome(self), home)
        return wait(future, timeout_s, self.get_name())

    def __await__(self) -> Generator[Any, None, Any]:
        if self.done() or current_loop() is self.get_loop():
            return super().__await__()
        future = asyncio.run_coroutine_threadsafe(outcome(self), self.get_loop())
        return asyncio.wrap_future(future).__await__()

    def cancel(self, msg: Any = None) -> bool:
        if self.done() or current_loop() is self.get_loop():
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
        context: Context,
    ) -> None:
        self.scope = scope
        self._home = home
        self._label = callee.label
        self._read = True  # until there is something to read
        self._future = submit(_TaskResponse, coroutine, home, callee.label, callee.pending, context)
        self._read = False

    def result(self, timeout_s: float | None = None) -> Any:
        if not self._future.done():
            refuse_to_block(self._home, self._label)
        self._read = True
        return wait(self._future, timeout_s, self._label)

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


_CALLS = (DeploymentResponse, ItemStream)


def _holds_calls(values: tuple[Any, ...] | list[Any]) -> bool:
    for value in values:
        kind = type(value)
        if kind is str or kind is int or kind is float:
            continue
        if isinstance(value, _CALLS):
            return True
        if (kind is list or kind is tuple) and _holds_calls(value):
            return True
        if kind is dict and _holds_calls(tuple(value.values())):
            return True
    return False


async def _values_of(value: Any) -> Any:
    """Return `value` with every response in it replaced by its value."""
    if isinstance(value, DeploymentResponse):
        # Shielded: whoever gets the value does not own the call that computes it.
        return await asyncio.shield(asyncio.ensure_future(outcome(value)))
    kind = type(value)
    if (kind is list or kind is tuple) and _holds_calls(value):
        return kind([await _values_of(item) for item in value])
    if kind is dict and _holds_calls(tuple(value.values())):
        return {key: await _values_of(item) for key, item in value.items()}
    return value


async def _call_with_values(
    callee: Callee, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    try:
        values, named = await _values_of(args), await _values_of(kwargs)
        return await callee.call(method, values, named)
    finally:
        _end_streams(args, kwargs)


def _end_streams(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """End the streams among the arguments of a call that has ended: they were its own."""
    for stream in streams_in((args, kwargs)):
        stream.abort()


class DeploymentResponseGenerator(ItemStream):
    """The items of a generator call that has been started: `async for`, or `for` in a thread.

    The generator is never more than one item ahead of its reader, or on Ray sixteen small ones
    (64 KiB of larger ones). An exception of the generator is raised after the items before it.
    When it is cancelled, closed or dropped, the generator is closed: its `finally` runs. Passed
    to another `.remote()`, it is read by that call, and closed when the call ends.
    """

    def __init__(
        self,
        callee: Callee,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        scope: Scope,
        context: Context,
    ) -> None:
        self.scope = scope

        async def source(emit: Emit) -> None:
            try:
                values, named = await _values_of(args), await _values_of(kwargs)
                await callee.stream(method, values, named, emit)
            finally:
                _end_streams(args, kwargs)

        super().__init__(source, callee.home(), callee.label, callee.pending, context)

    @property
    def degraded(self) -> tuple[str, ...]:
        """The deployments whose `fallback` has answered for them until now; empty for none."""
        return self.scope.degraded
