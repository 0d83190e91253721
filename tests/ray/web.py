"""Web servers on real Ray: a project in a folder, and the processes that serve it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import ray
import ray.util

from tests.processes import Program

__all__ = ["Server", "Site", "cluster_site", "lonely_site", "until"]

PATIENCE_S = 60.0

# Whatever is in capitals is replaced, so that a project can change.
SERVICE = """
    import asyncio, logging, os, time
    from pathlib import Path
    from fastapi import FastAPI
    from fastapi_graph import Graph, InputNode, deployment, graph_router

    FOLDER = Path(__file__).parent
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("fastapi_graph").setLevel(logging.INFO)

    def note(*words):
        with (FOLDER / "journal").open("a") as file:
            print(*words, os.getpid(), time.monotonic(), file=file)

    options = {"ray_actor_options": {"num_cpus": 0}, "graceful_shutdown_timeout_s": 5}

    @deployment(**options)
    class Offset:
        def __init__(self):
            note("made", "Offset")

        def add(self, number: int) -> int:
            return number + OFFSET

        def close(self):
            note("closed", "Offset")

    @deployment(
        num_replicas=int(os.environ.get("REPLICAS", "2")),
        user_config={"factor": int(os.environ.get("FACTOR", "10"))},
        **options,
    )
    class Scale:
        def __init__(self):
            time.sleep(LOADING_S)
            note("made", "Scale")

        def reconfigure(self, config):
            self.factor = config["factor"]
            note("configured", self.factor)

        async def run(self, number: int) -> list[int]:
            if number > 1000:
                note("slow", number)
            await asyncio.sleep(number / 1000)
            return [number * self.factor, os.getpid()]

        def close(self):
            note("closed", "Scale")

    with InputNode(int) as number:
        dag = Scale.bind().run.bind(Offset.bind().add.bind(number))

    graph = Graph(dag, name=NAME)
    app = FastAPI()
    app.include_router(graph_router(graph), prefix="/graph")

    @app.middleware("http")
    async def say_which_process(request, call_next):
        response = await call_next(request)
        response.headers["x-process"] = str(os.getpid())
        return response

    if os.environ.get("UNREACHABLE"):
        async def refuse(*args, **kwargs):
            raise ConnectionRefusedError("unreachable")

        asyncio.SelectorEventLoop.create_connection = refuse
        asyncio.SelectorEventLoop.create_unix_connection = refuse

    note("imported", "service")
"""


class Server(Program):
    """A server, which is given the time that Ray takes."""

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait until it has printed what matches `pattern`."""
        found = until(lambda: re.search(pattern, self.output) or self.has_ended, self)
        assert isinstance(found, re.Match), f"it ended without {pattern!r}: {self.output}"
        return found

    def __str__(self) -> str:
        return self.output

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def ready(self, workers: int = 1) -> str:
        """Wait until every worker process serves, and return where."""
        ready = r"Application startup complete|ASGI server listening"
        self.wait_for(rf"(?s)((?:{ready}).*){{{workers}}}")
        return self.wait_for_url()

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Wait for its end and return the exit code."""
        return super().wait(timeout_s)

    def kill_all(self) -> None:
        """Send SIGKILL to it and all that it has started, at once."""
        os.killpg(self.pid, signal.SIGKILL)
        self.wait()


class Site:
    """A project in a folder, and the servers that a test starts for it.

    Args:
        folder: Where `service.py` is written.
        environ: What every server has in its environment.
    """

    def __init__(self, folder: Path, environ: dict[str, str]) -> None:
        self.folder = folder / "project"
        self.folder.mkdir()
        self.namespace = f"web-{uuid.uuid4().hex[:8]}"
        self.servers: list[Server] = []
        self.temporary = environ.get("RAY_TMPDIR", "")
        self._environ = {
            "FASTAPI_GRAPH_BACKEND": "ray",
            "FASTAPI_GRAPH_NAMESPACE": self.namespace,
            "FASTAPI_GRAPH_LEASE_S": "2",
            "PYTHONDONTWRITEBYTECODE": "1",  # a module is rewritten within a second
            "PYTHONUNBUFFERED": "1",
            **environ,
        }
        self.write()

    def write(self, offset: int = 1, loading_s: float = 0.0, name: str | None = "web") -> None:
        """Write the project, as it is or changed."""
        source = textwrap.dedent(SERVICE)
        for word, value in {"OFFSET": offset, "LOADING_S": loading_s, "NAME": name}.items():
            source = re.sub(rf"\b{word}\b", repr(value), source)
        (self.folder / "service.py").write_text(source)

    # Servers

    def start(self, *command: object, **environ: str) -> Server:
        """Start a Python program in the project's folder."""
        log = self.folder.parent / f"output-{len(self.servers)}.txt"
        words = [sys.executable, *map(str, command)]
        self.servers.append(Server(words, self.folder, log, {**self._environ, **environ}))
        return self.servers[-1]

    def uvicorn(self, *options: object, port: int = 0, **environ: str) -> Server:
        """Start uvicorn as its script does, with an empty entry in the module path."""
        script = Path(sys.executable).with_name("uvicorn")
        return self.start(script, "service:app", f"--port={port}", *options, **environ)

    def gunicorn(self, *options: object, workers: int = 2, **environ: str) -> Server:
        """Start gunicorn."""
        fixed = ("-k", "asgi", "--no-control-socket", "--bind=127.0.0.1:0")
        return self.start(
            "-m", "gunicorn", "service:app", f"-w{workers}", *fixed, *options, **environ
        )

    def cli(self, *arguments: object, **environ: str) -> Server:
        """Start the command line."""
        return self.start("-m", "fastapi_graph", *arguments, **environ)

    # What became of them

    def notes(self, *words: str) -> list[tuple[str, int, float]]:
        """Return the last word, process and time of each note that begins with `words`."""
        path = self.folder / "journal"
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        found = [line for line in lines if tuple(line[: len(words)]) == words]
        return [(line[1], int(line[2]), float(line[3])) for line in found]

    def made(self) -> list[str]:
        """Return the name of each object that was constructed."""
        return sorted(word for word, _, _ in self.notes("made"))

    def makers(self, name: str = "") -> set[int]:
        """Return the processes in which objects were constructed."""
        return {pid for word, pid, _ in self.notes("made") if name in ("", word)}

    def actors(self) -> set[str]:
        """Return the names of the graph's actors."""
        named = ray.util.list_named_actors(all_namespaces=True)
        return {actor["name"] for actor in named if actor["namespace"] == self.namespace}

    def until_gone(self, timeout_s: float = PATIENCE_S) -> float:
        """Wait until the graph has no actor and no process left; return the seconds it took."""
        began = time.monotonic()
        until(lambda: not self.actors() and not any(map(alive, self.makers())), self, timeout_s)
        return time.monotonic() - began

    def __str__(self) -> str:
        return "\n".join(server.output for server in self.servers)

    def close(self) -> None:
        """End the servers, and what they have left in the cluster."""
        for server in self.servers:
            server.kill()
        if not ray.is_initialized():
            return
        for name in self.actors():
            with contextlib.suppress(ValueError):
                ray.kill(ray.get_actor(name, self.namespace))


