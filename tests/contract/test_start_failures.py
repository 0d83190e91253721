"""A start that fails says why, and what was started is closed."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from fastapi_graph import (
    DeploymentHandle,
    DeploymentStartError,
    Graph,
    GraphSettings,
    deployment,
)
from tests.contract.conftest import Serve
from tests.contract.probes import Journal, Noted, collect, here

pytestmark = pytest.mark.anyio


@deployment
class SyncRaising:
    def __init__(self, *holds: Any) -> None:
        raise LookupError("no such weights")

    def __call__(self) -> None: ...


@deployment
class AsyncRaising:
    async def __init__(self, *holds: Any) -> None:
        await asyncio.sleep(0)
        raise LookupError("no such weights")

    def __call__(self) -> None: ...


@deployment(user_config=1)
class BadlyConfigured:
    def __init__(self, *holds: Any) -> None: ...

    def reconfigure(self, config: int) -> None:
        raise LookupError("no such weights")

    def __call__(self) -> None: ...


RAISING: list[Any] = [SyncRaising, AsyncRaising, BadlyConfigured]


@pytest.mark.parametrize("cls", RAISING)
async def test_the_error_names_node_place_and_cause(cls: Any, serve: Serve) -> None:
    node, place = cls.bind(), here()
    graph = serve(collect.bind(node.__call__.bind()))
    with pytest.raises(DeploymentStartError, match="no such weights") as caught:
        await graph.start()
    assert cls.name in str(caught.value)
    assert place in str(caught.value)
    cause = caught.value.__cause__
    assert type(cause) is LookupError
    assert str(cause) == "no such weights"
    (status,) = [status for status in graph.status() if status.name == cls.name]
    assert status.state == "stopped"
    assert "no such weights" in status.error


@pytest.mark.parametrize("cls", RAISING)
async def test_what_was_started_is_closed(cls: Any, journal: Journal, serve: Serve) -> None:
    first = Noted.bind(journal, "first")
    second = Noted.bind(journal, "second", first)
    after = Noted.bind(journal, "after", failing := cls.bind(second))
    graph = serve(collect.bind(after.__call__.bind(), failing))
    with pytest.raises(DeploymentStartError):
        await graph.start()
    assert journal.read() == ["made first", "made second", "closed second", "closed first"]
    assert {status.state for status in graph.status()} == {"stopped"}


async def test_a_graph_that_did_not_start_may_be_started_again(
    journal: Journal, serve: Serve
) -> None:
    @deployment
    class SecondTry:
        def __init__(self, journal: Journal) -> None:
            journal.add("try")
            if journal.count("try") == 1:
                raise ConnectionError("not yet")

        def __call__(self) -> str:
            return "answered"

    graph = serve(SecondTry.bind(journal), name="second-try")
    with pytest.raises(DeploymentStartError, match="not yet"):
        await graph.start()
    async with graph:
        assert await graph.handle.remote() == "answered"


@pytest.mark.usefixtures("in_process")  # elsewhere the process ends, and with it everything
async def test_constructors_that_still_run_are_ended_and_closed(
    journal: Journal, serve: Serve
) -> None:
    """One fails while another is still being constructed."""

    @deployment
    class Slow:
        async def __init__(self, journal: Journal) -> None:
            journal.add("slow begins")
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                journal.add("slow is cancelled")
                raise

        def __call__(self) -> None: ...

    @deployment
    class Fails:
        async def __init__(self, journal: Journal) -> None:
            await journal.wait_for("slow begins")
            raise LookupError("no such weights")

        def __call__(self) -> None: ...

    dag = collect.bind(Slow.bind(journal).__call__.bind(), Fails.bind(journal).__call__.bind())
    with pytest.raises(DeploymentStartError, match="Fails"):
        await serve(dag).start()
    assert journal.read() == ["slow begins", "slow is cancelled"]


async def test_a_sync_constructor_that_ends_too_late_is_closed_too(
    in_process: GraphSettings, journal: Journal
) -> None:
    """The thread of a constructor cannot be stopped; what it made must not be left behind."""
    begun, go_on = threading.Event(), threading.Event()

    @deployment
    class Slow:
        def __init__(self) -> None:
            begun.set()
            assert go_on.wait(5)
            journal.add("made")

        def close(self) -> None:
            journal.add("closed")

        def __call__(self) -> None: ...

    @deployment
    class Fails:
        async def __init__(self) -> None:
            assert await asyncio.to_thread(begun.wait, 5)
            asyncio.get_running_loop().call_later(0.02, go_on.set)
            raise LookupError("no such weights")

        def __call__(self) -> None: ...

    dag = collect.bind(Slow.bind().__call__.bind(), Fails.bind().__call__.bind())
    with pytest.raises(DeploymentStartError, match="Fails"):
        await Graph(dag, settings=in_process).start()
    await journal.wait_for("made")
    async with asyncio.timeout(0.5):
        await journal.wait_for("closed")


@pytest.mark.parametrize("how", ["cancel", "timeout"])
async def test_a_start_that_is_cancelled_closes_what_was_started(
    how: str, journal: Journal, serve: Serve, backend: GraphSettings
) -> None:
    patience = 0.3 if backend.backend == "inprocess" else 8.0  # processes start before it

    @deployment
    class Endless:
        async def __init__(self, holds: DeploymentHandle, journal: Journal) -> None:
            journal.add("endless begins")
            await asyncio.sleep(60)

        def __call__(self) -> None: ...

    graph = serve(Endless.bind(Noted.bind(journal), journal))
    expected = asyncio.CancelledError if how == "cancel" else TimeoutError

    async def start() -> None:
        async with asyncio.timeout(patience if how == "timeout" else None):
            await graph.start()

    starting = asyncio.create_task(start())
    await journal.wait_for("endless begins")
    if how == "cancel":
        starting.cancel()
    with pytest.raises(expected):
        await starting
    assert journal.read() == ["made noted", "endless begins", "closed noted"]
    assert {status.state for status in graph.status()} == {"stopped"}
