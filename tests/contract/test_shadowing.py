"""shadow: one deployment answers, another one gets copies, and that changes nothing else."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from fastapi_graph import DeploymentHandle, Graph, GraphSettings, InputNode, deployment, shadow
from tests.contract.conftest import Serve
from tests.contract.probes import PATIENCE_S, Journal

pytestmark = pytest.mark.anyio


@deployment
class Answering:
    async def predict(self, value: Any) -> Any:
        return value

    async def change(self, values: list[int]) -> list[int]:
        values.append(0)
        return values

    async def items(self, count: int) -> AsyncIterator[int]:
        for number in range(count):
            yield number

    async def wait(self, journal: Journal) -> None:
        journal.add("primary waits")
        await asyncio.sleep(PATIENCE_S)


@deployment
class Copied:
    """Notes the calls it gets; those of `hold` go on until the journal says `open`."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal

    async def predict(self, value: Any) -> Any:
        self.journal.add(f"copy {value}")
        return "of the copy"

    async def change(self, values: list[int]) -> None:
        self.journal.add(f"copy {values}")

    def items(self, count: int) -> Iterator[int]:
        for number in range(count):
            self.journal.add(f"item {number}")
            yield -number

    async def wait(self, journal: Journal) -> None:
        self.journal.add("copy waits")
        await self.journal.wait_for("open")
        self.journal.add("copy done")


@deployment
class Holding:
    def __init__(self, journal: Journal) -> None:
        self.journal = journal

    async def predict(self, value: Any) -> None:
        self.journal.add(f"begin {value}")
        await self.journal.wait_for("open")
        self.journal.add(f"end {value}")


@deployment
class Failing:
    async def predict(self, value: Any) -> None:
        raise ZeroDivisionError("in the shadow")


class Panic(BaseException):
    """What an extension module may raise."""


@deployment
class Escaping:
    async def predict(self, value: type[BaseException]) -> None:
        raise value

    async def items(self, count: int) -> AsyncIterator[int]:
        for number in itertools.count():
            yield number


@deployment
class Asking:
    def __init__(self, model: DeploymentHandle) -> None:
        self.model = model

    async def ask(self, value: Any) -> Any:
        return await self.model.predict.remote(value)


async def settled(graph: Graph, node: Any, **traffic: int) -> None:
    """Wait until the shadow has counted these, and no others."""
    wanted = {"copied": 0, "failed": 0, "dropped": 0, **traffic}
    async with asyncio.timeout(PATIENCE_S):
        while graph.traffic(node) != wanted:  # noqa: ASYNC110 - a counter is no event
            await asyncio.sleep(0.001)


async def test_one_answers_and_the_other_gets_a_copy(journal: Journal, serve: Serve) -> None:
    model = shadow(Answering.bind(), Copied.bind(journal))
    with InputNode() as x:
        dag = model.predict.bind(x)
    async with serve(dag) as graph:
        assert [await graph.handle.remote(n) for n in range(3)] == [0, 1, 2]
        assert await graph.handle_of(model).predict.remote(value=3) == 3
        for number in range(4):
            await journal.wait_for(f"copy {number}")
        assert graph.traffic(model) == {"copied": 4, "failed": 0, "dropped": 0}
    assert sorted(journal.read()) == [f"copy {n}" for n in range(4)]


async def test_only_a_share_is_copied(journal: Journal, serve: Serve) -> None:
    model = shadow(Answering.bind(), Copied.bind(journal), share=0.25)
    async with serve(model) as graph:
        await asyncio.gather(*(graph.handle.predict.remote(n) for n in range(400)))
        copied = graph.traffic(model)["copied"]
    assert 60 < copied < 140  # within 4.6 standard deviations
    assert len(journal.read()) == copied


