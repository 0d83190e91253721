"""A cluster of several nodes, of which one is lost; in a process of its own."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from fastapi_graph import DeploymentHandle, Graph, GraphSettings, InputNode, deployment
from fastapi_graph.backends.ray.controller import controller_name
from tests.processes import ROOT, Program
from tests.ray.test_faults import Load, until

NAMESPACE = "nodes"
SECOND = {"127.0.0.3", "127.0.0.4"}
RECOVERY_S = 30.0  # of which Ray may take most to find out


@pytest.mark.timeout(120)
def test_a_node_is_lost(tmp_path: Path) -> None:
    code = "from tests.ray.test_faults_nodes import main; main()"
    environ = {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "", "RAY_AUTH_MODE": "disabled"}
    program = Program([sys.executable, "-c", code], ROOT, tmp_path / "output.txt", environ)
    try:
        code_of_end = program.wait(110)
        print(program.output)
        assert code_of_end == 0, program.output
        program.assert_gone()
    finally:
        program.kill()


@deployment
class Doubles:
    """Runs on a node of its own, which shares no folder with the others."""

    async def __call__(self, value: int) -> int:
        await asyncio.sleep(0.02)
        return 2 * value

    async def node(self) -> str:
        return address_of_node()


@deployment
class Increments:
    """Runs on one of two nodes, and on the other when that is lost."""

    def __init__(self, inner: DeploymentHandle) -> None:
        self.inner = inner

    async def __call__(self, value: int) -> int:
        doubled: int = await self.inner.remote(value)
        return doubled + 1

    async def node(self) -> str:
        return address_of_node()


def address_of_node() -> str:
    import ray

    address: str = ray.util.get_node_ip_address()
    return address


def main() -> None:
    from ray.cluster_utils import Cluster

    def add(host: str, **options: Any) -> Any:
        return cluster.add_node(num_cpus=2, node_ip_address=host, **options)

    cluster = Cluster()
    try:
        cluster.add_node(num_cpus=2, include_dashboard=False)
        with tempfile.TemporaryDirectory() as folder:
            add("127.0.0.2", resources={"first": 1}, env_vars={"TMPDIR": folder})
            nodes = {host: add(host, resources={"second": 1}) for host in SECOND}
            asyncio.run(lose(cluster, nodes))
    finally:
        cluster.shutdown()


async def lose(cluster: Any, nodes: dict[str, Any]) -> None:
    doubles = Doubles.options(ray_actor_options={"resources": {"first": 0.1}}).bind()
    increments = Increments.options(ray_actor_options={"resources": {"second": 0.1}}).bind(doubles)
    with InputNode() as x:
        dag = increments.__call__.bind(doubles.__call__.bind(x))
    settings = GraphSettings(backend="ray", namespace=NAMESPACE, ray_address=cluster.address)
    graph = Graph(dag, name="nodes", settings=settings)
    async with graph, Load(graph.handle, lambda number: 4 * number + 1) as load:
        host = await graph.handle_of(increments).node.remote()
        other = next(iter(SECOND - {host}))
        assert await graph.handle_of(doubles).node.remote() == "127.0.0.2"
        await show_connections(graph, host)
        began = time.monotonic()
        await asyncio.to_thread(cluster.remove_node, nodes[host], allow_graceful=False)
        await until(lambda: restarts(graph)["Increments"], RECOVERY_S)
        print(f"noticed after {time.monotonic() - began:.1f} s")
        await until(lambda: all(s.replicas == s.wanted for s in graph.status()), RECOVERY_S)
        took = time.monotonic() - began
        print(f"recovered after {took:.1f} s")
        assert took < RECOVERY_S
        await load.go_on()
        print(f"calls answered after {time.monotonic() - began:.1f} s")
        assert await graph.handle_of(increments).node.remote() == other
        assert restarts(graph) == {"Doubles": 0, "Increments": 1}


def restarts(graph: Graph) -> dict[str, int]:
    return {status.name: status.restarts for status in graph.status()}


async def show_connections(graph: Graph, host: str) -> None:
    """Check that calls go over TCP to the one node and over unix sockets to the other."""
    import ray

    actor: Any = ray.get_actor(controller_name(graph.name), NAMESPACE)
    (view,) = (await actor.status.remote()).values()
    (first,) = view.deployments["Doubles"].replicas
    (second,) = view.deployments["Increments"].replicas
    assert (first.host, second.host) == ("127.0.0.2", host)
    assert connections_to(first.port) == 2, "this process and the other replica"
    assert connections_to(second.port) == 0
    assert second.unix_path


def connections_to(port: int) -> int:
    """Return how many TCP connections from this machine to a port are established."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    fields = [line.split() for line in lines]
    return sum(field[2].endswith(f":{port:04X}") and field[3] == "01" for field in fields)
