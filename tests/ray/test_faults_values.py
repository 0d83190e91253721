"""Values that cannot travel, and large ones, whose keepers die and whose callers leave."""

# ruff: noqa: ASYNC110 - what is polled is in another process

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from fastapi_graph import Graph, InputNode, deployment
from fastapi_graph.dataplane.segments import Segments
from fastapi_graph.errors import ReplicaLostError, SerializationError
from tests import cluster
from tests.contract.probes import Journal
from tests.ray.test_faults import CALLERS, Load, kill, pids_of, serve, until

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120), pytest.mark.usefixtures("ray_cluster")]

SIZE = 1 << 20  # numbers of four bytes: twice as much as rides the wire


def _rebuild(pid: int) -> Any:
    if os.getpid() != pid:
        raise OSError("only where it was made")
    return Homesick()


class Homesick:
    """It pickles, and unpickles in the process that made it only."""

    def __reduce__(self) -> Any:
        return _rebuild, (os.getpid(),)


@deployment
class Odd:
    """Has results that cannot travel, beside those that can."""

    async def __call__(self, value: int) -> int:
        await asyncio.sleep(0.02)
        return value

    async def homesick(self, *_: Any) -> Any:
        return Homesick()

    async def lock(self) -> Any:
        return [threading.Lock()]

    async def pid(self) -> int:
        return os.getpid()


async def test_values_that_cannot_travel_fail_their_own_call_only() -> None:
    node = Odd.bind()
    async with serve(node) as graph, Load(graph.handle, lambda number: number) as load:
        handle = graph.handle_of(node)
        before = await pids_of(handle, 1)
        for _ in range(3):
            with pytest.raises(
                SerializationError, match=r"Odd .*: the result cannot be unpickled: on"
            ):
                await handle.homesick.remote()
            with pytest.raises(SerializationError, match=r"Odd.*argument cannot be unpickled"):
                await handle.homesick.remote(Homesick())
            with pytest.raises(SerializationError, match=r"Odd.lock .*result cannot be pickled"):
                await handle.lock.remote()
            with pytest.raises(SerializationError, match=r"Odd .*an argument cannot be pickled"):
                await handle.remote(threading.Lock())
        await load.go_on()
        assert await pids_of(handle, 1) == before
        assert graph.status()[0].restarts == 0


@deployment
class Makes:
    """Makes a large value, which stays in its process until somebody wants it."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal

    async def __call__(self, value: int) -> Any:
        self.journal.add(f"made by {os.getpid()}")
        return np.full(SIZE, value, "int32")

    async def pid(self) -> int:
        return os.getpid()


@deployment
class Waits:
    """Runs beside the maker, for as long as the journal has not opened it."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal

    async def __call__(self, value: int) -> int:
        self.journal.add("waits")
        while value < 0 and not self.journal.count("open"):
            await asyncio.sleep(0.01)
        return value


@deployment
class Sums:
    async def __call__(self, large: Any, more: int) -> int:
        return int(large[0]) + int(large[-1]) + more


@deployment
class Scales:
    async def __call__(self, large: Any) -> Any:
        return large * 2


def through(journal: Journal, **options: Any) -> tuple[Any, Any]:
    """Return a graph that passes a large value on twice, and its maker."""
    maker = Makes.options(**options).bind(journal)
    with InputNode() as x:
        large = maker.__call__.bind(x)
        waited = Waits.bind(journal).__call__.bind(x)
        return Sums.bind().__call__.bind(Scales.bind().__call__.bind(large), waited), maker


def joined(journal: Journal, **options: Any) -> tuple[Any, Any]:
    """Return a graph that uses a large value after another node has ended, and its maker."""
    maker = Makes.options(**options).bind(journal)
    with InputNode() as x:
        large = maker.__call__.bind(x)
        return Sums.bind().__call__.bind(large, Waits.bind(journal).__call__.bind(x)), maker


WAYS = pytest.mark.parametrize("shared_memory", [False, True])


