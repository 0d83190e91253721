"""Real servers in processes of their own, on free ports."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

HEADER = """
import asyncio, os, signal, threading, time
from typing import Any
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi_graph import (
    DAGDriver, DeploymentHandle, Graph, GraphSettings, InputNode, deployment, graph_router
)

app = FastAPI()

def say(*words):
    print(*words, flush=True)

def serve(function, prefix, *, settings=None, **options):
    with InputNode() as x:
        dag = deployment(function, **options).bind(x)
    app.include_router(graph_router(dag, settings=settings), prefix=prefix)
"""


def wait_until(condition: Callable[[], Any], timeout_s: float = 8, what: str = "") -> Any:
    """Return what `condition` gives, as soon as it gives something."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.01)
    return found


class Server:
    """A server process, and all that it has printed.

    Args:
        command: What to run.
        cwd: Where the app's module is.
    """

    def __init__(self, command: list[str], cwd: Path) -> None:
        self.lines: list[str] = []
        self.port = 0
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def logged(self, pattern: str, timeout_s: float = 8) -> re.Match[str]:
        """Wait until the log has something, and return the match."""

        def found() -> re.Match[str] | None:
            if match := re.search(pattern, self.log):
                return match
            assert self.process.poll() is None or self._reader.is_alive(), self.log
            return None

        try:
            return wait_until(found, timeout_s, pattern)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log}") from None

    def post(self, path: str, json: Any = None, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=json, timeout=8, **options)

    def send(self, path: str, body: bytes = b"1", *, length: int | None = None) -> socket.socket:
        """Send a request on a socket of its own, and return that without reading."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=8)
        length = len(body) if length is None else length
        connection.sendall(
            f"POST {path} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n"
            f"content-length: {length}\r\nconnection: close\r\n\r\n".encode()
            + body
        )
        return connection

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        """End the process, and make sure that it has ended."""
        if self.process.poll() is None:
            self.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)
        self._reader.join(10)
        assert self.process.stdout is not None
        self.process.stdout.close()


def read_all(connection: socket.socket) -> bytes:
    """Return all that comes until the other side closes, and close."""
    with contextlib.closing(connection):
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


@contextlib.contextmanager
def started(command: list[str], cwd: Path, listening: str) -> Iterator[Server]:
    server = Server(command, cwd)
    try:
        server.port = int(server.logged(listening, 20)[1])
        yield server
    finally:
        server.stop()


def write_app(folder: Path, code: str) -> str:
    """Write an app to a module, and return `module:app`."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"served_{os.getpid()}_{time.monotonic_ns()}"
    (folder / f"{name}.py").write_text(HEADER + textwrap.dedent(code))
    return f"{name}:app"


def uvicorn(folder: Path, code: str, *options: str) -> contextlib.AbstractContextManager[Server]:
    """Serve an app with uvicorn; `code` follows `HEADER`."""
    command = [sys.executable, "-m", "uvicorn", write_app(folder, code), "--port", "0", *options]
    return started(command, folder, r"running on http://127\.0\.0\.1:(\d+)")


def gunicorn(folder: Path, code: str, *options: str) -> contextlib.AbstractContextManager[Server]:
    """Serve an app with `gunicorn -k asgi`; `code` follows `HEADER`."""
    command = [sys.executable, "-m", "gunicorn", "-k", "asgi", "--no-control-socket"]
    command += ["--bind", "127.0.0.1:0", *options, write_app(folder, code)]
    return started(command, folder, r"ASGI server listening on http://127\.0\.0\.1:(\d+)")
