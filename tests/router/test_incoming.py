"""What the headers of a request say to a graph, and those of the answer back."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from fastapi import Depends, FastAPI, HTTPException, Response
from fastapi.routing import APIRoute

from fastapi_graph import (
    Graph,
    GraphDefinitionError,
    GraphSettings,
    InputNode,
    deployment,
    get_request_context,
    graph_router,
)
from fastapi_graph.request import current_scope
from tests.router.golden import client_of


@deployment
async def answer(value: Any) -> Any:
    if value == "wait":
        await asyncio.sleep(30)
    if value == "fail":
        raise RuntimeError
    if value == "teapot":
        raise HTTPException(418)
    if value == "raw":
        return Response("raw", headers={"x-request-id": "its own"})
    return get_request_context().deadline_s


class OwnRoute(APIRoute):
    """A route class that is not ours."""


async def nothing() -> None:
    """Turn the shortcut off."""


def app_of(**options: Any) -> FastAPI:
    app = FastAPI()
    with InputNode() as x:
        app.include_router(graph_router(answer.bind(x), **options), prefix="/a")
    return app


WAYS: dict[str, dict[str, Any]] = {
    "shortcut": {},
    "dependency": {"dependencies": [Depends(nothing)]},
    "own route class": {"route_class": OwnRoute},
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> dict[str, Any]:
    return WAYS[request.param]


def test_the_id_goes_in_and_out(way: dict[str, Any]) -> None:
    with client_of(app_of(**way)) as client:
        given = client.post("/a", json=1, headers={"x-request-id": "abc"})
        assert given.headers["x-request-id"] == "abc"
        made = [client.post("/a", json=1).headers["x-request-id"] for _ in range(2)]
        assert len(set(made)) == 2
        for bad in ("", "with space", "x" * 129):
            response = client.post("/a", json=1, headers={"x-request-id": bad})
            assert response.headers["x-request-id"] not in ("", bad)


def test_errors_have_the_id_too() -> None:
    with client_of(app_of()) as client:
        for value, status in (("teapot", 418), ("wait", 504)):
            headers = {"x-request-id": "abc", "x-request-timeout-seconds": "0.05"}
            response = client.post("/a", json=value, headers=headers)
            assert (response.status_code, response.headers["x-request-id"]) == (status, "abc")
        response = client.post("/a", content=b"{", headers={"x-request-id": "abc"})
        assert response.status_code == 422
        assert response.headers["x-request-id"] == "abc"
        raw = client.post("/a", json="raw", headers={"x-request-id": "abc"})
        assert raw.headers.get_list("x-request-id") == ["its own"]


@pytest.mark.parametrize(
    "router, header, expected",
    [(None, "5", 5), (10, "5", 5), (5, "10", 5), (5, None, 5), (None, None, None)],
)
def test_the_earlier_deadline_counts(
    router: float | None, header: str | None, expected: float | None, way: dict[str, Any]
) -> None:
    headers = {} if header is None else {"x-request-timeout-seconds": header}
    if "route_class" in way and header is not None:
        way = {}
    with client_of(app_of(request_timeout_s=router, **way)) as client:
        left = client.post("/a", json=1, headers=headers).json()
    assert left == expected if expected is None else expected - 3 < left <= expected


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf", ""])
def test_a_deadline_that_cannot_be(text: str) -> None:
    with client_of(app_of()) as client:
        response = client.post("/a", json=1, headers={"x-request-timeout-seconds": text})
    assert response.status_code == 400
    assert "x-request-timeout-seconds must be a number above 0" in response.json()["detail"]


def test_the_keyword_wins_over_the_setting() -> None:
    settings = GraphSettings(request_timeout_s=100)
    with client_of(app_of(request_timeout_s=5, settings=settings)) as client:
        assert client.post("/a", json=1).json() <= 5
    with pytest.raises(GraphDefinitionError, match="request_timeout_s=0"):
        app_of(request_timeout_s=0)


def test_an_endpoint_and_a_dependency_have_the_context() -> None:
    seen = []

    async def look() -> None:
        seen.append(get_request_context())

    def look_in_thread() -> None:
        seen.append(get_request_context())

    app = app_of(dependencies=[Depends(look), Depends(look_in_thread)])
    with client_of(app) as client:
        client.post("/a", json=1, headers={"x-request-id": "abc"})
    assert [(each.request_id, each.route, each.deployment) for each in seen] == [
        ("abc", "/a", "")
    ] * 2


def test_a_degraded_answer_says_so(way: dict[str, Any]) -> None:
    @deployment(fallback=0)
    async def model(value: int) -> int:
        if value > 1:
            raise ConnectionError
        return value

    app = FastAPI()
    with InputNode(int) as x:
        app.include_router(graph_router(model.bind(x), **way), prefix="/m")
    with client_of(app) as client:
        fine, degraded = client.post("/m", json=1), client.post("/m", json=2)
    assert (fine.json(), "x-graph-degraded" in fine.headers) == (1, False)
    assert (degraded.json(), degraded.headers["x-graph-degraded"]) == (0, "model")


@pytest.mark.parametrize("status", [503, 429])
def test_the_status_over_capacity(status: int) -> None:
    begun, go_on = threading.Event(), threading.Event()

    @deployment(max_ongoing_requests=1, max_queued_requests=0)
    def busy() -> None:
        begun.set()
        go_on.wait(20)

    app = FastAPI()
    settings = GraphSettings(over_capacity_status=status)
    app.include_router(graph_router(busy.bind(), settings=settings), prefix="/b")
    with client_of(app) as client:
        first = threading.Thread(target=client.post, args=("/b",))
        first.start()
        assert begun.wait(20)
        refused = client.post("/b")
        go_on.set()
        first.join()
    assert refused.status_code == status
    assert int(refused.headers["Retry-After"]) >= 1


def test_a_handle_in_an_endpoint_belongs_to_its_request() -> None:
    graph = Graph(answer.bind(1))
    app = FastAPI(lifespan=graph.lifespan)

    @app.get("/e")
    async def endpoint(handle: Any = Depends(graph.provide())) -> Any:
        await handle.remote()
        return get_request_context().request_id

    with client_of(app) as client:
        assert len(client.get("/e").json()) == 32


@pytest.mark.anyio
async def test_a_server_finds_nothing_of_the_request_in_the_context() -> None:
    seen = []

    async def receive() -> Any:
        seen.append(current_scope.get())
        return {"type": "http.request", "body": b"1"}

    async def send(message: Any) -> None:
        seen.append(current_scope.get())

    app = app_of(request_timeout_s=5)
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/a",
        "raw_path": b"/a",
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "http_version": "1.1",
        "headers": [(b"content-type", b"application/json")],
    }
    async with app.router.lifespan_context(app):
        await app(scope, receive, send)
        await asyncio.sleep(0)
    assert seen == [None] * 3
