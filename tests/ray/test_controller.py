"""The controller on a real Ray, with replicas that only play their part."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.exceptions
import ray.util
from ray.experimental import internal_kv

from fastapi_graph.backends.ray.controller import controller_name, get_or_create_controller
from fastapi_graph.backends.ray.errors import ControllerExitingError, StartFailed
from fastapi_graph.backends.ray.messages import DeploymentOffer, Offer, View
from fastapi_graph.errors import GraphNameTakenError, VersionSupersededError

pytestmark = pytest.mark.timeout(120)

STAND_IN = "tests.ray.stand_in:StandIn"


class Graph:
    """What a client does, for the graph of one test."""

    def __init__(self, namespace: str, journal: Path) -> None:
        self.name = f"g-{uuid.uuid4().hex[:8]}"
        self.namespace = namespace
        self.journal = journal
        self.controller: Any = None
        self.create()

    def create(self) -> Any:
        self.controller = get_or_create_controller(
            self.name, self.namespace, replica_class=STAND_IN
        )
        return self.controller

    def call(self, method: str, *args: Any) -> Any:
        return ray.get(getattr(self.controller, method).remote(*args), timeout=60)

    def controller_pid(self) -> int | None:
        """Return the process of the controller; None while it does not answer."""
        try:
            return self.call("__ray_call__", lambda _: os.getpid())
        except ray.exceptions.RayActorError:
            return None

    def kill_controller(self) -> int | None:
        """Kill the controller, and return the process that it had; Ray starts another."""
        pid = self.controller_pid()
        ray.kill(self.controller, no_restart=False)
        return pid

    def restart_controller(self) -> None:
        """Kill the controller, and wait for another: it may answer for a moment until it dies."""
        before = self.kill_controller()
        soon(lambda: self.controller_pid() not in (None, before))

    def offer(self, version: str, *deployments: DeploymentOffer, **changes: Any) -> Offer:
        values: dict[str, Any] = {
            "graph": self.name,
            "version": version,
            "owner": "me",
            "lifetime": "app",
            "deployments": deployments or (deployment("A"),),
            "directory": b"",
            "sys_path": (),
            "lease_s": 30.0,
            "update_timeout_s": 60.0,
            "update_strategy": "rolling",
            "orphan_timeout_s": 60.0,
            "client_settings": {"journal": str(self.journal)},
        }
        return Offer(**{**values, **changes})

    def until(self, condition: Callable[[View], Any], version: str = "v1") -> View:
        """Watch a version, as clients do, until its view is as it should be."""
        revision, deadline = 0, time.monotonic() + 60
        while time.monotonic() < deadline:
            view: View = self.call("watch", version, revision, 5.0)
            if condition(view):
                return view
            revision = view.revision
        raise AssertionError(f"never came: {view}")

    def run(self, offer: Offer, client: str = "c") -> View:
        self.call("attach", client, offer)
        return self.until(lambda view: view.state == "running", offer.version)

    def notes(self, replica_id: str) -> list[str]:
        path = self.journal / replica_id
        return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []

    def pid(self, replica_id: str) -> int:
        return int((self.journal / replica_id).read_text().split()[1])

    def actors(self) -> list[str]:
        names = {controller_name(self.name)}
        return [
            actor["name"]
            for actor in ray.util.list_named_actors(all_namespaces=True)
            if actor["name"] in names or actor["name"].startswith(f"{self.name}:")
        ]

    def gone(self) -> bool:
        keys = internal_kv._internal_kv_list(self.namespace, namespace=b"fastapi_graph")
        return not self.actors() and not any(self.name.encode() in key for key in keys)


def deployment(name: str, *requires: str, **changes: Any) -> DeploymentOffer:
    values: dict[str, Any] = {
        "name": name,
        "num_replicas": 1,
        "actor_options": {"num_cpus": 0},
        "requires": frozenset(requires),
        "body": b"",
        "user_config": None,
        "max_ongoing_requests": 100,
        "health_check_period_s": 10.0,
        "health_check_timeout_s": 30.0,
        "graceful_shutdown_timeout_s": 3.0,
        "where": f"app.py:{name}",
    }
    return DeploymentOffer(**{**values, **changes})


def soon(condition: Callable[[], Any], timeout_s: float = 30.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (result := condition()):
        assert time.monotonic() < deadline, "never came"
        time.sleep(0.05)
    return result


def ids(view: View, name: str = "A") -> list[str]:
    return [address.replica_id for address in view.deployments[name].replicas]


@pytest.fixture
def graph(ray_cluster: str, tmp_path: Path) -> Iterator[Graph]:
    graph = Graph(ray_cluster, tmp_path)
    yield graph
    try:
        graph.create()
        graph.call("shutdown")
    except (ray.exceptions.RayActorError, ControllerExitingError):
        pass
    soon(graph.gone)


def test_a_graph_from_its_first_client_to_its_last(graph: Graph) -> None:
    offer = graph.offer("v1", deployment("A", num_replicas=2), deployment("B", "A"))
    attached = graph.call("attach", "c", offer)
    assert len(attached.secret) == 32
    view = graph.call("watch", "v1", attached.revision)
    view = graph.until(lambda view: view.state == "running")
    assert [len(ids(view, name)) for name in "AB"] == [2, 1]
    assert graph.call("status") == {"v1": view}
    assert graph.call("renew", "c", {"A": (0, 0)}) is True
    assert graph.call("renew", "unknown", {}) is False
    assert sorted(graph.actors()) == sorted(
        [*ids(view, "A"), *ids(view, "B"), controller_name(graph.name)]
    )
    graph.call("detach", "c")
    soon(graph.gone)
    assert [graph.notes(replica_id)[-1] for replica_id in ids(view)] == ["drain:3"] * 2
    pids = [graph.pid(replica_id) for replica_id in ids(view)]
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_watch_waits_for_a_change(graph: Graph) -> None:
    view = graph.run(graph.offer("v1"))
    began = time.monotonic()
    assert graph.call("watch", "v1", view.revision, 0.5) == view
    assert time.monotonic() - began >= 0.4
    watching = graph.controller.watch.remote("v1", view.revision)
    graph.call("attach", "d", graph.offer("v1", deployment("A", num_replicas=2)))
    assert ray.get(watching).revision > view.revision


def test_a_killed_replica_is_replaced(graph: Graph) -> None:
    (replica_id,) = ids(graph.run(graph.offer("v1")))
    os.kill(graph.pid(replica_id), signal.SIGKILL)
    graph.call("suspect", replica_id)
    view = graph.until(lambda view: ids(view) and ids(view) != [replica_id])
    assert view.deployments["A"].restarts == 1
    assert f"replica {replica_id} was lost" in view.deployments["A"].error
    assert view.state == "running"


def test_a_killed_replica_is_found_without_anybody_who_suspects_it(graph: Graph) -> None:
    (replica_id,) = ids(graph.run(graph.offer("v1")))
    os.kill(graph.pid(replica_id), signal.SIGKILL)
    graph.until(lambda view: ids(view) and ids(view) != [replica_id])


def test_a_constructor_that_fails(graph: Graph) -> None:
    offer = graph.offer("v1", deployment("A"), deployment("B", "A", body=b"fail"))
    graph.call("attach", "c", offer)
    view = graph.until(lambda view: view.state == "failed")
    assert view.reason == "B did not start: ValueError"
    assert view.error == b"encoded"
    soon(lambda: graph.actors() == [controller_name(graph.name)])


def test_options_that_ray_refuses(graph: Graph) -> None:
    offer = graph.offer("v1", deployment("A", actor_options={"num_cpus": -1}))
    graph.call("attach", "c", offer)
    view = graph.until(lambda view: view.state == "failed")
    assert view.reason.startswith(
        "A (bound at app.py:A) did not start: its actor cannot be made: ValueError: "
    )


def test_resources_that_no_node_has(graph: Graph) -> None:
    options = {"num_cpus": 0, "num_gpus": 1}
    offer = graph.offer("v1", deployment("A", actor_options=options), update_timeout_s=6.0)
    graph.call("attach", "c", offer)
    reason = "waiting for resources: needs {'GPU': 1}, no node has them"
    view = graph.until(lambda view: view.deployments["A"].error)
    assert view.deployments["A"].error == reason
    view = graph.until(lambda view: view.state == "failed")
    assert view.reason == (f"not ready within update_timeout_s=6: A has 0 of 1 replicas: {reason}")
    soon(lambda: graph.actors() == [controller_name(graph.name)])


@pytest.mark.parametrize("body", [b"sick", b"hang"])
def test_an_unhealthy_replica_is_replaced(graph: Graph, body: bytes) -> None:
    changes = {"health_check_period_s": 0.2, "health_check_timeout_s": 0.5}
    (replica_id,) = ids(graph.run(graph.offer("v1", deployment("A", body=body, **changes))))
    view = graph.until(lambda view: view.deployments["A"].restarts)
    assert f"health check of replica {replica_id} failed" in view.deployments["A"].error
    checks = graph.notes(replica_id).count("check")
    assert checks == (3 if body == b"sick" else 1)
    graph.until(lambda view: ids(view) and ids(view) != [replica_id])


def test_user_config_and_scale_change_in_place(graph: Graph) -> None:
    (replica_id,) = ids(graph.run(graph.offer("v1")))
    changed = deployment("A", num_replicas=2, user_config=b"new")
    graph.call("attach", "d", graph.offer("v1", changed))
    view = graph.until(lambda view: len(ids(view)) == 2)
    assert replica_id in ids(view)
    soon(lambda: "reconfigure:new" in graph.notes(replica_id))
    graph.call("attach", "e", graph.offer("v1"))
    assert ids(graph.until(lambda view: len(ids(view)) == 1)) == [replica_id]


def test_versions(graph: Graph) -> None:
    graph.run(graph.offer("v1"), "a")
    graph.run(graph.offer("v2"), "b")
    graph.call("detach", "a")
    graph.until(lambda view: view.state == "stopped", "v1")
    with pytest.raises(VersionSupersededError, match="superseded by v2"):
        graph.call("attach", "a", graph.offer("v1"))
    with pytest.raises(GraphNameTakenError, match="of 'me'"):
        graph.call("attach", "d", graph.offer("v1", owner="you"))
    assert graph.call("renew", "b", {}) is True


def test_leases_expire(graph: Graph) -> None:
    graph.run(graph.offer("v1", lease_s=1.0))
    soon(graph.gone)


def test_detached_outlives_its_client(graph: Graph) -> None:
    view = graph.run(graph.offer("v1", lifetime="detached"))
    graph.call("detach", "c")
    time.sleep(0.5)
    assert graph.run(graph.offer("v1", lifetime="detached"), "d") == view


def test_a_restarted_controller_adopts_its_replicas(graph: Graph) -> None:
    offer = graph.offer("v1", deployment("A", num_replicas=2), deployment("B", body=b""))
    before = graph.run(offer)
    secret = graph.call("attach", "c", offer).secret
    orphan = f"{graph.name}:v0:A:orphan"
    stand_in = ray.remote(Orphan).options(
        name=orphan, namespace=graph.namespace, lifetime="detached", num_cpus=0
    )
    ray.get(stand_in.remote().ping.remote())
    graph.restart_controller()
    view = graph.until(lambda view: view.state == "running")
    assert view.revision > before.revision
    assert sorted(ids(view)) == sorted(ids(before))
    assert graph.call("renew", "c", {}) is True
    assert graph.call("attach", "c", offer).secret == secret
    soon(lambda: orphan not in graph.actors())
    # The replicas of the former controller are watched by this one.
    (replica_id,) = ids(view, "B")
    os.kill(graph.pid(replica_id), signal.SIGKILL)
    view = graph.until(lambda view: ids(view, "B") not in ([], [replica_id]))
    assert sorted(ids(view)) == sorted(ids(before))


def test_a_killed_controller_replaces_what_died_meanwhile(graph: Graph) -> None:
    (replica_id,) = ids(graph.run(graph.offer("v1")))
    pid = graph.pid(replica_id)
    graph.kill_controller()
    os.kill(pid, signal.SIGKILL)

    def replaced() -> bool:
        try:
            return ids(graph.call("watch", "v1", 0)) not in ([], [replica_id])
        except ray.exceptions.RayActorError:
            return False

    soon(replaced)


def test_a_checkpoint_that_cannot_be_read_is_none(graph: Graph) -> None:
    graph.run(graph.offer("v1", lifetime="detached"))
    (key,) = (
        key
        for key in internal_kv._internal_kv_list(graph.namespace, namespace=b"fastapi_graph")
        if graph.name.encode() in key and key.endswith(b"state")
    )
    internal_kv._internal_kv_put(key, b"what is this", True, namespace=b"fastapi_graph")
    graph.restart_controller()
    soon(lambda: graph.actors() == [controller_name(graph.name)])
    assert graph.call("status") == {}


def test_a_graph_may_come_again(graph: Graph) -> None:
    first = graph.run(graph.offer("v1"))
    graph.call("detach", "c")
    soon(graph.gone)
    graph.create()
    second = graph.run(graph.offer("v1"))
    assert ids(first) != ids(second)
    assert second.revision > first.revision


def test_a_replica_is_killed_while_it_starts(graph: Graph) -> None:
    graph.call("attach", "c", graph.offer("v1", deployment("A", body=b"slow")))
    soon(lambda: len(list(graph.journal.iterdir())) == 1)
    graph.call("detach", "c")
    soon(graph.gone)


def test_exceptions_cross_ray(ray_cluster: str) -> None:
    actor = ray.remote(Orphan).options(num_cpus=0).remote()
    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        ray.get(actor.fail.remote())
    cause = caught.value.cause
    assert isinstance(cause, StartFailed)
    assert (cause.reason, cause.error, str(cause)) == ("why", b"error", "why")
    ray.kill(actor)


class Orphan:
    def ping(self) -> None: ...

    def fail(self) -> None:
        raise StartFailed("why", b"error")
