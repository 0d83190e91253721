"""Rows over HTTP: what the seed graph answers under load, and how soon it starts.

The stacks do not fit on a small machine at once. So within a round one peer after another is
started, measured and stopped.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator

from tests.benchmarks import serving
from tests.benchmarks.ray_suite.peers import OURS, OURS_STREAM, PEERS, SERVE_STREAM, Peers
from tests.benchmarks.ray_suite.rounds import Results, measure
from tests.benchmarks.ray_suite.streams import Streams, read_streams
from tests.benchmarks.serving import Load
from tests.benchmarks.timing import Effort, Row, Target, at_least, at_most, duration, rate

TARGETS: dict[str, tuple[Target, Target]] = {
    "ours-inprocess": (at_least(0.5), at_most(2.5)),
    "raw-actors": (at_least(8), at_most(1 / 4, "a quarter")),
    "serve": (at_least(40), at_most(1 / 10, "a tenth")),
    "serve-wide": (at_least(40), at_most(1 / 10, "a tenth")),
    "serve-optimized": (at_least(25), at_most(1 / 8, "an eighth")),
    "serve-fast": (at_least(25), at_most(1 / 8, "an eighth")),
    "bentoml": (at_least(10), at_most(1 / 5, "a fifth")),
}
"""Of the throughput, and of the latency."""

STREAM_CLIENTS = 16
SERVE_BEGINS = "serve.run begins at"
_WARM_UP_S = 2
_SETTLES_WITHIN_S = 1


def load(effort: Effort, peers: Peers, names: Collection[str]) -> Iterator[Row]:
    """Requests per second and latency of the graph and of each peer."""
    serving.need_wrk()
    failed: dict[str, float] = {}

    def under_load(name: str) -> tuple[Load, Load]:
        with peers.stage(name) as (_, start):
            port = serving.free_port()
            start(port).wait_for_answer(port)
            tolerate = PEERS[name].fails
            serving.wrk(port, _WARM_UP_S, tolerate=tolerate)
            many = serving.wrk(port, effort.duration, tolerate=tolerate)
            failed[name] = max(many.errors, failed.get(name, 0))
            time.sleep(_SETTLES_WITHIN_S)
            return many, serving.wrk(port, effort.duration, 1, tolerate=tolerate)

    compared = [name for name in TARGETS if name in names]
    results = measure(under_load, [OURS, *compared], effort.rounds)
    for name in compared:
        yield results.row(
            f"HTTP, {serving.CONNECTIONS} connections",
            (OURS, name),
            PEERS[name].label,
            lambda figures: figures[0].rate,
            rate,
            TARGETS[name][0],
            note=f"up to {failed[name]:.1%} of its requests fail" if failed.get(name) else "",
        )
    for name in compared:
        yield results.row(
            "HTTP, one connection, p50",
            (OURS, name),
            PEERS[name].label,
            lambda figures: figures[1].p50,
            duration,
            TARGETS[name][1],
        )


def streams(effort: Effort, peers: Peers) -> Iterator[Row]:
    """Streams of small items to several clients at once."""

    def read(name: str) -> Streams:
        with peers.stage(name) as (_, start):
            port = serving.free_port()
            start(port).wait_for_answer(port)
            read_streams(port, 1)
            return read_streams(port, STREAM_CLIENTS)

    results: Results[Streams] = measure(read, [OURS_STREAM, SERVE_STREAM], effort.rounds)
    names = OURS_STREAM, SERVE_STREAM
    label = PEERS[SERVE_STREAM].label
    work = f"HTTP streams of 1,000 small items, {STREAM_CLIENTS} clients at once"
    yield results.row(
        work,
        names,
        label,
        lambda figures: figures.rate,
        lambda value: f"{value:.0f} items/s",
        at_least(10),
    )
    yield results.row(
        f"{work}, first item, p50",
        names,
        label,
        lambda figures: figures.first,
        duration,
        at_most(1 / 4, "a quarter"),
    )


def start(effort: Effort, peers: Peers) -> Iterator[Row]:
    """How long it takes on a running cluster until the first request is answered."""

    def until_first_answer(name: str) -> float:
        with peers.stage(name) as (_, start):
            port = serving.free_port()
            begin = time.monotonic()
            program = start(port)
            answered = program.wait_for_answer(port)
            if name == "serve":
                begin = float(program.wait_for_line(SERVE_BEGINS))
            return answered - begin

    results: Results[float] = measure(until_first_answer, [OURS, "serve"], effort.rounds)
    yield results.row(
        "start of `uvicorn` to the first answer, on a running cluster",
        (OURS, "serve"),
        "Ray Serve, `serve.run` to the first answer",
        float,
        duration,
        at_most(1 / 3, "a third"),
    )