async def test_a_failure_is_counted_and_said_in_a_whisper(
    caplog: pytest.LogCaptureFixture, serve: Serve
) -> None:
    model = shadow(Answering.bind(), Failing.bind())
    caplog.set_level(logging.DEBUG, "fastapi_graph")
    async with serve(model) as graph:
        assert await graph.handle.predict.remote(1) == 1
        await settled(graph, model, copied=1, failed=1)
    (record,) = (record for record in caplog.records if "in the shadow" in record.getMessage())
    assert record.levelno == logging.DEBUG
    assert "shadow(Answering, Failing)" in record.getMessage()


@pytest.mark.usefixtures("in_process")  # on Ray it ends the process of the replica alone
async def test_even_system_exit_is_only_a_failure(serve: Serve) -> None:
    @deployment
    class Leaving:
        async def predict(self, value: Any) -> None:
            raise SystemExit

    model = shadow(Answering.bind(), Leaving.bind())
    async with serve(model) as graph:
        assert await graph.handle.predict.remote(1) == 1
        await settled(graph, model, copied=1, failed=1)


@pytest.mark.parametrize("kind", [Panic, asyncio.CancelledError])
async def test_so_is_what_is_no_exception(kind: type[BaseException], serve: Serve) -> None:
    model = shadow(Answering.bind(), Escaping.bind())
    async with serve(model) as graph:
        assert await graph.handle.predict.remote(kind) is kind
        await settled(graph, model, copied=1, failed=1)


@pytest.mark.usefixtures("in_process")
async def test_a_stream_without_end_lets_others_run(serve: Serve) -> None:
    model = shadow(Answering.bind(), Escaping.options(graceful_shutdown_timeout_s=0.1).bind())
    async with serve(model) as graph:
        assert [item async for item in graph.handle.items.remote(2)] == [0, 1]
        for _ in range(20):
            async with asyncio.timeout(1):
                assert await graph.handle.predict.remote(1) == 1


async def test_one_that_dies_takes_nothing_along(backend: GraphSettings, serve: Serve) -> None:
    if backend.backend != "ray":
        pytest.skip("it would be the process of the test")

    @deployment(max_retries=0)
    class Dying:
        async def predict(self, value: Any) -> None:
            os._exit(1)

    model = shadow(Answering.bind(), Dying.bind())
    async with serve(model) as graph:
        for number in range(3):
            assert await graph.handle.predict.remote(number) == number
        await settled(graph, model, copied=3, failed=3)


async def test_a_slow_one_is_not_waited_for(journal: Journal, serve: Serve) -> None:
    model = shadow(Answering.bind(), Holding.bind(journal))
    async with serve(model) as graph:
        assert await graph.handle.predict.remote(1) == 1
        await journal.wait_for("begin 1")
        assert journal.read() == ["begin 1"]
        journal.add("open")
        await journal.wait_for("end 1")


async def test_there_is_a_bound(journal: Journal, serve: Serve) -> None:
    model = shadow(Answering.bind(), Holding.bind(journal), max_ongoing_requests=2)
    async with serve(model) as graph:
        assert [await graph.handle.predict.remote(n) for n in range(5)] == list(range(5))
        assert graph.traffic(model) == {"copied": 2, "failed": 0, "dropped": 3}
        journal.add("open")
        await journal.wait_for("end 0")
        await journal.wait_for("end 1")
        while graph.traffic(model)["copied"] < 3:  # there is room again
            await graph.handle.predict.remote("again")
    assert not [line for line in journal.read() if line in {"begin 2", "begin 3", "begin 4"}]


async def test_one_at_its_limits_loses_copies_only(journal: Journal, serve: Serve) -> None:
    limited = Holding.options(max_ongoing_requests=1, max_queued_requests=0)
    model = shadow(Answering.bind(), limited.bind(journal))
    async with serve(model) as graph:
        assert await graph.handle.predict.remote(0) == 0
        await journal.wait_for("begin 0")
        assert await graph.handle.predict.remote(1) == 1
        await settled(graph, model, copied=2, dropped=1)
        journal.add("open")
        await journal.wait_for("end 0")
    assert "begin 1" not in journal.read()


