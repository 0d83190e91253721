"""Timeouts of deployments and handles, and what they leave behind."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from fastapi_graph import (
    BackPressureError,
    DeadlineExceededError,
    DeploymentHandle,
    InputNode,
    deployment,
)
from tests.contract.conftest import Serve
from tests.contract.probes import Gate, Journal, Waits, budget, here

pytestmark = pytest.mark.anyio


async def test_timeout_of_a_deployment(journal: Journal, serve: Serve) -> None:
    gate, where = Gate.bind(), here(1)
    node = Waits.options(timeout_s=0.2).bind(gate, journal, budget.bind())
    with InputNode() as x:
        dag = node.__call__.bind(x)
    async with serve(dag) as graph:
        message = f"Waits .bound at .*{where}.: no result within timeout_s=0.2"
        with pytest.raises(DeadlineExceededError, match=message):
            await graph.handle.remote("a")
        await journal.wait_for("cancelled a")
        with pytest.raises(DeadlineExceededError):
            await graph.handle_of(node).thread.remote("b")
        items = graph.handle_of(node).items.remote()
        assert await anext(items) == 1
        with pytest.raises(DeadlineExceededError):
            await anext(items)


async def test_timeout_of_a_handle_travels_down(journal: Journal, serve: Serve) -> None:
    node = Waits.bind(Gate.bind(), journal, budget.bind())
    async with serve(node) as graph:
        assert await graph.handle.left.remote() == (None, None)
        mine, below = await graph.handle.options(timeout_s=30).left.remote()
        assert 29 < below <= mine <= 30
        with pytest.raises(DeadlineExceededError):
            await graph.handle.options(timeout_s=0.1).remote("a")
        await journal.wait_for("cancelled a")
        shorter = graph.handle.options(timeout_s=5).options(timeout_s=30)
        assert (await shorter.left.remote())[0] > 29


async def test_a_call_that_waits_for_its_turn_is_given_up_and_never_begun(
    journal: Journal, serve: Serve
) -> None:
    gate = Gate.bind()
    node = Waits.options(max_ongoing_requests=1).bind(gate, journal, budget.bind())
    async with serve(node) as graph:
        first = graph.handle.remote("a")
        await journal.wait_for("start a")
        with pytest.raises(DeadlineExceededError):
            await graph.handle.options(timeout_s=0.1).remote("b")
        await graph.handle_of(gate).open.remote()
        await first
        await graph.handle.remote("c")
        assert journal.count("start b") == 0


async def test_a_thread_that_is_abandoned_is_counted(journal: Journal, serve: Serve) -> None:
    @deployment(max_ongoing_requests=1)
    class Blocks:
        def __init__(self, journal: Journal) -> None:
            self.journal = journal

        def __call__(self, until: str) -> None:
            self.journal.add("blocks")
            while not self.journal.count(until):
                time.sleep(0.01)

    node = Blocks.bind(journal)
    async with serve(node) as graph:

        def abandoned() -> int:
            return dict(graph.status()[0].counts).get("abandoned", 0)

        began = time.monotonic()
        with pytest.raises(DeadlineExceededError):
            await graph.handle.options(timeout_s=0.1).remote("go on")
        assert time.monotonic() - began < 5
        async with asyncio.timeout(20):
            while abandoned() != 1:  # noqa: ASYNC110 - it is counted elsewhere
                await asyncio.sleep(0.01)
        journal.add("go on")
        await graph.handle.remote("go on")  # its slot is free again
        async with asyncio.timeout(20):
            while abandoned():  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def test_capacity_errors_pass_through_nodes(journal: Journal, serve: Serve) -> None:
    @deployment
    class Outer:
        def __init__(self, inner: DeploymentHandle) -> None:
            self.inner = inner

        async def __call__(self, name: str) -> Any:
            return await self.inner.remote(name)

    gate = Gate.bind()
    inner = Waits.options(max_ongoing_requests=1, max_queued_requests=0).bind(
        gate, journal, budget.bind()
    )
    async with serve(Outer.bind(inner)) as graph:
        first = graph.handle.remote("a")
        await journal.wait_for("start a")
        with pytest.raises(BackPressureError, match="Waits is at capacity"):
            await graph.handle.remote("b")
        await graph.handle_of(gate).open.remote()
        await first


async def test_a_call_that_its_caller_has_left_keeps_its_timeout(
    journal: Journal, serve: Serve
) -> None:
    @deployment
    class Leaves:
        def __init__(self, below: DeploymentHandle) -> None:
            self.below = below.options(timeout_s=0.5)

        async def __call__(self) -> None:
            self.response = self.below.remote("a")

    waits = Waits.bind(Gate.bind(), journal, budget.bind())
    async with serve(Leaves.bind(waits)) as graph:
        await graph.handle.options(timeout_s=0.3).remote()
        await journal.wait_for("cancelled a")
