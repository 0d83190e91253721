"""The result cache: identical calls run once, and keep out of each other's way."""

from __future__ import annotations

import asyncio
import contextlib
import operator
import random
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from fastapi_graph import (
    Cache,
    DeadlineExceededError,
    DeploymentHandle,
    GraphSettings,
    InputNode,
    OptionError,
    SerializationError,
    deployment,
    get_request_context,
)
from fastapi_graph.policies.cache import content_of
from fastapi_graph.request import within
from tests.contract.conftest import Serve
from tests.contract.probes import Gate, Journal, notes

pytestmark = pytest.mark.anyio


class Model:
    """Notes each call that reaches it."""

    def __init__(self, journal: Journal, gate: Any = None) -> None:
        self.journal = journal
        self.gate = gate

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.journal.add("call")
        return args, kwargs

    async def fails(self, name: str) -> str:
        self.journal.add("call")
        raise ConnectionError(name)

    async def waits(self, name: str) -> str:
        self.journal.add(f"start {name}")
        try:
            await self.gate.wait.remote()
        except asyncio.CancelledError:
            self.journal.add(f"cancelled {name}")
            raise
        return name

    async def items(self) -> AsyncIterator[int]:
        self.journal.add("call")
        yield 1


def bound(journal: Journal, gate: Any = None, **settings: Any) -> Any:
    cache = Cache(**{"ttl_s": 60.0, **settings})
    return deployment(Model).options(cache=cache).bind(journal, gate)


async def test_a_hit_skips_the_node(journal: Journal, serve: Serve) -> None:
    node = bound(journal)
    with InputNode() as x:
        dag = node.__call__.bind(x)
    async with serve(dag) as graph:
        for _ in range(3):
            assert await graph.handle.remote({"a": [1]}) == (({"a": [1]},), {})
        assert await graph.handle_of(node).remote({"a": [1]}) == (({"a": [1]},), {})
        assert journal.count("call") == 1
        assert graph.status()[0].counts == {"cache_hits": 3, "cache_misses": 1}
    async with graph:  # what an earlier life has kept is not there any more
        await graph.handle.remote({"a": [1]})
        assert journal.count("call") == 2


async def test_what_differs_is_called(journal: Journal, serve: Serve) -> None:
    calls: list[Any] = [
        ((1,), {}),
        ((1.0,), {}),
        ((True,), {}),
        (("1",), {}),
        (([1],), {}),
        (((1,),), {}),
        ((), {"a": 1}),
        ((), {"b": 1}),
        ((1, 2), {}),
        ((None,), {}),
    ]
    async with serve(bound(journal)) as graph:
        for args, kwargs in calls * 2:
            await graph.handle.remote(*args, **kwargs)
        assert journal.count("call") == len(calls)


async def test_concurrent_calls_are_one(journal: Journal, serve: Serve) -> None:
    gate = Gate.bind()
    async with serve(bound(journal, gate)) as graph:
        responses = [graph.handle.waits.remote("a") for _ in range(5)]
        await journal.wait_for("start a")
        await graph.handle_of(gate).open.remote()
        assert await asyncio.gather(*responses) == ["a"] * 5
        assert journal.count("start a") == 1


async def test_who_leaves_costs_the_others_nothing(journal: Journal, serve: Serve) -> None:
    gate = Gate.bind()
    async with serve(bound(journal, gate)) as graph:
        first = graph.handle.waits.remote("a")
        await journal.wait_for("start a")
        late = graph.handle.options(timeout_s=0.05).waits.remote("a")
        other = graph.handle.waits.remote("a")
        with pytest.raises(DeadlineExceededError):
            await late
        first.cancel()
        await asyncio.wait([first])
        await graph.handle_of(gate).open.remote()
        assert await other == "a"
        assert journal.read() == ["start a"]


async def test_a_call_that_nobody_wants_is_cancelled(journal: Journal, serve: Serve) -> None:
    async with serve(bound(journal, Gate.bind())) as graph:
        responses = [graph.handle.waits.remote("a") for _ in range(2)]
        await journal.wait_for("start a")
        for response in responses:
            response.cancel()
        await asyncio.wait(responses)
        await journal.wait_for("cancelled a")


async def test_who_comes_while_a_call_is_cancelled_begins_anew(
    journal: Journal, serve: Serve
) -> None:
    gate = Gate.bind()
    async with serve(bound(journal, gate)) as graph:
        first = graph.handle.waits.remote("a")
        await journal.wait_for("start a")
        first.cancel()
        await asyncio.sleep(0)  # the cancellation is under way
        second = graph.handle.waits.remote("a")
        await journal.wait_for("start a", 2)
        await graph.handle_of(gate).open.remote()
        assert await second == "a"
        await asyncio.wait([first])
        assert first.cancelled()


