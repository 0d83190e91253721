"""Random calls for as long as FUZZ_SECONDS says; on Ray, replicas die under them."""

from __future__ import annotations

import asyncio
import os
import random
import time
from typing import Any

import pytest

from fastapi_graph import Graph, GraphSettings
from fastapi_graph.errors import ExecutionError
from tests import cluster
from tests.contract.outcomes import Caller, graph_of

SECONDS = float(os.environ.get("FUZZ_SECONDS", "60"))
SEED = os.environ.get("FUZZ_SEED")
CALLS = 300

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(SECONDS + 120)]

IN_PROCESS = {"backend": "inprocess"}
ON_RAY = {"backend": "ray", "namespace": cluster.NAMESPACE}


def seeds() -> Any:
    if SEED is not None:
        return iter([int(SEED)])
    deadline = time.monotonic() + SECONDS
    return iter(
        lambda: 0 if time.monotonic() > deadline else random.SystemRandom().getrandbits(48), 0
    )


async def kill_now_and_then(graph: Graph, inner: Any, source: random.Random) -> None:
    """Let replicas end themselves, some while apart."""
    while True:
        await asyncio.sleep(source.uniform(0.5, 2.0))
        try:
            await graph.handle_of(inner).options(max_retries=0).die.remote()
        except ExecutionError:
            continue


@pytest.mark.parametrize("serialize", [False, True])
async def test_in_process(serialize: bool) -> None:
    for seed in seeds():
        print(f"FUZZ_SEED={seed}")
        outer, inner = graph_of()
        settings = GraphSettings(**IN_PROCESS, serialize=serialize)
        async with Graph(outer, settings=settings) as graph:
            caller = Caller(graph, inner, seed)
            await caller.run(CALLS)
            await caller.settled()


async def test_on_ray(ray_cluster: str) -> None:
    outer, inner = graph_of(num_replicas=2)
    async with Graph(outer, settings=GraphSettings(**ON_RAY)) as graph:
        for seed in seeds():
            print(f"FUZZ_SEED={seed}")
            killing = asyncio.create_task(kill_now_and_then(graph, inner, random.Random(seed)))
            try:
                caller = Caller(graph, inner, seed)
                await caller.run(CALLS)
            finally:
                killing.cancel()
                await asyncio.wait([killing])
            await caller.settled()
