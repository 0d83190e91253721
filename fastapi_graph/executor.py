"""Runs one request through a plan.

Everything that can be decided once is decided when the plan is compiled: how each argument
is read, which steps follow which. For a request there is a list of values, one per slot, and
a count per step of the results it still waits for.

A step that runs alone is awaited in place. Steps that run side by side each have a task and
a context of their own, and what follows such a step alone runs in its task. When they have
come to an end, what is left is awaited in place again. The first failure cancels the others,
and the plan ends only when they have ended.

The result of a step that is a generator is a stream: its items are made while another step
reads them, and whoever has read enough of them, the stream ends with the plan.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from fastapi_graph.arguments import (
    ManyInputs,
    Values,
    compile_args,
    compile_kwargs,
    compile_read,
    only_read,
)
from fastapi_graph.context import Call, Emit, add_note, current_call, eager_task
from fastapi_graph.dataplane.values import Kept, KeptLost
from fastapi_graph.errors import ReplicaLostError
from fastapi_graph.graph.containers import rebuild
from fastapi_graph.graph.plan import Plan, Read, Step
from fastapi_graph.replica import Replica
from fastapi_graph.request import current_attempt
from fastapi_graph.streams import ItemStream

__all__ = ["Caller", "Executor"]


class Caller(Protocol):
    """Calls one deployment.

    Attributes:
        local: The replica in this process whose async methods may be awaited in place, in a
            slot; None where calls have to go through `call`.
        keeps: Whether large values may stay in other processes, with `keep` and `release`.
        hedges: Whether there may be another replica for a second attempt at the same time.
        max_retries: How often a call may be made again after the loss of a replica.
    """

    local: Replica | None
    keeps: bool
    hedges: bool
    max_retries: int

    def call(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Coroutine[Any, Any, Any]:
        """Call a method and return its result.

        Raises:
            BackPressureError: The deployment is over its limits.
            Exception: What the method raised.
        """

    def stream(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], emit: Emit
    ) -> Coroutine[Any, Any, None]:
        """Call a generator method and await `emit(item)` for each of its items."""

    def keep(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Coroutine[Any, Any, Any]:
        """Call a method and return its result, or a `Kept` that stands for a large one."""

    def release(self, kept: Kept) -> None:
        """Let go of a value that `keep()` has given."""


class Executor:
    """A compiled plan.

    Args:
        plan: What to run.
        caller_of: From a deployment's name to what calls it.
        handle_of: From a deployment's name to a handle to pass as an argument.
        pending: Takes the tasks that make the items of streams until they have finished.
    """

    def __init__(
        self,
        plan: Plan,
        caller_of: Callable[[str], Caller],
        handle_of: Callable[[str], Any],
        pending: set[asyncio.Task[Any]],
    ) -> None:
        self._size = len(plan.steps) + 1
        self._output = compile_read(plan.output)
        self._steps = [
            _CompiledStep(step, caller_of(step.deployment), handle_of) for step in plan.steps
        ]
        by_slot = {compiled.slot: compiled for compiled in self._steps}
        for step in plan.steps:
            for slot in step.needs:
                by_slot[slot].followers.append(by_slot[step.slot])
        self._waits = [0, *(len(step.needs) for step in plan.steps)]
        self._first = [compiled for compiled in self._steps if not self._waits[compiled.slot]]
        self._opening = [compiled for compiled in self._steps[:-1] if compiled.streams]
        for compiled in self._opening:
            compiled.streams, compiled.opens = False, pending
        self._keeping = _let_keep(plan, by_slot)
        for compiled in self._steps:
            compiled.look_ahead(self._waits)

    async def run(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], emit: Emit | None = None
    ) -> Any:
        """Run the plan on the arguments of a call, and return its output.

        Args:
            args: The positional arguments of the call.
            kwargs: Its keyword arguments.
            emit: Takes the items, where the output is a generator.

        Raises:
            InputError: The input lacks something that the graph reads.
            OutputError: A node's output lacks something that another one reads.
            Exception: What the first failing node raised.
        """
        if current_attempt.get() is not None:
            current_attempt.set(None)  # it is one at the whole plan, and not at its steps
        values: Values = [None] * self._size
        values[0] = args[0] if len(args) == 1 and not kwargs else ManyInputs(args, kwargs)
        waits = self._waits.copy()
        ready = self._first
        try:
            while ready:
                if len(ready) > 1:
                    branches = _Branches(values, waits)
                    if not branches.start(ready):
                        await branches.wait()
                    ready = branches.ready
                elif not ready[0].streams:
                    ready = await _run_chain(ready[0], values, waits)
                else:
                    assert emit is not None
                    return await ready[0].stream(values, emit)
            return self._output(values)
        finally:
            for step in self._keeping:
                if isinstance(value := values[step.slot], Kept):
                    step.caller.release(value)
            for step in self._opening:
                if isinstance(value := values[step.slot], ItemStream):
                    value.abort()

    async def stream(self, args: tuple[Any, ...], kwargs: dict[str, Any], emit: Emit) -> None:
        """Run a plan whose output is a generator, and emit its items."""
        await self.run(args, kwargs, emit)


class _CompiledStep:
    """One step, ready to run: getters instead of descriptions."""

    __slots__ = (
        "args",
        "caller",
        "followers",
        "keep",
        "kwargs",
        "label",
        "makers",
        "method",
        "next",
        "only_read",
        "opens",
        "slot",
        "streams",
        "where",
    )

    def __init__(self, step: Step, caller: Caller, handle_of: Callable[[str], Any]) -> None:
        self.slot = step.slot
        self.caller = caller
        self.method = step.method
        self.args = compile_args(step.args, handle_of)
        self.kwargs = compile_kwargs(step.kwargs, handle_of)
        self.only_read = only_read(step)
        self.followers: list[_CompiledStep] = []
        self.keep = False
        self.makers: tuple[_CompiledStep, ...] = ()  # of what it takes and may be kept
        self.next: _CompiledStep | None = None
        self.streams = step.streams
        self.opens: set[asyncio.Task[Any]] | None = None
        self.label = step.label
        self.where = step.where

    def look_ahead(self, waits: list[int]) -> None:
        """Note the step that runs after this one, and alone, whatever happens, if there is one."""
        if len(self.followers) == 1:
            (follower,) = self.followers
            if waits[follower.slot] == 1 and not follower.streams:
                self.next = follower

    def kwargs_of(self, values: Values) -> dict[str, Any]:
        """Return the keyword arguments."""
        return {} if self.kwargs is None else self.kwargs(values)

    def call(self, values: Values) -> Coroutine[Any, Any, Any]:
        """Call the step where it cannot be awaited in place."""
        if self.opens is not None:
            return self._open(values, self.opens)
        return self._call_again(values) if self.makers else self._call(values)

    def _call(self, values: Values) -> Coroutine[Any, Any, Any]:
        call = self.caller.keep if self.keep else self.caller.call
        return call(self.method, self.args(values), self.kwargs_of(values))

    async def _call_again(self, values: Values) -> Any:
        """Call the step; a large value that is lost with the replica that kept it is made again."""
        while True:
            try:
                return await self._call(values)
            except KeptLost as lost:
                for maker in self.makers:
                    if values[maker.slot] == lost.kept:
                        if not maker.caller.max_retries:
                            raise ReplicaLostError(
                                f"{maker.label}: the replica that kept its result was lost, and "
                                f"max_retries=0 allows no other attempt (bound at {maker.where})"
                            ) from None
                        values[maker.slot] = await maker.call(values)

    async def _open(self, values: Values, pending: set[asyncio.Task[Any]]) -> ItemStream:
        """Start the step, whose method is a generator, and return its items."""
        home = asyncio.get_running_loop()
        return ItemStream(lambda emit: self.stream(values, emit), home, self.label, pending)

    async def stream(self, values: Values, emit: Emit) -> None:
        """Run the step, whose method is a generator, and emit its items."""
        try:
            await self.caller.stream(self.method, self.args(values), self.kwargs_of(values), emit)
        except Exception as error:
            self.annotate(error)
            raise

    def annotate(self, error: Exception) -> None:
        """Say on the exception in which node of the graph it happened."""
        add_note(error, f"in node {self.label} (bound at {self.where})")


async def _run_chain(
    step: _CompiledStep, values: Values, waits: list[int], branches: _Branches | None = None
) -> list[_CompiledStep]:
    """Run a step and what follows it, while one step alone can run next; return those that can.

    In a task of its own it is one of the `branches`. Then these decide how it goes on, and it
    tells them how it ends.

    The hot path. What can be awaited in this process is awaited in place: without a coroutine
    of ours around it, without even a call to take a slot and another one to give it back.
    """
    args: tuple[Any, ...]
    kwargs: dict[str, Any] | None
    call = Call()
    token = current_call.set(call)
    try:
        while True:
            method, replica = step.method, step.caller.local
            if (
                replica is None
                or replica.ongoing >= replica.limit
                or (
                    (function := replica.async_methods.get(method)) is None
                    and (function := replica.find_async(method)) is None
                )
            ):
                result = await step.call(values)
            else:
                only_read = step.only_read
                if not only_read:
                    args = step.args(values)
                    kwargs = None if step.kwargs is None else step.kwargs(values)
                replica.ongoing += 1
                call.host = replica
                try:
                    if only_read:
                        result = await function(values[only_read])
                    elif kwargs is None:
                        result = await function(*args)
                    else:
                        result = await function(*args, **kwargs)
                except BaseException as error:
                    replica.contain(error, method)
                    raise
                finally:
                    if replica.queue:
                        replica.leave()
                    else:
                        replica.ongoing -= 1
            values[step.slot] = result
            following = step.next
            if following is not None:
                step = following
                continue
            ready = []
            for follower in step.followers:
                waits[follower.slot] -= 1
                if not waits[follower.slot]:
                    ready.append(follower)
            alone = len(ready) == 1 and not ready[0].streams
            if not alone and (not ready or branches is None or not branches.split(ready)):
                return ready
            step = ready[0]
    except asyncio.CancelledError as error:
        call.cancel_nested()
        if branches is None:
            raise
        branches.fail(error)
        return []
    except Exception as error:
        step.annotate(error)
        if branches is None:
            raise
        branches.fail(error)
        return []
    except BaseException as error:
        if branches is not None:
            branches.fail(error)
        raise
    finally:
        if call.ending is not None:
            call.end()
        if branches is None:
            current_call.reset(token)
        else:  # whose task is over, and with it the context
            branches.end()


def _let_keep(plan: Plan, steps: dict[int, _CompiledStep]) -> tuple[_CompiledStep, ...]:
    """Let results stay where they were made if only other processes read them, and whole."""
    keeping = {
        slot
        for slot, step in steps.items()
        if step.caller.keeps and step.opens is None and slot != plan.output.slot
    }
    takes: dict[int, set[int]] = {}

    for step in plan.steps:
        reads = takes[step.slot] = set[int]()

        def note(read: Read, reads: set[int] = reads, slot: int = step.slot) -> Read:
            if read.path or not steps[slot].caller.keeps:
                keeping.discard(read.slot)
            reads.add(read.slot)
            return read

        rebuild((step.args, step.kwargs), Read, note)
    for slot in keeping:
        steps[slot].keep = True
    for slot, compiled in steps.items():
        compiled.makers = tuple(steps[taken] for taken in sorted(takes[slot] & keeping))
    return tuple(steps[slot] for slot in sorted(keeping))


class _Branches:
    """Steps that run side by side, until at most one is left.

    Attributes:
        ready: What is left when all has ended.
    """

    __slots__ = ("_error", "_loop", "_running", "_tasks", "_values", "_waits", "_wake", "ready")

    def __init__(self, values: Values, waits: list[int]) -> None:
        self._values = values
        self._waits = waits
        self.ready: list[_CompiledStep] = []
        self._loop = asyncio.get_running_loop()
        self._running = 0
        self._tasks: list[asyncio.Task[Any]] = []
        self._error: BaseException | None = None
        self._wake: asyncio.Future[None] | None = None

    def start(self, steps: list[_CompiledStep]) -> bool:
        """Start the steps, and say whether they, and what follows them, have succeeded already."""
        self._running = len(steps)
        for step in steps:
            if self._error is not None:
                self._running -= 1
            else:
                self._spawn(step)
        return not self._running and self._error is None

    async def wait(self) -> None:
        """Wait until all has ended; raise what the first that failed raised."""
        if self._running and self._error is None:
            self._wake = self._loop.create_future()
            try:
                await self._wake
            except asyncio.CancelledError as error:
                self.fail(error)  # the request was cancelled: so are its nodes
        if self._error is not None:
            await self._settle()
            failure, self._error = self._error, None
            try:
                raise failure
            finally:
                del failure  # its traceback has this frame, and with it the request's values

    async def _settle(self) -> None:
        """Wait until every task has ended, also those that were cancelled before they began."""
        while running := [task for task in self._tasks if not task.done()]:
            try:
                await asyncio.wait(running)
            except asyncio.CancelledError:
                continue  # told again; the nodes have been told already

    def _spawn(self, step: _CompiledStep) -> None:
        branch = _run_chain(step, self._values, self._waits, self)
        task = eager_task(asyncio.Task, branch, self._loop, step.label)
        if not task.done():
            self._tasks.append(task)

    def split(self, ready: list[_CompiledStep]) -> bool:
        """Say whether the branch that asks shall go on with the first of some steps.

        The others become branches. If it is the last of the branches, all are left for later.
        """
        if self._running == 1 or self._error is not None:
            self.ready = ready
            return False
        self._running += len(ready) - 1
        for other in ready[1:]:
            if self._has_failed():  # one that was started here, perhaps
                self._running -= 1
            else:
                self._spawn(other)
        return not self._has_failed()

    def _has_failed(self) -> bool:
        return self._error is not None

    def fail(self, error: BaseException) -> None:
        """Cancel all branches but the one that failed, if it is the first to fail."""
        if self._error is None:
            self._error = error
            current = asyncio.current_task()
            for task in self._tasks:
                if task is not current:
                    task.cancel()
            self._wake_up()

    def end(self) -> None:
        """Note that a branch has ended."""
        self._running -= 1
        if not self._running:
            self._wake_up()

    def _wake_up(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)
