"""A call that fails leaves no cycle: full collections stop everything that the loop does."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from fastapi_graph import (
    BackPressureError,
    DeploymentHandle,
    InputNode,
    deployment,
    graph_router,
)
from tests.contract.conftest import Serve

pytestmark = pytest.mark.anyio


class PlannedError(Exception):
    """What these deployments raise."""


@deployment(max_ongoing_requests=1, max_queued_requests=0)
class Failing:
    async def at_once(self, value: Any) -> None:
        raise PlannedError

    async def later(self, value: Any) -> None:
        await asyncio.sleep(0)
        raise PlannedError

    async def keep(self) -> None:
        await asyncio.sleep(60)


@deployment
async def passes(value: Any) -> Any:
    return value


@deployment
async def joins(*values: Any) -> Any:
    return values


@deployment
class Calls:
    def __init__(self, failing: DeploymentHandle) -> None:
        self.failing = failing

    async def __call__(self, value: Any) -> Any:
        return await self.failing.at_once.remote(value)


@pytest.fixture
def garbage() -> Iterator[list[Any]]:
    gc.collect()
    gc.disable()
    try:
        yield gc.garbage
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def errors_in(garbage: list[Any]) -> list[BaseException]:
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    gc.set_debug(0)
    return [thing for thing in garbage if isinstance(thing, BaseException)]


async def errors_left(
    handle: DeploymentHandle, kind: type[Exception], garbage: list[Any]
) -> list[BaseException]:
    for _ in range(2):  # what is made only once is left by the first
        errors_in(garbage)
        garbage.clear()
        for _ in range(5):
            with pytest.raises(kind):
                await handle.remote(1)
    return errors_in(garbage)


with InputNode() as value:
    FAILING = Failing.bind()
    DAGS = {
        "at once": FAILING.at_once.bind(value),
        "later": FAILING.later.bind(value),
        "chain": FAILING.later.bind(passes.bind(value)),
        "branches": joins.bind(passes.bind(value), FAILING.later.bind(value)),
        "nested": Calls.bind(FAILING).__call__.bind(value),
        "with a timeout": Failing.options(timeout_s=60).bind().later.bind(value),
    }


@pytest.mark.parametrize("name", DAGS)
async def test_what_raises(name: str, serve: Serve, garbage: list[Any]) -> None:
    async with serve(DAGS[name]) as graph:
        assert await errors_left(graph.handle, PlannedError, garbage) == []


async def test_what_is_refused(serve: Serve, garbage: list[Any]) -> None:
    async with serve(DAGS["at once"]) as graph:
        keeping = graph.handle_of(FAILING).keep.remote()
        await asyncio.sleep(0.1)
        assert await errors_left(graph.handle, BackPressureError, garbage) == []
        keeping.cancel()
        await asyncio.wait([keeping])


async def test_what_is_refused_over_http(serve: Serve, garbage: list[Any]) -> None:
    graph = serve(DAGS["at once"])
    app = FastAPI()
    app.include_router(graph_router(graph))
    async with app.router.lifespan_context(app):
        keeping = graph.handle_of(FAILING).keep.remote()
        await asyncio.sleep(0.1)
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://here"
        ) as client:
            for _ in range(2):
                errors_in(garbage)
                garbage.clear()
                assert [(await client.post("/", json=1)).status_code for _ in range(5)] == [503] * 5
            assert errors_in(garbage) == []
        keeping.cancel()
        await asyncio.wait([keeping])
