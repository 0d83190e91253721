"""What the command line shows on the terminal: a graph as a tree, and deployments' states."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.logging import RichHandler
from rich.table import Table
from rich.tree import Tree

from fastapi_graph.application import Graph, graphs
from fastapi_graph.backends import DeploymentStatus
from fastapi_graph.graph.build import inputs_of
from fastapi_graph.graph.nodes import AccessNode, InputNode, Node
from fastapi_graph.graph.virtual import Rule, Shadow

__all__ = [
    "console",
    "error_console",
    "graph_tree",
    "log_handler",
    "own_rows",
    "publish_rows",
    "published_rows",
    "status_shown",
]

console = Console(width=None if sys.stdout.isatty() else 160)
error_console = Console(stderr=True)

Rows = dict[tuple[str, str], list[DeploymentStatus]]
"""The status of each deployment, by graph and name, of every process that has one."""

_PERIOD_S = 1.0
_COLUMNS = (
    "graph",
    "deployment",
    "state",
    "replicas",
    "starting",
    "ongoing",
    "queued",
    "restarts",
    "error",
)


def own_rows() -> Rows:
    """Return the states in this process."""
    started = (graph for graph in graphs() if graph.is_started)
    return {(graph.name, row.name): [row] for graph in started for row in graph.status()}


def publish_rows(folder: Path) -> None:
    """Write the states in this process to a file in `folder`, every second."""
    path = folder / f"{os.getpid()}.json"

    def publish() -> None:
        while folder.exists():
            rows = [[graph, rows] for (graph, _), rows in own_rows().items()]
            draft = path.with_suffix(".new")
            with contextlib.suppress(OSError):  # the folder goes when the command ends
                draft.write_text(json.dumps(rows))
                draft.replace(path)
            threading.Event().wait(_PERIOD_S)

    threading.Thread(target=publish, name="publish status", daemon=True).start()


def published_rows(folder: Path) -> Rows:
    """Return the states that the worker processes have published."""
    found: Rows = {}
    for path in sorted(folder.glob("*.json")):
        if not Path(f"/proc/{path.stem}").exists() and Path("/proc/self").exists():
            path.unlink(missing_ok=True)
            continue
        for graph, rows in json.loads(path.read_text()):
            for row in rows:
                status = DeploymentStatus(*row)
                found.setdefault((graph, status.name), []).append(status)
    return found


@contextlib.contextmanager
def status_shown(rows: Callable[[], Rows], *, live: bool) -> Iterator[None]:
    """Show states while the body runs: a table on a terminal, else a line for every change.

    Args:
        rows: Returns the states.
        live: Refresh the table in place. Without, where other processes write to the
            terminal too, it is printed again when a state has changed.
    """
    ended = threading.Event()
    show = _show_live if live and console.is_terminal else _show_changes
    thread = threading.Thread(target=show, args=(rows, ended), name="show status", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _show_live(rows: Callable[[], Rows], ended: threading.Event) -> None:
    with Live(_table(rows()), console=console, auto_refresh=False, transient=True) as live:
        while not ended.wait(_PERIOD_S):
            live.update(_table(rows()), refresh=True)


def _show_changes(rows: Callable[[], Rows], ended: threading.Event) -> None:
    shown: dict[tuple[str, str], tuple[str, str]] = {}
    while not ended.wait(_PERIOD_S / 2):
        found = rows()
        states = {key: (_state(of), _replicas(of)) for key, of in found.items()}
        if console.is_terminal:
            if states != shown:
                console.print(_table(found))
        else:
            for key, (state, _) in states.items():
                if key not in shown or shown[key][0] != state:
                    graph, name = key
                    console.out(f"{graph}: {name} is {state}")
        shown = states


def _counted(of: list[DeploymentStatus]) -> list[DeploymentStatus]:
    """Return the rows to add up: where replicas are shared, all report the same ones."""
    return of[-1:] if of[0].shared else of


def _replicas(of: list[DeploymentStatus]) -> str:
    counted = _counted(of)
    return f"{sum(row.replicas for row in counted)}/{sum(row.wanted for row in counted)}"


def _state(of: list[DeploymentStatus]) -> str:
    """Return the state of a deployment in several processes: the one that is furthest off."""
    order = ("failed", "unhealthy", "stopping", "stopped", "starting", "running")
    return min((row.state for row in of), key=order.index)


def _table(rows: Rows) -> Table:
    table = Table(*_COLUMNS)
    for (graph, name), of in rows.items():
        counted = _counted(of)
        numbers = (
            sum(row.starting for row in counted),
            sum(row.ongoing for row in counted),
            sum(row.queued for row in counted),
            sum(row.restarts for row in counted),
        )
        error = next((row.error for row in of if row.error), "")
        table.add_row(graph, name, _state(of), _replicas(of), *map(str, numbers), error)
    return table


def log_handler() -> logging.Handler:
    """Return a log handler that writes above the table."""
    return RichHandler(console=console, show_path=False)


def graph_tree(graph: Graph, prefix: str | None = None) -> Tree:
    """Return a graph as a tree: its routes with what they call, then its deployments.

    Args:
        graph: The graph.
        prefix: What to show before the paths, in an app; by default it is served by itself, at
            the `route_prefix` of its driver.
    """
    ingress = graph.ingress
    in_app = prefix is not None
    prefix = ingress.route_prefix if prefix is None else prefix
    tree = Tree(f"graph {graph.name}, backend {graph.settings.backend}")
    methods = "GET, POST" if ingress.is_driver else "POST"
    for path, node in ingress.routes.items():
        where = prefix.rstrip("/") + ("" if path == "/" else path)
        _add_node(tree.add(f"{methods} {where or '/'}"), node, set())
    deployments = tree.add("deployments")
    driver = graph.built.names.get(ingress.root) if ingress.is_driver else None
    for spec in graph.built.deployments.values():
        wanted = spec.options.num_replicas
        replicas = f"{wanted} replica{'s' * (wanted > 1)}"
        if spec.name == driver and in_app:
            replicas = f"num_replicas={wanted}, but the server of the app decides"
        elif spec.name == driver:
            replicas = f"num_replicas={wanted}, so {wanted} web process{'es' * (wanted > 1)}"
        elif wanted != 1 and graph.settings.backend == "inprocess":
            replicas = f"num_replicas={wanted}, but 1 in each process with this backend"
        holds = f", has handles to {', '.join(sorted(spec.requires))}" if spec.requires else ""
        deployments.add(f"{spec.name}: {replicas}{holds} ({spec.where})")
    if graph.built.virtual:
        virtual = tree.add("splits and shadows")
        for each in graph.built.virtual.values():
            said = _spread(each.rule, each.alternatives)
            virtual.add(f"{each.interface.name}: {said} ({each.interface.where})")
    return tree


def _spread(rule: Rule, alternatives: tuple[str, ...]) -> str:
    """Say where calls go."""
    if isinstance(rule, Shadow):
        answers, copied = alternatives
        return f"{answers} answers, {rule.share:.4g} of the calls are copied to {copied}"
    total = sum(rule.weights)
    shares = zip(alternatives, rule.weights, strict=True)
    said = ", ".join(f"{weight / total:.4g} to {name}" for name, weight in shares)
    if rule.sticky_by is None:
        return said
    return f"{said}, sticky by {getattr(rule.sticky_by, '__name__', repr(rule.sticky_by))}"


def _add_node(tree: Tree, node: Node, seen: set[Node]) -> None:
    again = node in seen
    seen.add(node)
    branch = tree.add(f"{node._label()} ({node._where}){', shown above' if again else ''}")
    for child in () if again else inputs_of(node):
        if not isinstance(child, InputNode) or not isinstance(node, AccessNode):
            _add_node(branch, child, seen)
