"""`@batch`: calls with one input each become calls of a function that takes lists."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from typing import Any, ParamSpec, Protocol, TypeVar, overload

from fastapi_graph.batching.batched import Batched, BatchedCall, BatchedStream
from fastapi_graph.errors import GraphDefinitionError, OptionError
from fastapi_graph.graph.nodes import Unbound, caller_location
from fastapi_graph.graph.options import BatchOptions
from fastapi_graph.graph.signatures import kind_of

__all__ = ["batch"]

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")
T = TypeVar("T")


class BatchedMethod(Protocol[P, R]):
    """What type checkers see of a batched method: it is one of each instance."""

    def __get__(self, instance: Any, owner: Any = ..., /) -> Batched[P, R]: ...

    def __call__(self, instance: Any, /, *args: P.args, **kwargs: P.kwargs) -> R: ...


class _Decorator(Protocol):
    @overload
    def __call__(
        self, function: Callable[[list[T]], Awaitable[Sequence[R]] | Sequence[R]], /
    ) -> Batched[[T], Coroutine[Any, Any, R]]: ...

    @overload
    def __call__(
        self, function: Callable[[list[T]], AsyncIterator[Sequence[R]] | Iterator[Sequence[R]]], /
    ) -> Batched[[T], AsyncIterator[R]]: ...

    @overload  # before methods, whose `self` is no list
    def __call__(self, function: Callable[[list[S], list[T]], Any], /) -> Batched[[S, T], Any]: ...

    @overload
    def __call__(
        self, function: Callable[[S, list[T]], Awaitable[Sequence[R]] | Sequence[R]], /
    ) -> BatchedMethod[[T], Coroutine[Any, Any, R]]: ...

    @overload
    def __call__(
        self,
        function: Callable[[S, list[T]], AsyncIterator[Sequence[R]] | Iterator[Sequence[R]]],
        /,
    ) -> BatchedMethod[[T], AsyncIterator[R]]: ...

    @overload
    def __call__(self, function: Callable[..., Any], /) -> Batched[..., Any]: ...


@overload
def batch(
    function: Callable[[list[T]], Awaitable[Sequence[R]] | Sequence[R]], /
) -> Batched[[T], Coroutine[Any, Any, R]]: ...


@overload
def batch(
    function: Callable[[list[T]], AsyncIterator[Sequence[R]] | Iterator[Sequence[R]]], /
) -> Batched[[T], AsyncIterator[R]]: ...


@overload  # before methods, whose `self` is no list
def batch(function: Callable[[list[S], list[T]], Any], /) -> Batched[[S, T], Any]: ...


@overload
def batch(
    function: Callable[[S, list[T]], Awaitable[Sequence[R]] | Sequence[R]], /
) -> BatchedMethod[[T], Coroutine[Any, Any, R]]: ...


@overload
def batch(
    function: Callable[[S, list[T]], AsyncIterator[Sequence[R]] | Iterator[Sequence[R]]], /
) -> BatchedMethod[[T], AsyncIterator[R]]: ...


@overload
def batch(function: Callable[..., Any], /) -> Batched[..., Any]: ...


@overload
def batch(
    *,
    max_batch_size: int = ...,
    batch_wait_timeout_s: float = ...,
    max_concurrent_batches: int = ...,
    batch_size_fn: Callable[[list[Any]], int] | None = ...,
    target_latency_s: float | None = ...,
) -> _Decorator: ...


def batch(function: Any = None, /, **options: Any) -> Any:
    """Gather calls into batches: `@batch` or `@batch(max_batch_size=32)`.

    The decorated function or method takes a list for each of its parameters and returns a list
    with one result for each input, in their order. Callers pass one input and get one result.
    It may be sync, which runs in a worker thread, or async; to its callers it is always async.
    An exception in the list of results is raised by that call alone; one that is raised fails
    all calls of the batch.

    A generator yields, at each step, a list with one item for each caller. `StopIteration` in
    place of an item ends the stream of that caller.

    Args:
        function: The function or method, when used bare.
        **options: Names, meanings and defaults are those of Ray Serve's `@serve.batch`:

            - `max_batch_size` (int, 10): a batch starts when it is as large.
            - `batch_wait_timeout_s` (float, 0.01): or when its oldest call has waited this long;
              0 is not at all.
            - `max_concurrent_batches` (int, 1): how many run at once; calls gather meanwhile.
            - `batch_size_fn`: takes the list of inputs (the first argument of each call) and
              returns the size, an int, that `max_batch_size` limits; by default, how many.
            - `target_latency_s` (float): choose size and wait, from how long batches have
              taken, so that calls take no longer than this. Then `max_batch_size` (100) and
              `batch_wait_timeout_s` (no limit) are the most that is chosen.

    Raises:
        OptionError: An option is unknown or its value cannot work.
        GraphDefinitionError: What is decorated is no function.
    """
    where = caller_location()

    def decorate(function: Any) -> Any:
        if isinstance(function, Unbound):
            raise GraphDefinitionError(
                f"{function!r} is a deployment: put @batch under @deployment (at {where})"
            )
        if not inspect.isfunction(function):
            raise GraphDefinitionError(
                f"@batch takes a function or a method, not {function!r} (at {where})"
            )
        label = function.__qualname__.rpartition("<locals>.")[2]
        validated = BatchOptions.validated(label, options, where)
        if not function.__code__.co_argcount and not function.__code__.co_kwonlyargcount:
            raise GraphDefinitionError(
                f"{label} takes no arguments, so there is nothing to batch (at {where})"
            )
        if not kind_of(function).endswith("stream"):
            return BatchedCall(function, validated)
        if validated.target_latency_s is not None:
            raise OptionError(
                f"{label}: option target_latency_s={validated.target_latency_s}: {label} is a "
                "generator, and how long it takes is up to its readers; set max_batch_size and "
                f"batch_wait_timeout_s (at {where})"
            )
        return BatchedStream(function, validated)

    return decorate if function is None else decorate(function)
