"""Servers that find no cluster: they say so, or run one that ends with them."""

from __future__ import annotations

import re
import signal
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.processes import free_port
from tests.ray.web import (
    PATIENCE_S,
    Server,
    Site,
    answering,
    cluster_site,
    lonely_site,
    post,
    processes_of,
    until,
    value,
)

pytest.importorskip("ray")

pytestmark = pytest.mark.timeout(180)

MADE = ["Offset", "Scale", "Scale"]
WHAT_TO_DO = r"run `ray start --head` first, or set RAY_ADDRESS, or serve with `fastapi-graph run`"

FORK = """
    import asyncio, os, sys
    from service import dag, graph
    from fastapi_graph import Graph

    async def once(graph):
        async with graph:
            return await graph.handle.remote(4)

    def in_child(work):
        child = os.fork()
        if child == 0:
            try:
                asyncio.run(work)
            except BaseException as error:
                print("child:", type(error).__name__, error, flush=True)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        work.close()

    async def main():
        async with graph:
            print("parent:", (await graph.handle.remote(4))[0], flush=True)
            return await asyncio.to_thread(forked)

    def forked():
        in_child(once(Graph(dag, name="other")))
        in_child(once(graph))

    asyncio.run(main())
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with lonely_site(tmp_path) as site:
        yield site


def assert_nothing_left(site: Site, server: Server) -> float:
    """Check that no process of a server is left, and return the seconds that took."""
    began = time.monotonic()

    def left() -> set[int]:
        return server.processes() | processes_of(site.temporary)

    until(lambda: not left(), server)
    return time.monotonic() - began


def test_gunicorn_without_a_cluster(site: Site) -> None:
    began = time.monotonic()
    server = site.gunicorn()
    assert server.wait() != 0
    assert re.search(f"BackendError: this is one of several web processes.*{WHAT_TO_DO}", str(site))
    assert time.monotonic() - began < 20
    assert_nothing_left(site, server)
    assert site.made() == []


def test_uvicorn_workers_without_a_cluster(site: Site) -> None:
    server = site.uvicorn("--workers=2")
    server.wait_for(WHAT_TO_DO)
    server.send(signal.SIGTERM)
    server.wait()
    assert_nothing_left(site, server)
    assert site.made() == []


@pytest.mark.parametrize("variable", ["RAY_ADDRESS", "FASTAPI_GRAPH_RAY_ADDRESS"])
def test_ray_client_is_refused(site: Site, variable: str) -> None:
    server = site.uvicorn(**{variable: "ray://127.0.0.1:10001"})
    assert server.wait() != 0
    assert "BackendError: ray://127.0.0.1:10001: Ray Client is not supported" in server.output
    assert "`ray start --address=... --num-cpus=0`" in server.output


def test_a_cluster_that_is_not_there(site: Site) -> None:
    server = site.uvicorn(RAY_ADDRESS=f"127.0.0.1:{free_port()}")
    assert server.wait() != 0
    assert "BackendError: there is no Ray cluster at 127.0.0.1:" in server.output


def test_delete_without_a_cluster(site: Site) -> None:
    command = site.cli("delete", "web")
    assert command.wait() == 1
    assert "BackendError: there is no Ray cluster on this machine" in command.output
    command = site.cli("delete", "web", "--backend", "inprocess")
    assert command.wait() == 1
    assert "BackendError: graph 'web': with this backend no graph outlives" in command.output


def test_one_process_has_a_cluster_of_its_own(site: Site) -> None:
    server = site.uvicorn()
    url = server.ready()
    assert value(url) == 50
    assert processes_of(site.temporary)
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(value, url, 4500)
        until(lambda: site.notes("slow"), site)
        server.send(signal.SIGTERM)
        assert slow.result() == 45010
    code = server.wait()
    took = assert_nothing_left(site, server)
    print(f"the cluster was gone {took:.2f} s after the server")
    assert took < 5
    assert "Application shutdown complete" in server.output, code
    assert sorted(word for word, _, _ in site.notes("closed")) == MADE


@pytest.mark.parametrize("how", ["SIGTERM", "Ctrl-C"])
def test_the_command_owns_the_cluster_of_its_workers(site: Site, how: str) -> None:
    command = ("run", "service:app", "--workers=2", "--backend=ray", "--port=0")
    server = site.cli(*command, FASTAPI_GRAPH_BACKEND="inprocess")
    url = server.ready(workers=2)
    workers = answering(url, 2)
    assert server.pid not in workers
    assert site.made() == MADE
    assert {post(url).json()[1] for _ in range(40)} == site.makers("Scale")
    server.wait_for("web: Scale is running")
    if how == "SIGTERM":
        server.send(signal.SIGTERM)
    else:
        server.press_ctrl_c()
    code = server.wait(PATIENCE_S)
    took = assert_nothing_left(site, server)
    print(f"the cluster was gone {took:.2f} s after the command")
    assert code == 0
    assert took < 5
    assert sorted(word for word, _, _ in site.notes("closed")) == MADE


def test_started_before_a_fork(ray_cluster: str, tmp_path: Path) -> None:
    with cluster_site(tmp_path) as site:
        (site.folder / "forking.py").write_text(textwrap.dedent(FORK))
        program = site.start("forking.py", PYTHONWARNINGS="default")
        assert program.wait() == 0, program.output
        assert "parent: 50" in program.output
        errors = re.findall("child: (.*)", program.output)
        assert len(errors) == 2, program.output
        for error in errors:
            assert error.startswith("BackendError")
            assert "before this process was forked" in error
        site.until_gone()
