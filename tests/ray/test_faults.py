"""Processes that are killed under load: no request fails, and what was lost comes back."""

# ruff: noqa: ASYNC110 - what is polled is in another process

from __future__ import annotations

import asyncio
import os
import signal
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest
import ray

from fastapi_graph import DeploymentHandle, Graph, GraphSettings, InputNode, deployment
from fastapi_graph.backends.ray.controller import controller_name
from fastapi_graph.errors import ReplicaLostError
from tests import cluster
from tests.contract.probes import Journal

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120), pytest.mark.usefixtures("ray_cluster")]

CALLERS = 16
RECOVERY_S = 20.0
PATIENCE_S = 60.0


class Load:
    """Callers that call in a loop and check each answer, while the context lasts.

    Args:
        handle: What they call, with a number.
        expected: What the answer to a number has to be.
    """

    def __init__(self, handle: DeploymentHandle, expected: Callable[[int], Any]) -> None:
        self.answered = 0
        self._failures: list[str] = []
        self._handle = handle
        self._expected = expected
        self._over = False
        self._callers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._callers = [asyncio.create_task(self._run(number)) for number in range(CALLERS)]
        await self.go_on()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._over = True
        _, unanswered = await asyncio.wait(self._callers, timeout=PATIENCE_S)
        for task in unanswered:
            task.cancel()
        assert not unanswered, "calls were never answered"
        assert not self._failures, f"{len(self._failures)} calls failed: {self._failures[:3]}"

    async def go_on(self, count: int = 5 * CALLERS) -> None:
        """Wait until so many more calls have been answered."""
        wanted = self.answered + count
        await until(lambda: self.answered >= wanted)

    async def _run(self, number: int) -> None:
        while not self._over:
            number += CALLERS
            try:
                found = await self._handle.remote(number)
                if found != self._expected(number):
                    raise AssertionError(f"{found!r} is not the answer to {number}")
                self.answered += 1
            except Exception as error:
                self._failures.append(repr(error))
                await asyncio.sleep(0.1)


async def until(condition: Callable[[], Any], timeout_s: float = PATIENCE_S) -> Any:
    """Wait until something is so, and return what the condition returned."""
    async with asyncio.timeout(timeout_s):
        while not (found := condition()):
            await asyncio.sleep(0.005)
        return found


async def controller_pid(graph: Graph) -> int:
    """Return the process of a graph's controller, as soon as it answers."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                actor: Any = ray.get_actor(controller_name(graph.name), cluster.NAMESPACE)
                pid: int = await actor.__ray_call__.remote(lambda _: os.getpid())
                return pid
            except (ValueError, ray.exceptions.RayActorError):
                await asyncio.sleep(0.05)


async def pids_of(handle: DeploymentHandle, count: int) -> list[int]:
    """Return the processes of the replicas of a deployment with a method `pid`."""
    found: set[int] = set()
    async with asyncio.timeout(PATIENCE_S):
        while len(found) < count:
            found |= set(await asyncio.gather(*(handle.pid.remote() for _ in range(8))))
    return sorted(found)


async def recovered(graph: Graph, killed: float, **restarts: int) -> None:
    """Wait until all replicas are ready.

    Args:
        graph: The graph.
        killed: When something was killed.
        **restarts: How many replicas of a deployment had to be replaced until now.
    """

    def is_whole() -> bool:
        return all(
            status.state == "running"
            and status.replicas == status.wanted
            and status.restarts == restarts.get(status.name, 0)
            for status in graph.status()
        )

    try:
        await until(is_whole, RECOVERY_S)
    except TimeoutError:
        pytest.fail(f"not recovered within {RECOVERY_S} s: {graph.status()}")
    print(f"recovered after {time.monotonic() - killed:.2f} s: {restarts}")


def kill(*pids: int) -> float:
    """Kill processes, and return when."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return time.monotonic()


def serve(target: Any, **settings: Any) -> Graph:
    """Make a graph on Ray; keywords are settings."""
    own = {"backend": "ray", "namespace": cluster.NAMESPACE, **settings}
    return Graph(target, name=f"faults-{uuid.uuid4().hex[:8]}", settings=GraphSettings(**own))


@deployment(num_replicas=2, max_ongoing_requests=8)
class Doubles:
    """Takes its time, so that a call is always under way when a replica is killed."""

    async def __call__(self, value: int) -> int:
        await asyncio.sleep(0.02)
        return 2 * value

    async def pid(self) -> int:
        return os.getpid()


