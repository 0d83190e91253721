"""Cancelling a call ends what it has started, and nothing else."""

# ruff: noqa: ASYNC110 - what is polled is in another process, or has no event

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from fastapi_graph import (
    DeploymentHandle,
    DeploymentResponse,
    GraphSettings,
    deployment,
)
from tests.contract.conftest import Serve
from tests.contract.probes import Gate, Journal, Worker

pytestmark = pytest.mark.anyio


@deployment
async def identity(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


@deployment
class Caller:
    def __init__(self, worker: DeploymentHandle, journal: Journal) -> None:
        self.worker = worker
        self.journal = journal

    async def awaits(self, name: str) -> Any:
        return await self.worker.work.remote(name)

    async def starts(self, name: str) -> Any:
        response = self.worker.work.remote(name)
        await asyncio.sleep(60)
        return response

    async def gathers(self, name: str) -> Any:
        return await asyncio.gather(*(self.worker.work.remote(f"{name}{n}") for n in range(3)))

    def waits(self, name: str) -> Any:
        try:
            return self.worker.work.remote(name).result(timeout_s=5)
        except asyncio.CancelledError:
            self.journal.add("caller saw it")
            raise


def cancel(response: DeploymentResponse) -> bool:
    return response.cancel()


async def cancel_in_thread(response: DeploymentResponse) -> bool:
    return await asyncio.to_thread(response.cancel)


@pytest.mark.parametrize("how", [cancel, cancel_in_thread])
@pytest.mark.parametrize("method", ["awaits", "starts", "waits"])
async def test_cancelling_reaches_nested_calls(
    how: Callable[[DeploymentResponse], Any], method: str, journal: Journal, serve: Serve
) -> None:
    worker = Worker.bind(Gate.bind(), journal)
    async with serve(Caller.bind(worker, journal)) as graph:
        response = getattr(graph.handle, method).remote("a")
        await journal.wait_for("start a")
        outcome = how(response)
        assert (await outcome if asyncio.iscoroutine(outcome) else outcome) is True
        with pytest.raises(asyncio.CancelledError):
            await response
        await journal.wait_for("cancelled a")
        assert response.cancel() is False


async def test_cancelling_the_awaiting_task_cancels_the_call(
    journal: Journal, serve: Serve
) -> None:
    worker = Worker.bind(Gate.bind(), journal)
    async with serve(Caller.bind(worker, journal)) as graph:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await graph.handle.awaits.remote("a")
        await journal.wait_for("cancelled a")


@pytest.mark.parametrize("method", ["awaits", "starts", "waits", "gathers"])
async def test_queued_nested_calls_of_a_cancelled_call_never_run(
    method: str, journal: Journal, serve: Serve, backend: GraphSettings
) -> None:
    # In another process, the caller itself holds back what its slots do not allow.
    seen = 3 if method == "gathers" and backend.backend == "inprocess" else 1
    gate = Gate.bind()
    worker = Worker.bind(gate, journal)
    async with serve(Caller.bind(worker, journal)) as graph:
        first = graph.handle_of(worker).work.remote("first")
        await journal.wait_for("start first")
        gone = getattr(graph.handle, method).remote("gone")
        await queued(graph, seen)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        await queued(graph, 0)
        last = graph.handle_of(worker).work.remote("last")
        await graph.handle_of(gate).open.remote()
        assert [await first, await last] == ["first", "last"]
    assert not [line for line in journal.read() if line.startswith("start gone")]


async def queued(graph: Any, number: int) -> None:
    async with asyncio.timeout(5):
        while {status.name: status.queued for status in graph.status()}["Worker"] != number:
            await asyncio.sleep(0.001)


async def test_cancelling_from_a_thread_that_waits_for_nothing(
    journal: Journal, serve: Serve
) -> None:
    async with serve(Worker.bind(Gate.bind(), journal)) as graph:

        def in_thread() -> None:
            response = graph.handle.work.remote("a")
            while "start a" not in journal.read():
                pass
            assert response.cancel() is True
            with pytest.raises(asyncio.CancelledError):
                response.result(timeout_s=5)

        await asyncio.to_thread(in_thread)
        await journal.wait_for("cancelled a")


async def test_cancelling_a_consumer_leaves_the_responses_it_was_given(
    journal: Journal, serve: Serve
) -> None:
    gate = Gate.bind()
    worker = Worker.bind(gate, journal)
    async with serve(identity.bind(Caller.bind(worker, journal))) as graph:
        given = graph.handle_of(worker).work.remote("a")
        consumer = graph.handle_of("identity").remote(given)
        await journal.wait_for("start a")
        consumer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await consumer
        await graph.handle_of(gate).open.remote()
        assert await given == "a"
