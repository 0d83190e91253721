"""`user_config` reaches `reconfigure()`, and `check_health()` is called."""

# ruff: noqa: ASYNC110 - what is polled has no event

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from fastapi_graph import (
    DeploymentHandle,
    DeploymentStartError,
    Graph,
    deployment,
)
from tests.contract.conftest import Serve
from tests.contract.probes import Journal, here

pytestmark = pytest.mark.anyio


# user_config


@deployment(user_config={"factor": 3})
class Configured:
    def __init__(self) -> None:
        self.factor = 0

    def reconfigure(self, config: dict[str, int]) -> None:
        self.factor = config["factor"]

    def __call__(self, value: int) -> int:
        return value * self.factor


@deployment(user_config=[5])
class AsyncConfigured:
    def __init__(self) -> None:
        self.factor = 0

    async def reconfigure(self, config: list[int]) -> None:
        await asyncio.sleep(0)
        self.factor = config[0]

    def __call__(self, value: int) -> int:
        return value * self.factor


@pytest.mark.parametrize("cls, expected", [(Configured, 6), (AsyncConfigured, 10)])
async def test_user_config_reaches_reconfigure(cls: Any, expected: int, serve: Serve) -> None:
    async with serve(cls.bind()) as graph:
        assert await graph.handle.remote(2) == expected


async def test_options_change_the_user_config(serve: Serve) -> None:
    node = Configured.options(user_config={"factor": 7}).bind()
    async with serve(node) as graph:
        assert await graph.handle.remote(2) == 14


async def test_without_user_config_there_is_no_reconfigure(serve: Serve) -> None:
    async with serve(Configured.options(user_config=None).bind()) as graph:
        assert await graph.handle.remote(2) == 0


async def test_reconfigure_may_use_a_handle(serve: Serve) -> None:
    @deployment(user_config=4)
    class Model:
        def __init__(self, other: DeploymentHandle) -> None:
            self.other = other
            self.factor = 0

        async def reconfigure(self, value: int) -> None:
            self.factor = await self.other.remote(value)

        def __call__(self) -> int:
            return self.factor

    async with serve(Model.bind(Configured.bind())) as graph:
        assert await graph.handle.remote() == 12


@deployment(user_config=1)
class Unconfigurable:
    def __call__(self) -> None: ...


@deployment(user_config=1)
def unconfigurable() -> None: ...


@pytest.mark.parametrize("target", [Unconfigurable, unconfigurable])
async def test_user_config_without_reconfigure_is_an_error(target: Any, serve: Serve) -> None:
    node, place = target.bind(), here()
    graph = serve(node)
    with pytest.raises(DeploymentStartError, match=r"user_config.*reconfigure") as caught:
        await graph.start()
    assert target.name in str(caught.value)
    assert place in str(caught.value)


# Health


@deployment(health_check_period_s=0.01)
class Checked:
    """Is healthy as long as its file is absent."""

    def __init__(self, sick: Journal) -> None:
        self.sick = sick

    def check_health(self) -> None:
        if self.sick.read():
            raise ValueError("out of memory")

    def __call__(self) -> str:
        return "answered"


@deployment(health_check_period_s=0.01)
class AsyncChecked:
    def __init__(self, sick: Journal) -> None:
        self.sick = sick

    async def check_health(self) -> None:
        if self.sick.read():
            raise ValueError("out of memory")

    def __call__(self) -> str:
        return "answered"


@pytest.mark.parametrize("cls", [Checked, AsyncChecked])
async def test_a_failing_check_at_start_is_a_start_error(
    cls: Any, journal: Journal, serve: Serve
) -> None:
    journal.add("sick")
    node, place = cls.bind(journal), here()
    with pytest.raises(DeploymentStartError, match="out of memory") as caught:
        await serve(node).start()
    assert cls.name in str(caught.value)
    assert place in str(caught.value)
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("cls", [Checked, AsyncChecked])
@pytest.mark.usefixtures("in_process")  # other backends replace the replica
async def test_a_check_that_fails_later_shows_in_the_status(
    cls: Any, journal: Journal, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(cls.bind(journal)) as graph:
        with caplog.at_level(logging.WARNING, logger="fastapi_graph"):
            (status,) = graph.status()
            assert (status.name, status.state, status.error) == (cls.name, "running", "")
            journal.add("sick")
            await state_is(graph, "unhealthy")
            (status,) = graph.status()
            assert "out of memory" in status.error
            assert await graph.handle.remote() == "answered"
            await asyncio.sleep(0.05)  # several more periods
            assert caplog.text.count("out of memory\n") == 1
            journal.path.unlink()
            await state_is(graph, "running")
    assert "healthy again" in caplog.text
    assert graph.status()[0].state == "stopped"


async def state_is(graph: Graph, state: str) -> None:
    async with asyncio.timeout(5):
        while graph.status()[0].state != state:
            await asyncio.sleep(0.001)


async def test_a_check_that_hangs_is_a_start_error(serve: Serve) -> None:
    @deployment(health_check_timeout_s=0.02)
    class Hanging:
        async def check_health(self) -> None:
            await asyncio.sleep(60)

        def __call__(self) -> None: ...

    with pytest.raises(DeploymentStartError, match="Hanging") as caught:
        await serve(Hanging.bind()).start()
    assert isinstance(caught.value.__cause__, TimeoutError)


async def test_a_check_runs_after_reconfigure(journal: Journal, serve: Serve) -> None:
    @deployment(user_config="config")
    class Ordered:
        def __init__(self, journal: Journal) -> None:
            self.journal = journal
            journal.add("made")

        async def reconfigure(self, config: str) -> None:
            self.journal.add(config)

        def check_health(self) -> None:
            self.journal.add("checked")

        def __call__(self) -> None: ...

    async with serve(Ordered.bind(journal)):
        assert journal.read() == ["made", "config", "checked"]
