"""Web processes that share the replicas of a graph: real uvicorn, real gunicorn, real Ray."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.processes import free_port
from tests.ray.web import (
    PATIENCE_S,
    Load,
    Server,
    Site,
    answering,
    cluster_site,
    post,
    until,
    value,
)

pytestmark = pytest.mark.timeout(180)

MADE = ["Offset", "Scale", "Scale"]
LEASE_S = 2.0


@pytest.fixture
def site(ray_cluster: str, tmp_path: Path) -> Iterator[Site]:
    with cluster_site(tmp_path) as site:
        yield site


def serve(site: Site, kind: str) -> Server:
    return site.gunicorn() if kind == "gunicorn" else site.uvicorn("--workers=2")


@pytest.mark.parametrize("kind", ["gunicorn", "uvicorn"])
def test_two_workers_share_the_replicas(site: Site, kind: str) -> None:
    server = serve(site, kind)
    url = server.ready(workers=2)
    workers = answering(url, 2)
    assert server.pid not in workers
    assert workers < server.processes()
    assert site.made() == MADE
    replicas = {post(url).json()[1] for _ in range(40)}
    assert replicas == site.makers("Scale")
    assert len(site.actors()) == 1 + len(MADE)
    server.send(signal.SIGTERM)
    server.wait()
    assert site.until_gone(10) < 10
    assert sorted(word for word, _, _ in site.notes("closed")) == MADE
    assert "Traceback" not in server.output


def test_replicas_go_after_every_web_process_was_killed(site: Site) -> None:
    server = site.gunicorn()
    assert value(server.ready(workers=2)) == 50
    server.kill_all()
    took = site.until_gone()
    print(f"gone {took:.2f} s after kill -9")
    assert took < LEASE_S + 8, took
    assert sorted(word for word, _, _ in site.notes("closed")) == MADE


def test_a_killed_worker_fails_nothing_of_the_other(site: Site) -> None:
    server = site.gunicorn()
    url = server.ready(workers=2)
    workers = answering(url, 2)
    clients = [httpx.Client(trust_env=False, timeout=PATIENCE_S) for _ in range(2)]
    loads: dict[int, list[Load]] = {pid: [] for pid in workers}
    try:
        while any(len(of) < 2 for of in loads.values()):
            client = httpx.Client(trust_env=False, timeout=PATIENCE_S)
            clients.append(client)
            pid = int(post_on(client, url).headers["x-process"])
            if len(loads[pid]) < 2:
                loads[pid].append(Load(lambda client=client: post_on(client, url)))
        victim, survivor = sorted(workers)
        for load in loads[victim] + loads[survivor]:
            load.more()
        os.kill(victim, signal.SIGKILL)
        new = until(lambda: answering(url, 2) - {survivor, victim}, server)
        # Until after the lease of the dead worker.
        time.sleep(LEASE_S + 1)
        for load in loads[survivor]:
            load.more()
    finally:
        failures = {pid: [load.end() for load in of] for pid, of in loads.items()}
        for client in clients:
            client.close()
    assert failures[survivor] == [None, None]
    seen = [response for load in loads[survivor] for response in load.answers]
    assert {int(response.headers["x-process"]) for response in seen} == {survivor}
    assert site.made() == MADE
    assert value(url) == 50
    assert len(new) == 1
    server.send(signal.SIGTERM)
    server.wait()
    site.until_gone()


def post_on(client: httpx.Client, url: str) -> httpx.Response:
    return client.post(f"{url}/graph", json=4)


def test_scale_and_config_change_in_place(site: Site) -> None:
    first = site.uvicorn(REPLICAS="1", FACTOR="10")
    url = first.ready()
    assert value(url) == 50
    (old,) = site.makers("Scale")
    (offset,) = site.makers("Offset")
    second = site.uvicorn(REPLICAS="2", FACTOR="100")
    other = second.ready()
    until(lambda: (str(100), old) in [note[:2] for note in site.notes("configured")], site)
    assert value(other) == value(url) == 500
    until(lambda: len(site.made()) > 2, site)
    assert site.made() == MADE
    assert old in site.makers("Scale")
    assert site.makers("Offset") == {offset}
    (new,) = site.makers("Scale") - {old}
    assert [note[:2] for note in site.notes("configured")].count(("10", new)) == 0
    until(lambda: post(url).json()[1] == new, site)
    assert {post(other).json()[1] for _ in range(40)} == {old, new}
    third = site.uvicorn(REPLICAS="1", FACTOR="100")
    third.ready()
    until(lambda: len(site.actors()) == 3, site)
    assert site.made() == MADE
    assert value(url) == 500
    for server in (third, second, first):
        server.send(signal.SIGTERM)
        server.wait()
    site.until_gone()


@pytest.mark.parametrize("changed", [False, True])
def test_a_name_belongs_to_its_first_owner(site: Site, changed: bool) -> None:
    first = site.uvicorn(FASTAPI_GRAPH_OWNER="us")
    url = first.ready()
    load = Load(lambda: post(url))
    if changed:
        site.write(offset=1000)
    began = time.monotonic()
    second = site.uvicorn(FASTAPI_GRAPH_OWNER="them")
    assert second.wait() != 0
    took = time.monotonic() - began
    assert "GraphNameTakenError: the graph name 'web' is taken: a graph of 'us'" in second.output
    assert load.end() is None
    assert value(url) == 50
    assert site.made() == MADE
    assert took < 9, took
    first.send(signal.SIGTERM)
    first.wait()
    site.until_gone()


def test_transport_through_ray(site: Site) -> None:
    server = site.uvicorn(FASTAPI_GRAPH_TRANSPORT="ray", UNREACHABLE="1")
    url = server.ready()
    assert value(url) == 50
    assert {post(url).json()[1] for _ in range(40)} == site.makers("Scale")
    server.send(signal.SIGTERM)
    server.wait()
    site.until_gone()
    assert "direct connection" not in server.output


def test_transport_through_ray_where_nothing_else_works(site: Site) -> None:
    server = site.uvicorn("--loop=asyncio", UNREACHABLE="1")
    url = server.ready()
    assert value(url) == 50
    assert server.output.count("cannot be reached by a direct connection") == len(MADE)
    direct = site.uvicorn("--loop=asyncio", port=free_port())
    assert value(direct.ready()) == 50
    for each in (server, direct):
        each.send(signal.SIGTERM)
        each.wait()
    site.until_gone()
    assert "direct connection" not in direct.output
