"""Limits: capacity, time, size, and very many requests."""

import asyncio
import threading
import time
from typing import Any

import httpx
import pytest
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient

from fastapi_graph import (
    DeploymentHandle,
    Graph,
    GraphSettings,
    InputNode,
    deployment,
    graph_router,
)
from tests.faults.servers import uvicorn

JSON = {"content-type": "application/json"}


def app_of(function: Any, *, settings: GraphSettings | None = None, **options: Any) -> FastAPI:
    with InputNode() as x:
        dag = deployment(function, **options).bind(x)
    app = FastAPI()
    app.include_router(graph_router(dag, settings=settings), prefix="/g")
    return app


async def concurrently(app: FastAPI, count: int, before_last: Any = None) -> list[httpx.Response]:
    """Post many requests at once, in one loop, without a server."""
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await asyncio.gather(*(client.post("/g", json=n) for n in range(count)))


def test_over_capacity() -> None:
    async def slow(value: int) -> int:
        await asyncio.sleep(0.1)
        return value

    app = app_of(slow, max_ongoing_requests=2, max_queued_requests=1)
    responses = asyncio.run(concurrently(app, 6))
    assert [response.status_code for response in responses] == [200] * 3 + [503] * 3
    refused = responses[-1]
    assert int(refused.headers["retry-after"]) >= 1
    assert "slow" not in refused.text
    assert "max_ongoing" not in refused.text


def test_over_capacity_of_a_nested_deployment() -> None:
    @deployment(max_ongoing_requests=1, max_queued_requests=0)
    async def inner(value: int) -> int:
        await asyncio.sleep(0.1)
        return value

    @deployment
    class Outer:
        def __init__(self, inner: DeploymentHandle) -> None:
            self.inner = inner

        async def __call__(self, value: int) -> int:
            return await self.inner.remote(value)

    app = FastAPI()
    app.include_router(graph_router(Outer.bind(inner.bind())), prefix="/g")
    responses = asyncio.run(concurrently(app, 3))
    assert sorted(response.status_code for response in responses) == [200, 503, 503]
    assert all("retry-after" in r.headers for r in responses if r.status_code == 503)


def test_capacity_comes_back() -> None:
    async def slow(value: int) -> int:
        await asyncio.sleep(0.02)
        return value

    app = app_of(slow, max_ongoing_requests=1, max_queued_requests=0)
    with TestClient(app) as client:
        for number in range(3):
            assert client.post("/g", json=number).json() == number


@pytest.mark.parametrize("guard", [[], [Depends(lambda: None)]], ids=["plain", "depending"])
def test_deadline(guard: list[Any]) -> None:
    ended: list[str] = []

    async def slow(value: float) -> float:
        try:
            await asyncio.sleep(value)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        return value

    with InputNode() as x:
        dag = deployment(slow).bind(x)
    app = FastAPI()
    router = graph_router(dag, settings=GraphSettings(request_timeout_s=0.1), dependencies=guard)
    app.include_router(router, prefix="/g")
    with TestClient(app) as client:
        before = time.monotonic()
        response = client.post("/g", json=5)
        assert time.monotonic() - before < 2
        assert response.status_code == 504
        assert ended == ["cancelled"]
        assert client.post("/g", json=0).json() == 0


def test_deadline_of_a_synchronous_node() -> None:
    release = threading.Event()

    def blocked(value: Any) -> Any:
        release.wait(5)
        return value

    app = app_of(blocked, settings=GraphSettings(request_timeout_s=0.1))
    with TestClient(app) as client:
        assert client.post("/g", json=1).status_code == 504
        release.set()
        assert client.post("/g", json=1).json() == 1


def test_timeout_error_of_a_node_is_its_own() -> None:
    async def times_out(value: Any) -> Any:
        raise TimeoutError("of the database")

    app = app_of(times_out, settings=GraphSettings(request_timeout_s=5))
    with TestClient(app, raise_server_exceptions=False) as client:
        assert client.post("/g", json=1).status_code == 500
    with TestClient(app) as client, pytest.raises(TimeoutError, match="of the database"):
        client.post("/g", json=1)


def test_a_blocked_synchronous_node_blocks_nothing_else() -> None:
    release = threading.Event()

    def maybe_blocked(value: str) -> str:
        if value == "block":
            assert release.wait(5)
        return value

    graph = Graph(_bound(maybe_blocked))
    app = FastAPI()
    app.include_router(graph_router(graph), prefix="/g")

    async def run() -> None:
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                blocked = [asyncio.create_task(client.post("/g", json="block")) for _ in range(60)]
                await asyncio.sleep(0.1)
                answer = await asyncio.wait_for(client.post("/g", json="go"), 3)
                assert answer.json() == "go"
                release.set()
                assert {r.json() for r in await asyncio.gather(*blocked)} == {"block"}

    asyncio.run(run())


def _bound(function: Any) -> Any:
    with InputNode() as x:
        return deployment(function).bind(x)


def test_two_thousand_concurrent_requests() -> None:
    async def branch(value: int) -> int:
        await asyncio.sleep(0.001)
        return value * 2

    async def join(left: int, right: int, whole: int) -> list[int]:
        return [left, right, whole]

    with InputNode() as x:
        node, other = deployment(branch), deployment(branch).options(name="other")
        dag = deployment(join).bind(node.bind(x), other.bind(x), x)
    app = FastAPI()
    app.include_router(graph_router(dag), prefix="/g")
    responses = asyncio.run(concurrently(app, 2000))
    assert [response.json() for response in responses] == [[2 * n, 2 * n, n] for n in range(2000)]


MANY = """
async def slow(value):
    await asyncio.sleep(0.05)
    return value

serve(slow, "/g", max_ongoing_requests=100)
"""


def test_two_thousand_concurrent_requests_to_a_server(tmp_path: Any) -> None:
    async def post(port: int, number: int) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = str(number).encode()
        writer.write(
            b"POST /g HTTP/1.1\r\nhost: t\r\nconnection: close\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
        )
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        assert answer.startswith(b"HTTP/1.1 200"), answer
        return int(answer.rpartition(b"\r\n\r\n")[2])

    async def run(port: int) -> list[int]:
        return await asyncio.gather(*(post(port, number) for number in range(2000)))

    with uvicorn(tmp_path, MANY, "--backlog", "4096", "--log-level", "info") as server:
        assert asyncio.run(run(server.port)) == list(range(2000))
        assert "Traceback" not in server.log


LARGE = """
def same(value):
    return len(value)

serve(same, "/g", settings=GraphSettings(max_body_size=1000))
serve(same, "/free")
"""


def test_body_too_large(tmp_path: Any) -> None:
    with uvicorn(tmp_path, LARGE) as server:
        large = b'"' + b"a" * 2000 + b'"'
        assert server.post("/g", "a" * 998).json() == 998
        for content in (large, iter([large[:900], large[900:]])):
            response = server.post("/g", content=content, headers=JSON)
            assert response.status_code == 413
        assert server.post("/free", content=large, headers=JSON).json() == 2000
        assert server.post("/g", "a").json() == 1
        assert "Traceback" not in server.log
