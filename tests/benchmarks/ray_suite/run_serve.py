"""Serve the graph with Ray Serve: `python -m tests.benchmarks.ray_suite.run_serve NAME PORT`."""

from __future__ import annotations

import contextlib
import signal
import sys
import time

import ray
from ray import serve

from tests.benchmarks.peers import serve_graph

BEGINS = "serve.run begins at"


def main(application: str, port: str) -> None:
    ray.init(log_to_driver=False)
    print(BEGINS, time.monotonic(), flush=True)
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    serve.run(getattr(serve_graph, application))
    with contextlib.suppress(KeyboardInterrupt):
        signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
