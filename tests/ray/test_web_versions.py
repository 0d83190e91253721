"""New code, restarts and the end of a graph that outlives its web processes."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import ray

from fastapi_graph.backends.ray.names import controller_name
from tests.processes import free_port
from tests.ray.web import Load, Server, Site, alive, cluster_site, post, until, value

pytestmark = pytest.mark.timeout(180)

MADE = ["Offset", "Scale", "Scale"]
DETACHED = {"FASTAPI_GRAPH_LIFETIME": "detached"}


@pytest.fixture
def site(ray_cluster: str, tmp_path: Path) -> Iterator[Site]:
    with cluster_site(tmp_path) as site:
        yield site


def stop(server: Server) -> None:
    server.send(signal.SIGTERM)
    server.wait()


def controller_pid(site: Site) -> int:
    """Return the process of the graph's controller, or 0 while it is not there."""
    from ray._private.state import actors

    actor = ray.get_actor(controller_name("web"), site.namespace)
    found = actors(actor_id=actor._actor_id.hex())
    return int(found["Pid"]) if found["State"] == "ALIVE" else 0


class Balancer:
    """Sends requests to several servers in turn, each on a connection of its own."""

    def __init__(self) -> None:
        self.urls: list[str] = []
        self._turn = 0

    def send(self) -> httpx.Response:
        urls = self.urls
        self._turn += 1
        return post(urls[self._turn % len(urls)])


def test_a_rolling_restart_with_changed_code(site: Site) -> None:
    ports = [free_port(), free_port()]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    servers = [site.uvicorn(port=port) for port in ports]
    for server in servers:
        server.ready()
    old = site.makers()
    assert site.made() == MADE
    balancer = Balancer()
    balancer.urls = urls
    load = Load(balancer.send)
    load.more()
    site.write(offset=1001)
    try:
        for index, url in enumerate(urls):
            balancer.urls = [other for other in urls if other != url]
            load.more(2)  # those on their way to it have been answered
            stop(servers[index])
            if index:
                break
            servers[index] = site.uvicorn(port=ports[index])
            servers[index].ready()
            balancer.urls = urls
            load.more()
            # While a process leases the old version, it is served beside the new one.
            assert all(map(alive, old))
            assert (value(urls[0]), value(urls[1])) == (10050, 50)
        until(lambda: not any(map(alive, old)), site)
        new = site.makers() - old
        assert site.made() == sorted(2 * MADE)
        # The old code comes back too late.
        before = (site.folder / "service.py").read_text()
        site.write()
        late = site.uvicorn(port=ports[1])
        assert late.wait() != 0
        assert "VersionSupersededError" in late.output
        (site.folder / "service.py").write_text(before)
        servers[1] = site.uvicorn(port=ports[1])
        servers[1].ready()
        balancer.urls = urls
        load.more()
    finally:
        failure = load.end()
    assert failure is None
    numbers = [response.json()[0] for response in load.answers]
    assert set(numbers) == {50, 10050}
    assert numbers.index(10050) >= 20
    assert numbers[-20:] == [10050] * 20
    assert site.made() == sorted(2 * MADE)
    assert all(map(alive, new))
    for server in servers:
        stop(server)
    site.until_gone()


def test_detached_replicas_outlive_web_processes(site: Site) -> None:
    site.write(loading_s=3.0)
    first = site.uvicorn(**DETACHED)
    assert value(first.ready()) == 50
    stop(first)
    replicas = site.makers()
    time.sleep(3)  # longer than a lease
    assert all(map(alive, replicas))
    second = site.uvicorn(**DETACHED)
    url = second.ready()
    assert value(url) == 50
    answered = time.monotonic()
    assert site.made() == MADE
    assert site.notes("closed") == []
    waited = float(second.wait_for(r"all running, after ([0-9.]+) s").group(1))
    assert waited < 1.0
    imported = max(when for _, _, when in site.notes("imported"))
    print(f"attached in {waited} s, answered {answered - imported:.2f} s after the imports")
    assert answered - imported < 12
    # One that is in use is not deleted.
    deleting = site.cli("delete", "web", **DETACHED)
    assert deleting.wait() == 1
    assert "graph 'web' is used by 1 process" in deleting.output
    assert "Traceback" not in deleting.output
    assert value(url) == 50
    stop(second)
    deleting = site.cli("delete", "web", **DETACHED)
    assert deleting.wait() == 0, deleting.output
    assert site.until_gone(3) < 3
    assert sorted(word for word, _, _ in site.notes("closed")) == MADE
    deleting = site.cli("delete", "web", **DETACHED)
    assert deleting.wait() == 1
    assert "there is no graph 'web'" in deleting.output


def test_a_detached_graph_needs_a_name(site: Site) -> None:
    site.write(name=None)
    server = site.uvicorn(**DETACHED)
    assert server.wait() != 0
    assert re.search(r"SettingsError: lifetime='detached' needs .*Graph\(dag, name=", server.output)
    assert site.actors() == set()


def test_a_new_version_replaces_a_detached_one(site: Site) -> None:
    first = site.uvicorn(**DETACHED)
    assert value(first.ready()) == 50
    old = site.makers()
    stop(first)
    site.write(offset=1001)
    second = site.uvicorn(**DETACHED)
    url = second.ready()
    assert value(url) == 10050
    until(lambda: not any(map(alive, old)), site)
    site.write()
    late = site.uvicorn(**DETACHED)
    assert late.wait() != 0
    assert "VersionSupersededError" in late.output
    assert value(url) == 10050
    stop(second)
    deleting = site.cli("delete", "web", **DETACHED)
    assert deleting.wait() == 0, deleting.output
    site.until_gone()


def test_the_controller_is_killed_between_two_web_processes(site: Site) -> None:
    first = site.uvicorn(**DETACHED)
    assert value(first.ready()) == 50
    replicas = site.makers()
    stop(first)
    killed = controller_pid(site)
    os.kill(killed, signal.SIGKILL)
    second = site.uvicorn(**DETACHED)
    url = second.ready()
    assert value(url) == 50
    assert controller_pid(site) not in (0, killed)
    assert site.made() == MADE
    assert all(map(alive, replicas))
    stop(second)
    # The new one has not forgotten that they stay.
    time.sleep(3)
    assert all(map(alive, replicas))
    deleting = site.cli("delete", "web", **DETACHED)
    assert deleting.wait() == 0, deleting.output
    site.until_gone()


def test_the_controller_is_killed_under_load(site: Site) -> None:
    server = site.uvicorn()
    url = server.ready()
    load = Load(lambda: post(url))
    load.more()
    killed = controller_pid(site)
    ray.kill(ray.get_actor(controller_name("web"), site.namespace), no_restart=False)
    until(lambda: controller_pid(site) not in (0, killed), site)
    load.more(100)
    assert load.end() is None
    assert site.made() == MADE
    stop(server)
    site.until_gone()
