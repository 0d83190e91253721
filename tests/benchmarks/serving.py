"""A server of the seed graph: how it is started, asked once, and put under load."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import shutil
import socket
import subprocess
from pathlib import Path

from tests.benchmarks import seed

CONNECTIONS = 32
PATH = "/my-dag"
BODY = json.dumps(seed.REQUEST)
ROOT = Path(__file__).parents[2]
_SCRIPT = Path(__file__).with_name("post.lua")


class BenchmarkError(SystemExit):
    """Something could not be measured. It ends the program unless somebody expects it."""


@dataclasses.dataclass(frozen=True)
class Load:
    """What one run of wrk has seen.

    Attributes:
        rate: Requests per second that were answered.
        p50: The median of the latencies, in seconds.
        errors: Which share of the requests was not.
    """

    rate: float
    p50: float
    errors: float


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def uvicorn(python: str, app: str, port: int) -> list[str]:
    """Return the command that serves an app with one worker, uvloop and httptools."""
    options = f"--port {port} --loop uvloop --http httptools --log-level warning --no-access-log"
    return [python, "-m", "uvicorn", app, *options.split()]


def check(port: int) -> None:
    """Post the request once, and see that the answer is right.

    Raises:
        BenchmarkError: It is wrong.
        OSError: There is no answer.
        http.client.HTTPException: Likewise.
    """
    status, answer = ask(port)
    if status != 200 or answer != seed.ANSWER:
        raise BenchmarkError(f"wrong answer from port {port}: {status} {answer!r}")


def ask(port: int) -> tuple[int, object]:
    """Post the request once; return the status and the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.request("POST", PATH, BODY, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
        is_json = "json" in response.headers.get("Content-Type", "")
    return response.status, json.loads(text) if is_json else text


def need_wrk() -> None:
    if shutil.which("wrk") is None:
        raise BenchmarkError("This needs wrk: apt-get install wrk, or brew install wrk")


def wrk(port: int, seconds: int, connections: int = CONNECTIONS, *, tolerate: float = 0.0) -> Load:
    """Put a server under load.

    Args:
        port: Where it listens.
        seconds: How long.
        connections: How many requests are open at any time.
        tolerate: Which share of the requests may fail.

    Raises:
        BenchmarkError: More than that failed, or nothing was answered.
    """
    options = (
        f"--threads 1 --connections {connections} --duration {seconds}s --timeout 30s "
        f"--script {_SCRIPT}"
    )
    command = ["wrk", *options.split(), f"http://127.0.0.1:{port}{PATH}", "--", BODY]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = done.stdout.rpartition("figures: ")[2].split()
    requests, microseconds, errors, p50 = (int(figure) for figure in figures)
    if errors > tolerate * requests or errors >= requests:
        raise BenchmarkError(f"{requests} requests and {errors} errors at port {port}")
    return Load((requests - errors) / microseconds * 1e6, p50 / 1e6, errors / requests)
