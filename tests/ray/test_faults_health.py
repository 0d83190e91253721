"""Replicas that live and do not answer: those that hang are replaced, busy ones are not."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from fastapi_graph import deployment
from tests.contract.probes import Journal
from tests.ray.test_faults import Load, pids_of, recovered, serve

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120), pytest.mark.usefixtures("ray_cluster")]


@deployment(num_replicas=2, health_check_period_s=0.3, health_check_timeout_s=1.0)
class Hangs:
    """Hangs in the replica whose process the journal names."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal

    async def __call__(self, value: int) -> int:
        await asyncio.sleep(0.02)
        return value

    async def pid(self) -> int:
        return os.getpid()

    async def check_health(self) -> None:
        if self.journal.count(f"{os.getpid()} sleeps"):
            await asyncio.sleep(60)
        if self.journal.count(f"{os.getpid()} blocks"):
            time.sleep(60)  # noqa: ASYNC251 - the whole process hangs
        if self.journal.count(f"{os.getpid()} fails"):
            raise RuntimeError("out of memory")


@pytest.mark.parametrize("how", ["sleeps", "blocks", "fails"])
async def test_a_replica_that_hangs_is_replaced(how: str, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    node = Hangs.bind(journal)
    async with serve(node) as graph, Load(graph.handle, lambda number: number) as load:
        victim, other = await pids_of(graph.handle_of(node), 2)
        journal.add(f"{victim} {how}")
        await recovered(graph, time.monotonic(), Hangs=1)
        await load.go_on()
        after = await pids_of(graph.handle_of(node), 2)
        assert other in after
        assert victim not in after
        (status,) = graph.status()
        assert "health check of replica" in status.error
        assert ("out of memory" if how == "fails" else "health_check_timeout_s") in status.error


@deployment(num_replicas=2, health_check_period_s=0.5)
class Computes:
    """Blocks its event loop, as a CPU-heavy `async def` does."""

    async def __call__(self, value: int) -> int:
        await asyncio.sleep(0.02)
        return value

    async def block(self, seconds: float) -> int:
        time.sleep(seconds)  # noqa: ASYNC251 - this is what is tested
        return os.getpid()

    async def pid(self) -> int:
        return os.getpid()


async def test_a_replica_that_computes_is_not_dead() -> None:
    node = Computes.bind()
    async with serve(node) as graph, Load(graph.handle, lambda number: number) as load:
        before = await pids_of(graph.handle_of(node), 2)
        blocking = graph.handle_of(node).block.remote(6)
        await asyncio.sleep(4)  # longer than two pings take
        await load.go_on()  # calls take the other replica
        (status,) = graph.status()
        assert (status.state, status.replicas, status.restarts) == ("running", 2, 0)
        assert await blocking in before
        await load.go_on()
        assert await pids_of(graph.handle_of(node), 2) == before
        (status,) = graph.status()
        assert (status.restarts, status.error) == (0, "")
