"""Batched functions and methods: what `@batch` makes of a function that takes lists."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import sys
import types
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Sequence,
)
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Generic,
    NamedTuple,
    ParamSpec,
    Self,
    TypeVar,
    Union,
    get_args,
    get_origin,
)
from weakref import WeakKeyDictionary

from fastapi_graph.batching.queue import Batch, BatchQueue, Item, Work
from fastapi_graph.batching.streams import StreamBatch, StreamItem
from fastapi_graph.errors import GraphDefinitionError
from fastapi_graph.graph.nodes import caller_location, location
from fastapi_graph.graph.options import BatchOptions
from fastapi_graph.graph.signatures import kind_of, signature_of

__all__ = ["BatchSettings", "Batched", "BatchedCall", "BatchedStream", "unfinished"]

P = ParamSpec("P")
R = TypeVar("R")


class BatchSettings(NamedTuple):
    """How calls are batched now.

    Attributes:
        max_batch_size: The largest size of a batch. With a target latency, it is chosen.
        batch_wait_timeout_s: How long a call may wait for others; chosen likewise.
        max_concurrent_batches: How many batches may run at once.
        target_latency_s: The target, if there is one.
    """

    max_batch_size: int
    batch_wait_timeout_s: float
    max_concurrent_batches: int
    target_latency_s: float | None


class _State:
    """What the calls of one function, or of one method of one instance, share."""

    def __init__(self, batched: Batched[Any, Any], owner: object = None) -> None:
        function: Any = batched.function
        code = function.__code__
        self.work = Work(
            batched.label,
            location(code.co_filename, code.co_firstlineno),
            in_thread=kind_of(function).startswith("sync"),
            options=batched.options,
        )
        self.owner_id = id(owner)  # a copy of the instance has the same attributes
        self._signature = _signature(function)
        self.positional = _positional(self._signature)
        self._batch = batched._batch
        self._queues: WeakKeyDictionary[asyncio.AbstractEventLoop, BatchQueue] = WeakKeyDictionary()

    def queue(self, loop: asyncio.AbstractEventLoop) -> BatchQueue:
        """Return the queue; each loop has its own, because what waits there belongs to it."""
        queue = self._queues.get(loop)
        if queue is None:
            queue = self._queues[loop] = BatchQueue(self.work, loop, self._batch)
        return queue

    def canonical(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments in a form that all calls with the same ones have."""
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.work.label}: {error}") from None
        return bound.args, bound.kwargs

    def configure(self, **changed: Any) -> None:
        """Let other options be in force, for what waits already, too."""
        before = {name: getattr(self.work.options, name) for name in BatchOptions.model_fields}
        options = BatchOptions.validated(self.work.label, {**before, **changed}, caller_location())
        self.work.configure(options)
        for queue in tuple(self._queues.values()):
            with contextlib.suppress(RuntimeError):  # its loop is closed
                queue.loop.call_soon_threadsafe(queue.form)

    @property
    def running(self) -> set[asyncio.Task[None]]:
        """What runs."""
        return {batch.task for queue in self._queues.values() for batch in queue.running}

    def __reduce__(self) -> tuple[Any, ...]:
        # What waits here is no part of the instance that holds it: there it is made anew.
        return type(None), ()


class Batched(Generic[P, R]):
    """A batched function or method: it is called with one input, and gives one result.

    Made by `batch`. A method has a queue for each instance.

    Attributes:
        function: The function that takes lists.
        options: The options that it was decorated with.
    """

    _batch = Batch  # not annotated: an instance has `__annotations__` of its own

    def __init__(self, function: Callable[..., Any], options: BatchOptions) -> None:
        self.function = function
        self.options = options
        self._is_method = False  # that is, not of an instance yet
        self._state: _State | None = None
        self.__module__ = function.__module__
        self.__name__ = function.__name__
        self.__qualname__ = function.__qualname__
        self.__doc__ = function.__doc__

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.__qualname__.rpartition("<locals>.")[2]

    @property
    def batch_settings(self) -> BatchSettings:
        """How calls are batched now."""
        work = self._shared.work
        return BatchSettings(
            work.size,
            work.wait_s,
            work.options.max_concurrent_batches,
            work.options.target_latency_s,
        )

    def set_max_batch_size(self, new_max_batch_size: int) -> None:
        """Change `max_batch_size`, of this instance if it is a method.

        Raises:
            OptionError: The value cannot work.
        """
        self._shared.configure(max_batch_size=new_max_batch_size)

    def set_batch_wait_timeout_s(self, new_batch_wait_timeout_s: float) -> None:
        """Change `batch_wait_timeout_s`, of this instance if it is a method.

        Raises:
            OptionError: The value cannot work.
        """
        self._shared.configure(batch_wait_timeout_s=new_batch_wait_timeout_s)

    @property
    def _shared(self) -> _State:
        if self._state is None:
            if self._is_method:
                raise TypeError(f"{self.label} is a method: use it on an instance")
            self._state = _State(self)
        return self._state

    def __set_name__(self, owner: type, name: str) -> None:
        self._is_method = True

    def __get__(self, instance: Any, owner: type | None = None) -> Self:
        if instance is None or not self._is_method:
            return self
        try:
            kept = vars(instance)
        except TypeError:
            raise TypeError(
                f"{self.label} has its queue in the instance, and {type(instance).__qualname__} "
                "has no __dict__: add '__dict__' to its __slots__"
            ) from None
        bound = object.__new__(type(self))
        bound.__dict__.update(self.__dict__)
        bound.function = types.MethodType(self.function, instance)
        bound._is_method = False
        key = f"@batch {id(self)}"  # a subclass may have a method of the same name
        bound._state = kept.get(key)
        if bound._state is None or bound._state.owner_id != id(instance):
            bound._state = kept[key] = _State(bound, instance)
        return bound

    @property
    def __signature__(self) -> inspect.Signature:
        # Evaluated when it is asked for: what the annotations name may be defined later.
        signature = _signature(self.function)
        parameters = []
        for position, parameter in enumerate(signature.parameters.values()):
            if not (self._is_method and position == 0):
                if any(parameter.annotation is kind for kind in _NO_LISTS):
                    raise GraphDefinitionError(
                        f"{self.label}: {parameter} is the value of one call, but a batch gets a "
                        f"list of them: list[{parameter.annotation.__name__}]"
                    )
                parameter = parameter.replace(annotation=_of_one(parameter.annotation))
            parameters.append(parameter)
        result = signature.return_annotation
        if self._batch is StreamBatch:
            result = AsyncIterator[_without_errors(_of_one(_of_one(result)))]  # type: ignore[misc]
        else:
            result = _without_errors(_of_one(result))
        return signature.replace(parameters=parameters, return_annotation=result)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.function, self.options, self._is_method)

    def __repr__(self) -> str:
        return f"<Batched {self.label}>"

    if TYPE_CHECKING:

        def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...

    else:

        def __getattr__(self, name: str) -> Any:
            if name != "__annotations__":
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            signature = self.__signature__
            said = {name: item.annotation for name, item in signature.parameters.items()}
            said["return"] = signature.return_annotation
            return {key: value for key, value in said.items() if value is not signature.empty}


