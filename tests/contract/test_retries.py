"""Retries and hedges: a call that is made again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from fastapi_graph import (
    Cache,
    DeadlineExceededError,
    DeploymentHandle,
    GraphSettings,
    InputNode,
    OptionError,
    deployment,
    get_request_context,
)
from tests.contract.conftest import Serve
from tests.contract.probes import Journal, idle

pytestmark = pytest.mark.anyio


class Flaky:
    """Fails some times before it answers."""

    def __init__(self, journal: Journal, failures: int) -> None:
        self.journal = journal
        self.failures = failures

    async def __call__(self, name: str) -> str:
        attempt = get_request_context().attempt
        self.journal.add(f"{name} {attempt}")
        if attempt <= self.failures:
            raise ConnectionError(name)
        return f"{name} at {attempt}"

    def sync(self, name: str) -> str:
        return asyncio.run(self(name))

    async def items(self, name: str, fail_at: int) -> AsyncIterator[int]:
        attempt = get_request_context().attempt
        self.journal.add(f"{name} {attempt}")
        for number in range(3):
            if number == fail_at and attempt <= self.failures:
                raise ConnectionError(name)
            yield number


@pytest.mark.parametrize("method", ["__call__", "sync"])
async def test_retry_on(method: str, journal: Journal, serve: Serve) -> None:
    flaky = deployment(Flaky).options(retry_on=ConnectionError, retry_backoff_s=0.001)
    node = flaky.bind(journal, 2)
    with InputNode() as x:
        dag = getattr(node, method).bind(x)
    async with serve(dag) as graph:
        assert await graph.handle.remote("a") == "a at 3"
        handle = graph.handle_of(node).options(method_name=method)
        assert await handle.remote("b") == "b at 3"
        assert graph.status()[0].counts["retries"] == 4
    assert journal.read() == ["a 1", "a 2", "a 3", "b 1", "b 2", "b 3"]


async def test_retries_end(journal: Journal, serve: Serve) -> None:
    node = deployment(Flaky).options(retry_on=[OSError], retry_backoff_s=0).bind(journal, 9)
    async with serve(node) as graph:
        with pytest.raises(ConnectionError, match="a"):
            await graph.handle.remote("a")
        assert journal.read() == ["a 1", "a 2", "a 3"]
        once = graph.handle.options(max_retries=1)
        with pytest.raises(ConnectionError):
            await once.remote("b")
        assert journal.count("b 2") == 1
        assert journal.count("b 3") == 0


async def test_nothing_is_retried_unless_asked(journal: Journal, serve: Serve) -> None:
    async with serve(deployment(Flaky).bind(journal, 1)) as graph:
        with pytest.raises(ConnectionError):
            await graph.handle.remote("a")
        for other in (ValueError, (KeyError, TimeoutError)):
            with pytest.raises(ConnectionError):
                await graph.handle.options(retry_on=other).remote("a")
        assert journal.read() == ["a 1"] * 3
        retrying = graph.handle.options(retry_on=ConnectionError, retry_backoff_s=0)
        assert await retrying.remote("b") == "b at 2"


async def test_a_stream_is_retried_until_its_first_item(journal: Journal, serve: Serve) -> None:
    node = deployment(Flaky).options(retry_on=ConnectionError, retry_backoff_s=0).bind(journal, 1)
    async with serve(node) as graph:
        items = graph.handle.items.remote("a", 0)
        assert [item async for item in items] == [0, 1, 2]
        assert journal.read() == ["a 1", "a 2"]
        items = graph.handle.items.remote("b", 1)
        assert await anext(items) == 0
        with pytest.raises(ConnectionError):
            await anext(items)
        assert journal.count("b 2") == 0


async def test_a_stream_that_was_read_is_not_read_again(journal: Journal, serve: Serve) -> None:
    @deployment
    async def numbers(count: int) -> AsyncIterator[int]:
        for number in range(count):
            journal.add(f"number {number}")
            yield number

    @deployment(retry_on=ConnectionError, retry_backoff_s=0, cache=Cache(ttl_s=60))
    async def reads(items: AsyncIterator[int], fail: bool) -> int:
        async for item in items:
            if fail:
                raise ConnectionError(f"at {item}")
        return item

    with InputNode() as x:
        dag = reads.bind(numbers.bind(x[0]), x[1])
    async with serve(dag) as graph:
        with pytest.raises(ConnectionError, match="at 0"):
            await graph.handle.remote(3, True)
        assert journal.count("number 0") == 1
        for _ in range(2):
            assert await graph.handle.remote(3, False) == 2
        assert journal.count("number 0") == 3


async def test_an_iterator_is_not_read_again(
    journal: Journal, in_process: GraphSettings, serve: Serve
) -> None:
    if in_process.serialize:
        pytest.skip("it cannot be pickled")

    @deployment(retry_on=ConnectionError, retry_backoff_s=0, cache=Cache(ttl_s=60))
    async def total(numbers: Iterator[int]) -> int:
        journal.add("call")
        if next(numbers) == 1:
            raise ConnectionError
        return sum(numbers)

    async with serve(total.bind()) as graph:
        with pytest.raises(ConnectionError):
            await graph.handle.remote(iter([1, 2, 3]))
        assert await graph.handle.remote(number for number in (0, 2, 3)) == 5
        assert journal.count("call") == 2


async def test_many_retries_do_not_overflow(serve: Serve) -> None:
    @deployment(retry_on=ConnectionError, retry_backoff_s=0, max_retries=1100)
    async def never() -> None:
        raise ConnectionError

    async with serve(never.bind()) as graph:
        with pytest.raises(ConnectionError):
            await graph.handle.remote()


async def test_handles_with_equal_options_are_equal(serve: Serve) -> None:
    async with serve(short.bind()) as graph:
        one, other = (graph.handle.options(timeout_s=float("1.5")) for _ in range(2))
        assert one == other
        assert hash(one) == hash(other)
        assert one != graph.handle.options(timeout_s=2)


async def test_a_pause_past_the_deadline_is_not_made(
    journal: Journal, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.random", lambda: 0.5)
    options = {"retry_on": ConnectionError, "retry_backoff_s": 10.0, "timeout_s": 4.0}
    async with serve(deployment(Flaky).options(**options).bind(journal, 9)) as graph:
        with pytest.raises(ConnectionError):
            await graph.handle.remote("a")
    assert journal.read() == ["a 1"]


async def test_an_attempt_is_not_that_of_the_calls_below(journal: Journal, serve: Serve) -> None:
    @deployment(retry_on=ConnectionError, retry_backoff_s=0)
    class Outer:
        def __init__(self, inner: DeploymentHandle) -> None:
            self.inner = inner

        async def __call__(self, name: str) -> Any:
            answer = await self.inner.remote(name)
            if get_request_context().attempt == 1:
                raise ConnectionError
            return get_request_context().attempt, answer

    async with serve(Outer.bind(deployment(Flaky).bind(journal, 0))) as graph:
        assert await graph.handle.remote("a") == (2, "a at 1")


# Hedges


class Uneven:
    """Answers at once, but for the first call of all, which waits."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal

    async def __call__(self, name: str) -> str:
        context = get_request_context()
        first = not self.journal.read()
        self.journal.add(f"{name} {context.attempt}")
        if first:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.journal.add(f"{name} {context.attempt} cancelled")
                raise
        return context.replica


