"""Clients that leave and servers that stop, on real servers."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults.servers import gunicorn, read_all, uvicorn, wait_until

LEAVING = """
class Waiting:
    async def predict(self, value):
        say("node", value, "runs")
        try:
            await asyncio.sleep(20)
        except asyncio.CancelledError:
            say("node", value, "was cancelled")
            raise

Waiting = deployment(Waiting)

@deployment
class Outer:
    def __init__(self, inner: DeploymentHandle):
        self.inner = inner

    async def predict(self, value):
        return await self.inner.predict.remote(value)

with InputNode() as x:
    dag = Waiting.bind().predict.bind(x)
    nested = Outer.bind(Waiting.bind()).predict.bind(x)

async def nothing():
    pass

app.include_router(graph_router(dag), prefix="/plain")
app.include_router(graph_router(dag), prefix="/guarded", dependencies=[Depends(nothing)])
app.include_router(graph_router(nested), prefix="/nested")

@deployment
class Driver:
    def __init__(self, inner: DeploymentHandle):
        self.inner = inner

    async def __call__(self, request: Request):
        return await self.inner.remote(await request.json())

app.include_router(graph_router(Driver.bind(dag)), prefix="/driver")

async def quick(value):
    return value

serve(quick, "/quick")
"""

SERVERS = {"uvicorn": uvicorn, "gunicorn": gunicorn}


@pytest.mark.parametrize("kind", SERVERS)
def test_client_that_leaves(kind: str, tmp_path: Path) -> None:
    with SERVERS[kind](tmp_path, LEAVING) as server:
        for number, path in enumerate(("/plain", "/guarded", "/nested", "/driver", "/plain/")):
            connection = server.send(path, str(number).encode())
            server.logged(f"node {number} runs")
            connection.close()
            server.logged(f"node {number} was cancelled", timeout_s=1)
            server.logged(f"499 POST {path}", timeout_s=1)
        assert server.post("/quick", 1).json() == 1
        assert "Traceback" not in server.log
        assert " 500" not in server.log


@pytest.mark.parametrize("path", ["/quick", "/guarded", "/driver"])
@pytest.mark.parametrize("kind", SERVERS)
def test_client_that_leaves_in_the_middle_of_its_body(kind: str, path: str, tmp_path: Path) -> None:
    with SERVERS[kind](tmp_path, LEAVING) as server:
        connection = server.send(path, b'{"a', length=100)
        time.sleep(0.1)
        connection.close()
        time.sleep(0.2)
        assert server.post("/quick", 1).json() == 1
        assert "runs" not in server.log
        assert "Traceback" not in server.log, server.log


def test_client_that_stays_is_not_cancelled(tmp_path: Path) -> None:
    code = """
    async def slow(value):
        await asyncio.sleep(value)
        return value

    serve(slow, "/g")
    """
    with uvicorn(tmp_path, code) as server:
        connection = server.send("/g", b"0.4")
        connection.settimeout(5)
        assert read_all(connection).endswith(b"0.4")
        with httpx.Client(base_url=server.url) as client:  # one connection, used again
            for _ in range(3):
                assert client.post("/g", json=0.15).json() == 0.15
        assert "499" not in server.log


FAILING = """
async def my_model(value):
    raise ValueError("secret weights")

serve(my_model, "/g")

def blocked(value):
    time.sleep(value)
    return value

serve(blocked, "/blocked")
"""


def test_failing_node_is_named_in_the_log(tmp_path: Path) -> None:
    with uvicorn(tmp_path, FAILING) as server:
        response = server.post("/g", 1)
        assert (response.status_code, response.text) == (500, "Internal Server Error")
        server.logged("ValueError: secret weights")
        server.logged(r"my_model \(bound at .*py:\d+\)")
        assert server.post("/g", content=b"{", headers={"content-type": "application/json"}).json()


def test_blocked_node_does_not_block_the_others(tmp_path: Path) -> None:
    with uvicorn(tmp_path, FAILING) as server:
        blocked = server.send("/blocked", b"1.0")
        before = time.monotonic()
        assert server.post("/blocked", 0).json() == 0
        assert time.monotonic() - before < 0.8
        assert read_all(blocked).endswith(b"1.0")


STOPPING = """
class Model:
    async def predict(self, value):
        say("request runs")
        await asyncio.sleep(value)
        say("request ends")
        return value

    def close(self):
        say("model closed")

Model = deployment(Model, graceful_shutdown_timeout_s=5)
with InputNode() as x:
    app.include_router(graph_router(Model.bind().predict.bind(x)), prefix="/g")