@WAYS
async def test_what_kept_a_value_is_killed(shared_memory: bool, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    dag, maker = joined(journal)
    async with serve(dag, shared_memory=shared_memory) as graph:
        (victim,) = await pids_of(graph.handle_of(maker), 1)
        calls = [graph.handle.remote(-number) for number in range(1, 5)]
        await journal.wait_for(f"made by {victim}", 4)
        await journal.wait_for("waits", 4)
        await asyncio.sleep(0.2)  # the answers are here, the values there
        kill(victim)
        await until(lambda: graph.status()[0].restarts or graph.status()[1].restarts)
        journal.add("open")
        assert [await call for call in calls] == [-3 * number for number in range(1, 5)]
        made = [line for line in journal.read() if line.startswith("made")]
        assert made.count(f"made by {victim}") == 4
        # What is in shared memory outlives who has written it.
        assert len(made) == (4 if shared_memory else 8)


@WAYS
async def test_what_kept_a_value_that_must_not_be_made_twice_is_killed(
    shared_memory: bool, tmp_path: Path
) -> None:
    journal = Journal(tmp_path / "journal")
    dag, maker = joined(journal, max_retries=0)
    async with serve(dag, shared_memory=shared_memory) as graph:
        (victim,) = await pids_of(graph.handle_of(maker), 1)
        call = graph.handle.remote(-1)
        await journal.wait_for(f"made by {victim}")
        await journal.wait_for("waits")
        await asyncio.sleep(0.2)
        kill(victim)
        journal.add("open")
        if shared_memory:
            assert await call == -3
        else:
            with pytest.raises(ReplicaLostError, match="the replica that kept its result was lost"):
                await call
        assert sum(line.startswith("made") for line in journal.read()) == 1


@deployment
class Prepared:
    """Writes every result into the same memory, as models with prepared outputs do."""

    def __init__(self) -> None:
        self.out = np.empty(SIZE * 4, "int32")

    async def __call__(self, number: int) -> Any:
        self.out[:] = number
        return self.out

    async def hang(self) -> None:
        time.sleep(2)  # noqa: ASYNC251 - as a model that computes does


@WAYS
async def test_a_node_may_use_its_output_again(shared_memory: bool) -> None:
    async with serve(Prepared.bind(), shared_memory=shared_memory) as graph:

        async def call(number: int) -> None:
            found = await graph.handle.remote(number)
            assert found.min() == found.max() == number

        await asyncio.gather(*map(call, range(40)))


async def test_a_replica_that_does_not_hear_of_it_does_not_delay_a_timeout() -> None:
    async with serve(Prepared.bind()) as graph:
        hang = graph.handle.options(timeout_s=0.1, fallback="instead").hang
        began = time.monotonic()
        assert await hang.remote() == "instead"
        assert time.monotonic() - began < 1


def stored() -> int:
    """Return how many bytes there are in the object store, and in the replicas' shared memory."""
    name = "object_store_memory"
    store = int(ray.cluster_resources()[name] - ray.available_resources()[name])
    return store + sum(path.stat().st_size for path in Segments("any").folder.parent.glob("*/*"))


async def stays_at(before: int) -> None:
    try:
        await until(lambda: stored() <= before, 20.0)
    except TimeoutError:
        pytest.fail(f"{stored()} bytes are in the object store, where {before} were")


async def call_all(graph: Graph, numbers: range) -> None:
    for start in numbers[:: CALLERS // 4]:
        part = range(start, min(start + CALLERS // 4, numbers.stop))
        answers = await asyncio.gather(*(graph.handle.remote(number) for number in part))
        assert answers == [5 * number for number in part]


@WAYS
async def test_large_values_leave_nothing_behind(shared_memory: bool, tmp_path: Path) -> None:
    dag, _ = through(Journal(tmp_path / "journal"))
    async with serve(dag, shared_memory=shared_memory) as graph:
        before = stored()
        await call_all(graph, range(300))
        await stays_at(before)
        chance = random.Random(0)
        for _ in range(20):
            calls = [graph.handle.remote(number) for number in range(4)]
            await asyncio.sleep(chance.random() * 0.05)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        await call_all(graph, range(8))
        await stays_at(before)


def replicas_of(graph: Graph) -> list[str]:
    return [
        actor["name"]
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["name"].startswith(f"{graph.name}:")
    ]


@WAYS
async def test_large_arguments_leave_nothing_behind(shared_memory: bool) -> None:
    """A caller may leave while its arguments are on their way, before there is a call."""
    with InputNode() as x:
        dag = Sums.bind().__call__.bind(x, 0)
    async with serve(dag, shared_memory=shared_memory) as graph:
        before = stored()
        (name,) = replicas_of(graph)
        large = np.full(SIZE, 7, "int32")
        for _ in range(20):
            assert await graph.handle.remote(large) == 14
        await stays_at(before)
        chance = random.Random(0)
        for _ in range(40):
            calls = [graph.handle.remote(large) for _ in range(4)]
            await asyncio.sleep(chance.random() * 0.005)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        async with asyncio.timeout(5):
            assert await graph.handle.remote(large) == 14
        await stays_at(before)
        assert replicas_of(graph) == [name]
        replica = ray.get_actor(name, cluster.NAMESPACE)
        async with asyncio.timeout(5):
            # What it keeps is in the store without counting there.
            while await replica.__ray_call__.remote(lambda actor: len(actor._keeper)):
                await asyncio.sleep(0.05)