async def test_errors_are_not_kept(journal: Journal, serve: Serve) -> None:
    async with serve(bound(journal)) as graph:
        for _ in range(2):
            with pytest.raises(ConnectionError):
                await graph.handle.fails.remote("a")
        assert journal.count("call") == 2


async def test_what_a_fallback_gave_is_not_kept(journal: Journal, serve: Serve) -> None:
    async with serve(bound(journal)) as graph:
        for _ in range(2):
            response = graph.handle.options(fallback="instead").fails.remote("a")
            assert await response == "instead"
            assert response.degraded == ("Model",)
        assert journal.count("call") == 2


async def test_ttl(journal: Journal, serve: Serve) -> None:
    async with serve(bound(journal, ttl_s=0.05)) as graph:
        await graph.handle.remote(1)
        await asyncio.sleep(0.1)
        await graph.handle.remote(1)
        assert journal.count("call") == 2


async def test_the_least_recently_used_goes_first(journal: Journal, serve: Serve) -> None:
    async with serve(bound(journal, max_size=2)) as graph:
        for value in (1, 2, 1, 3, 1):
            await graph.handle.remote(value)
        assert journal.count("call") == 3
        await graph.handle.remote(2)
        assert journal.count("call") == 4


async def test_a_key_of_ones_own(journal: Journal, serve: Serve) -> None:
    async with serve(bound(journal, key=lambda user, question: user["id"])) as graph:
        first = await graph.handle.remote({"id": 1}, "a")
        assert await graph.handle.remote({"id": 1}, "b") == first
        assert await graph.handle.remote({"id": 2}, "b") != first
        assert journal.count("call") == 2


async def test_models_are_told_apart(journal: Journal, serve: Serve) -> None:
    async with serve(bound(journal, key=lambda *_: 1)) as graph:
        for model_id in ("a", "b", "a"):
            await graph.handle.options(multiplexed_model_id=model_id).remote(1)
        assert journal.count("call") == 2


async def test_a_handle_to_a_graph_has_no_part_in_the_cache_of_its_last_node(serve: Serve) -> None:
    @deployment(cache=Cache(ttl_s=60))
    async def last(value: int) -> int:
        return value * 2

    @deployment
    async def first(value: int) -> int:
        return value + 100

    with InputNode(int) as x:
        dag = last.bind(first.bind(x))
    async with serve(dag) as graph:
        assert await graph.handle.options(timeout_s=30).remote(1) == 202
        assert await graph.handle_of("last").remote(1) == 2


async def test_an_override_is_not_kept(in_process: GraphSettings, serve: Serve) -> None:
    @deployment(cache=Cache(ttl_s=60))
    async def real(value: int) -> str:
        return "real"

    node = real.bind()
    async with serve(node) as graph:
        assert await graph.handle.remote(1) == "real"
        with graph.override(node, lambda value: "fake"):
            assert await graph.handle.remote(1) == "fake"
        assert await graph.handle.remote(1) == "real"


async def test_who_shares_a_failure_gets_an_exception_of_its_own(
    journal: Journal, serve: Serve
) -> None:
    gate = Gate.bind()

    @deployment(cache=Cache(ttl_s=60))
    class Fails:
        def __init__(self, gate: Any, journal: Journal) -> None:
            self.gate = gate
            self.journal = journal

        async def __call__(self, name: str) -> None:
            self.journal.add("start")
            await self.gate.wait.remote()
            raise ConnectionError(name)

    async with serve(Fails.bind(gate, journal)) as graph:
        responses = [graph.handle.remote("a") for _ in range(3)]
        await journal.wait_for("start")
        await graph.handle_of(gate).open.remote()
        errors = await asyncio.gather(*responses, return_exceptions=True)
    assert len({id(error) for error in errors}) == 3
    assert {type(error) for error in errors} == {ConnectionError}


async def test_a_key_that_cannot_be(journal: Journal, serve: Serve) -> None:
    async with serve(bound(journal, key=lambda value: [value])) as graph:
        with pytest.raises(SerializationError, match="Model: its cache key: unhashable"):
            await graph.handle.remote(1)


async def test_a_key_function_that_fails(journal: Journal, serve: Serve) -> None:
    async with serve(bound(journal, key=lambda value, other: value)) as graph:
        with pytest.raises(TypeError) as caught:
            await graph.handle.remote(1)
        assert "in the cache key of Model" in notes(caught.value)