@deployment(max_ongoing_requests=100)
class Increments:
    """Calls another deployment from its own process."""

    def __init__(self, inner: DeploymentHandle) -> None:
        self.inner = inner

    async def __call__(self, value: int) -> int:
        doubled: int = await self.inner.remote(value)
        return doubled + 1

    async def pid(self) -> int:
        return os.getpid()


def chain() -> tuple[Any, Any, Any]:
    """Return a graph that calls a deployment directly and through another one."""
    doubles = Doubles.bind()
    increments = Increments.bind(doubles)
    with InputNode() as x:
        return increments.__call__.bind(doubles.__call__.bind(x)), doubles, increments


def answer(number: int) -> int:
    return 4 * number + 1


async def test_one_of_two_replicas() -> None:
    dag, doubles, _ = chain()
    async with serve(dag) as graph, Load(graph.handle, answer) as load:
        victim, other = await pids_of(graph.handle_of(doubles), 2)
        killed = kill(victim)
        await recovered(graph, killed, Doubles=1)
        await load.go_on()
        after = await pids_of(graph.handle_of(doubles), 2)
        assert other in after
        assert victim not in after


async def test_every_replica_of_a_deployment() -> None:
    dag, doubles, _ = chain()
    async with serve(dag) as graph, Load(graph.handle, answer) as load:
        victims = await pids_of(graph.handle_of(doubles), 2)
        killed = kill(*victims)
        await recovered(graph, killed, Doubles=2)
        await load.go_on()
        assert not {*victims} & {*await pids_of(graph.handle_of(doubles), 2)}


async def test_a_replica_that_calls_others() -> None:
    dag, _, increments = chain()
    async with serve(dag) as graph, Load(graph.handle, answer) as load:
        killed = kill(*await pids_of(graph.handle_of(increments), 1))
        await recovered(graph, killed, Increments=1)
        await load.go_on()


async def test_the_controller() -> None:
    dag, doubles, increments = chain()
    async with serve(dag) as graph, Load(graph.handle, answer) as load:
        before = await pids_of(graph.handle_of(doubles), 2)
        first = await controller_pid(graph)
        killed = kill(first)
        await load.go_on()
        assert await controller_pid(graph) != first
        print(f"the controller is back after {time.monotonic() - killed:.2f} s")
        assert await pids_of(graph.handle_of(doubles), 2) == before
        # The new one looks after the replicas that it found.
        killed = kill(before[0], *await pids_of(graph.handle_of(increments), 1))
        await recovered(graph, killed, Doubles=1, Increments=1)
        await load.go_on()


async def test_the_controller_and_a_replica_at_once(caplog: pytest.LogCaptureFixture) -> None:
    dag, doubles, _ = chain()
    async with serve(dag) as graph, Load(graph.handle, answer) as load:
        victim, other = await pids_of(graph.handle_of(doubles), 2)
        killed = kill(await controller_pid(graph), victim)
        await recovered(graph, killed, Doubles=1)
        await load.go_on()
        after = await pids_of(graph.handle_of(doubles), 2)
        assert other in after
        assert victim not in after
    # A dead replica needs no advice how to reach it, though nobody has said yet that it is dead.
    assert "cannot be reached by a direct connection" not in caplog.text


@deployment(max_retries=0)
class Once:
    def __init__(self, journal: Journal) -> None:
        self.journal = journal

    async def work(self, name: str) -> str:
        self.journal.add(name)
        if name != "quick":
            await asyncio.sleep(60)
        return name

    async def pid(self) -> int:
        return os.getpid()


async def test_a_call_that_must_not_run_twice(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    with InputNode() as x:
        node = Once.bind(journal)
        dag = node.work.bind(x)
    async with serve(dag) as graph:
        calls = [graph.handle.remote("slow") for _ in range(CALLERS)]
        await journal.wait_for("slow", CALLERS)
        killed = kill(*await pids_of(graph.handle_of(node), 1))
        for call in calls:
            with pytest.raises(ReplicaLostError, match=r"Once: replica .* max_retries=0"):
                await call
        # What has never begun is no second attempt: it waits for the replacement.
        assert await graph.handle.remote("quick") == "quick"
        assert journal.read().count("slow") == CALLERS
        await recovered(graph, killed, Once=1)
