"""Responses: awaited, passed on, dropped, by the thousand."""

from __future__ import annotations

import asyncio
import gc
import logging
from typing import Any

import pytest

from fastapi_graph import (
    DeploymentHandle,
    DeploymentResponse,
    GraphDefinitionError,
    deployment,
)
from tests.contract.conftest import Serve
from tests.contract.probes import Gate, Journal, Worker

pytestmark = pytest.mark.anyio


@deployment
async def double(value: Any) -> Any:
    return value * 2


@deployment
def sync_double(value: Any) -> Any:
    return value * 2


@deployment
async def fail(message: str = "wrong") -> None:
    await asyncio.sleep(0)
    raise ValueError(message)


@deployment
async def fail_at_once(message: str = "wrong") -> None:
    raise ValueError(message)


@deployment
async def identity(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


@pytest.mark.parametrize("function", [double, sync_double])
async def test_await_once_twice_and_gather(function: Any, serve: Serve) -> None:
    async with serve(function.bind()) as graph:
        response = graph.handle.remote(2)
        assert isinstance(response, DeploymentResponse)
        assert await response == 4
        assert await response == 4
        assert response.done()
        assert await asyncio.gather(*(graph.handle.remote(n) for n in range(5))) == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("function", [fail, fail_at_once])
async def test_a_failure_is_raised_every_time(function: Any, serve: Serve) -> None:
    async with serve(function.bind()) as graph:
        response = graph.handle.remote()
        for _ in range(2):
            with pytest.raises(ValueError, match="wrong"):
                await response


async def test_a_call_starts_before_it_is_awaited(journal: Journal, serve: Serve) -> None:
    gate = Gate.bind()
    async with serve(Worker.bind(gate, journal)) as graph:
        response = graph.handle.work.remote("a")
        await journal.wait_for("start a")
        assert not response.done()
        await graph.handle_of(gate).open.remote()
        await journal.wait_for("end a")
        assert await response == "a"


async def test_unawaited_responses_are_arguments(serve: Serve) -> None:
    async with serve(identity.bind(double.bind(0), fail.bind(), sync_double.bind(0))) as graph:
        one, two = graph.handle_of("double"), graph.handle_of("sync_double")
        call = graph.handle_of("identity")
        args, kwargs = await call.remote(
            one.remote(1), [two.remote(2), (3,)], k={"a": [one.remote(two.remote(1))]}
        )
        assert args == (2, [4, (3,)])
        assert kwargs == {"k": {"a": [4]}}
        shared = one.remote(5)
        assert await call.remote(shared, [shared]) == ((10, [10]), {})
        with pytest.raises(ValueError, match="wrong"):
            await call.remote([graph.handle_of("fail").remote()])


async def test_an_unknown_method_is_an_error_at_once(serve: Serve) -> None:
    @deployment
    class Model:
        def forward(self) -> None: ...

    async with serve(Model.bind()) as graph:
        with pytest.raises(GraphDefinitionError, match=r"Model.*backward.*forward"):
            graph.handle.backward  # noqa: B018


async def test_handles_are_compared_by_what_they_call(serve: Serve) -> None:
    async with serve(double.bind()) as graph, serve(double.bind()) as other:
        assert graph.handle == graph.handle_of("double")
        assert len({graph.handle, graph.handle_of("double")}) == 1
        assert graph.handle != other.handle
        assert "double" in repr(graph.handle)


# Dropped


def test_a_dropped_response_completes_and_its_failure_is_logged(
    journal: Journal, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    @deployment
    async def late(gate: DeploymentHandle) -> None:
        await gate.wait.remote()
        journal.add("done")
        raise ValueError("nobody reads this")

    async def main(from_thread: bool) -> None:
        gate = Gate.bind()
        async with serve(identity.bind(late.bind(gate), gate)) as graph:
            if from_thread:
                await asyncio.to_thread(
                    lambda: graph.handle_of("late").remote(graph.handle_of(gate)) and None
                )
            else:
                graph.handle_of("late").remote(graph.handle_of(gate))
            gc.collect()
            await graph.handle_of(gate).open.remote()
            await journal.wait_for("done")
            await asyncio.sleep(0.01)
            gc.collect()
            await asyncio.sleep(0)

    for from_thread in (False, True):
        caplog.clear()
        journal.path.unlink(missing_ok=True)
        with caplog.at_level(logging.ERROR):
            asyncio.run(main(from_thread))
        assert "nobody reads this" in caplog.text
        assert "late" in caplog.text


def test_a_failure_that_was_read_is_not_logged(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with serve(fail.bind()) as graph:
            with pytest.raises(ValueError, match="wrong"):
                await graph.handle.remote()
            with pytest.raises(ValueError, match="wrong"):
                await asyncio.to_thread(lambda: graph.handle.remote().result())

            async def elsewhere() -> None:
                with pytest.raises(ValueError, match="wrong"):
                    await graph.handle.remote()

            await asyncio.to_thread(lambda: asyncio.run(elsewhere()))
        gc.collect()

    asyncio.run(main())
    assert not caplog.records


# Many


@pytest.mark.parametrize("function", [double, sync_double])
async def test_two_thousand_concurrent_calls(function: Any, serve: Serve) -> None:
    async with serve(function.bind()) as graph:
        responses = [graph.handle.remote(n) for n in range(2_000)]
        assert await asyncio.gather(*responses) == [2 * n for n in range(2_000)]


async def test_nested_synchronous_waits_do_not_starve_each_other(serve: Serve) -> None:
    @deployment(max_ongoing_requests=200)
    class Outer:
        def __init__(self, inner: DeploymentHandle, gate: DeploymentHandle) -> None:
            self.inner = inner
            self.gate = gate

        def __call__(self, value: int) -> int:
            self.gate.meet.remote(200).result(timeout_s=10)  # all hold a thread by now
            return self.inner.remote(value).result(timeout_s=10) + 1

    node = Outer.bind(sync_double.bind(), Gate.bind())
    async with serve(node) as graph:
        from concurrent.futures import ThreadPoolExecutor

        def call(value: int) -> int:
            return graph.handle.remote(value).result(timeout_s=10)

        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(200) as pool:
            results = await asyncio.gather(
                *(loop.run_in_executor(pool, call, n) for n in range(200))
            )
    assert results == [2 * n + 1 for n in range(200)]
