"""The request's context: the same id in every node, whichever process it is in."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from fastapi_graph import (
    DeploymentHandle,
    GraphSettings,
    InputNode,
    deployment,
    get_request_context,
    graph_router,
)
from tests.contract.conftest import Logged, Serve


@deployment
async def context(*_: Any) -> Any:
    return get_request_context()._asdict()


@deployment
class Asks:
    def __init__(self, below: DeploymentHandle) -> None:
        self.below = below

    def __call__(self, value: Any) -> Any:
        mine = get_request_context()._asdict()  # in a thread
        return [mine, *self.below.options(multiplexed_model_id="mine").remote().result()]


@deployment
async def both(*values: Any) -> Any:
    return [*values, await asyncio.to_thread(lambda: get_request_context()._asdict())]


with InputNode() as x:
    DAG = both.bind(context.bind(x), Asks.bind(both.bind(context.bind())).__call__.bind(x))


def flat(value: Any) -> list[dict[str, Any]]:
    return [value] if isinstance(value, dict) else [part for each in value for part in flat(each)]


def test_over_http(backend: GraphSettings) -> None:
    app = FastAPI()
    app.include_router(graph_router(DAG, settings=backend), prefix="/dag")
    headers = {
        "x-request-id": "abc-1",
        "serve_multiplexed_model_id": "m7",
        "x-request-timeout-seconds": "50",
    }
    with TestClient(app) as client:
        response = client.post("/dag", json=1, headers=headers)
        found = flat(response.json())
        other = client.post("/dag", json=1)
    assert response.headers["x-request-id"] == "abc-1"
    assert [part["deployment"] for part in found] == [
        "context",
        "Asks",
        "context_1",
        "both",
        "both_1",
    ]
    assert {part["request_id"] for part in found} == {"abc-1"}
    assert {part["route"] for part in found} == {"/dag"}
    assert [part["multiplexed_model_id"] for part in found] == ["m7", "m7", "mine", "mine", "m7"]
    assert all(40 < part["deadline_s"] <= 50 for part in found)
    assert {part["attempt"] for part in found} == {1}
    assert all(part["replica"] for part in found)
    (made,) = {part["request_id"] for part in flat(other.json())}
    assert made == other.headers["x-request-id"] != "abc-1"
    assert len(made) == 32
    assert {part["deadline_s"] for part in flat(other.json())} == {None}


@pytest.mark.anyio
async def test_through_handles(serve: Serve) -> None:
    async with serve(DAG) as graph:
        assert get_request_context().deployment == ""
        first, second = [flat(await graph.handle.remote(1)) for _ in range(2)]
        (one,), (other,) = [{part["request_id"] for part in found} for found in (first, second)]
        assert one != other
        assert {part["route"] for part in first} == {""}


@deployment
async def logs(value: str) -> None:
    import logging

    logging.getLogger("mine").warning("seen %s", value)


def test_logs_as_json(
    backend: GraphSettings, logged: Logged, capfd: pytest.CaptureFixture[str]
) -> None:
    import logging

    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    settings = GraphSettings(**{**backend.model_dump(), "log_format": "json"})
    app = FastAPI()
    with InputNode() as value:
        app.include_router(graph_router(logs.bind(value), settings=settings), prefix="/logs")
    try:
        with TestClient(app) as client:
            client.post("/logs", json="this", headers={"x-request-id": "abc-2"})
            text = ""
            for _ in range(100):  # Ray writes what a process logs to a file, a little later
                text += capfd.readouterr().err + logged.text
                if '"seen this"' in text:
                    break
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    line = next(line for line in text.splitlines() if '"seen this"' in line)
    record = json.loads(line[line.index("{") :])
    assert record["level"] == "WARNING"
    assert record["logger"] == "mine"
    assert record["request_id"] == "abc-2"
    assert record["node"] == "logs"
    assert record["replica"].startswith("logs:" if backend.backend == "inprocess" else "")