async def test_what_cannot_be_pickled_is_not_copied(
    backend: GraphSettings, journal: Journal, serve: Serve
) -> None:
    if backend.backend != "inprocess" or backend.serialize:
        pytest.skip("nothing gets anywhere without being pickled")
    model = shadow(Answering.bind(), Copied.bind(journal))
    async with serve(model) as graph:
        lock = threading.Lock()
        assert await graph.handle.predict.remote(lock) is lock
        assert graph.traffic(model) == {"copied": 0, "failed": 1, "dropped": 0}
    assert journal.read() == []


async def test_what_the_first_does_to_an_argument_stays_with_it(
    journal: Journal, serve: Serve
) -> None:
    model = shadow(Answering.bind(), Copied.bind(journal))
    async with serve(model) as graph:
        assert await graph.handle.change.remote([1]) == [1, 0]
        await journal.wait_for("copy [1]")


async def test_a_stream_is_read_to_its_end_by_nobody(journal: Journal, serve: Serve) -> None:
    model = shadow(Answering.bind(), Copied.bind(journal))
    async with serve(model) as graph:
        assert [item async for item in graph.handle.items.remote(3)] == [0, 1, 2]
        await journal.wait_for("item 2")
        stream = graph.handle.items.remote(5)
        assert await anext(stream) == 0
        await stream.aclose()  # of the first only
        await journal.wait_for("item 4")


async def test_a_cancelled_request_leaves_its_copy(journal: Journal, serve: Serve) -> None:
    model = shadow(Answering.bind(), Copied.bind(journal))
    with InputNode() as x:
        dag = model.wait.bind(x)
    async with serve(dag) as graph:
        response = graph.handle.remote(journal)
        await journal.wait_for("primary waits")
        await journal.wait_for("copy waits")
        response.cancel()
        with pytest.raises(asyncio.CancelledError):
            await response
        journal.add("open")
        await journal.wait_for("copy done")


@pytest.mark.parametrize("nested", [True, False])
async def test_a_graph_that_stops_waits_for_copies(
    nested: bool, journal: Journal, serve: Serve
) -> None:
    model = shadow(Answering.bind(), Holding.bind(journal))
    with InputNode() as x:
        dag = Asking.bind(model).ask.bind(x) if nested else model.predict.bind(x)
    graph = serve(dag)
    await graph.start()
    assert await graph.handle.remote(1) == 1
    await journal.wait_for("begin 1")
    stopping = asyncio.create_task(graph.stop())
    await asyncio.sleep(0.1)
    assert not stopping.done()
    journal.add("open")
    await stopping
    assert journal.read()[-1] == "end 1"


async def test_a_graph_that_stops_does_not_wait_for_ever(journal: Journal, serve: Serve) -> None:
    impatient = {"graceful_shutdown_timeout_s": 0.1}
    model = shadow(
        Answering.options(**impatient).bind(), Holding.options(**impatient).bind(journal)
    )
    async with serve(model) as graph:
        assert await graph.handle.predict.remote(1) == 1
        await journal.wait_for("begin 1")
    assert "end 1" not in journal.read()


async def test_a_fallback_of_the_copy_is_no_news_of_the_answer(
    journal: Journal, serve: Serve
) -> None:
    @deployment(fallback="instead")
    class Broken:
        def __init__(self, journal: Journal) -> None:
            self.journal = journal

        async def predict(self, value: Any) -> Any:
            self.journal.add("copy")
            raise ConnectionError

    @deployment
    class Slow:
        def __init__(self, journal: Journal) -> None:
            self.journal = journal

        async def predict(self, value: Any) -> Any:
            await self.journal.wait_for("copy")
            await asyncio.sleep(0.05)
            return value

    async with serve(shadow(Slow.bind(journal), Broken.bind(journal))) as graph:
        response = graph.handle.predict.remote(1)
        assert await response == 1
        assert response.degraded == ()