async def test_a_hedge_wins(journal: Journal, backend: GraphSettings, serve: Serve) -> None:
    uneven = deployment(Uneven).options(num_replicas=2, hedge_after_s=0.5)
    async with serve(uneven.bind(journal)) as graph:
        if backend.backend == "inprocess":  # one replica: there is no hedge
            slow = graph.handle.remote("a")
            await journal.wait_for("a 1")
            await asyncio.sleep(0.7)
            assert journal.read() == ["a 1"]
            slow.cancel()
            await asyncio.wait([slow])
            return
        await graph.handle.remote("a")
        await journal.wait_for("a 1 cancelled")
        assert journal.count("a 2") == 1
        assert graph.status()[0].counts["hedges"] == 1
        await graph.handle.remote("b")
        assert journal.count("b 2") == 0
        await idle(graph)


async def test_no_hedge_without_another_replica(
    journal: Journal, backend: GraphSettings, serve: Serve
) -> None:
    uneven = deployment(Uneven).options(hedge_after_s=0.05)
    async with serve(uneven.bind(journal)) as graph:
        with pytest.raises(DeadlineExceededError):
            await graph.handle.options(timeout_s=0.5).remote("a")
        assert journal.count("a 2") == 0
        assert "hedges" not in graph.status()[0].counts


@pytest.mark.parametrize(
    "options, message",
    [
        ({"retry_on": "ValueError"}, "retry_on"),
        ({"retry_on": BaseException}, "retry_on"),
        ({"retry_on": ValueError, "max_retries": 0}, "max_retries=0 allows none"),
        ({"hedge_after_s": 1, "max_retries": 0}, "hedge_after_s needs another attempt"),
        ({"hedge_after_s": 0}, "hedge_after_s"),
        ({"timeout_s": -1}, "timeout_s"),
        ({"retry_backoff_s": -1}, "retry_backoff_s"),
        ({"cache": 5}, "cache"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        deployment(Flaky).options(**options)


@deployment
async def short(name: str) -> str:
    return name[:1]


async def test_handle_options_that_cannot_be(serve: Serve) -> None:
    async with serve(short.bind()) as graph:
        with pytest.raises(OptionError, match="handle to short: option timeout_s=0"):
            graph.handle.options(timeout_s=0)
        with pytest.raises(OptionError, match="multiplexed_model_id=5 must be a string"):
            graph.handle.options(multiplexed_model_id=5)
        assert graph.handle.options(timeout_s=5) != graph.handle
        assert await graph.handle.options(timeout_s=5).remote("ab") == "a"