@contextlib.contextmanager
def cluster_site(folder: Path) -> Iterator[Site]:
    """Give a project whose servers join the cluster of the tests."""
    address = ray.get_runtime_context().gcs_address
    site = Site(folder, {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token"})
    try:
        yield site
    finally:
        site.close()


@contextlib.contextmanager
def lonely_site(folder: Path) -> Iterator[Site]:
    """Give a project whose servers find no cluster; those they start are below `RAY_TMPDIR`."""
    # Paths of sockets must be short.
    temporary = tempfile.mkdtemp(prefix="fg-", dir="/tmp")
    # Ray's own processes do not survive that warnings are errors.
    site = Site(folder, {"RAY_TMPDIR": temporary, "PYTHONWARNINGS": "default"})
    try:
        yield site
    finally:
        site.close()
        for pid in processes_of(temporary):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(temporary, ignore_errors=True)


def processes_of(temporary: str) -> set[int]:
    """Return the processes of the clusters that are below a folder."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if temporary.encode() in (path / "cmdline").read_bytes():
                found.add(int(path.name))
    return found


class Load:
    """Requests one after the other on a thread, each of which must be answered.

    Args:
        send: Sends a request and returns its answer.
    """

    def __init__(self, send: Callable[[], httpx.Response]) -> None:
        self.answers: list[httpx.Response] = []
        self.failure: BaseException | None = None
        self._send = send
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                response = self._send()
                assert response.status_code == 200, response.text
            except (httpx.HTTPError, AssertionError) as error:
                self.failure = error
                return
            self.answers.append(response)
            time.sleep(0.005)

    def more(self, number: int = 20) -> None:
        """Wait until so many more requests were answered."""
        wanted = len(self.answers) + number
        until(lambda: len(self.answers) >= wanted or self.failure, "no more answers")

    def end(self) -> BaseException | None:
        """End it, and return what went wrong."""
        self._ended.set()
        self._thread.join()
        return self.failure


def post(url: str, number: int = 4, **options: Any) -> httpx.Response:
    """Ask the graph, on a connection of its own."""
    options = {"timeout": PATIENCE_S, "trust_env": False, **options}
    return httpx.post(f"{url}/graph", json=number, **options)


def value(url: str, number: int = 4) -> int:
    """Return what the graph makes of a number."""
    response = post(url, number)
    assert response.status_code == 200, response.text
    return int(response.json()[0])


def answering(url: str, wanted: int) -> set[int]:
    """Return the web processes that answer, once there are as many as wanted."""
    found: set[int] = set()

    def ask() -> bool:
        found.add(int(post(url).headers["x-process"]))
        return len(found) >= wanted

    until(ask, found)
    return found


def alive(pid: int) -> bool:
    """Return whether a process exists."""
    return Path(f"/proc/{pid}").exists()


def until(condition: Callable[[], Any], said: object = "", timeout_s: float = PATIENCE_S) -> Any:
    """Return what a condition gives, as soon as it gives something."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {said}"
        time.sleep(0.02)
    return found
