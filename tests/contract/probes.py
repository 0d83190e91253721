"""What the tests look through: deployments and values that work in any process."""

# ruff: noqa: ASYNC110 - what is polled is in another process, or has no event

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi_graph import DeploymentHandle, Graph, deployment, get_request_context

PATIENCE_S = 20.0


class Journal:
    """A file of lines, written by whoever holds it, wherever that runs."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, entry: object) -> None:
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(file, f"{entry}\n".encode())
        finally:
            os.close(file)

    def read(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []

    def count(self, entry: object) -> int:
        return self.read().count(str(entry))

    async def wait_for(self, entry: object, count: int = 1) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while self.count(entry) < count:
                await asyncio.sleep(0.001)


async def idle(graph: Graph) -> None:
    """Wait until no slot is taken. Replicas in other processes say so once a second."""
    async with asyncio.timeout(PATIENCE_S):
        while any(status.ongoing or status.queued for status in graph.status()):
            await asyncio.sleep(0.01)


@deployment(max_ongoing_requests=100_000)
class Gate:
    """Lets calls wait for each other, also when they run in different processes."""

    def __init__(self) -> None:
        self._opened = asyncio.Event()
        self._arrived = 0
        self._met = asyncio.Event()

    async def wait(self) -> str:
        """Wait until the gate is opened."""
        async with asyncio.timeout(PATIENCE_S):
            await self._opened.wait()
        return "opened"

    async def open(self) -> None:
        self._opened.set()

    async def meet(self, parties: int) -> None:
        """Wait until this many calls wait here: they can only all return if they overlap."""
        self._arrived += 1
        if self._arrived >= parties:
            self._met.set()
        async with asyncio.timeout(PATIENCE_S):
            await self._met.wait()

    async def arrived(self, parties: int) -> None:
        """Wait until this many calls have come to `meet`."""
        async with asyncio.timeout(PATIENCE_S):
            while self._arrived < parties:
                await asyncio.sleep(0.001)


@deployment
class Noted:
    """Notes when it is made and closed; it may hold anything."""

    def __init__(self, journal: Journal, name: str = "noted", *holds: Any) -> None:
        self.journal = journal
        self.name = name
        journal.add(f"made {name}")

    def __call__(self) -> str:
        return self.name

    def close(self) -> None:
        self.journal.add(f"closed {self.name}")


@deployment
async def collect(*values: Any) -> list[Any]:
    return list(values)


@deployment(max_ongoing_requests=1)
class Worker:
    """Runs one call at a time, each until the gate is opened."""

    def __init__(self, gate: DeploymentHandle, journal: Journal) -> None:
        self.gate = gate
        self.journal = journal

    async def work(self, name: str) -> str:
        self.journal.add(f"start {name}")
        try:
            await self.gate.wait.remote()
        except asyncio.CancelledError:
            self.journal.add(f"cancelled {name}")
            raise
        self.journal.add(f"end {name}")
        return name


@deployment
async def budget() -> float | None:
    return get_request_context().deadline_s


@deployment
class Waits:
    def __init__(self, gate: DeploymentHandle, journal: Journal, budget: DeploymentHandle) -> None:
        self.gate = gate
        self.journal = journal
        self.budget = budget

    async def __call__(self, name: str) -> Any:
        self.journal.add(f"start {name}")
        try:
            await self.gate.wait.remote()
        except asyncio.CancelledError:
            self.journal.add(f"cancelled {name}")
            raise

    def thread(self, name: str) -> Any:
        self.journal.add(f"start {name}")
        self.gate.wait.remote().result()

    async def left(self) -> Any:
        return get_request_context().deadline_s, await self.budget.remote()

    async def items(self) -> AsyncIterator[int]:
        yield 1
        await self.gate.wait.remote()


def here(offset: int = 0) -> str:
    """Return `file.py:line` of the caller, `offset` lines further down."""
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return f"{Path(frame.f_back.f_code.co_filename).name}:{frame.f_back.f_lineno + offset}"


def notes(error: BaseException) -> str:
    """Return what was noted on an exception."""
    return "\n".join(getattr(error, "__notes__", ()))