@pytest.mark.parametrize("settings", [{"key": operator.itemgetter("id")}, {}])
async def test_a_fallback_answers_for_what_has_no_key(
    settings: Any, journal: Journal, serve: Serve
) -> None:
    model = deployment(Model).options(cache=Cache(ttl_s=60, **settings), fallback="instead")
    async with serve(model.bind(journal)) as graph:
        argument: Any = {} if settings else threading.Lock()
        assert await graph.handle.remote(argument) == "instead"


async def test_it_has_as_long_as_the_last_of_those_who_wait(journal: Journal, serve: Serve) -> None:
    @deployment(cache=Cache(ttl_s=60))
    async def look(journal: Journal, name: str) -> float | None:
        journal.add(f"start {name}")
        await journal.wait_for(f"open {name}")
        return get_request_context().deadline_s

    async with serve(look.bind()) as graph:

        async def call(name: str, *deadlines: float | None) -> set[float | None]:
            now = asyncio.get_running_loop().time()
            calls = []
            for deadline in deadlines:
                with within(None if deadline is None else now + deadline):
                    calls.append(graph.handle.remote(journal, name))
                await journal.wait_for(f"start {name}")
            journal.add(f"open {name}")
            return set(await asyncio.gather(*calls))

        (alone,) = await call("alone", 50)
        assert alone is not None
        assert 40 < alone < 50
        assert await call("none", None, 50) == {None}
        if graph.settings.backend == "inprocess":
            (latest,) = await call("both", 30, 50, 40)
            assert latest is not None
            assert 40 < latest < 50
            assert await call("later none", 50, None) == {None}


async def test_the_deadline_of_the_first_is_not_that_of_others(
    journal: Journal, serve: Serve
) -> None:
    @deployment
    class Below:
        async def __call__(self) -> str:
            return "below"

    @deployment(cache=Cache(ttl_s=60))
    class Above:
        def __init__(self, below: DeploymentHandle, journal: Journal) -> None:
            self.below = below
            self.journal = journal

        async def __call__(self) -> str:
            self.journal.add("start")
            left = get_request_context().deadline_s
            await asyncio.sleep(0 if left is None else 0.5)
            return await self.below.remote()

    async with serve(Above.bind(Below.options(timeout_s=60).bind(), journal)) as graph:
        await graph.handle_of("Below").remote()
        with within(asyncio.get_running_loop().time() + 0.4):
            first = graph.handle.remote()
        await journal.wait_for("start")
        assert await graph.handle.remote() == "below"
        with contextlib.suppress(DeadlineExceededError):
            await first


async def test_no_retry_is_waited_for_past_the_deadline(
    journal: Journal, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random, "random", lambda: 1.0)
    options = {"retry_on": ConnectionError, "retry_backoff_s": 6.0, "fallback": "instead"}
    model = deployment(Model).options(cache=Cache(ttl_s=60), **options)
    async with serve(model.bind(journal)) as graph:
        with within(asyncio.get_running_loop().time() + 5):
            assert await graph.handle.fails.remote("a") == "instead"
    assert journal.count("call") == 1


async def test_streams_are_not_kept(journal: Journal, serve: Serve) -> None:
    async with serve(bound(journal)) as graph:
        for _ in range(2):
            assert [item async for item in graph.handle.items.remote()] == [1]
        assert journal.count("call") == 2


def test_settings_that_cannot_be() -> None:
    for settings, message in [
        ({"ttl_s": 0}, "ttl_s=0 must be above 0"),
        ({"ttl_s": "5"}, "ttl_s='5' must be a number of seconds"),
        ({"ttl_s": True}, "ttl_s=True must be a number of seconds"),
        ({"ttl_s": 1, "key": asyncio.sleep}, "is async"),
        ({"ttl_s": 1, "max_size": 0}, "max_size=0 must be at least 1"),
        ({"ttl_s": 1, "max_size": 1.5}, "whole number"),
        ({"ttl_s": 1, "key": "id"}, "must be callable"),
    ]:
        with pytest.raises(OptionError, match=message):
            Cache(**settings)


def test_content() -> None:
    numpy = pytest.importorskip("numpy")
    same = [
        ({"a": 1, "b": [2]}, {"b": [2], "a": 1}),
        (numpy.arange(1000), numpy.arange(1000)),
    ]
    for left, right in same:
        assert content_of(left, "it") == content_of(right, "it")
    different = [(1, 1.0), (1, True), ([1], (1,)), ({1: 2}, {2: 1}), ("a", b"a"), (0.0, False)]
    different += [([0.0], [-0.0]), (numpy.arange(3), numpy.arange(4))]
    different += [(numpy.arange(3), numpy.arange(3.0))]
    for left, right in different:
        assert content_of(left, "it") != content_of(right, "it")
