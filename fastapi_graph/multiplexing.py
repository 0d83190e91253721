"""Multiplexed models: each replica holds some of many models, and calls go where theirs is.

The idea, the names and their meaning are Ray Serve's:
https://docs.ray.io/en/latest/serve/model-multiplexing.html
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextvars import ContextVar, copy_context
from typing import Any

import anyio
from anyio import CapacityLimiter

from fastapi_graph.context import current_call, eager_task
from fastapi_graph.errors import GraphDefinitionError, InputError, OptionError
from fastapi_graph.graph.nodes import caller_location, location
from fastapi_graph.raised import twin
from fastapi_graph.request import Scope, current_request, current_scope
from fastapi_graph.threads import forget_finalizer, in_thread

__all__ = ["ModelCache", "Multiplexed", "get_multiplexed_model_id", "models_of", "multiplexed"]

logger = logging.getLogger("fastapi_graph")


def get_multiplexed_model_id() -> str:
    """Return the model that the current request asks for; empty if it asks for none.

    A request asks with the header `serve_multiplexed_model_id`, a call with
    `handle.options(multiplexed_model_id=...)`; the calls below it ask for the same.
    """
    request = current_request()
    return "" if request is None else request.multiplexed_model_id


def multiplexed(function: Any = None, /, *, max_num_models_per_replica: int = 3) -> Any:
    """Make a function or method that loads a model keep the models that it has loaded.

    ```
    @multiplexed(max_num_models_per_replica=3)
    async def get_model(self, model_id: str): ...
    ```

    `await self.get_model()` gives the model of the current request, `await self.get_model(id)`
    any other. Calls that want the same model load it once. Beyond the limit the model that was
    used least lately is unloaded: its `aclose()`, `close()` or `__del__()` runs, sync or async,
    once no call uses it. On Ray, calls go to a replica that holds their model, if it has a slot.

    Args:
        function: The function or method, sync or async, that takes the id, when used bare.
        max_num_models_per_replica: How many models a replica keeps; -1 for no limit.

    Raises:
        OptionError: The limit cannot work.
        GraphDefinitionError: What is decorated is no function.
    """
    limit, where = max_num_models_per_replica, caller_location()
    if type(limit) is not int or limit == 0 or limit < -1:
        raise OptionError(
            f"multiplexed: max_num_models_per_replica={limit!r} must be a whole number above 0, "
            f"or -1 for no limit (at {where})"
        )

    def decorate(function: Any) -> Multiplexed:
        if not inspect.isfunction(function):
            raise GraphDefinitionError(
                f"@multiplexed takes a function or a method, not {function!r} (at {where})"
            )
        return Multiplexed(function, limit)

    return decorate if function is None else decorate(function)


class Multiplexed:
    """A function or method that gives models, which it keeps. Made by `multiplexed`.

    Args:
        function: Loads a model.
        limit: How many are kept; -1 for no limit.
    """

    def __init__(self, function: Callable[..., Any], limit: int) -> None:
        self.function = function
        self.limit = limit
        self.label = function.__qualname__.rpartition("<locals>.")[2]
        self._is_method = False
        self._own: ModelCache | None = None
        functools.update_wrapper(self, function)
        del self.__wrapped__  # type: ignore[attr-defined]  # it is async, whatever that is

    def __set_name__(self, owner: type, name: str) -> None:
        self._is_method = True

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else self.cache_of(instance)

    def cache_of(self, instance: Any) -> ModelCache:
        """Return the models that an instance keeps."""
        kept = vars(instance)
        cache = kept.get(_KEY)
        if cache is None or cache.owner_id != id(instance):  # which a copy of it is not
            load = functools.partial(self.function, instance)
            cache = kept[_KEY] = ModelCache(load, self.limit, self.label, id(instance))
        return cache  # type: ignore[no-any-return]

    async def __call__(self, *args: Any) -> Any:
        """Return a model."""
        if self._is_method:
            return await self.cache_of(args[0])(*args[1:])
        if self._own is None:
            self._own = ModelCache(self.function, self.limit, self.label)
        return await self._own(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.function, self.limit, self._is_method)


_KEY = "@multiplexed"
HEADER = "serve_multiplexed_model_id"


def _restored(function: Callable[..., Any], limit: int, is_method: bool) -> Multiplexed:
    restored = Multiplexed(function, limit)
    restored._is_method = is_method
    return restored


def models_of(hosted: Any) -> ModelCache | None:
    """Return the models that an object keeps; None if it is not multiplexed.

    Raises:
        GraphDefinitionError: It has several methods that are.
    """
    if isinstance(hosted, Multiplexed) or not hasattr(hosted, "__dict__"):
        return None
    found: dict[str, Multiplexed] = {}
    for cls in reversed(type(hosted).__mro__):
        for name, member in vars(cls).items():
            if isinstance(member, Multiplexed):
                found[name] = member
            else:
                found.pop(name, None)  # a subclass has overridden it
    if len(found) > 1:
        raise GraphDefinitionError(
            f"{type(hosted).__qualname__} has several @multiplexed methods, {', '.join(found)}: a "
            "replica keeps the models of one; make a deployment for each"
        )
    return next(iter(found.values())).cache_of(hosted) if found else None


class _Model:
    """A model that is kept, or on its way, and how many calls use it or wait for it."""

    __slots__ = ("idle", "is_loaded", "loading", "model_id", "uses", "value")

    loading: asyncio.Task[None]

    def __init__(self, model_id: str) -> None:
        self.model_id = model_id
        self.is_loaded = False
        self.value: Any = None
        self.uses = 0
        self.idle: asyncio.Event | None = None

    def release(self) -> None:
        """Note that a call that used it has ended."""
        self.uses -= 1
        if not self.uses and self.idle is not None:
            self.idle.set()


_loads: ContextVar[tuple[ModelCache, ...]] = ContextVar("fastapi_graph_loads", default=())
"""For which caches the current context loads a model."""


class ModelCache:
    """The models of one instance, in the order of their last use.

    Args:
        load: Loads a model by its id.
        limit: How many are kept; -1 for no limit.
        label: What messages call it.
        owner_id: The id of the instance.

    Attributes:
        listeners: Told the ids of the models whenever they change.
    """

    def __init__(
        self, load: Callable[[str], Any], limit: int, label: str, owner_id: int = 0
    ) -> None:
        self.owner_id = owner_id
        self.listeners: list[Callable[[list[str]], None]] = []
        self._load = load
        self._limit = limit
        self._label = label
        code = getattr(load, "func", load).__code__
        self._where = location(code.co_filename, code.co_firstlineno)
        self._threads = CapacityLimiter(math.inf)
        self._models: OrderedDict[str, _Model] = OrderedDict()
        # As many may be loaded at once as may be kept.
        self._places = anyio.Semaphore(limit, fast_acquire=True) if limit > 0 else None
        self._coming = 0  # how many are being loaded
        self._unloading: dict[asyncio.Task[None], _Model] = {}

    @property
    def model_ids(self) -> list[str]:
        """The models that are kept or on their way, the one asked for last at the end."""
        return [*self._models]

    async def __call__(self, model_id: str = "") -> Any:
        """Return a model, loaded if need be.

        Args:
            model_id: Which; by default the one that the request asks for.

        Raises:
            InputError: The request asks for none.
            Exception: What loading it raised.
        """
        model_id = model_id or get_multiplexed_model_id()
        if not model_id:
            raise InputError(
                f"{self._label}: the request asks for no model; send the header {HEADER}, or call "
                "handle.options(multiplexed_model_id=...); in the code of @batch there is no "
                "request, so read get_multiplexed_model_id() before it and pass it on",
                path=("header", HEADER),
                reason="it says which model is asked for",
            )
        if (model := self._models.get(model_id)) is not None:
            self._models.move_to_end(model_id)
        else:
            model = self._begin(model_id)
        model.uses += 1  # at once, so that nobody unloads it before this goes on
        try:
            if not model.loading.done():
                await asyncio.shield(model.loading)
            model.loading.result()
        except BaseException as error:
            model.release()
            if isinstance(error, Exception):
                # Notes and a traceback are added to what is raised, so it is never shared.
                raise twin(error) from error.__cause__
            raise
        if (call := current_call.get()) is not None:
            call.at_end(model.release)
        else:
            model.release()
        return model.value

    def _begin(self, model_id: str) -> _Model:
        """Start to load a model, in a task that belongs to none of those who want it."""
        context = copy_context()
        context.run(current_call.set, None)
        context.run(current_scope.set, Scope(current_request(), None, current_scope.get()))
        loop = asyncio.get_running_loop()
        model = self._models[model_id] = _Model(model_id)
        self._tell()  # so that others who want it come here, too
        name = f"load {model_id}"
        model.loading = eager_task(asyncio.Task, self._load_into(model), loop, name, context)
        model.loading.add_done_callback(lambda task: self._ended(model, task))
        return model

    def _ended(self, model: _Model, task: asyncio.Task[None]) -> None:
        if task.cancelled() or task.exception() is not None:  # which whoever waits is told
            self._forget(model)

    def _forget(self, model: _Model) -> None:
        if self._models.get(model.model_id) is model:
            del self._models[model.model_id]
            self._tell()

    async def _load_into(self, model: _Model) -> None:
        async with contextlib.AsyncExitStack() as stack:
            if self._places is not None and self not in _loads.get():  # else it would lock itself
                await stack.enter_async_context(self._places)
            _loads.set((*_loads.get(), self))
            self._coming += 1
            try:
                await self._make_room()
                began = time.monotonic()
                model.value = await self._loaded(model.model_id)
                model.is_loaded = True
            except BaseException:
                self._forget(model)
                raise
            finally:
                self._coming -= 1
        while self._is_over(kept := self._kept()):  # where a load has loaded another model
            _ = self._unload_soon(kept[0])
        took = time.monotonic() - began
        logger.info("%s: loaded %s in %.3f s", self._label, model.model_id, took)

    async def _loaded(self, model_id: str) -> Any:
        if inspect.iscoroutinefunction(getattr(self._load, "func", self._load)):
            return await self._load(model_id)
        worker = asyncio.ensure_future(self._in_thread(self._load, model_id))
        try:
            return await asyncio.shield(worker)
        except asyncio.CancelledError:
            # The thread cannot be stopped, and what it loads has to be unloaded.
            with contextlib.suppress(Exception):
                await self._end(model_id, await worker)
            raise

    async def _make_room(self) -> None:
        """Unload what was used least lately; wait for it, unless a call still uses it."""
        while self._is_over(kept := self._kept()):
            unloading = self._unload_soon(kept[0])
            if not kept[0].uses:
                await asyncio.wait([unloading])

    def _is_over(self, kept: list[_Model]) -> bool:
        return bool(kept) and 0 < self._limit < self._coming + len(kept)

    def _kept(self) -> list[_Model]:
        return [model for model in self._models.values() if model.is_loaded]

    def _unload_soon(self, model: _Model) -> asyncio.Task[None]:
        self._forget(model)
        unloading = asyncio.get_running_loop().create_task(
            self._unload(model), name=f"unload {model.model_id}"
        )
        self._unloading[unloading] = model
        unloading.add_done_callback(self._unloading.pop)
        return unloading

    async def _unload(self, model: _Model) -> None:
        if model.uses:
            model.idle = asyncio.Event()
            await model.idle.wait()
        value, model.value = model.value, None
        await self._end(model.model_id, value)

    async def _end(self, model_id: str, value: Any) -> None:
        try:
            for name in ("aclose", "close", "__del__"):
                if callable(end := getattr(value, name, None)):
                    if inspect.iscoroutinefunction(end):
                        await end()
                    elif inspect.isawaitable(result := await self._in_thread(end)):
                        await result
                    if name == "__del__":
                        forget_finalizer(value)
                    break
        except Exception:
            logger.exception("%s: unloading %s failed", self._label, model_id)
        else:
            logger.info("%s: unloaded %s", self._label, model_id)

    async def _in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        return await in_thread(
            function, args, {}, limiter=self._threads, who=self._label, where=self._where
        )

    def _tell(self) -> None:
        for listener in self.listeners:
            listener(self.model_ids)

    async def close(self, timeout_s: float) -> None:
        """Unload every model, one after the other.

        Args:
            timeout_s: Seconds after which an end that still goes on is cancelled. A load in a
                thread is left to itself, and what it loads is unloaded then.
        """
        until = time.monotonic() + timeout_s
        loads = [model.loading for model in self._models.values() if not model.is_loaded]
        for loading in loads:
            loading.cancel()
        going_on = await _finished(loads, until)
        for model in self._unloading.values():  # whoever used one has been cancelled
            model.uses = 0
            if model.idle is not None:
                model.idle.set()
        for model in self._kept():
            model.uses = 0
            going_on |= await _finished([self._unload_soon(model)], until)
        going_on |= await _finished(self._unloading, until)
        for unloading in [*self._unloading]:
            unloading.cancel()
        if going_on:
            names = ", ".join(sorted(task.get_name() for task in going_on))
            logger.warning("%s: not ended within %g s: %s", self._label, timeout_s, names)

    def __reduce__(self) -> tuple[Any, ...]:
        # What is kept here is no part of the instance that holds it: there it is made anew.
        return type(None), ()


async def _finished(tasks: Iterable[asyncio.Task[None]], until: float) -> set[asyncio.Task[None]]:
    """Wait for tasks; return those that have not finished."""
    tasks = set(tasks)
    if tasks:
        _, tasks = await asyncio.wait(tasks, timeout=max(0.0, until - time.monotonic()))
    return tasks
