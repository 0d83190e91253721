"""Constructors: once per start, side by side where they can, in order where they must."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from fastapi_graph import (
    DeploymentHandle,
    Graph,
    GraphSettings,
    deployment,
)
from tests.contract.conftest import Serve
from tests.contract.probes import Gate, Journal, Noted, collect

pytestmark = pytest.mark.anyio


async def test_once_per_start_however_many_consume_it(journal: Journal, serve: Serve) -> None:
    node = Noted.bind(journal)
    dag = collect.bind(node.__call__.bind(), node.__call__.bind(), node)
    graph = serve(dag)
    assert journal.read() == []
    async with graph:
        assert journal.read() == ["made noted"]
        for _ in range(3):
            await graph.handle.remote()
        assert journal.read() == ["made noted"]
    assert journal.read() == ["made noted", "closed noted"]
    async with graph:
        assert journal.count("made noted") == 2
    assert journal.count("closed noted") == 2


@deployment
class SyncMeeting:
    def __init__(self, gate: DeploymentHandle) -> None:
        gate.meet.remote(4).result(timeout_s=5)

    def __call__(self) -> str:
        return "met"


@deployment
class AsyncMeeting:
    async def __init__(self, gate: DeploymentHandle) -> None:
        await gate.meet.remote(4)

    def __call__(self) -> str:
        return "met"


async def test_independent_constructors_run_side_by_side(serve: Serve) -> None:
    gate = Gate.bind()
    nodes = [cls.bind(gate) for cls in (SyncMeeting, AsyncMeeting) for _ in range(2)]
    async with serve(collect.bind(*(node.__call__.bind() for node in nodes))) as graph:
        assert await graph.handle.remote() == ["met"] * 4


async def test_after_those_it_holds_handles_to(journal: Journal, serve: Serve) -> None:
    first = Noted.bind(journal, "first")
    second = Noted.bind(journal, "second", [first])
    third = Noted.bind(journal, "third", {"k": second.__call__.bind()}, first)
    async with serve(third):
        assert journal.read() == ["made first", "made second", "made third"]
    assert journal.read()[3:] == ["closed third", "closed second", "closed first"]


async def test_a_sync_constructor_runs_off_the_loop(in_process: GraphSettings) -> None:
    threads: list[int] = []

    @deployment
    class Model:
        def __init__(self) -> None:
            threads.append(threading.get_ident())

        def __call__(self) -> None: ...

    async with Graph(Model.bind(), settings=in_process):
        assert len(threads) == 1
        assert threads != [threading.get_ident()]


async def test_the_loop_is_free_while_a_constructor_blocks(in_process: GraphSettings) -> None:
    begun, go_on = threading.Event(), threading.Event()

    @deployment
    class Model:
        def __init__(self) -> None:
            begun.set()
            assert go_on.wait(5)

        def __call__(self) -> None: ...

    graph = Graph(Model.bind(), settings=in_process)
    starting = asyncio.create_task(graph.start())
    assert await asyncio.to_thread(begun.wait, 5)
    assert [status.state for status in graph.status()] == ["starting"]
    go_on.set()
    await starting
    assert [status.state for status in graph.status()] == ["running"]
    await graph.stop()
    assert [status.state for status in graph.status()] == ["stopped"]


async def test_an_async_constructor_runs_on_the_loop(in_process: GraphSettings) -> None:
    seen: list[Any] = []

    @deployment
    class Model:
        async def __init__(self, weight: int, *, bias: int = 0) -> None:
            await asyncio.sleep(0)
            seen.append(asyncio.get_running_loop())
            self.value = weight + bias

        async def __call__(self) -> int:
            return self.value

    async with Graph(Model.bind(1, bias=2), settings=in_process) as graph:
        assert seen == [asyncio.get_running_loop()]
        assert await graph.handle.remote() == 3
