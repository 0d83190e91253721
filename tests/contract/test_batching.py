"""`@batch`: calls that run as one."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from fastapi_graph import (
    BackPressureError,
    DeadlineExceededError,
    DeploymentHandle,
    Graph,
    GraphSettings,
    InputNode,
    OptionError,
    OutputError,
    batch,
    deployment,
)
from fastapi_graph.batching.streams import UNREAD_AT_MOST
from fastapi_graph.request import within
from tests.contract.conftest import Serve
from tests.contract.probes import PATIENCE_S, Gate, Journal, notes

pytestmark = pytest.mark.anyio

FOR_EVER_S = 60.0


# Who is in a batch


@deployment
class Batches:
    """Each call returns its own input and all inputs of its batch."""

    @batch(max_batch_size=3, batch_wait_timeout_s=FOR_EVER_S)
    async def of_async(self, values: list[int]) -> list[Any]:
        return [[value, values] for value in values]

    @batch(max_batch_size=3, batch_wait_timeout_s=FOR_EVER_S)
    def of_sync(self, values: list[int]) -> list[Any]:
        return [[value, values] for value in values]

    @batch(max_batch_size=3, batch_wait_timeout_s=FOR_EVER_S)
    async def of_streams(self, values: list[int]) -> AsyncIterator[list[Any]]:
        yield [[value, values] for value in values]

    @batch(max_batch_size=3, batch_wait_timeout_s=FOR_EVER_S)
    def of_sync_streams(self, values: list[int]) -> Iterator[list[Any]]:
        yield [[value, values] for value in values]

    @batch(max_batch_size=3, batch_wait_timeout_s=FOR_EVER_S)
    async def __call__(self, values: list[int]) -> tuple[Any, ...]:
        return tuple([value, values] for value in values)

    @batch(max_batch_size=3, batch_wait_timeout_s=FOR_EVER_S)
    async def with_two(self, values: list[int], factors: Any = None) -> list[Any]:
        return [[value, values, factors] for value in values]


@deployment
@batch(max_batch_size=3, batch_wait_timeout_s=FOR_EVER_S)
async def batches(values: list[int]) -> list[Any]:
    return [[value, values] for value in values]


async def ended(response: Any) -> None:
    """Wait for a call that was cancelled; whoever cancels a stream sees its end."""
    if hasattr(response, "__aiter__"):
        assert [item async for item in response] == []
        return
    with pytest.raises(asyncio.CancelledError):
        await response


async def answer(response: Any) -> Any:
    if hasattr(response, "__aiter__"):
        (only,) = [item async for item in response]
        return only
    return await response


@pytest.mark.parametrize(
    "method", ["__call__", "of_async", "of_sync", "of_streams", "of_sync_streams"]
)
async def test_concurrent_calls_of_a_method_form_batches(method: str, serve: Serve) -> None:
    async with serve(Batches.bind()) as graph:
        call = graph.handle.options(method_name=method)
        answers = await asyncio.gather(*(answer(call.remote(n)) for n in range(6)))
    own, together = zip(*answers, strict=True)
    assert list(own) == list(range(6))
    assert list(together) == [[0, 1, 2]] * 3 + [[3, 4, 5]] * 3


async def test_concurrent_calls_of_a_function_form_batches(serve: Serve) -> None:
    with InputNode(int) as x:
        dag = batches.bind(x)
    async with serve(dag) as graph:
        answers = await asyncio.gather(*(graph.handle.remote(n) for n in range(3)))
    assert answers == [[n, [0, 1, 2]] for n in range(3)]


async def test_a_call_waits_no_longer_than_it_shall(serve: Serve) -> None:
    @deployment
    class Patient:
        @batch(batch_wait_timeout_s=0.05)
        async def work(self, values: list[int]) -> list[float]:
            return [time.monotonic()] * len(values)

    async with serve(Patient.bind()) as graph:
        before = time.monotonic()
        assert await graph.handle.work.remote(1) - before >= 0.05


async def test_arguments_by_position_and_by_name_are_the_same(serve: Serve) -> None:
    async with serve(Batches.bind()) as graph:
        call = graph.handle.with_two
        answers = await asyncio.gather(
            call.remote(1, 2), call.remote(3, factors=4), call.remote(factors=6, values=5)
        )
    assert answers == [[n, [1, 3, 5], [2, 4, 6]] for n in (1, 3, 5)]


async def test_calls_that_leave_out_different_arguments_are_in_different_batches(
    serve: Serve,
) -> None:
    async with serve(Batches.bind()) as graph:
        call = graph.handle.with_two
        answers = await asyncio.gather(
            *(call.remote(n) for n in (1, 2)),
            call.remote(3, 4),
            *(call.remote(n) for n in (5, 6, 7)),
        )
    assert answers == [
        *([n, [1, 2], None] for n in (1, 2)),
        [3, [3], [4]],
        *([n, [5, 6, 7], None] for n in (5, 6, 7)),
    ]


async def test_a_call_that_does_not_fit_fails_alone(serve: Serve) -> None:
    async with serve(Batches.bind()) as graph:
        call = graph.handle.with_two
        wrong, *fine = await asyncio.gather(
            call.remote(0, 0, 0), *(call.remote(n) for n in (1, 2, 3)), return_exceptions=True
        )
    assert fine == [[n, [1, 2, 3], None] for n in (1, 2, 3)]
    assert isinstance(wrong, TypeError)
    assert "Batches.with_two" in str(wrong)


async def test_calls_gather_while_a_batch_runs(journal: Journal, serve: Serve) -> None:
    @deployment
    class Busy:
        def __init__(self, gate: DeploymentHandle, journal: Journal) -> None:
            self.gate = gate
            self.journal = journal

        @batch(max_batch_size=10, batch_wait_timeout_s=0, max_concurrent_batches=2)
        async def work(self, values: list[int]) -> list[int]:
            self.journal.add(f"start {values}")
            await self.gate.wait.remote()
            return [len(values)] * len(values)

        async def count(self) -> int:
            return 0

    gate = Gate.bind()
    async with serve(Busy.bind(gate, journal)) as graph:
        calls = [asyncio.ensure_future(graph.handle.work.remote(n)) for n in range(2)]
        await journal.wait_for("start [1]")
        calls += [asyncio.ensure_future(graph.handle.work.remote(n)) for n in range(2, 6)]
        await graph.handle.count.remote()  # comes after the others
        await graph.handle_of(gate).open.remote()
        assert await asyncio.gather(*calls) == [1, 1, 4, 4, 4, 4]
    assert journal.read() == ["start [0]", "start [1]", "start [2, 3, 4, 5]"]


async def test_batch_size_fn_measures_a_batch(serve: Serve) -> None:
    @deployment
    class Measured:
        @batch(
            max_batch_size=10,
            batch_wait_timeout_s=FOR_EVER_S,
            batch_size_fn=lambda texts: sum(map(len, texts)),
        )
        async def work(self, texts: list[str]) -> list[list[str]]:
            return [texts for _ in texts]

    async with serve(Measured.bind()) as graph:
        texts = ["aaaa", "bbbb", "cccc", "d" * 20, "e" * 10]
        answers = await asyncio.gather(*(graph.handle.work.remote(text) for text in texts))
        with pytest.raises(TypeError, match="int"):
            await graph.handle.work.remote(5)
    assert answers == [texts[:2], texts[:2], [texts[2]], [texts[3]], [texts[4]]]


async def test_sync_batches_use_no_threads_of_others(serve: Serve) -> None:
    parties = 50  # more than the threads that anyio has by default

    @deployment
    class Meeting:
        def __init__(self) -> None:
            self.barrier = threading.Barrier(parties)

        @batch(max_batch_size=1, max_concurrent_batches=parties)
        def meet(self, values: list[int]) -> list[int]:
            self.barrier.wait(timeout=20)
            return values

    async with serve(Meeting.bind()) as graph:
        calls = [graph.handle.meet.remote(n) for n in range(parties)]
        assert await asyncio.gather(*calls) == list(range(parties))


async def test_two_instances_share_nothing(serve: Serve) -> None:
    first, second = Batches.bind(), Batches.bind()

    @deployment
    async def both(a: Any, b: Any) -> Any:
        return [a, b]

    with InputNode() as x:
        dag = both.bind(first.of_async.bind(x), second.of_async.bind(x))
    async with serve(dag) as graph:
        answers = await asyncio.gather(*(graph.handle.remote(n) for n in range(3)))
    assert answers == [[[n, [0, 1, 2]], [n, [0, 1, 2]]] for n in range(3)]


# Failures


class Rejected(Exception):
    def __init__(self, value: int, *, why: str) -> None:
        super().__init__(f"{value} was rejected: {why}")
        self.value = value


@deployment
class Failing:
    @batch(max_batch_size=4, batch_wait_timeout_s=FOR_EVER_S)
    async def some(self, values: list[int]) -> list[int | Rejected]:
        return [Rejected(n, why="odd") if n % 2 else n for n in values]

    @batch(max_batch_size=3, batch_wait_timeout_s=FOR_EVER_S)
    def all(self, values: list[int]) -> list[int]:
        raise Rejected(len(values), why="too many")

    @batch(max_batch_size=2, batch_wait_timeout_s=FOR_EVER_S)
    async def some_streams(self, values: list[int]) -> AsyncIterator[list[Any]]:
        yield values
        yield [Rejected(n, why="odd") if n % 2 else n for n in values]
        yield values

    @batch(max_batch_size=2, batch_wait_timeout_s=FOR_EVER_S)
    def all_streams(self, values: list[int]) -> Iterator[list[int]]:
        yield values
        raise Rejected(len(values), why="too many")

    @batch(max_batch_size=2, batch_wait_timeout_s=FOR_EVER_S)
    async def wrong(self, values: list[Any]) -> Any:
        return values[0]

    @batch(max_batch_size=2, batch_wait_timeout_s=FOR_EVER_S)
    async def wrong_streams(self, values: list[Any]) -> AsyncIterator[Any]:
        yield values[0]


async def test_an_exception_in_the_list_fails_its_own_call_only(serve: Serve) -> None:
    async with serve(Failing.bind()) as graph:
        answers = await asyncio.gather(
            *(graph.handle.some.remote(n) for n in range(4)), return_exceptions=True
        )
    assert answers[::2] == [0, 2]
    for number, error in ((1, answers[1]), (3, answers[3])):
        assert isinstance(error, Rejected)
        assert error.value == number
        assert "Failing.some" in notes(error)


async def test_an_exception_that_is_raised_fails_every_call(serve: Serve) -> None:
    async with serve(Failing.bind()) as graph:
        errors = await asyncio.gather(
            *(graph.handle.all.remote(n) for n in range(3)), return_exceptions=True
        )
    assert len({id(error) for error in errors}) == 3
    assert len({id(error.__notes__) for error in errors}) == 3
    for error in errors:
        assert isinstance(error, Rejected)
        assert error.value == 3
        assert error.__notes__ == errors[0].__notes__


async def read(items: Any) -> list[Any]:
    """Read items, and what ends them if it is an exception."""
    seen: list[Any] = []
    try:
        async for item in items:
            seen.append(item)  # noqa: PERF401 - what was read before an exception counts
    except Rejected as error:
        seen.append(error.value)
    return seen


async def test_an_exception_in_a_step_ends_its_own_stream_only(serve: Serve) -> None:
    async with serve(Failing.bind()) as graph:
        streams = [read(graph.handle.some_streams.remote(n)) for n in (5, 6)]
        assert await asyncio.gather(*streams) == [[5, 5], [6, 6, 6]]


async def test_an_exception_of_the_generator_ends_every_stream(serve: Serve) -> None:
    async with serve(Failing.bind()) as graph:
        streams = [read(graph.handle.all_streams.remote(n)) for n in (5, 6)]
        assert await asyncio.gather(*streams) == [[5, 2], [6, 2]]


@pytest.mark.parametrize(
    "result, got",
    [
        ([1], "1 results"),
        ((1, 2, 3), "3 results"),
        (5, "int"),
        ("ab", "str"),
        ({1: 1, 2: 2}, "dict"),
    ],
)
@pytest.mark.parametrize("method", ["wrong", "wrong_streams"])
async def test_anything_but_one_result_each_is_an_error(
    method: str, result: Any, got: str, serve: Serve
) -> None:
    async with serve(Failing.bind()) as graph:
        call = getattr(graph.handle, method)
        errors = await asyncio.gather(
            answer(call.remote(result)), answer(call.remote(0)), return_exceptions=True
        )
    for error in errors:
        assert isinstance(error, OutputError)
        assert f"Failing.{method}" in str(error)
        assert got in str(error)
        assert "batch of 2" in str(error)
        assert "test_batching.py:" in str(error)


# Who leaves


@deployment
class Gated:
    """Batches that run until the gate is opened."""

    def __init__(self, gate: DeploymentHandle, journal: Journal) -> None:
        self.gate = gate
        self.journal = journal

    async def noted(self, values: list[int]) -> None:
        self.journal.add(f"start {values}")
        try:
            await self.gate.wait.remote()
        except asyncio.CancelledError:
            self.journal.add(f"cancelled {values}")
            raise
        self.journal.add(f"end {values}")

    async def nothing(self) -> None:
        pass

    @batch(max_batch_size=2, batch_wait_timeout_s=FOR_EVER_S)
    async def work(self, values: list[int]) -> list[int]:
        await self.noted(values)
        return values

    @batch(max_batch_size=2, batch_wait_timeout_s=FOR_EVER_S)
    async def stream(self, values: list[int]) -> AsyncIterator[list[int]]:
        await self.noted(values)
        yield values

    @batch(max_batch_size=2, batch_wait_timeout_s=FOR_EVER_S)
    def sync(self, values: list[int]) -> list[int]:
        self.journal.add(f"start {values}")
        with contextlib.suppress(BaseException):
            self.gate.wait.remote().result(timeout_s=20)
        self.journal.add(f"end {values}")
        return values


GATED = pytest.mark.parametrize("method", ["work", "stream", "sync"])


@contextlib.asynccontextmanager
async def gated(serve: Serve, journal: Journal) -> AsyncIterator[tuple[Graph, DeploymentHandle]]:
    gate = Gate.bind()
    async with serve(Gated.bind(gate, journal)) as graph:
        yield graph, graph.handle_of(gate)


@GATED
async def test_a_cancelled_call_leaves_the_others_of_its_batch_alone(
    method: str, journal: Journal, serve: Serve
) -> None:
    async with gated(serve, journal) as (graph, gate):
        call = getattr(graph.handle, method)
        first, second = call.remote(1), call.remote(2)
        await journal.wait_for("start [1, 2]")
        first.cancel()
        await ended(first)
        await gate.open.remote()
        assert await answer(second) == 2
    assert journal.read() == ["start [1, 2]", "end [1, 2]"]


@GATED
async def test_a_batch_that_all_have_left_is_cancelled(
    method: str, journal: Journal, serve: Serve
) -> None:
    async with gated(serve, journal) as (graph, _):
        call = getattr(graph.handle, method)
        for pair in ([1, 2], [3, 4]):  # the second needs the place of the first
            calls = [call.remote(n) for n in pair]
            await journal.wait_for(f"start {pair}")
            for response in calls:
                response.cancel()
            await journal.wait_for(f"{'end' if method == 'sync' else 'cancelled'} {pair}")


@GATED
async def test_a_cancelled_call_that_waits_is_in_no_batch(
    method: str, journal: Journal, serve: Serve
) -> None:
    async with gated(serve, journal) as (graph, gate):
        call = getattr(graph.handle, method)
        gone = call.remote(0)
        await graph.handle.nothing.remote()  # comes after the other
        gone.cancel()
        await ended(gone)
        await graph.handle.nothing.remote()
        await gate.open.remote()
        answers = await asyncio.gather(*(answer(call.remote(n)) for n in (1, 2)))
        assert answers == [1, 2]
    assert journal.read()[0] == "start [1, 2]"


async def test_a_call_past_its_deadline_is_in_no_batch(journal: Journal, serve: Serve) -> None:
    @deployment
    class Slow:
        @batch(max_batch_size=2, batch_wait_timeout_s=0.2)
        async def work(self, values: list[int]) -> list[list[int]]:
            return [values for _ in values]

    async with serve(Slow.bind()) as graph:
        with within(asyncio.get_running_loop().time() + 0.1):
            late = graph.handle.work.remote(1)
        with pytest.raises(DeadlineExceededError):
            await late
        answers = await asyncio.gather(*(graph.handle.work.remote(n) for n in (2, 3)))
        assert answers == [[2, 3], [2, 3]]


@pytest.mark.usefixtures("in_process")
async def test_close_waits_for_threads_of_batches(serve: Serve) -> None:
    started, release = threading.Event(), threading.Event()
    seen: list[str] = []

    @deployment
    class Closing:
        @batch(max_batch_size=1)
        def work(self, values: list[int]) -> list[int]:
            started.set()
            release.wait(20)
            seen.append("worked")
            return values

        def close(self) -> None:
            seen.append("closed")

    async with serve(Closing.bind()) as graph:
        call = asyncio.create_task(answer(graph.handle.work.remote(1)))
        await asyncio.to_thread(started.wait)
        call.cancel()
        await asyncio.wait([call])
        asyncio.get_running_loop().call_later(0.05, release.set)
    assert seen == ["worked", "closed"]


# Streams


@deployment
class Streams:
    def __init__(self, journal: Journal | None = None) -> None:
        self.journal = journal

    @batch(max_batch_size=2, batch_wait_timeout_s=FOR_EVER_S)
    async def count(self, numbers: list[int]) -> AsyncIterator[list[Any]]:
        try:
            for n in range(max(numbers)):
                if self.journal is not None:
                    self.journal.add(f"made {n}")
                yield [n if n < number else StopIteration for number in numbers]
        finally:
            if self.journal is not None:
                self.journal.add("closed")

    @batch(max_batch_size=2, batch_wait_timeout_s=FOR_EVER_S)
    def sync_count(self, numbers: list[int]) -> Iterator[list[Any]]:
        try:
            for n in range(max(numbers)):
                if self.journal is not None:
                    self.journal.add(f"made {n}")
                yield [n if n < number else StopIteration() for number in numbers]
        finally:
            if self.journal is not None:
                self.journal.add("closed")


STREAMS = pytest.mark.parametrize("method", ["count", "sync_count"])


@STREAMS
async def test_each_step_yields_an_item_for_each_call(method: str, serve: Serve) -> None:
    async with serve(Streams.bind()) as graph:
        call = getattr(graph.handle, method)
        streams = await asyncio.gather(*(read(call.remote(n)) for n in (2, 4, 0, 1)))
    assert streams == [[0, 1], [0, 1, 2, 3], [], [0]]


async def test_a_reader_that_is_far_too_slow_is_left_behind(serve: Serve) -> None:
    most = UNREAD_AT_MOST

    @deployment
    class Counts:
        @batch(max_batch_size=2, batch_wait_timeout_s=PATIENCE_S)
        async def count(self, stops: list[int]) -> AsyncIterator[list[int]]:
            for number in range(stops[0]):
                yield [number] * len(stops)

    async with serve(Counts.bind()) as graph:
        slow, fast = (graph.handle.count.remote(2 * most) for _ in range(2))
        assert await anext(slow) == 0
        async with asyncio.timeout(PATIENCE_S):
            assert await read(fast) == [*range(2 * most)]
        got = [0]

        async def read_on() -> None:
            async for item in slow:
                got.append(item)  # noqa: PERF401 - it is cut short

        with pytest.raises(BackPressureError, match=f"its reader is {most} items behind"):
            await read_on()
        assert got == [*range(len(got))]
        assert most <= len(got) < 1.5 * most


@STREAMS
async def test_a_slow_reader_holds_nobody_up(method: str, serve: Serve) -> None:
    async with serve(Streams.bind()) as graph:
        call = getattr(graph.handle, method)
        slow, fast = call.remote(5), call.remote(5)
        assert await asyncio.gather(anext(slow), read(fast)) == [0, [0, 1, 2, 3, 4]]
        assert await read(slow) == [1, 2, 3, 4]


@STREAMS
async def test_a_generator_is_not_ahead_of_all_its_readers(
    method: str, journal: Journal, serve: Serve, ahead: int
) -> None:
    async with serve(Streams.bind(journal)) as graph:
        call = getattr(graph.handle, method)
        streams = [call.remote(100), call.remote(100)]
        assert await asyncio.gather(*map(anext, streams)) == [0, 0]
        await asyncio.sleep(0.02)
        assert len(journal.read()) <= 2 + ahead
        for stream in streams:
            await stream.aclose()
        await journal.wait_for("closed")
        assert len(journal.read()) <= 4 + ahead


@STREAMS
async def test_a_reader_that_leaves_does_not_end_the_others(method: str, serve: Serve) -> None:
    async with serve(Streams.bind()) as graph:
        call = getattr(graph.handle, method)
        leaving, staying = call.remote(50), call.remote(5)
        await asyncio.gather(anext(leaving), anext(staying))
        await leaving.aclose()
        assert await read(staying) == [1, 2, 3, 4]


# Settings


@deployment
class Configured:
    def reconfigure(self, config: dict[str, Any]) -> None:
        self.work.set_max_batch_size(config["size"])
        self.work.set_batch_wait_timeout_s(config["wait"])

    @batch
    async def work(self, values: list[int]) -> list[list[int]]:
        return [values for _ in values]

    async def settings(self) -> tuple[Any, ...]:
        return tuple(self.work.batch_settings)

    async def set_size(self, size: Any) -> None:
        self.work.set_max_batch_size(size)


async def test_reconfigure_changes_size_and_wait(serve: Serve) -> None:
    node = Configured.options(user_config={"size": 2, "wait": FOR_EVER_S}).bind()
    async with serve(node) as graph:
        answers = await asyncio.gather(*(graph.handle.work.remote(n) for n in range(4)))
        assert answers == [[0, 1], [0, 1], [2, 3], [2, 3]]
        assert await graph.handle.settings.remote() == (2, FOR_EVER_S, 1, None)


async def test_a_change_holds_for_what_waits_already(serve: Serve) -> None:
    node = Configured.options(user_config={"size": 3, "wait": FOR_EVER_S}).bind()
    async with serve(node) as graph:
        calls = [graph.handle.work.remote(n) for n in range(2)]
        await graph.handle.settings.remote()  # comes after the others
        await graph.handle.set_size.remote(2)
        assert await asyncio.gather(*calls) == [[0, 1], [0, 1]]


async def test_a_setting_that_cannot_work_is_an_error(serve: Serve) -> None:
    async with serve(Configured.bind()) as graph:
        with pytest.raises(OptionError, match=r"Configured\.work: option max_batch_size=0"):
            await graph.handle.set_size.remote(0)
        assert await graph.handle.settings.remote() == (10, 0.01, 1, None)


def test_a_wait_too_short_to_be_timed(in_process: GraphSettings) -> None:
    """uvloop gives another kind of handle for a time that is now."""
    uvloop = pytest.importorskip("uvloop")

    @deployment
    class Hasty:
        @batch(max_batch_size=3, batch_wait_timeout_s=1e-4)
        async def work(self, values: list[int]) -> list[list[int]]:
            return [values for _ in values]

    async def calls() -> list[list[int]]:
        async with Graph(Hasty.bind(), settings=in_process) as graph:
            return list(await asyncio.gather(*(graph.handle.work.remote(n) for n in range(2))))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(calls()) == [[0, 1], [0, 1]]


async def test_a_target_chooses_size_and_wait(serve: Serve) -> None:
    @deployment
    class Adaptive:
        @batch(target_latency_s=0.2, max_batch_size=8)
        def work(self, values: list[int]) -> list[list[int]]:
            time.sleep(0.001)
            return [values for _ in values]

        async def settings(self) -> tuple[Any, ...]:
            return tuple(self.work.batch_settings)

    async with serve(Adaptive.bind()) as graph:
        assert (await graph.handle.settings.remote())[0] == 1
        for _ in range(10):
            answers = await asyncio.gather(*(graph.handle.work.remote(n) for n in range(20)))
            assert all(n in values for n, values in enumerate(answers))
        size, wait_s, _, target_s = await graph.handle.settings.remote()
        assert 1 < size <= 8
        assert 0 <= wait_s < 0.2
        assert target_s == 0.2
