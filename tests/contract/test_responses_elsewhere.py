"""Responses waited for in threads and on other event loops; never a deadlock."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fastapi_graph import (
    DeadlockError,
    DeploymentHandle,
    DeploymentResponse,
    GraphSettings,
    ResponseTimeoutError,
    deployment,
)
from tests.contract.conftest import Serve
from tests.contract.probes import Gate, Journal, Worker

pytestmark = pytest.mark.anyio


@deployment
async def double(value: Any) -> Any:
    return value * 2


@deployment
async def fail(message: str = "wrong") -> None:
    await asyncio.sleep(0)
    raise ValueError(message)


@deployment
async def identity(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


async def test_result_in_a_thread(serve: Serve) -> None:
    async with serve(double.bind()) as graph:
        response = await asyncio.to_thread(graph.handle.remote, 1)
        assert isinstance(response, DeploymentResponse)
        assert await asyncio.to_thread(response.result) == 2
        assert await asyncio.to_thread(response.result, timeout_s=1) == 2
        assert await response == 2


async def test_a_response_of_the_loop_may_be_waited_for_in_a_thread(
    journal: Journal, serve: Serve
) -> None:
    gate = Gate.bind()
    async with serve(Worker.bind(gate, journal)) as graph:
        response = graph.handle.work.remote("a")
        waiting = asyncio.create_task(asyncio.to_thread(response.result))
        await graph.handle_of(gate).open.remote()
        assert await waiting == "a"
        assert response.result() == "a"  # it is done, so this does not block


async def test_result_times_out_and_the_call_goes_on(journal: Journal, serve: Serve) -> None:
    gate = Gate.bind()
    async with serve(Worker.bind(gate, journal)) as graph:

        def in_thread() -> DeploymentResponse:
            response = graph.handle.work.remote("a")
            with pytest.raises(ResponseTimeoutError, match=r"Worker.*0\.01"):
                response.result(timeout_s=0.01)
            return response

        response = await asyncio.to_thread(in_thread)
        await graph.handle_of(gate).open.remote()
        assert await response == "a"
    assert journal.read() == ["start a", "end a"]


async def test_a_timeout_error_of_the_user_is_no_response_timeout(serve: Serve) -> None:
    @deployment
    async def time_out() -> None:
        raise TimeoutError("the user's own")

    async with serve(time_out.bind()) as graph:
        with pytest.raises(TimeoutError, match="the user's own") as caught:
            await asyncio.to_thread(lambda: graph.handle.remote().result(timeout_s=5))
    assert type(caught.value) is TimeoutError


async def test_from_another_event_loop(serve: Serve) -> None:
    async with serve(identity.bind(double.bind(0), fail.bind())) as graph:
        mine = graph.handle_of("double").remote(10)

        async def main() -> Any:
            handle = graph.handle_of("double")
            assert isinstance(handle.remote(1), DeploymentResponse)
            with pytest.raises(ValueError, match="wrong"):
                await graph.handle_of("fail").remote()
            first = handle.remote(1)
            nested = handle.remote(handle.remote(2))
            return await first, await first, await nested, await mine

        assert await asyncio.to_thread(lambda: asyncio.run(main())) == (2, 2, 8, 20)


async def test_a_response_may_be_awaited_in_another_thread_than_it_was_made_in(
    serve: Serve,
) -> None:
    async with serve(double.bind()) as graph:

        def make() -> DeploymentResponse:
            return graph.handle.remote(4)

        response = await asyncio.to_thread(make)

        async def main() -> Any:
            return await response

        assert await asyncio.to_thread(lambda: asyncio.run(main())) == 8


async def test_waiting_on_the_loop_that_computes_is_an_error(
    journal: Journal, serve: Serve
) -> None:
    gate = Gate.bind()
    async with serve(Worker.bind(gate, journal)) as graph:
        of_loop = graph.handle.work.remote("a")
        of_thread = await asyncio.to_thread(graph.handle.work.remote, "b")
        for response in (of_loop, of_thread):
            with pytest.raises(DeadlockError, match=r"Worker.*await"):
                response.result(timeout_s=0.1)
        await graph.handle_of(gate).open.remote()
        assert [await of_loop, await of_thread] == ["a", "b"]


async def test_waiting_in_an_async_node_is_an_error(
    in_process: GraphSettings, serve: Serve
) -> None:
    @deployment
    async def blocks(handle: DeploymentHandle) -> Any:
        return handle.wait.remote().result()

    gate = Gate.bind()
    async with serve(blocks.bind(gate)) as graph:
        with pytest.raises(DeadlockError):
            await graph.handle.remote()
        await graph.handle_of(gate).open.remote()
