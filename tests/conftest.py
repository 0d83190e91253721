"""What every test gets: the import path, anyio's backend, and a check for what it left behind."""

# ruff: noqa: ASYNC110 - that a task has ended is no event
from __future__ import annotations

import asyncio
import inspect
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

# At the end of the path: an installed fastapi_graph comes before the source tree, while
# `example_app` and `tests`, which are not installed, are found here.
sys.path.append(str(Path(__file__).parents[1]))

from tests import cluster

PROCESS = Path("/proc/self")
PATIENCE_S = 5.0


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """Run tests marked `anyio` on asyncio, which is all that is supported."""
    return "asyncio"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not isinstance(item, pytest.Function) or not inspect.iscoroutinefunction(item.obj):
            continue
        if item.get_closest_marker("anyio") and "nothing_left" in item.fixturenames:
            # After the outer check, whose loop must be closed by then, and before the rest.
            item.fixturenames.insert(item.fixturenames.index("nothing_left") + 1, "no_task_left")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """Start a Ray cluster for all tests, and yield the namespace to use in it."""
    pytest.importorskip("ray")
    with cluster.running():
        yield cluster.NAMESPACE


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a thread, a socket, a process or an actor behind."""
    on_ray = cluster.is_used(request)
    if on_ray:
        request.getfixturevalue("ray_cluster")
    before = resources(on_ray)
    yield
    deadline = time.monotonic() + PATIENCE_S
    while (left := resources(on_ray) - before) and time.monotonic() < deadline:
        time.sleep(0.002)
    assert not left, f"left behind: {sorted(map(str, left))}"


@pytest.fixture
async def no_task_left() -> AsyncIterator[None]:
    """Fail a test that leaves a task behind; part of every test that is marked `anyio`."""
    yield
    deadline = time.monotonic() + PATIENCE_S
    while (left := tasks()) and time.monotonic() < deadline:
        await asyncio.sleep(0.002)
    assert not left, f"left behind: {sorted(map(repr, left))}"


def tasks() -> set[asyncio.Task[object]]:
    """Return the unfinished tasks of the running loop, except those of anyio's test runner."""
    return {
        task
        for task in asyncio.all_tasks()
        if not getattr(task.get_coro(), "__qualname__", "").startswith("TestRunner.")
    }


def resources(on_ray: bool = False) -> set[threading.Thread | str]:
    """Return the threads, sockets, child processes and actors that exist now."""
    if on_ray:  # whose sockets and processes come and go
        return {*threading.enumerate(), *cluster.actors()}
    return {*threading.enumerate(), *sockets(), *children()}


def sockets() -> Iterator[str]:
    for descriptor in (PROCESS / "fd").glob("*"):
        try:
            target = str(descriptor.readlink())
        except OSError:  # it was closed, or was that of the listing itself
            continue
        if target.startswith("socket:"):
            yield target


def children() -> Iterator[str]:
    for task in (PROCESS / "task").glob("*/children"):
        try:
            numbers = task.read_text().split()
        except OSError:  # the thread has ended
            continue
        yield from (f"process {number}" for number in numbers)
