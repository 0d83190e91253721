"""The models that one instance keeps: which, for how long, and who loads them."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from contextvars import ContextVar, copy_context
from typing import Any

from anyio import CapacityLimiter

from fastapi_graph.context import Call, current_call, eager_task
from fastapi_graph.errors import InputError
from fastapi_graph.graph.nodes import location
from fastapi_graph.raised import contain, is_failure, twin
from fastapi_graph.request import Scope, current_request, current_scope
from fastapi_graph.threads import forget_finalizer, in_thread

__all__ = ["HEADER", "ModelCache", "get_multiplexed_model_id"]

logger = logging.getLogger("fastapi_graph")

HEADER = "serve_multiplexed_model_id"


def get_multiplexed_model_id() -> str:
    """Return the model that the current request asks for; empty if it asks for none.

    A request asks with the header `serve_multiplexed_model_id`, a call with
    `handle.options(multiplexed_model_id=...)`; the calls below it ask for the same.
    """
    request = current_request()
    return "" if request is None else request.multiplexed_model_id


class _Model:
    """A model that is kept, or on its way, and how many calls use it or wait for it.

    Attributes:
        loading: The task that loads it, until it has.
        turn: What its load waits for, while others are loaded.
    """

    __slots__ = ("idle", "is_loaded", "loading", "model_id", "turn", "uses", "value")

    def __init__(self, model_id: str) -> None:
        self.model_id = model_id
        self.is_loaded = False
        self.value: Any = None
        self.uses = 0
        self.idle: asyncio.Event | None = None
        self.loading: asyncio.Task[None] | None = None
        self.turn: asyncio.Future[None] | None = None

    def release(self) -> None:
        """Note that a call that used it has ended."""
        self.uses -= 1
        if not self.uses and self.idle is not None:
            self.idle.set()


class _Load:
    """Marks a context as that of a load, until that has ended."""

    __slots__ = ("cache", "outer")

    def __init__(self, cache: ModelCache, outer: _Load | None) -> None:
        self.cache: ModelCache | None = cache
        self.outer = outer


_current_load: ContextVar[_Load | None] = ContextVar("fastapi_graph_load", default=None)


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
        self._coming = 0  # how many are being loaded, no more at once than may be kept
        self._queue: deque[_Model] = deque()  # those that wait until they may be
        self._closed = False
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
        if not model_id.isprintable():
            raise InputError(
                f"{self._label}: {model_id!r} is no id of a model, because it has characters that "
                "cannot be printed",
                path=("header", HEADER),
                reason="it has characters that cannot be printed",
            )
        if (model := self._models.get(model_id)) is not None:
            self._models.move_to_end(model_id)
            if model.turn is not None and self._is_loading_here():
                self._let_go_on(model)  # else two loads would wait for each other
        else:
            model = self._begin(model_id)
        model.uses += 1  # at once, so that nobody unloads it before this goes on
        try:
            if model.loading is not None:
                await asyncio.shield(model.loading)
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
        outer, call = current_call.get(), Call()
        call.host = outer.host if outer is not None else None
        context.run(current_call.set, call)
        context.run(current_scope.set, Scope(current_request(), None, current_scope.get()))
        loop = asyncio.get_running_loop()
        model = self._models[model_id] = _Model(model_id)
        self._tell()  # so that others who want it come here, too
        load = self._load_into(model, call, nested=self._is_loading_here())
        loading = eager_task(asyncio.Task, load, loop, f"load {model_id}", context)
        loading.add_done_callback(lambda task: self._ended(model, task))
        if not model.is_loaded:
            model.loading = loading
        return model

    def _ended(self, model: _Model, task: asyncio.Task[None]) -> None:
        if task.cancelled() or task.exception() is not None:  # which whoever waits is told
            self._forget(model)

    def _forget(self, model: _Model) -> None:
        if self._models.get(model.model_id) is model:
            del self._models[model.model_id]
            self._tell()

    def _is_loading_here(self) -> bool:
        """Say whether the current context is that of a load of this cache."""
        load = _current_load.get()
        while load is not None and load.cache is not self:
            load = load.outer
        return load is not None

    async def _wait_for_turn(self, model: _Model) -> None:
        """Wait until as few others are loaded that this one may be, too; then it counts as one."""
        if self._limit < 0 or self._coming < self._limit:
            self._coming += 1
            return
        turn = model.turn = asyncio.get_running_loop().create_future()
        self._queue.append(model)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._end_turn()
            raise
        finally:
            model.turn = None

    def _let_go_on(self, model: _Model) -> None:
        if model.turn is not None and not model.turn.done():
            self._coming += 1
            model.turn.set_result(None)

    def _end_turn(self) -> None:
        self._coming -= 1
        while self._queue and self._coming < self._limit:
            self._let_go_on(self._queue.popleft())

    async def _load_into(self, model: _Model, call: Call, *, nested: bool) -> None:
        if nested:
            self._coming += 1
        else:
            await self._wait_for_turn(model)
        load = _Load(self, _current_load.get())
        _current_load.set(load)
        try:
            await self._make_room()
            began = time.monotonic()
            model.value = await self._loaded(model.model_id)
            model.is_loaded = True
            model.loading = None  # it has the context of whoever came first
        except BaseException as error:
            self._forget(model)
            contain(error, f"{self._label}, which was to load {model.model_id}")
            raise
        finally:
            load.cache = None
            call.end()
            self._end_turn()
        while self._is_over(kept := self._kept()):  # where a load has loaded another model
            _ = self._unload_soon(kept[0])
        if self._closed and self._models.get(model.model_id) is model:
            _ = self._unload_soon(model)
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
        except BaseException as error:
            if not is_failure(error):
                raise
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
        self._closed = True
        until = time.monotonic() + timeout_s
        loads = [model.loading for model in self._models.values() if model.loading is not None]
        for loading in loads:
            loading.cancel()
        going_on = await _finished(loads, timeout_s)
        for model in self._unloading.values():  # whoever used one has been cancelled
            model.uses = 0
            if model.idle is not None:
                model.idle.set()
        kept = self._kept()
        for index, model in enumerate(kept):
            model.uses = 0
            share = (until - time.monotonic()) / (len(kept) - index)
            going_on |= await _finished([self._unload_soon(model)], share)
        going_on |= await _finished(self._unloading, until - time.monotonic())
        for unloading in [*self._unloading]:
            unloading.cancel()
        if going_on := {task for task in going_on if not task.done()}:
            names = ", ".join(sorted(task.get_name() for task in going_on))
            logger.warning("%s: not ended within %.3g s: %s", self._label, timeout_s, names)

    def __reduce__(self) -> tuple[Any, ...]:
        # What is kept here is no part of the instance that holds it: there it is made anew.
        return type(None), ()


async def _finished(
    tasks: Iterable[asyncio.Task[None]], timeout_s: float
) -> set[asyncio.Task[None]]:
    """Wait for tasks; return those that have not finished."""
    tasks = set(tasks)
    if tasks:
        _, tasks = await asyncio.wait(tasks, timeout=max(0.0, timeout_s))
    return tasks
