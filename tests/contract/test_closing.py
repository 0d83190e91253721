"""What ends an object: `close()` or a finaliser, sync or async, once."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from fastapi_graph import (
    DeploymentHandle,
    Graph,
    GraphSettings,
    deployment,
)
from tests.contract.conftest import Logged, Serve
from tests.contract.probes import Journal, Noted, here

pytestmark = pytest.mark.anyio


class Ending:
    def __init__(self, journal: Journal) -> None:
        self.journal = journal

    def __call__(self) -> None: ...


@deployment
class SyncClose(Ending):
    def close(self) -> None:
        self.journal.add("ended")


@deployment
class AsyncClose(Ending):
    async def close(self) -> None:
        await asyncio.sleep(0)
        self.journal.add("ended")


@deployment
class SyncDel(Ending):
    def __del__(self) -> None:
        self.journal.add("ended")


@deployment
class AsyncDel(Ending):
    async def __del__(self) -> None:  # type: ignore[misc]  # as in Ray Serve
        await asyncio.sleep(0)
        self.journal.add("ended")


@deployment
class Both(Ending):
    def close(self) -> None:
        self.journal.add("ended")

    def __del__(self) -> None:
        self.journal.add("finalised")


@pytest.mark.parametrize("cls", [SyncClose, AsyncClose, SyncDel, AsyncDel])
async def test_what_ends_an_object_runs_once(cls: Any, journal: Journal, serve: Serve) -> None:
    graph = serve(cls.bind(journal))
    async with graph:
        await graph.handle.remote()
        assert journal.read() == []
    assert journal.read() == ["ended"]
    gc.collect()
    assert journal.read() == ["ended"]
    async with graph:
        pass
    gc.collect()
    assert journal.read() == ["ended"] * 2


async def test_close_comes_before_the_finaliser(journal: Journal, serve: Serve) -> None:
    async with serve(Both.bind(journal)):
        pass
    gc.collect()
    assert journal.read()[0] == "ended"
    assert journal.count("ended") == 1
    assert journal.count("finalised") <= 1


async def test_a_sync_close_runs_off_the_loop(in_process: GraphSettings) -> None:
    threads: list[int] = []

    @deployment
    class Model:
        def close(self) -> None:
            threads.append(threading.get_ident())

        def __call__(self) -> None: ...

    async with Graph(Model.bind(), settings=in_process):
        pass
    assert len(threads) == 1
    assert threads != [threading.get_ident()]


async def test_close_may_call_what_it_holds_a_handle_to(journal: Journal, serve: Serve) -> None:
    @deployment
    class Saver:
        def __init__(self, store: DeploymentHandle, journal: Journal) -> None:
            self.store = store
            self.journal = journal

        async def close(self) -> None:
            self.journal.add(f"saved to {await self.store.remote()}")

        def __call__(self) -> None: ...

    async with serve(Saver.bind(Noted.bind(journal, "store"), journal)):
        pass
    assert journal.read() == ["made store", "saved to store", "closed store"]


async def test_a_close_that_raises_is_logged_and_the_others_are_closed(
    journal: Journal, serve: Serve, logged: Logged
) -> None:
    @deployment
    class Failing:
        def __init__(self, holds: DeploymentHandle) -> None: ...

        def close(self) -> None:
            raise ValueError("cannot close")

        def __call__(self) -> None: ...

    node, place = Failing.bind(Noted.bind(journal)), here()
    async with serve(node):
        pass
    assert journal.read() == ["made noted", "closed noted"]
    assert "cannot close" in logged.text
    assert "Failing" in logged.text
    assert place in logged.text


@pytest.mark.parametrize("streams", [False, True])
async def test_a_thread_that_was_left_in_a_function_ends_before_the_graph(
    streams: bool, journal: Journal, in_process: GraphSettings
) -> None:
    seen = threading.Event()

    def work(journal: Journal) -> None:
        journal.add("begins")
        seen.wait(20)
        time.sleep(0.1)
        journal.add("ends")

    def items(journal: Journal) -> Iterator[int]:
        yield 1
        work(journal)
        yield 2

    async with Graph(deployment(items if streams else work).bind(), settings=in_process) as graph:
        call = graph.handle.remote(journal)
        if streams:
            assert await anext(call) == 1
        await journal.wait_for("begins")
        call.cancel()
        while not graph.status()[0].counts.get("abandoned"):  # noqa: ASYNC110 - a counter
            await asyncio.sleep(0.001)
        seen.set()
    assert journal.read() == ["begins", "ends"]


async def test_a_thread_that_was_left_in_the_object_ends_before_it_is_closed(
    journal: Journal, serve: Serve
) -> None:
    @deployment
    class Native:
        def __init__(self, journal: Journal) -> None:
            self.journal = journal

        def compute(self) -> None:
            self.journal.add("begins")
            time.sleep(0.1)
            self.journal.add("ends")

        def close(self) -> None:
            self.journal.add("closed")

    async with serve(Native.bind(journal)) as graph:
        response = graph.handle.compute.remote()
        await journal.wait_for("begins")
        response.cancel()
        with pytest.raises(asyncio.CancelledError):
            await response
        assert journal.count("ends") == 0
    assert journal.read() == ["begins", "ends", "closed"]


async def test_a_stop_that_is_cancelled_leaves_a_graph_that_can_start(
    journal: Journal, serve: Serve
) -> None:
    @deployment(graceful_shutdown_timeout_s=0.5)
    class Slow:
        def __init__(self, journal: Journal) -> None:
            self.journal = journal

        async def __call__(self) -> str:
            return "here"

        async def close(self) -> None:
            self.journal.add("closing")
            await asyncio.sleep(60)

    graph = serve(Slow.bind(journal))
    await graph.start()
    stopping = asyncio.create_task(graph.stop())
    await journal.wait_for("closing")
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    await graph.start()
    assert await graph.handle.remote() == "here"
    stopping = asyncio.create_task(graph.stop())
    await asyncio.sleep(0.02)
    stopping.cancel()
    await asyncio.wait([stopping])
