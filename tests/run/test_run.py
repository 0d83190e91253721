"""`run` and `shutdown`, in the process of the test."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from fastapi_graph import (
    BackendError,
    DAGDriver,
    DeploymentStartError,
    Graph,
    GraphDefinitionError,
    GraphNotStartedError,
    InputNode,
    MissingExtraError,
    deployment,
    run,
    shutdown,
)
from tests.processes import free_port


@deployment
async def double(number: int) -> int:
    return number * 2


@deployment
class Scale:
    """Notes what happens to it in the list it was made with."""

    def __init__(self, factor: int, notes: list[str] | None = None) -> None:
        self.factor = factor
        self.notes = [] if notes is None else notes
        self.notes.append("made")

    async def __call__(self, number: int) -> int:
        return number * self.factor

    async def slowly(self, number: int) -> int:
        self.notes.append("asked")
        await asyncio.sleep(0.3)
        self.notes.append("answered")
        return number * self.factor

    def close(self) -> None:
        self.notes.append("closed")


@deployment
class Broken:
    def __init__(self) -> None:
        raise RuntimeError("no weights")

    def __call__(self, number: int) -> int:
        return number


with InputNode() as number:
    doubled = double.bind(number)


@pytest.fixture(autouse=True)
def nothing_runs_on() -> Iterator[None]:
    yield
    shutdown()


@pytest.fixture
def port() -> int:
    return free_port()


def post(port: int, path: str = "/", number: Any = 2) -> httpx.Response:
    url = f"http://127.0.0.1:{port}{path}"
    return httpx.post(url, json=number, trust_env=False, timeout=5)


def test_handle_works_at_once(port: int) -> None:
    assert run(doubled, port=port).remote(2).result(timeout_s=5) == 4


def test_answers_over_http(port: int) -> None:
    run(doubled, port=port)
    assert post(port).json() == 4
    assert post(port, number={"no": "number"}).status_code == 500


def test_driver_with_a_prefix(port: int) -> None:
    driver = DAGDriver.options(route_prefix="/my-dag").bind(doubled)
    handle = run(driver, port=port)
    assert handle.predict.remote(3).result() == handle.remote(3).result() == 6
    assert post(port, "/my-dag").json() == post(port, "/my-dag/").json() == 4
    assert post(port).status_code == 404


def test_route_prefix_keyword_wins(port: int) -> None:
    run(DAGDriver.options(route_prefix="/my-dag").bind(doubled), port=port, route_prefix="/else/")
    assert post(port, "/else").json() == 4
    assert post(port, "/my-dag").status_code == 404


def test_dict_of_routes(port: int) -> None:
    handle = run({"/double": doubled, "/scale": Scale.bind(10)}, port=port)
    assert handle.predict_with_route.remote("/scale", 2).result() == 20
    assert post(port, "/double").json() == 4
    assert post(port, "/scale").json() == 20


def test_graph(port: int) -> None:
    graph = Graph(doubled, name="doubled")
    assert run(graph, port=port).remote(2).result() == 4
    assert {row.state for row in graph.status()} == {"running"}
    shutdown()
    assert {row.state for row in graph.status()} == {"stopped"}


def test_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(BackendError, match=f"cannot listen on 127.0.0.1:{port}"):
            run(doubled, port=port, name="doubled")
    assert run(doubled, port=port, name="doubled").remote(2).result() == 4


def test_port_in_use_constructs_nothing() -> None:
    notes: list[str] = []
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        pytest.raises(BackendError, match="cannot listen"),
    ):
        run(Scale.bind(2, notes), port=other.getsockname()[1])
    assert notes == []


def test_port_in_use_leaves_the_graph_it_would_have_replaced(port: int) -> None:
    handle = run(doubled, port=port, name="doubled")
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(BackendError):
        run(Scale.bind(3), port=other.getsockname()[1], name="doubled")
    assert handle.remote(2).result() == 4
    assert post(port).json() == 4


def test_wrong_graph_leaves_the_graph_it_would_have_replaced(port: int) -> None:
    handle = run(doubled, port=port, name="doubled")
    with pytest.raises(GraphDefinitionError):
        run(double, port=free_port(), name="doubled")
    assert handle.remote(2).result() == 4


def test_constructor_fails(port: int) -> None:
    notes: list[str] = []

    @deployment
    class Both:
        def __init__(self, scale: Any, broken: Any) -> None: ...
        def __call__(self, number: int) -> int:
            return number

    with pytest.raises(DeploymentStartError, match=r"Broken.*did not start.*no weights") as caught:
        run(Both.bind(Scale.bind(2, notes), Broken.bind()), port=port)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert __file__.rpartition("/")[2] in str(caught.value)
    assert notes in ([], ["made", "closed"])
    assert run(doubled, port=port).remote(2).result() == 4


def test_several_at_once(port: int) -> None:
    first = run(doubled, port=port)
    second = run(Scale.bind(3), port=(other := free_port()))
    assert first.remote(first.remote(2)).result() == 8
    assert second.remote(2).result() == post(other).json() == 6
    assert post(port).json() == 4


@pytest.mark.parametrize("same_port", [True, False])
def test_same_name_is_replaced(port: int, same_port: bool) -> None:
    notes: list[str] = []
    before = run(Scale.bind(2, notes), port=port, name="scale")
    now = port if same_port else free_port()
    after = run(Scale.bind(3), port=now, name="scale")
    assert notes == ["made", "closed"]
    assert after.remote(2).result() == post(now).json() == 6
    with pytest.raises(GraphNotStartedError):
        before.remote(2)
    if not same_port:
        with pytest.raises(httpx.ConnectError):
            post(port)


def test_same_script_cell_again_is_replaced(port: int) -> None:
    run(Scale.bind(2), port=port)
    assert run(Scale.bind(3), port=port).remote(2).result() == 6


def test_shutdown(port: int) -> None:
    notes: list[str] = []
    threads = set(threading.enumerate())
    handle = run(Scale.bind(2, notes), port=port)
    other = run(doubled, port=free_port())
    shutdown()
    assert notes == ["made", "closed"]
    for stopped in (handle, other):
        with pytest.raises(GraphNotStartedError):
            stopped.remote(2)
    with pytest.raises(httpx.ConnectError):
        post(port)
    assert set(threading.enumerate()) <= threads
    shutdown()  # nothing to do


def test_shutdown_lets_requests_finish(port: int) -> None:
    notes: list[str] = []
    with InputNode() as number:
        slow = Scale.bind(2, notes).slowly.bind(number)
    handle = run(slow, port=port)
    with ThreadPoolExecutor() as pool:
        over_http = pool.submit(post, port)
        from_python = handle.remote(3)
        while notes.count("asked") < 2:
            time.sleep(0.005)
        shutdown()
        assert over_http.result().json() == 4
        assert from_python.result() == 6
    assert notes == ["made", "asked", "asked", "answered", "answered", "closed"]


def test_shutdown_with_an_open_connection(port: int) -> None:
    run(doubled, port=port)
    with httpx.Client(trust_env=False) as client:
        assert client.post(f"http://127.0.0.1:{port}/", json=2).json() == 4
        began = time.monotonic()
        shutdown()  # the connection is kept alive by its client
        assert time.monotonic() - began < 2


@pytest.mark.anyio
async def test_from_within_a_running_loop(port: int) -> None:
    handle = run(doubled, port=port)
    assert await handle.remote(2) == 4
    assert await asyncio.gather(*(handle.remote(n) for n in range(3))) == [0, 2, 4]
    async with httpx.AsyncClient(trust_env=False) as client:
        assert (await client.post(f"http://127.0.0.1:{port}/", json=2)).json() == 4
    shutdown()


@pytest.mark.anyio
async def test_from_a_thread_of_a_running_loop(port: int) -> None:
    handle = await asyncio.to_thread(run, doubled, port=port)
    assert await handle.remote(2) == 4
    assert await asyncio.to_thread(lambda: handle.remote(3).result()) == 6
    await asyncio.to_thread(shutdown)


def test_handle_in_many_threads(port: int) -> None:
    handle = run(doubled, port=port)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda n: handle.remote(n).result(5), range(50))) == list(
            range(0, 100, 2)
        )


def test_without_uvicorn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fastapi-graph\[cli\]'"):
        run(doubled)


def test_any_free_port() -> None:
    assert run(doubled, port=0).remote(2).result() == 4


def test_ipv6() -> None:
    with contextlib.closing(socket.socket(socket.AF_INET6)) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 here")
        port = probe.getsockname()[1]
    run(doubled, host="::1", port=port)
    answer = httpx.post(f"http://[::1]:{port}/", json=2, trust_env=False)
    assert answer.json() == 4


def test_shutdown_from_within_a_node_does_not_wait_for_itself() -> None:
    @deployment
    async def last() -> str:
        shutdown()
        return "goodbye"

    handle = run(last.bind(), port=0)
    assert handle.remote().result(5) == "goodbye"
    shutdown()
