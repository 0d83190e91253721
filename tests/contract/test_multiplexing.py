"""Multiplexed models: loaded once, kept while they are used, found again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from fastapi_graph import (
    DeploymentHandle,
    DeploymentStartError,
    GraphDefinitionError,
    GraphSettings,
    InputError,
    InputNode,
    NodeError,
    OptionError,
    batch,
    deployment,
    get_multiplexed_model_id,
    get_request_context,
    graph_router,
    multiplexed,
)
from tests.contract.conftest import Serve
from tests.contract.probes import PATIENCE_S, Gate, Journal

pytestmark = pytest.mark.anyio


class Model:
    def __init__(self, journal: Journal, model_id: str) -> None:
        self.journal = journal
        self.model_id = model_id

    async def aclose(self) -> None:
        self.journal.add(f"unload {self.model_id}")


class SyncModel:
    def __init__(self, journal: Journal, model_id: str) -> None:
        self.journal = journal
        self.model_id = model_id

    def close(self) -> None:
        self.journal.add(f"unload {self.model_id}")


class Host:
    def __init__(self, journal: Journal, gate: Any = None) -> None:
        self.journal = journal
        self.gate = gate

    @multiplexed(max_num_models_per_replica=2)
    async def get_model(self, model_id: str) -> Model:
        self.journal.add(f"load {model_id}")
        if model_id.startswith("gated"):
            await self.gate.wait.remote()
        if model_id == "broken":
            raise ConnectionError(model_id)
        return Model(self.journal, model_id)

    async def __call__(self, *_: Any) -> str:
        return (await self.get_model()).model_id

    async def named(self, model_id: str) -> str:
        return (await self.get_model(model_id)).model_id

    async def where(self) -> str:
        await self.get_model()
        return get_request_context().replica

    async def use(self, model_id: str) -> str:
        model = await self.get_model(model_id)
        self.journal.add(f"use {model_id}")
        await self.gate.wait.remote()
        self.journal.add(f"used {model_id}")
        return model.model_id


class SyncHost(Host):
    @multiplexed(max_num_models_per_replica=2)
    def get_model(self, model_id: str) -> SyncModel:  # type: ignore[override]
        self.journal.add(f"load {model_id}")
        return SyncModel(self.journal, model_id)


@pytest.mark.parametrize("host", [Host, SyncHost])
async def test_the_least_recently_used_is_unloaded(
    host: Any, journal: Journal, serve: Serve
) -> None:
    async with serve(deployment(host).bind(journal)) as graph:
        for model_id in ("a", "b", "a", "c", "a"):
            handle = graph.handle.options(multiplexed_model_id=model_id)
            assert await handle.remote() == model_id
        assert journal.read() == ["load a", "load b", "unload b", "load c"]
    assert sorted(journal.read()[4:]) == ["unload a", "unload c"]


async def test_concurrent_calls_load_once(journal: Journal, serve: Serve) -> None:
    gate = Gate.bind()
    async with serve(deployment(Host).bind(journal, gate)) as graph:
        first, *others = [graph.handle.named.remote("gated") for _ in range(4)]
        await journal.wait_for("load gated")
        first.cancel()
        await asyncio.wait([first])
        await graph.handle_of(gate).open.remote()
        assert await asyncio.gather(*others) == ["gated"] * 3
        assert journal.count("load gated") == 1


async def test_no_more_are_kept_than_may_be_however_many_are_asked_for_at_once(
    journal: Journal, serve: Serve
) -> None:
    gate = Gate.bind()
    async with serve(deployment(Host).bind(journal, gate)) as graph:
        names = [f"gated {number}" for number in range(6)]
        calls = [graph.handle.named.remote(name) for name in names]
        await journal.wait_for("load gated 1")
        await asyncio.sleep(0.1)
        assert sum(line.startswith("load") for line in journal.read()) == 2, "at the same time"
        await graph.handle_of(gate).open.remote()
        assert await asyncio.gather(*calls) == names
        await journal.wait_for("unload gated 3")
        kept: set[str] = set()
        for line in journal.read():
            what, _, name = line.partition(" ")
            (kept.add if what == "load" else kept.discard)(name)
        assert kept == {"gated 4", "gated 5"}


@pytest.mark.parametrize("host", [Host, SyncHost])
async def test_models_that_compete_are_used_before_they_are_unloaded(
    host: Any, journal: Journal, serve: Serve
) -> None:
    names = [f"m{number % 7}" for number in range(28)]
    async with serve(deployment(host).bind(journal)) as graph:
        for _ in range(2):
            async with asyncio.timeout(PATIENCE_S):
                calls = [graph.handle.named.remote(name) for name in names]
                assert await asyncio.gather(*calls) == names
        assert sum(line.startswith("load") for line in journal.read()) <= len(names)


async def test_a_load_may_load_another_model(journal: Journal, serve: Serve) -> None:
    class Adapters(Host):
        @multiplexed(max_num_models_per_replica=2)
        async def get_model(self, model_id: str) -> Model:
            self.journal.add(f"load {model_id}")
            await asyncio.sleep(0.01)
            if model_id != "base":
                await self.get_model("base")
            return Model(self.journal, model_id)

    async with serve(deployment(Adapters).bind(journal)) as graph:
        async with asyncio.timeout(PATIENCE_S):
            names = ["a", "b", "base", "c", "d"]
            calls = [graph.handle.named.remote(name) for name in names]
            assert await asyncio.gather(*calls) == names
    found = [line.partition(" ")[0] for line in journal.read()]
    assert found.count("load") == found.count("unload")


async def test_a_model_is_there_as_long_as_a_load_needs_it(journal: Journal, serve: Serve) -> None:
    class Adapters(Host):
        @multiplexed(max_num_models_per_replica=1)
        async def get_model(self, model_id: str) -> Model:
            self.journal.add(f"load {model_id}")
            if model_id != "base":
                await self.get_model("base")
                await asyncio.sleep(0.05)
                assert self.journal.count("unload base") == 0
            return Model(self.journal, model_id)

    async with serve(deployment(Adapters).bind(journal)) as graph:
        assert await graph.handle.named.remote("a") == "a"


async def test_a_model_that_a_thread_loads_as_the_graph_stops_is_unloaded(
    journal: Journal, in_process: GraphSettings, serve: Serve
) -> None:
    release = threading.Event()

    class Slow(Host):
        @multiplexed
        def get_model(self, model_id: str) -> SyncModel:  # type: ignore[override]
            self.journal.add(f"load {model_id}")
            release.wait(PATIENCE_S)
            return SyncModel(self.journal, model_id)

    slow = deployment(Slow).options(graceful_shutdown_timeout_s=0.1)
    async with serve(slow.bind(journal)) as graph:
        call = graph.handle.named.remote("a")
        await journal.wait_for("load a")
    assert journal.count("unload a") == 0
    release.set()
    await journal.wait_for("unload a")
    assert call.cancelled()


async def test_a_model_that_does_not_end_does_not_keep_the_graph_from_stopping(
    journal: Journal, in_process: GraphSettings, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    class Endless(Model):
        async def aclose(self) -> None:
            await asyncio.Event().wait()

    class Slow(Model):
        async def aclose(self) -> None:
            await asyncio.sleep(0.01)
            await super().aclose()

    class Hosts(Host):
        @multiplexed
        async def get_model(self, model_id: str) -> Model:
            return (Endless if model_id == "a" else Slow)(self.journal, model_id)

    hosts = deployment(Hosts).options(graceful_shutdown_timeout_s=1)
    async with asyncio.timeout(PATIENCE_S):
        async with serve(hosts.bind(journal)) as graph:
            for model_id in "ab":
                await graph.handle.named.remote(model_id)
    assert "not ended within 1 s: unload a" in caplog.text
    assert journal.read() == ["unload b"]


async def test_a_load_that_minds_no_cancellation_is_unloaded(
    journal: Journal, in_process: GraphSettings, serve: Serve
) -> None:
    class Stubborn(Host):
        @multiplexed
        async def get_model(self, model_id: str) -> Model:
            self.journal.add("load")
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(PATIENCE_S)
            return Model(self.journal, model_id)

    async with serve(deployment(Stubborn).bind(journal)) as graph:
        call = graph.handle.named.remote("a")
        await journal.wait_for("load")
        call.cancel()
    await journal.wait_for("unload a")


class Panic(BaseException):
    """What an extension module may raise."""


async def test_what_is_no_exception_fails_a_load_or_an_end_only(
    journal: Journal, serve: Serve
) -> None:
    class Ending(Model):
        async def aclose(self) -> None:
            await super().aclose()
            raise Panic

    class Hosts(Host):
        @multiplexed(max_num_models_per_replica=1)
        async def get_model(self, model_id: str) -> Model:
            if model_id == "broken":
                raise SystemExit
            return Ending(self.journal, model_id)

    async with serve(deployment(Hosts).bind(journal)) as graph:
        with pytest.raises(NodeError, match="SystemExit"):
            await graph.handle.named.remote("broken")
        for model_id in "ab":
            assert await graph.handle.named.remote(model_id) == model_id
    assert journal.read() == ["unload a", "unload b"]


async def test_a_failed_load_is_not_kept(journal: Journal, serve: Serve) -> None:
    async with serve(deployment(Host).bind(journal)) as graph:
        calls = [graph.handle.named.remote("broken") for _ in range(2)]
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(outcome, ConnectionError)
        with pytest.raises(ConnectionError):
            await graph.handle.named.remote("broken")
        assert journal.count("load broken") >= 2


async def test_a_model_in_use_is_not_unloaded(journal: Journal, serve: Serve) -> None:
    gate = Gate.bind()
    async with serve(deployment(Host).bind(journal, gate)) as graph:
        using = graph.handle.use.remote("a")
        await journal.wait_for("use a")
        for model_id in ("b", "c", "d"):
            await graph.handle.named.remote(model_id)
        assert journal.count("unload a") == 0
        await graph.handle_of(gate).open.remote()
        assert await using == "a"
        await journal.wait_for("unload a")
        found = journal.read()
        assert found.index("used a") < found.index("unload a")


async def test_a_request_that_asks_for_none(journal: Journal, serve: Serve) -> None:
    async with serve(deployment(Host).bind(journal)) as graph:
        with pytest.raises(InputError, match=r"Host.get_model: the request asks for no model; "):
            await graph.handle.remote()


async def test_the_calls_below_ask_for_the_same(journal: Journal, serve: Serve) -> None:
    @deployment
    class Outer:
        def __init__(self, host: DeploymentHandle) -> None:
            self.host = host

        async def __call__(self) -> list[str]:
            return [
                get_multiplexed_model_id(),
                await self.host.remote(),
                await self.host.options(multiplexed_model_id="own").remote(),
                get_multiplexed_model_id(),
            ]

    async with serve(Outer.bind(deployment(Host).bind(journal))) as graph:
        handle = graph.handle.options(multiplexed_model_id="m1")
        assert await handle.remote() == ["m1", "m1", "own", "m1"]
        assert get_multiplexed_model_id() == ""


def test_over_http(journal: Journal, backend: GraphSettings) -> None:
    app = FastAPI()
    with InputNode() as x:
        dag = deployment(Host).bind(journal).__call__.bind(x)
    app.include_router(graph_router(dag, settings=backend), prefix="/m")
    with TestClient(app) as client:
        for model_id in ("a", "b"):
            answer = client.post("/m", json=1, headers={"serve_multiplexed_model_id": model_id})
            assert answer.json() == model_id
        (problem,) = client.post("/m", json=1).json()["detail"]
        assert problem["loc"] == ["header", "serve_multiplexed_model_id"]


async def test_calls_go_where_their_model_is(
    journal: Journal, backend: GraphSettings, serve: Serve
) -> None:
    if backend.backend == "inprocess":
        pytest.skip("there is one replica")
    async with serve(deployment(Host).options(num_replicas=2).bind(journal)) as graph:
        handles = {name: graph.handle.options(multiplexed_model_id=name) for name in "abcd"}
        homes = {name: await handle.where.remote() for name, handle in handles.items()}
        assert sorted(homes.values()) == sorted([*set(homes.values())] * 2)  # two each
        for _ in range(10):
            for name, handle in handles.items():
                assert await handle.where.remote() == homes[name]
        assert len(journal.read()) == 4
        assert await graph.handle.named.remote("a")  # asks for none


async def test_a_function_keeps_models_too(serve: Serve) -> None:
    loaded = []

    @multiplexed
    def load(model_id: str) -> str:
        loaded.append(model_id)
        return model_id.upper()

    assert [await load("a"), await load("b"), await load("a")] == ["A", "B", "A"]
    assert loaded == ["a", "b"]


async def test_several_in_a_class(serve: Serve) -> None:
    class Twice:
        @multiplexed
        async def one(self, model_id: str) -> str:
            return model_id

        @multiplexed
        async def two(self, model_id: str) -> str:
            return model_id

    with pytest.raises(DeploymentStartError, match="Twice has several @multiplexed methods"):
        await serve(deployment(Twice).bind()).start()


@pytest.mark.parametrize("model_id", ["a\nb", "\ud800", 5])
async def test_an_id_that_cannot_be(model_id: Any, journal: Journal, serve: Serve) -> None:
    async with serve(deployment(Host).bind(journal)) as graph:
        with pytest.raises(OptionError, match="must be a string of printable characters"):
            graph.handle.options(multiplexed_model_id=model_id)
        if model_id == "a\nb":
            with pytest.raises(InputError, match="is no id of a model"):
                await graph.handle.named.remote(model_id)


def test_what_cannot_be() -> None:
    for limit in (0, -2, 1.5, True):
        with pytest.raises(OptionError, match="max_num_models_per_replica"):
            multiplexed(max_num_models_per_replica=limit)
    with pytest.raises(GraphDefinitionError, match="takes a function or a method"):
        multiplexed(5)


async def test_it_is_logged(
    journal: Journal, in_process: GraphSettings, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with serve(deployment(Host).bind(journal)) as graph:
        await graph.handle.named.remote("a")
    assert "Host.get_model: loaded a in 0." in caplog.text
    assert "Host.get_model: unloaded a" in caplog.text


async def test_a_model_used_in_a_batch_or_a_constructor_is_given_back(
    journal: Journal, serve: Serve
) -> None:
    class Batches(Host):
        async def __init__(self, journal: Journal) -> None:
            Host.__init__(self, journal)
            await self.get_model("first")

        @batch(max_batch_size=1)
        async def predict(self, model_ids: list[str]) -> list[str]:
            return [(await self.get_model(model_ids[0])).model_id]

    async with serve(deployment(Batches).bind(journal)) as graph:
        for model_id in ("a", "b", "c"):
            await graph.handle.predict.remote(model_id)
        await journal.wait_for("unload first")
        await journal.wait_for("unload a")
