"""Rows without HTTP: `Graph.handle` on Ray next to plain Ray actors, each in its own script.

A script and its replicas run on one cluster with the others, one after another.
"""

from __future__ import annotations

import contextlib
import json
import operator
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from tests.benchmarks.ray_suite.peers import OURS, PEERS, Peers
from tests.benchmarks.ray_suite.programs import Stage
from tests.benchmarks.ray_suite.rounds import measure
from tests.benchmarks.timing import Effort, Row, at_least, at_most, duration

HEDGING = "tests.benchmarks.ray_suite.hedging"
PROBE = "tests.benchmarks.ray_suite.probe"
ACTORS = "raw-actors"
SCRIPTS = {
    OURS: "tests.benchmarks.peers.handle_calls",
    ACTORS: "tests.benchmarks.peers.actor_calls",
}
SIZES_MB = (10, 100)
_ENDS_WITHIN_S = 120


def call(effort: Effort, peers: Peers) -> Iterator[Row]:
    """One call of a deployment that answers at once."""
    with _probe(peers, "call", effort.duration) as probe:
        results = measure(probe, list(SCRIPTS), effort.rounds)
    yield results.row(
        "`await handle.remote(...)`, one at a time, p50",
        (OURS, ACTORS),
        "a Ray async actor",
        operator.itemgetter("p50"),
        duration,
        at_most(1 / 8, "an eighth"),
    )
    yield results.row(
        "`await handle.remote(...)`, 32 at a time",
        (OURS, ACTORS),
        "a Ray async actor",
        operator.itemgetter("rate"),
        lambda rate: f"{rate:.0f} calls/s",
        at_least(10),
    )


def hedge(effort: Effort, peers: Peers) -> Iterator[Row]:
    """A deployment with a slow tail, with `hedge_after_s` and without."""
    python = peers.environment(None).python
    figures: list[dict[str, float]] = []
    for _ in range(effort.rounds):
        with Stage() as stage:
            stage.start_cluster(python)
            command = [python, "-m", HEDGING, str(effort.duration)]
            output = stage.start(command, PEERS[OURS].environ).output(_ENDS_WITHIN_S)
            figures.append(dict(json.loads(output)))
    yield Row(
        "99th percentile of calls of which 2 % take 0.5 s, two replicas, with `hedge_after_s=0.02`",
        "`hedge_after_s` and the p50 of the same without slow calls",
        [each["hedged_p99"] for each in figures],
        [each["allowed"] for each in figures],
        duration,
        at_most(1.1),
        note=f"without a hedge {duration(statistics.median(e['plain_p99'] for e in figures))}",
    )
    yield Row(
        "calls that reach a replica",
        "calls",
        [each["attempts"] for each in figures],
        [each["calls"] for each in figures],
        lambda value: f"{value:.0f}",
        at_most(1.05),
    )


def values(effort: Effort, peers: Peers) -> Iterator[Row]:
    """Large arrays through a chain of three nodes."""
    for size in SIZES_MB:
        with _probe(peers, "values", effort.duration, size) as probe:
            results = measure(probe, list(SCRIPTS), effort.rounds)
        yield results.row(
            f"array of {size} MB through a chain of three nodes and back, p50",
            (OURS, ACTORS),
            "Ray actors that pass references",
            operator.itemgetter("p50"),
            duration,
            at_most(1.1),
        )


def memory(effort: Effort, peers: Peers) -> Iterator[Row]:
    """What an idle replica holds."""
    imported: dict[str, bool] = {}

    with _probe(peers, "memory") as probe:

        def look(name: str) -> dict[str, Any]:
            figures = probe(name)
            imported[name] = figures["numpy"]
            return figures

        results = measure(look, list(SCRIPTS), effort.rounds)
    with_numpy = ", ".join(name for name, is_imported in imported.items() if is_imported)
    for figure in ("pss", "uss"):
        yield results.row(
            f"memory of an idle replica ({figure.upper()})",
            (OURS, ACTORS),
            "a Ray async actor; the difference",
            operator.itemgetter(figure),
            lambda amount: f"{amount:.1f} MB",
            at_most(20, "MB more"),
            operator.sub,
            f"numpy was imported in {with_numpy}" if with_numpy else "",
        )


@contextlib.contextmanager
def _probe(peers: Peers, work: str, *arguments: float) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Start a cluster; yield what runs the script of a peer on it and returns its figures."""
    python = peers.environment(None).python
    with Stage() as stage:
        stage.start_cluster(python)

        def run(name: str) -> dict[str, Any]:
            command = [python, "-m", PROBE, SCRIPTS[name], work, *map(str, arguments)]
            output = stage.start(command, PEERS[name].environ).output(_ENDS_WITHIN_S)
            return dict(json.loads(output))

        yield run
