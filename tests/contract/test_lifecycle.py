"""Start and stop: counted, repeated, on new loops, under names."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fastapi_graph import (
    BackendError,
    GraphNotStartedError,
    InputNode,
    deployment,
)
from tests.contract.conftest import Serve
from tests.contract.probes import Gate, Journal


@deployment
class Counted:
    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        journal.add("made")

    async def __call__(self, value: int) -> int:
        return value * 2

    def close(self) -> None:
        self.journal.add("closed")


@deployment
async def double(value: int) -> int:
    return value * 2


@pytest.mark.anyio
async def test_starts_are_counted(journal: Journal, serve: Serve) -> None:
    graph = serve(Counted.bind(journal))
    async with graph:
        async with graph:
            assert await graph.handle.remote(1) == 2
        assert await graph.handle.remote(1) == 2
        assert journal.read() == ["made"]
    assert journal.read() == ["made", "closed"]
    with pytest.raises(GraphNotStartedError):
        await graph.handle.remote(1)


@pytest.mark.anyio
async def test_concurrent_starts_are_one(journal: Journal, serve: Serve) -> None:
    graph = serve(Counted.bind(journal))
    await asyncio.gather(*(graph.start() for _ in range(5)))
    assert journal.read() == ["made"]
    await asyncio.gather(*(graph.stop() for _ in range(4)))
    assert journal.read() == ["made"]
    assert await graph.handle.remote(1) == 2
    await graph.stop()
    assert journal.read() == ["made", "closed"]


@pytest.mark.anyio
async def test_one_stop_more_than_starts_does_nothing(journal: Journal, serve: Serve) -> None:
    graph = serve(Counted.bind(journal))
    await graph.stop()
    async with graph:
        pass
    await graph.stop()
    async with graph:
        assert await graph.handle.remote(1) == 2
    assert journal.read() == ["made", "closed"] * 2


@pytest.mark.anyio
async def test_handles_of_before_work_after_a_restart(journal: Journal, serve: Serve) -> None:
    graph = serve(Counted.bind(journal))
    handle = graph.handle
    for _ in range(3):
        with pytest.raises(GraphNotStartedError):
            handle.remote(1)
        async with graph:
            assert await handle.remote(1) == 2
            assert graph.handle == handle
    assert journal.read() == ["made", "closed"] * 3


def test_on_a_new_event_loop(journal: Journal, serve: Serve) -> None:
    graph = serve(Counted.bind(journal))

    async def main() -> Any:
        async with graph:
            return await graph.handle.remote(1)

    assert [asyncio.run(main()), asyncio.run(main())] == [2, 2]
    assert journal.read() == ["made", "closed"] * 2


def test_after_a_loop_that_ended_without_stopping_it(journal: Journal, serve: Serve) -> None:
    graph = serve(Counted.bind(journal), name="abandoned")
    asyncio.run(graph.start())
    with pytest.raises(GraphNotStartedError):
        graph.handle.remote(1)

    async def main() -> Any:
        with pytest.raises(GraphNotStartedError):
            await graph.handle.remote(1)
        async with graph:
            return await graph.handle.remote(1)

    assert asyncio.run(main()) == 2
    assert journal.count("made") == 2


@pytest.mark.anyio
async def test_starting_on_another_running_loop_is_an_error(serve: Serve) -> None:
    async with serve(double.bind(), name="here") as graph:

        def elsewhere() -> None:
            with pytest.raises(BackendError, match=r"'here' runs on another event loop"):
                asyncio.run(graph.start())

        await asyncio.to_thread(elsewhere)
        assert await graph.handle.remote(1) == 2


@pytest.mark.anyio
async def test_the_error_of_an_unstarted_graph_names_the_remedies(serve: Serve) -> None:
    graph = serve(double.bind(), name="unstarted")
    for call in (
        lambda: graph.handle.remote(1),
        lambda: graph.handle_of("double").remote(1),
        lambda: asyncio.to_thread(graph.handle.remote, 1),
    ):
        with pytest.raises(GraphNotStartedError, match=r"'unstarted' is not started") as caught:
            await call()
        for remedy in ("lifespan", "with TestClient(app)", "async with graph"):
            assert remedy in str(caught.value)


@pytest.mark.anyio
async def test_a_sub_graph_of_an_unstarted_graph(serve: Serve) -> None:
    with InputNode() as x:
        graph = serve(double.bind(double.bind(x)))
    with pytest.raises(GraphNotStartedError):
        await graph.handle.remote(1)


@pytest.mark.anyio
async def test_the_lifespan_starts_and_stops(journal: Journal, serve: Serve) -> None:
    graph = serve(Counted.bind(journal), name="spanned")
    async with graph.lifespan() as state:
        assert list(state.values()) == [graph]
        assert all("spanned" in key for key in state)
        assert await graph.handle.remote(1) == 2
    assert journal.read() == ["made", "closed"]


@pytest.mark.anyio
async def test_an_error_in_the_body_stops_it(journal: Journal, serve: Serve) -> None:
    graph = serve(Counted.bind(journal))
    with pytest.raises(KeyError):
        async with graph:
            raise KeyError
    assert journal.read() == ["made", "closed"]


# Names


@pytest.mark.anyio
async def test_an_explicit_name_is_taken_while_it_runs(serve: Serve) -> None:
    first, second = serve(double.bind(), name="same"), serve(double.bind(), name="same")
    async with first:
        with pytest.raises(BackendError, match=r"another running graph is named 'same'.*name="):
            await second.start()
        assert {status.state for status in second.status()} == {"stopped"}
        assert await first.handle.remote(1) == 2
    async with second:
        assert await second.handle.remote(1) == 2
        with pytest.raises(BackendError, match="'same'"):
            await first.start()


@pytest.mark.anyio
async def test_a_default_name_is_that_of_the_root_and_numbered(serve: Serve) -> None:
    graphs = [serve(double.bind()) for _ in range(3)]
    assert {graph.name for graph in graphs} == {f"{__name__}.double"}
    async with graphs[0], graphs[1], graphs[2]:
        names = [graph.name for graph in graphs]
        assert names == [f"{__name__}.double{suffix}" for suffix in ("", "_1", "_2")]
        assert await asyncio.gather(*(graph.handle.remote(1) for graph in graphs)) == [2] * 3
    async with graphs[2]:
        assert graphs[2].name == f"{__name__}.double"


@pytest.mark.anyio
async def test_a_default_name_gives_way_to_an_explicit_one(serve: Serve) -> None:
    with InputNode() as x:
        explicit = serve(double.bind(x), name=f"{__name__}.double")
        default = serve(double.bind(x))
    async with explicit, default:
        assert explicit.name == f"{__name__}.double"
        assert default.name == f"{__name__}.double_1"


@pytest.mark.anyio
async def test_the_name_of_a_graph_that_ends_in_a_method_or_a_part(serve: Serve) -> None:
    node = Gate.bind()
    assert serve(node.wait.bind()).name == "tests.contract.probes.Gate"
    assert serve(double.bind(1)).name == f"{__name__}.double"
    assert serve(double.options(name="scaler").bind(1)).name == f"{__name__}.scaler"


@pytest.mark.anyio
async def test_a_graph_that_did_not_start_frees_its_name(serve: Serve) -> None:
    @deployment
    class Fails:
        def __init__(self) -> None:
            raise LookupError

        def __call__(self) -> None: ...

    for _ in range(2):
        with pytest.raises(BackendError, match="Fails"):
            await serve(Fails.bind(), name="free").start()
    async with serve(double.bind(), name="free") as graph:
        assert await graph.handle.remote(1) == 2