def _restored(
    cls: type[Batched[..., Any]], function: Any, options: BatchOptions, is_method: bool
) -> Batched[..., Any]:
    batched = cls(function, options)
    batched._is_method = is_method
    return batched


class BatchedCall(Batched[..., Any]):
    """One that returns."""

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_method:
            return await _bound(self, args)(*args[1:], **kwargs)
        state = self._state or self._shared
        if kwargs or len(args) not in state.positional:
            args, kwargs = state.canonical(args, kwargs)
        loop = asyncio.get_running_loop()
        queue = state.queue(loop)
        item = Item(loop, self.function, args, kwargs)
        queue.join(item)
        try:
            result = await item.answer
        except asyncio.CancelledError:
            if (cancelled := queue.leave(item)) is not None:
                await asyncio.wait([cancelled])
            raise
        if isinstance(result, BaseException):
            try:
                raise result
            finally:
                del result  # its traceback has this frame
        return result


class BatchedStream(Batched[..., Any]):
    """One that yields."""

    _batch = StreamBatch

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_method:
            async with contextlib.aclosing(_bound(self, args)(*args[1:], **kwargs)) as results:
                async for result in results:
                    yield result
            return
        state = self._shared
        if kwargs or len(args) not in state.positional:
            args, kwargs = state.canonical(args, kwargs)
        loop = asyncio.get_running_loop()
        queue = state.queue(loop)
        item = StreamItem(loop, self.function, args, kwargs)
        queue.join(item)
        try:
            async with contextlib.aclosing(item.read()) as results:
                async for result in results:
                    yield result
        finally:
            item.leave()
            if (cancelled := queue.leave(item)) is not None:
                await asyncio.wait([cancelled])


def _bound(batched: Batched[..., Any], args: tuple[Any, ...]) -> Batched[..., Any]:
    if not args:
        raise TypeError(f"{batched.label} is a method: it needs an instance")
    return batched.__get__(args[0])


def unfinished(hosted: object) -> set[asyncio.Task[None]]:
    """Return the batches of an object's methods that run."""
    held = getattr(hosted, "__dict__", {})
    states = [value for value in held.values() if isinstance(value, _State)]
    return set().union(*(state.running for state in states))


def _signature(function: Any) -> inspect.Signature:
    """Return the signature of a function, or of a method without its `self`."""
    plain = getattr(function, "__func__", function)
    signature = signature_of(plain)  # which keeps what it is asked about: not an instance
    assert signature is not None
    if plain is function:
        return signature
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _positional(signature: inspect.Signature) -> range:
    """Return with how many positional arguments alone a function can be called."""
    least = most = 0
    for parameter in signature.parameters.values():
        required = parameter.default is parameter.empty
        if parameter.kind is parameter.VAR_POSITIONAL:
            most = sys.maxsize - 1
        elif parameter.kind is parameter.KEYWORD_ONLY:
            if required:
                return range(0)
        elif parameter.kind is not parameter.VAR_KEYWORD:
            least, most = least + required, most + 1
    return range(least, most + 1)


_NO_LISTS = (str, bytes, int, float, bool, dict)
_LISTS = (
    list,
    Sequence,
    Iterable,
    AsyncIterable,
    Iterator,
    AsyncIterator,
    Generator,
    AsyncGenerator,
)


def _of_one(annotation: Any) -> Any:
    """Return what a list of an annotated type has in it; `Any` if it does not say."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    arguments = get_args(annotation)
    return arguments[0] if arguments and get_origin(annotation) in _LISTS else Any


def _without_errors(annotation: Any) -> Any:
    """Return an annotation without the exceptions that may be results: they are raised."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return annotation
    results = [
        member
        for member in get_args(annotation)
        if not (isinstance(member, type) and issubclass(member, BaseException))
    ]
    return Union[tuple(results)] if results else Any  # noqa: UP007 - of what is known here only