"""


@pytest.mark.parametrize(
    "kind, number",
    [
        ("uvicorn", signal.SIGTERM),
        ("uvicorn", signal.SIGINT),
        ("gunicorn", signal.SIGTERM),  # its SIGINT is a quick stop, which does not wait
    ],
)
def test_stop_lets_requests_finish(kind: str, number: signal.Signals, tmp_path: Path) -> None:
    with SERVERS[kind](tmp_path, STOPPING) as server:
        connections = [server.send("/g", b"0.6") for _ in range(3)]
        wait_until(lambda: server.log.count("request runs") == 3)
        server.process.send_signal(number)
        for connection in connections:
            answer = read_all(connection)
            assert answer.startswith(b"HTTP/1.1 200"), answer
            assert answer.endswith(b"0.6")
        server.process.wait(8)
        wait_until(lambda: "model closed" in server.log)
        lines = [line for line in server.lines if line in ("request ends", "model closed")]
        assert lines == ["request ends"] * 3 + ["model closed"]
        assert "Traceback" not in server.log


def test_a_new_request_during_the_stop_gets_503(tmp_path: Path) -> None:
    """One comes in on a connection that is open already: the other is still answered."""
    code = """
    graph = None

    async def slow(value):
        await asyncio.sleep(value)
        return value

    with InputNode() as x:
        graph = Graph(deployment(slow).bind(x))
    app.include_router(graph_router(graph), prefix="/g")

    @app.post("/stop")
    async def stop():
        app.state.stopping = asyncio.create_task(graph.stop())
        await asyncio.sleep(0)
    """
    with uvicorn(tmp_path, code) as server:
        busy = server.send("/g", b"0.5")
        time.sleep(0.1)
        assert server.post("/stop").status_code == 200
        refused = server.post("/g", 0)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert read_all(busy).startswith(b"HTTP/1.1 200")


def test_constructor_that_fails_stops_the_server(tmp_path: Path) -> None:
    code = """
    @deployment
    class Broken:
        def __init__(self):
            raise OSError("no weights")
        async def __call__(self, value):
            return value

    app.include_router(graph_router(Broken.bind()), prefix="/g")
    """
    with pytest.raises(AssertionError) as raised, uvicorn(tmp_path, code):
        pass
    log = str(raised.value)
    assert "Broken (bound at" in log
    assert "OSError: no weights" in log
    assert "Application startup failed" in log


WORKERS = """
class Model:
    def __init__(self):
        say("model", os.getpid(), "starts")

    async def predict(self, value):
        await asyncio.sleep(value or 0)
        return os.getpid()

    def close(self):
        say("model", os.getpid(), "closed")

Model = deployment(Model)
with InputNode() as x:
    app.include_router(graph_router(Model.bind().predict.bind(x)), prefix="/g")
"""


def pids(server: Any, count: int = 30) -> set[int]:
    """Return the workers that answer, each request on a connection of its own."""
    found: set[int] = set()
    for _ in range(count):
        response = server.post("/g", 0)
        assert response.status_code == 200
        found.add(response.json())
    return found


def test_two_workers_and_a_stop(tmp_path: Path) -> None:
    with gunicorn(tmp_path, WORKERS, "-w", "2") as server:
        wait_until(lambda: server.log.count(" starts") == 2)
        assert len(wait_until(lambda: len(p := pids(server)) == 2 and p)) == 2
        busy = [server.send("/g", b"0.5") for _ in range(4)]
        time.sleep(0.2)
        server.terminate()
        for connection in busy:
            assert read_all(connection).startswith(b"HTTP/1.1 200")
        server.process.wait(8)
        wait_until(lambda: server.log.count(" closed") == 2)
        assert "Traceback" not in server.log


def test_killed_worker_is_replaced(tmp_path: Path) -> None:
    with gunicorn(tmp_path, WORKERS, "-w", "2") as server:
        wait_until(lambda: server.log.count(" starts") == 2)
        before = wait_until(lambda: len(p := pids(server)) == 2 and p)
        victim, other = sorted(before)
        stop = threading.Event()
        statuses: list[Any] = []

        def keep_asking() -> None:
            while not stop.is_set():
                try:
                    statuses.append(server.post("/g", 0).status_code)
                except httpx.TransportError:
                    statuses.append("lost")

        asking = threading.Thread(target=keep_asking)
        asking.start()
        try:
            os.kill(victim, signal.SIGKILL)
            wait_until(lambda: server.log.count(" starts") == 3)
        finally:
            stop.set()
            asking.join(10)
        assert set(statuses) <= {200, "lost"}
        assert statuses.count("lost") <= 1  # the request that the victim had accepted
        after = wait_until(lambda: len(p := pids(server)) == 2 and p)
        assert other in after
        assert victim not in after
