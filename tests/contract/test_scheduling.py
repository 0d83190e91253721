"""What runs, how often, side by side with what, and what ends it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fastapi_graph import DeploymentHandle, InputNode, deployment
from tests.contract.conftest import Serve
from tests.contract.probes import Gate, Journal

pytestmark = pytest.mark.anyio


@deployment
async def note(journal: Journal, name: str, *after: Any) -> str:
    journal.add(name)
    return name


@deployment
def sync_meet(gate: DeploymentHandle, parties: int, *after: Any) -> str:
    gate.meet.remote(parties).result(timeout_s=5)
    return "met"


@deployment
async def async_meet(gate: DeploymentHandle, parties: int, *after: Any) -> str:
    await gate.meet.remote(parties)
    return "met"


@deployment
def collect(*values: Any) -> list[Any]:
    return list(values)


async def test_a_shared_node_runs_once_per_request(journal: Journal, serve: Serve) -> None:
    with InputNode() as x:
        shared = note.bind(journal, "shared", x)
        left = note.bind(journal, "left", shared)
        dag = collect.bind(left, note.bind(journal, "right", [shared], shared), shared, shared)
    async with serve(dag) as graph:
        assert await graph.handle.remote(1) == ["left", "right", "shared", "shared"]
        assert sorted(journal.read()) == ["left", "right", "shared"]
        await graph.handle.remote(1)
        assert journal.count("shared") == 2


async def test_what_the_output_does_not_need_does_not_run(journal: Journal, serve: Serve) -> None:
    @deployment
    class Model:
        async def note(self, journal: Journal, name: str) -> str:
            journal.add(name)
            return name

    with InputNode() as x:
        model = Model.bind()
        model.note.bind(journal, "earlier")
        needed = model.note.bind(journal, "needed")
        note.bind(journal, "consumer of needed", needed)
        dag = collect.bind(needed, x)
    async with serve(dag) as graph:
        await graph.handle.remote(1)
    assert journal.read() == ["needed"]


@pytest.mark.parametrize("meet", [sync_meet, async_meet])
async def test_independent_nodes_overlap(meet: Any, serve: Serve) -> None:
    gate = Gate.bind()
    with InputNode() as x:
        dag = collect.bind(*(meet.bind(gate, 4, x) for _ in range(4)))
    async with serve(dag) as graph:
        assert await graph.handle.remote(1) == ["met"] * 4


async def test_sync_and_async_nodes_overlap(serve: Serve) -> None:
    gate = Gate.bind()
    dag = collect.bind(
        sync_meet.bind(gate, 3), [async_meet.bind(gate, 3)], async_meet.bind(gate, 3)
    )
    async with serve(dag) as graph:
        assert await graph.handle.remote() == ["met", ["met"], "met"]


async def test_nodes_that_follow_one_node_overlap(serve: Serve) -> None:
    gate = Gate.bind()
    with InputNode() as x:
        first = collect.bind(x)
        dag = collect.bind(*(async_meet.bind(gate, 3, first) for _ in range(3)))
    async with serve(dag) as graph:
        assert await graph.handle.remote(1) == ["met"] * 3


async def test_a_branch_does_not_wait_for_the_level_of_another(serve: Serve) -> None:
    # The third node of the long branch meets the first of the short one.
    gate = Gate.bind()
    with InputNode() as x:
        long = async_meet.bind(gate, 2, collect.bind(collect.bind(x)))
        dag = collect.bind(async_meet.bind(gate, 2, x), long)
    async with serve(dag) as graph:
        assert await graph.handle.remote(1) == ["met", "met"]


async def test_branches_within_branches_overlap(serve: Serve) -> None:
    gate = Gate.bind()
    with InputNode() as x:
        groups = []
        for _ in range(3):
            first = collect.bind(x)
            groups.append(collect.bind(*(async_meet.bind(gate, 9, first) for _ in range(3))))
        dag = collect.bind(*groups)
    async with serve(dag) as graph:
        assert await graph.handle.remote(1) == [["met"] * 3] * 3


async def test_requests_overlap(serve: Serve) -> None:
    with InputNode() as x:
        dag = async_meet.bind(Gate.bind(), 5, x)
    async with serve(dag) as graph:
        assert await asyncio.gather(*(graph.handle.remote(n) for n in range(5))) == ["met"] * 5


class BoomError(Exception):
    pass


@deployment
async def fail_after(gate: DeploymentHandle, parties: int, message: str) -> None:
    await gate.arrived.remote(parties)
    raise BoomError(message)


@deployment
async def linger(gate: DeploymentHandle, journal: Journal, fails: bool = False) -> None:
    """Wait for ever; when cancelled, take a while to clean up."""
    try:
        await gate.meet.remote(1_000)
    finally:
        journal.add("cleaning")
        for _ in range(10):
            await asyncio.sleep(0)
        journal.add("cleaned")
        if fails:
            raise ValueError("while cleaning")


@pytest.mark.parametrize("cleaning_fails", [False, True])
async def test_the_first_failure_cancels_the_rest_and_waits_for_it(
    cleaning_fails: bool, journal: Journal, serve: Serve
) -> None:
    gate = Gate.bind()
    dag = collect.bind(
        linger.bind(gate, journal, cleaning_fails),
        fail_after.bind(gate, 2, "first"),
        note.bind(journal, "never", linger.bind(gate, journal)),
    )
    async with serve(dag) as graph:
        with pytest.raises(BoomError, match="first"):
            await graph.handle.remote()
        assert sorted(journal.read()) == ["cleaned", "cleaned", "cleaning", "cleaning"]


async def test_after_a_failure_nothing_else_starts(journal: Journal, serve: Serve) -> None:
    @deployment
    async def fail() -> None:
        raise BoomError

    dag = collect.bind(
        fail.bind(),
        note.bind(journal, "follows", fail.bind()),
        note.bind(journal, "follows", collect.bind(fail.bind())),
    )
    async with serve(dag) as graph:
        with pytest.raises(BoomError):
            await graph.handle.remote()
    assert "follows" not in journal.read()


async def test_a_failure_is_of_one_request_only(serve: Serve) -> None:
    @deployment
    async def positive(value: int) -> int:
        await asyncio.sleep(0)
        if value < 0:
            raise BoomError(value)
        return value

    with InputNode() as x:
        dag = collect.bind(positive.bind(x), positive.bind(x))
    async with serve(dag) as graph:
        results = await asyncio.gather(
            *(graph.handle.remote(n) for n in (1, -2, 3)), return_exceptions=True
        )
    assert results[0] == [1, 1]
    assert isinstance(results[1], BoomError)
    assert results[2] == [3, 3]


async def test_cancelling_the_request_cancels_its_nodes_and_waits(
    journal: Journal, serve: Serve
) -> None:
    gate = Gate.bind()
    dag = collect.bind(linger.bind(gate, journal), linger.bind(gate, journal))
    async with serve(dag) as graph:
        response = graph.handle.remote()
        await graph.handle_of(gate).arrived.remote(2)
        response.cancel()
        with pytest.raises(asyncio.CancelledError):
            await response
        assert journal.count("cleaned") == 2


async def test_deployments_are_numbered_in_depth_first_argument_order(serve: Serve) -> None:
    @deployment
    class Model:
        def __init__(self, number: int) -> None:
            self.number = number

        def get(self, *after: Any) -> int:
            return self.number

    inner = collect.bind(Model.bind(0).get.bind(Model.bind(1).get.bind()))
    dag = collect.bind(
        inner, Model.options(name="named").bind(2).get.bind(), Model.bind(3).get.bind()
    )
    async with serve(dag) as graph:
        for name, number in (("Model", 0), ("Model_1", 1), ("named", 2), ("Model_2", 3)):
            assert await graph.handle_of(name).get.remote() == number
        names = {status.name for status in graph.status()}
    assert names == {"Model", "Model_1", "Model_2", "named", "collect", "collect_1"}
