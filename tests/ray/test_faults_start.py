"""Replicas that cannot start, and what their callers are told."""

# ruff: noqa: ASYNC110 - what is polled is in another process

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from fastapi_graph import deployment, graph_router
from fastapi_graph.backends.ray.controller import Controller
from fastapi_graph.errors import BackendError, DeploymentStartError, NoReplicaError
from tests.contract.probes import Journal, here
from tests.ray.test_faults import CALLERS, Load, kill, pids_of, serve, until

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120), pytest.mark.usefixtures("ray_cluster")]


class NoWeightsError(Exception):
    """An exception of a user, with an `__init__` that pickle cannot call."""

    def __init__(self, *, path: str) -> None:
        super().__init__(f"no weights at {path}")
        self.path = path


@deployment
class Model:
    """Cannot be constructed while the journal says so."""

    def __init__(self, journal: Journal) -> None:
        journal.add("made")
        if journal.read().count("break") > journal.read().count("repair"):
            raise NoWeightsError(path="/nowhere")

    async def __call__(self, value: int) -> int:
        await asyncio.sleep(0.02)
        return value

    async def pid(self) -> int:
        return os.getpid()


async def test_resources_that_no_node_has(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fastapi_graph")
    options = {"resources": {"unicorn": 1}}
    node = Model.options(ray_actor_options=options).bind(Journal(Path("unused")))
    graph = serve(node, update_timeout_s=6)
    starting = asyncio.create_task(graph.start())
    reason = "waiting for resources: needs {'unicorn': 1}, no node has them"
    try:
        await until(lambda: graph.status()[0].error == reason, 5.0)
        assert graph.status()[0].state == "starting"
        await until(lambda: f"Model: {reason}" in caplog.text, 5.0)
    finally:
        with pytest.raises(DeploymentStartError) as caught:
            await starting
    message = str(caught.value)
    assert message == f"not ready within update_timeout_s=6: Model has 0 of 1 replicas: {reason}"


async def test_a_constructor_that_fails_at_first(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.add("break")
    node, place = Model.bind(journal), here()
    began = time.monotonic()
    with pytest.raises(DeploymentStartError, match="no weights at /nowhere") as caught:
        await serve(node).start()
    assert time.monotonic() - began < 30
    assert str(caught.value).startswith("Model (bound at ")
    assert f"{place}) did not start: NoWeightsError: " in str(caught.value)
    cause = caught.value.__cause__
    assert type(cause) is NoWeightsError
    assert cause.path == "/nowhere"
    assert journal.count("made") == 1


async def test_a_constructor_that_fails_in_a_replacement(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    node = Model.options(num_replicas=2).bind(journal)
    async with serve(node) as graph, Load(graph.handle, lambda number: number) as load:
        victim, other = await pids_of(graph.handle_of(node), 2)
        journal.add("break")
        killed = kill(victim)
        await journal.wait_for("made", 4)
        await until(lambda: "no weights at /nowhere" in graph.status()[0].error)
        await load.go_on()
        assert await pids_of(graph.handle_of(node), 1) == [other]
        journal.add("repair")
        await until(lambda: graph.status()[0].replicas == 2)
        print(f"two replicas again after {time.monotonic() - killed:.2f} s")
        await load.go_on()
        assert other in await pids_of(graph.handle_of(node), 2)


async def test_no_replica_in_time(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    node = Model.bind(journal)
    graph = serve(node, replica_wait_s=1.0)
    app = FastAPI()
    app.include_router(graph_router(graph), prefix="/model")
    async with graph, client_of(app) as client:
        assert (await client.post("/model", json=1)).json() == 1
        (victim,) = await pids_of(graph.handle_of(node), 1)
        journal.add("break")
        kill(victim)
        began = time.monotonic()
        calls = [graph.handle.remote(number) for number in range(CALLERS)]
        for call in calls:
            with pytest.raises(NoReplicaError, match=r"Model: no replica within replica_wait_s=1"):
                await call
        assert 0.5 < time.monotonic() - began < 5
        refused = await client.post("/model", json=1)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        journal.add("repair")
        await until(lambda: graph.status()[0].replicas == 1)
        async with asyncio.timeout(10):
            while (await client.post("/model", json=1)).status_code != 200:
                await asyncio.sleep(0.05)


def client_of(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


async def test_a_controller_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the package is not installed, or of another version, on the nodes."""

    class Broken(Controller):
        async def __init__(self, *_: Any) -> None:
            raise ImportError("no module named 'fastapi_graph'")

    monkeypatch.setattr("fastapi_graph.backends.ray.controller.Controller", Broken)
    message = r"(?s)the controller of graph 'faults-\w+' does not start: .*ImportError: no module"
    with pytest.raises(BackendError, match=message):
        async with asyncio.timeout(60):
            await serve(Model.bind(Journal(Path("unused")))).start()
