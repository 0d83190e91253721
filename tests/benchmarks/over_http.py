"""Rows over HTTP: each peer in a uvicorn of its own, with one worker, uvloop and httptools."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator

from tests.benchmarks import seed, serving
from tests.benchmarks.timing import (
    Effort,
    Row,
    Target,
    at_least,
    at_most,
    duration,
    pairwise,
    rate,
    timed,
)

OURS = "tests.benchmarks.peers.graph:app"
OURS_SLOW = "tests.benchmarks.peers.graph:slow_app"

PEERS: dict[str, tuple[str, Target | None]] = {
    "FastAPI endpoint with `asyncio.gather`": (
        "tests.benchmarks.peers.fastapi_gather:app",
        at_least(1.3, aim=1.8),
    ),
    "the same in an included router, as the graph is": (
        "tests.benchmarks.peers.fastapi_gather:included_app",
        None,
    ),
    "bare Starlette endpoint with `asyncio.gather`": (
        "tests.benchmarks.peers.starlette_gather:app",
        at_least(0.55, aim=0.8),
    ),
}
"""What the throughput is compared with. A new peer is a module and an entry here."""

_STARTS_WITHIN_S = 30


def throughput(effort: Effort) -> Iterator[Row]:
    """Requests per second of the graph and of each peer, all of them under the same load."""
    serving.need_wrk()
    apps = {"ours": OURS} | {name: app for name, (app, _) in PEERS.items()}
    with contextlib.ExitStack() as stack:
        ports = {name: stack.enter_context(_serve(app)) for name, app in apps.items()}
        measures = {
            name: lambda port=port: serving.wrk(port, effort.duration).rate
            for name, port in ports.items()
        }
        results = pairwise(measures, effort.rounds)
    for name, (_, target) in PEERS.items():
        work = f"seed graph without delays, HTTP, {serving.CONNECTIONS} connections"
        yield Row(work, name, results["ours"], results[name], rate, target)


def latency(effort: Effort) -> Iterator[Row]:
    """How long one request through the seed graph with its delays takes, on an idle server."""
    with _serve(OURS_SLOW) as port:
        measures = {
            "ours": lambda: timed(lambda: serving.check(port)),
            "critical path": lambda: seed.CRITICAL_PATH_S,
        }
        results = pairwise(measures, effort.rounds)
    yield Row(
        "seed graph with its delays, HTTP, one request",
        "its critical path",
        results["ours"],
        results["critical path"],
        duration,
        at_most(0.455 / seed.CRITICAL_PATH_S, "0.455 s"),
    )


@contextlib.contextmanager
def _serve(app: str) -> Iterator[int]:
    """Run an app in a process of its own, and give the port."""
    port = serving.free_port()
    command = serving.uvicorn(sys.executable, app, port)
    process = subprocess.Popen(command, cwd=serving.ROOT)
    try:
        _wait_for(process, app, port)
        yield port
    finally:
        process.terminate()
        process.wait()


def _wait_for(process: subprocess.Popen[bytes], app: str, port: int) -> None:
    deadline = time.monotonic() + _STARTS_WITHIN_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            serving.check(port)
            return
        time.sleep(0.05)
    raise serving.BenchmarkError(f"uvicorn {app} did not start")
