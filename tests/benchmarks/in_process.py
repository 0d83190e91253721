"""Rows without HTTP, on the event loop that `asyncio.run` gives, as a script would use it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from fastapi_graph import Graph, InputNode, deployment
from tests.benchmarks import seed
from tests.benchmarks.peers import graph as ours
from tests.benchmarks.timing import (
    Effort,
    Row,
    Target,
    at_most,
    duration,
    pairwise,
    per_call,
    timed,
)

EAGER_TASKS = sys.version_info >= (3, 12)
NODES = 100
MANY_NODES = 1000
NOT_IMPORTED = ("ray", "numpy", "typer")


async def increment(value: int) -> int:
    return value + 1


async def yielding_increment(value: int) -> int:
    await asyncio.sleep(0)
    return value + 1


async def total(values: list[int]) -> int:
    return sum(values)


def chain(nodes: int, function: Any = increment) -> Any:
    """Bind nodes each of which takes the output of the one before."""
    node = deployment(function)
    with InputNode() as value:
        output = node.bind(value)
        for _ in range(nodes - 1):
            output = node.bind(output)
        return output


def fan(nodes: int, function: Any = increment) -> Any:
    """Bind nodes that all take the input, and one that takes their outputs."""
    node = deployment(function)
    with InputNode() as value:
        return deployment(total).bind([node.bind(value) for _ in range(nodes)])


def layers(nodes: int, width: int = 10) -> Any:
    """Bind layers of nodes each of which takes the outputs of the whole layer before."""
    node = deployment(total)
    with InputNode() as value:
        layer = [node.bind([value]) for _ in range(width)]
        for _ in range(nodes // width - 1):
            layer = [node.bind(layer) for _ in range(width)]
        return node.bind(layer)


def through_handle(effort: Effort) -> Iterator[Row]:
    """The seed graph by its handle."""
    yield _compare(
        effort,
        "seed graph without delays, `await handle.remote(...)`",
        "`asyncio.gather`",
        (ours.dag, seed.predict, seed.REQUEST),
        at_most(1.0) if EAGER_TASKS else at_most(1.3),
    )


def chained(effort: Effort) -> Iterator[Row]:
    """A chain of nodes by its handle."""
    for function, what in _functions():

        async def by_hand(value: int, function: Any = function) -> int:
            for _ in range(NODES):
                value = await function(value)
            return value

        yield _compare(
            effort,
            f"chain of {NODES} async nodes {what}, `await handle.remote(...)`",
            "loop",
            (chain(NODES, function), by_hand, 0),
            at_most(1.2) if EAGER_TASKS else None,
        )


def fanned(effort: Effort) -> Iterator[Row]:
    """A fan of nodes by its handle."""
    for function, what in _functions():

        async def by_hand(value: int, function: Any = function) -> int:
            return await total(await asyncio.gather(*[function(value) for _ in range(NODES)]))

        yield _compare(
            effort,
            f"fan of {NODES} async nodes {what}, `await handle.remote(...)`",
            "`asyncio.gather`",
            (fan(NODES, function), by_hand, 0),
            at_most(1.2) if EAGER_TASKS else None,
        )


def imported(effort: Effort) -> Iterator[Row]:
    """The import of the package, in a new interpreter, from compiled files."""
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | {"PYTHONPYCACHEPREFIX": cache, "PYTHONDONTWRITEBYTECODE": ""}

        def python(code: str) -> str:
            command = [sys.executable, "-c", code]
            return subprocess.check_output(command, env=env, text=True)

        loaded = python("import sys, fastapi_graph; print(*sys.modules)").split()
        if unwanted := set(NOT_IMPORTED).intersection(loaded):
            raise SystemExit(f"`import fastapi_graph` imports {', '.join(sorted(unwanted))}")
        measures = {
            module: lambda module=module: timed(lambda: python(f"import {module}"))
            for module in ("fastapi_graph", "fastapi")
        }
        ours_s, fastapi_s = pairwise(measures, 2 * effort.rounds).values()
    yield Row(
        f"`python -c 'import fastapi_graph'` (imports no {', '.join(NOT_IMPORTED)})",
        "`python -c 'import fastapi'`",
        ours_s,
        fastapi_s,
        duration,
        at_most(1.15),
    )


def built(effort: Effort) -> Iterator[Row]:
    """The time per node to bind, build and compile graphs of two sizes."""

    def measure(bind: Callable[[int], Any], nodes: int) -> Callable[[], float]:
        def build() -> None:
            for _ in range(MANY_NODES // nodes):  # the same number of nodes for every size
                _ = Graph(bind(nodes)).handle  # compiles

        return lambda: timed(build) / MANY_NODES

    for bind in (chain, fan, layers):
        measures = {str(nodes): measure(bind, nodes) for nodes in (MANY_NODES, NODES)}
        many, few = pairwise(measures, effort.rounds).values()
        yield Row(
            f"build of {MANY_NODES} nodes ({bind.__name__}), per node",
            f"build of {NODES} nodes, per node",
            many,
            few,
            duration,
            at_most(1.2, "flat"),
        )


def _functions() -> tuple[tuple[Any, str], ...]:
    return (
        (yielding_increment, "that yield to the loop once"),
        (increment, "that never wait"),
    )


def _compare(
    effort: Effort,
    work: str,
    peer: str,
    subject: tuple[Any, Callable[[Any], Awaitable[Any]], Any],
    target: Target | None,
) -> Row:
    """Compare a graph, called by its handle, with a coroutine function that does the same."""
    dag, by_hand, value = subject
    graph = Graph(dag)
    with asyncio.Runner() as runner:
        runner.run(graph.start())
        calls = {"ours": graph.handle.remote, "by hand": by_hand}

        async def answer(call: Any) -> Any:
            return await call(value)

        answers = [runner.run(answer(call)) for call in calls.values()]
        if answers[0] != answers[1]:
            raise SystemExit(f"{work}: the answers differ: {answers}")

        def measure(call: Any) -> Callable[[], float]:
            return lambda: runner.run(per_call(call, value, effort.duration / 10))

        measures = {name: measure(call) for name, call in calls.items()}
        ours_s, by_hand_s = pairwise(measures, effort.rounds).values()
        runner.run(graph.stop())
    return Row(work, peer, ours_s, by_hand_s, duration, target)
