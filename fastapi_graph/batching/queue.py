"""Calls that wait for others, and the batches that they become.

- A batch starts when it is full, or when its oldest call has waited long enough, and never while
  as many run as may.
- Calls are taken first in, first out. Those that leave out different arguments are never in one
  batch, because a list cannot leave out an item.
- A call that is cancelled leaves. When the last one has left a batch that runs, it is cancelled.
- A batch runs in a task and a context of its own, which are none of its calls'.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import math
from collections import deque
from collections.abc import Callable
from contextvars import Context
from typing import Any

from anyio import CapacityLimiter

from fastapi_graph.batching.adaptive import BatchTuner
from fastapi_graph.context import Call, current_call, eager_task
from fastapi_graph.errors import DeadlineExceededError, OutputError
from fastapi_graph.graph.options import BatchOptions
from fastapi_graph.raised import twin
from fastapi_graph.request import Scope, current_deadline, current_scope
from fastapi_graph.threads import in_thread

__all__ = ["Batch", "BatchQueue", "Item", "Work"]


class Work:
    """What calls are batched for.

    Attributes:
        label: What messages call the function.
        where: `file:line` of its definition.
        in_thread: Whether it is sync.
        options: The options in force.
        tuner: What chooses size and wait, if there is a target latency.
    """

    def __init__(self, label: str, where: str, in_thread: bool, options: BatchOptions) -> None:
        self.label = label
        self.where = where
        self.in_thread = in_thread
        self.tuner: BatchTuner | None = None
        self.configure(options)

    def configure(self, options: BatchOptions) -> None:
        """Let other options be in force."""
        self.options = options
        if self.tuner is not None:
            self.tuner.allow(options.largest, options.longest_wait_s)
        elif options.target_latency_s is not None:
            self.tuner = BatchTuner(
                options.target_latency_s, options.largest, options.longest_wait_s
            )

    @property
    def size(self) -> int:
        """How large a batch may be, now."""
        return self.options.largest if self.tuner is None else self.tuner.size

    @property
    def wait_s(self) -> float:
        """How long a call may wait for others, now."""
        return self.options.longest_wait_s if self.tuner is None else self.tuner.wait_s


class Item:
    """One call that waits for its result.

    Attributes:
        function: What takes the lists.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        batch: What it is part of, once that has started.
        scope: What learns of the fallbacks that answer below.
        host: What runs the call that waits.
    """

    __slots__ = (
        "answer",
        "args",
        "batch",
        "deadline",
        "function",
        "host",
        "joined",
        "kwargs",
        "scope",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.function = function
        self.args = args
        self.kwargs = kwargs
        self.deadline = current_deadline()
        self.scope = current_scope.get()
        call = current_call.get()
        self.host = call.host if call is not None else None
        self.joined = loop.time()
        self.batch: Any = None
        self.answer: asyncio.Future[Any] = loop.create_future()

    @property
    def measured(self) -> Any:
        """What `batch_size_fn` sees of it: its first argument."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()), None)

    @property
    def left(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.answer.done()

    def fits(self, other: Item) -> bool:
        """Whether it may be in one batch with another one."""
        return len(self.args) == len(other.args) and self.kwargs.keys() == other.kwargs.keys()

    def give(self, result: Any) -> None:
        """Answer it; an exception is raised by whoever waits."""
        if not self.answer.done():
            self.answer.set_result(result)

    def end(self, error: BaseException | None = None) -> None:
        """Say that nothing else comes."""
        if error is not None:
            self.give(error)


class Batch:
    """Calls that run as one.

    Attributes:
        items: The calls, in order.
        size: What the options measure of them.
        gave: What messages say about the function's results.
    """

    gave = "returned"

    def __init__(self, queue: BatchQueue, items: list[Any], size: int) -> None:
        self.items = items
        self.size = size
        self._queue = queue
        self._work = queue.work
        self._call = Call()
        self._scope = Scope()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Run up to the first suspension, where Python can, and then beside everything else."""
        first = self.items[0]
        for item in self.items:
            item.batch = self
        self._function = first.function
        self._args = tuple(map(list, zip(*(item.args for item in self.items), strict=True)))
        self._kwargs = {name: [item.kwargs[name] for item in self.items] for name in first.kwargs}
        context = Context()
        self._call.host = first.host
        context.run(current_call.set, self._call)
        deadlines = [item.deadline for item in self.items]
        if None not in deadlines:
            self._scope.deadline = max(deadlines)
        context.run(current_scope.set, self._scope)
        name = f"batch of {self._work.label}"
        self._task = eager_task(asyncio.Task, self._run(), self._queue.loop, name, context)
        if self._task.done():
            self._ended(self._task)
        else:
            self._task.add_done_callback(self._ended)

    @property
    def task(self) -> asyncio.Task[None]:
        """What it runs in."""
        assert self._task is not None
        return self._task

    def leave(self) -> asyncio.Task[None] | None:
        """Go on without a call; return what is being cancelled if it was the last one."""
        if self.task.done() or not all(item.left for item in self.items):
            return None
        if self._work.in_thread:  # it cannot be stopped, and keeps its place until it ends
            self._call.cancel_nested()  # which it may be waiting for
            return None
        self.task.cancel()
        return self.task

    async def _run(self) -> None:
        try:
            await self._compute()
        except asyncio.CancelledError:
            self._call.cancel_nested()
            raise
        except BaseException as error:
            self._fail(error)

    async def _compute(self) -> None:
        started = self._queue.loop.time()
        if self._work.in_thread:
            results = await self._in_thread(self._function, self._args, self._kwargs)
            if inspect.isawaitable(results):
                results = await results
        else:
            results = await self._function(*self._args, **self._kwargs)
        self._give(results)
        if self._work.tuner is not None:
            self._work.tuner.observe(self.size, self._queue.loop.time() - started)

    async def _in_thread(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        limiter, work = self._queue.threads, self._work
        where = f"defined at {work.where}"
        return await in_thread(function, args, kwargs, limiter=limiter, who=work.label, where=where)

    def _give(self, results: Any) -> None:
        for item in self.items if self._scope.degraded else ():
            if item.scope is not None:
                item.scope.degrade(self._scope.degraded)
        for item, result in zip(self.items, self._one_each(results), strict=True):
            # Notes and a traceback are added to what is raised, so it is never shared.
            item.give(twin(result) if isinstance(result, BaseException) else result)

    def _one_each(self, results: Any) -> list[Any]:
        count = len(self.items)
        got = f"an instance of {type(results).__qualname__}"
        if _is_sequence(results):
            listed = list(results)
            if len(listed) == count:
                return listed
            got = f"{len(listed)} results"
        raise OutputError(
            f"{self._work.label} {self.gave} {got} for a batch of {count}: it has to be a list "
            f"with one result for each input, in their order (defined at {self._work.where})"
        )

    def _fail(self, error: BaseException) -> None:
        waiting = [item for item in self.items if not item.left]
        for item in waiting[1:]:
            item.end(twin(error))
        for item in waiting[:1]:
            item.end(error)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            for item in self.items:
                item.end(asyncio.CancelledError())
        # An exception that it has raised has a traceback, which has this.
        self.items = []
        self._args, self._kwargs = (), {}
        self._call.end()
        self._queue.ended(self)


class BatchQueue:
    """The calls of one function, or of one method of one instance, on one event loop.

    Args:
        work: What they are batched for.
        loop: The loop.
        batch: How they run: as a `Batch`, or a `StreamBatch`.
    """

    def __init__(
        self, work: Work, loop: asyncio.AbstractEventLoop, batch: type[Batch] = Batch
    ) -> None:
        self.work = work
        self.loop = loop
        self.threads = CapacityLimiter(math.inf)
        self.running: set[Batch] = set()
        self._batch = batch
        self._waiting: deque[Any] = deque()
        self._mixed = False
        self._timer: asyncio.Handle | None = None
        self._timer_at = 0.0
        self._forming = False

    def join(self, item: Any) -> None:
        """Let a call wait for its batch, which may start at once."""
        if self.work.options.batch_size_fn is not None:
            self._measure([item.measured])  # what cannot be measured is an error of this call only
        if self._waiting and not item.fits(self._waiting[-1]):
            self._mixed = True
        self._waiting.append(item)
        self.form()

    def leave(self, item: Any) -> asyncio.Task[None] | None:
        """Go on without a call; return what is being cancelled if it was the last of its batch."""
        if item.batch is not None:
            left: asyncio.Task[None] | None = item.batch.leave()
            return left
        with contextlib.suppress(ValueError):
            self._waiting.remove(item)
        return None

    def form(self) -> None:
        """Start the batches whose time has come."""
        if self._forming:  # a batch that starts may make calls, and may end
            return
        self._forming = True
        try:
            while self._waiting and len(self.running) < self.work.options.max_concurrent_batches:
                now = self.loop.time()
                try:
                    count, size, full = self._next(now)
                except Exception as error:  # of batch_size_fn
                    self._fail(error)
                    return
                due = self._waiting[0].joined + self.work.wait_s
                if not full and now < due:
                    self._look_again(due)
                    return
                self._start([self._waiting.popleft() for _ in range(count)], size, now)
        finally:
            self._forming = False

    def ended(self, batch: Batch) -> None:
        """Note that a batch has ended: another one may start."""
        self.running.discard(batch)
        if self._waiting:
            self.form()

    def _next(self, now: float) -> tuple[int, int, bool]:
        """Return how many calls the next batch has, their size, and whether it is full."""
        waiting, tuner = self._waiting, self.work.tuner
        limit = self.work.size if tuner is None else tuner.limit(now - waiting[0].joined)
        alike = len(waiting)
        if self._mixed:
            alike = sum(1 for _ in itertools.takewhile(waiting[0].fits, waiting))
            self._mixed = alike < len(waiting)
        if self.work.options.batch_size_fn is None:
            count = min(alike, limit)
            return count, count, count == limit or self._mixed
        measured: list[Any] = []
        size = 0
        for item in itertools.islice(waiting, alike):
            measured.append(item.measured)
            larger = self._measure(measured)
            if larger > limit and len(measured) > 1:
                return len(measured) - 1, size, True
            size = larger
        return alike, size, size >= limit or self._mixed

    def _measure(self, measured: list[Any]) -> int:
        measure = self.work.options.batch_size_fn
        assert measure is not None
        size: Any = measure(measured)
        if not isinstance(size, int):
            raise OutputError(
                f"batch_size_fn of {self.work.label} returned {size!r}: it has to return an int "
                f"(defined at {self.work.where})"
            )
        return size

    def _start(self, taken: list[Any], size: int, now: float) -> None:
        items = []
        for item in taken:
            if item.deadline is not None and item.deadline <= now:
                item.end(
                    DeadlineExceededError(
                        f"{self.work.label}: the request's deadline passed while the call waited "
                        "for its batch"
                    )
                )
            elif not item.left:
                items.append(item)
        if not items:
            return
        if self.work.tuner is not None:
            self.work.tuner.formed(len(items), now)
        batch = self._batch(self, items, size)
        self.running.add(batch)
        batch.start()

    def _look_again(self, when: float) -> None:
        if self._timer is not None:
            if self._timer_at <= when:
                return  # it comes in time, and looks again
            self._timer.cancel()
        # The time is kept here: uvloop's handle of a time that is now does not know it.
        self._timer = self.loop.call_at(when, self._time_has_come)
        self._timer_at = when

    def _time_has_come(self) -> None:
        self._timer = None
        self.form()

    def _fail(self, error: Exception) -> None:
        failing, self._waiting = self._waiting, deque()
        for item in failing:
            item.end(twin(error))


def _is_sequence(value: Any) -> bool:
    """Say whether it is a list, a tuple, an array or the like, and nothing else that has items."""
    if isinstance(value, str | bytes | bytearray) or hasattr(value, "keys"):
        return False
    return hasattr(value, "__len__") and hasattr(value, "__getitem__")
