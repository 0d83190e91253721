"""User code runs in real tasks, with contexts, timeouts and scopes that behave as anywhere."""

from __future__ import annotations

import asyncio
import contextvars
from typing import Any

import anyio
import pytest

from fastapi_graph import DeploymentHandle, InputNode, deployment
from tests.contract.conftest import Serve
from tests.contract.probes import Gate, Journal

pytestmark = pytest.mark.anyio

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


@deployment
async def collect(*values: Any) -> list[Any]:
    return list(values)


@deployment
async def set_and_meet(gate: DeploymentHandle, name: str, *after: Any) -> list[str]:
    before = variable.get()
    token = variable.set(name)
    await gate.meet.remote(2)
    here = variable.get()
    variable.reset(token)
    return [before, here, variable.get()]


@deployment
def sync_set_and_meet(gate: DeploymentHandle, name: str, *after: Any) -> list[str]:
    before = variable.get()
    token = variable.set(name)
    gate.meet.remote(2).result(timeout_s=5)
    here = variable.get()
    variable.reset(token)
    return [before, here, variable.get()]


@pytest.mark.parametrize("function", [set_and_meet, sync_set_and_meet])
async def test_nodes_side_by_side_have_contexts_of_their_own(function: Any, serve: Serve) -> None:
    gate = Gate.bind()
    with InputNode() as x:
        dag = collect.bind(function.bind(gate, "left", x), function.bind(gate, "right", x))
    async with serve(dag) as graph:
        assert await graph.handle.remote(1) == [
            ["unset", "left", "unset"],
            ["unset", "right", "unset"],
        ]
    assert variable.get() == "unset"


@deployment
async def leak(name: str, *after: Any) -> str:
    before = variable.get()
    variable.set(name)
    await asyncio.sleep(0)
    return before


@deployment
async def leak_at_once(name: str, *after: Any) -> str:
    before = variable.get()
    variable.set(name)
    return before


@pytest.mark.parametrize("function", [leak, leak_at_once])
async def test_what_a_node_sets_does_not_reach_its_siblings(function: Any, serve: Serve) -> None:
    with InputNode() as x:
        dag = collect.bind(*(function.bind(name, x) for name in "abc"))
    async with serve(dag) as graph:
        assert await graph.handle.remote(1) == ["unset"] * 3
        assert await graph.handle.remote(1) == ["unset"] * 3
    assert variable.get() == "unset"


@deployment
class Caller:
    def __init__(self, callee: DeploymentHandle) -> None:
        self.callee = callee

    async def __call__(self) -> list[str]:
        return [await self.callee.remote("inner"), variable.get()]


@pytest.mark.parametrize("function", [leak, leak_at_once])
async def test_what_a_call_sets_does_not_reach_its_caller(function: Any, serve: Serve) -> None:
    async with serve(Caller.bind(function.bind())) as graph:
        assert await graph.handle.remote() == ["unset", "unset"]
        assert await graph.handle_of(function.name).remote("outer") == "unset"
        assert variable.get() == "unset"


async def test_the_callers_context_reaches_the_nodes(in_process: Any, serve: Serve) -> None:
    @deployment
    async def read(*after: Any) -> str:
        return variable.get()

    @deployment
    def sync_read(*after: Any) -> str:
        return variable.get()

    with InputNode() as x:
        dag = collect.bind(read.bind(x), sync_read.bind(x), read.bind(sync_read.bind(x)))
    token = variable.set("of the caller")
    try:
        async with serve(dag) as graph:
            assert await graph.handle.remote(1) == ["of the caller"] * 3
            assert await asyncio.to_thread(lambda: graph.handle.remote(1).result(5)) == (
                ["of the caller"] * 3
            )
    finally:
        variable.reset(token)


# Timeouts, groups and scopes


@deployment
async def with_asyncio_timeout(*after: Any) -> str:
    try:
        async with asyncio.timeout(0.01):
            await asyncio.sleep(60)
    except TimeoutError:
        return "timed out"
    return "never"


@deployment
async def with_wait_for(*after: Any) -> str:
    try:
        await asyncio.wait_for(asyncio.sleep(60), 0.01)
    except TimeoutError:
        return "timed out"
    return "never"


@deployment
async def with_task_group(*after: Any) -> str:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise ValueError("in the group")

    outcome = "never"
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(60))
            group.create_task(fail())
    except* ValueError:
        outcome = "timed out"
    return outcome


@deployment
async def with_anyio_scope(*after: Any) -> str:
    with anyio.move_on_after(0.01) as scope:
        await anyio.sleep(60)
    return "timed out" if scope.cancelled_caught else "never"


@deployment
async def with_anyio_group(*after: Any) -> str:
    async with anyio.create_task_group() as group:
        group.start_soon(anyio.sleep, 60)
        await anyio.lowlevel.checkpoint()
        group.cancel_scope.cancel()
    return "timed out"


@deployment
async def cancelled_at_once(*after: Any) -> str:
    with anyio.CancelScope() as scope:
        scope.cancel()
        await anyio.sleep(60)
    return "timed out" if scope.cancelled_caught else "never"


@deployment
async def with_expired_timeout(*after: Any) -> str:
    try:
        async with asyncio.timeout(0):
            await asyncio.sleep(60)
    except TimeoutError:
        return "timed out"
    return "never"


USES = [
    with_asyncio_timeout,
    with_wait_for,
    with_task_group,
    with_anyio_scope,
    with_anyio_group,
    cancelled_at_once,
    with_expired_timeout,
]


@pytest.mark.parametrize("function", USES)
async def test_alone_side_by_side_in_a_chain_and_by_handle(function: Any, serve: Serve) -> None:
    with InputNode() as x:
        chain = function.bind(function.bind(x))
        dag = collect.bind(function.bind(x), function.bind(x), chain)
    async with serve(dag) as graph, serve(chain) as alone:
        assert await graph.handle.remote(1) == ["timed out"] * 3
        assert await alone.handle.remote(1) == "timed out"
        assert await graph.handle_of(function.name).remote() == "timed out"
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0


@pytest.mark.parametrize("how", ["asyncio", "anyio"])
async def test_a_timeout_around_a_handle_cancels_the_call(
    how: str, journal: Journal, serve: Serve
) -> None:
    @deployment
    async def endless(journal: Journal) -> None:
        journal.add("begins")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            journal.add("cancelled")
            raise

    @deployment
    class Impatient:
        def __init__(self, callee: DeploymentHandle, journal: Journal) -> None:
            self.callee = callee
            self.journal = journal

        async def __call__(self, how: str) -> str:
            try:
                if how == "anyio":
                    with anyio.fail_after(0.02):
                        await self.callee.remote(self.journal)
                else:
                    async with asyncio.timeout(0.02):
                        await self.callee.remote(self.journal)
            except TimeoutError:
                return "timed out"
            return "never"

    async with serve(Impatient.bind(endless.bind(), journal)) as graph:
        assert await graph.handle.remote(how) == "timed out"
        await journal.wait_for("cancelled")
    assert journal.read() == ["begins", "cancelled"]


async def test_handles_in_task_groups(serve: Serve) -> None:
    @deployment
    async def double(value: int) -> int:
        if value < 0:
            raise ValueError("negative")
        return value * 2

    @deployment
    class Grouping:
        def __init__(self, callee: DeploymentHandle) -> None:
            self.callee = callee

        async def __call__(self, values: list[int]) -> list[int]:
            async def call(value: int) -> int:
                return await self.callee.remote(value)

            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(call(value)) for value in values]
            return [task.result() for task in tasks]

    async with serve(Grouping.bind(double.bind())) as graph:
        assert await graph.handle.remote([1, 2, 3]) == [2, 4, 6]
        with pytest.raises(ExceptionGroup) as caught:
            await graph.handle.remote([1, -1])
    assert caught.value.subgroup(ValueError) is not None


# Tasks


@deployment
async def task_is_real(*after: Any) -> bool:
    """Whether the current task is one of the loop's, and can be cancelled by name."""
    first = asyncio.current_task()
    await asyncio.sleep(0)
    second = asyncio.current_task()
    assert first is not None
    return isinstance(first, asyncio.Task) and first is second and first in asyncio.all_tasks()


@deployment
async def cancel_itself(*after: Any) -> str:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        task.uncancel()
        return "went on"
    return "never"


async def test_the_current_task_is_a_real_one(serve: Serve) -> None:
    with InputNode() as x:
        dag = collect.bind(task_is_real.bind(x), task_is_real.bind(task_is_real.bind(x)))
    async with serve(dag) as graph, serve(task_is_real.bind()) as alone:
        assert await graph.handle.remote(1) == [True, True]
        assert await alone.handle.remote() is True


async def test_a_node_may_cancel_its_own_task_and_go_on(serve: Serve) -> None:
    with InputNode() as x:
        dag = collect.bind(cancel_itself.bind(x), cancel_itself.bind(x))
    async with serve(dag) as graph, serve(cancel_itself.bind()) as alone:
        assert await graph.handle.remote(1) == ["went on"] * 2
        assert await alone.handle.remote() == "went on"


async def test_nodes_side_by_side_have_different_tasks(in_process: Any, serve: Serve) -> None:
    tasks: set[Any] = set()

    @deployment
    async def note(gate: DeploymentHandle, *after: Any) -> None:
        tasks.add(asyncio.current_task())
        await gate.meet.remote(2)

    gate = Gate.bind()
    with InputNode() as x:
        dag = collect.bind(note.bind(gate, x), note.bind(gate, x))
    async with serve(dag) as graph:
        await graph.handle.remote(1)
    assert len(tasks) == 2
