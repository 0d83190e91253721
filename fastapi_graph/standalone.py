"""`run` and `shutdown`: serve a graph from a script, without an app of one's own."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from fastapi_graph.application import Graph
from fastapi_graph.errors import BackendError, GraphDefinitionError, MissingExtraError
from fastapi_graph.handle import DeploymentHandle
from fastapi_graph.router import graph_router
from fastapi_graph.settings import GraphSettings

if TYPE_CHECKING:
    import uvicorn

__all__ = ["app_of", "listen", "run", "shutdown", "sigterm_ends_serving"]

logger = logging.getLogger("fastapi_graph")

_services: list[_Service] = []
_services_lock = threading.Lock()


def app_of(graph: Graph, route_prefix: str | None = None) -> FastAPI:
    """Return an app that serves a graph and nothing else.

    Args:
        graph: The graph.
        route_prefix: The path to serve it at; by default the `route_prefix` of its driver.

    Raises:
        GraphDefinitionError: The prefix does not start with a slash.
    """
    prefix = graph.ingress.route_prefix if route_prefix is None else route_prefix
    if not prefix.startswith("/"):
        raise GraphDefinitionError(f"route prefix {prefix!r} must start with '/'")
    app = FastAPI(title=graph.name)
    app.include_router(graph_router(graph), prefix=prefix.rstrip("/"))
    return app


def run(
    target: Any,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    blocking: bool = False,
    route_prefix: str | None = None,
    settings: GraphSettings | None = None,
) -> DeploymentHandle:
    """Start a graph, serve it over HTTP in the background, and return its handle.

    The handle works at once, also in synchronous code: `run(dag).remote(1).result()`. A graph
    of the same name that `run` has started before is stopped first. Everything ends with
    `shutdown()`, or with the program.

    Args:
        target: What `graph_router` takes.
        host: The address to listen on.
        port: The port; 0 for one that is free.
        name: The graph's name, see `Graph`.
        blocking: Serve in this thread, until Ctrl-C or SIGTERM, and return after that.
        route_prefix: The path; by default the driver's own `route_prefix`, else `/`.
        settings: How to run the graph; by default read from the environment.

    Raises:
        DeploymentStartError: A deployment did not start.
        BackendError: The address cannot be listened on.
        MissingExtraError: uvicorn is not installed.
    """
    if isinstance(target, Graph) and (name, settings) != (None, None):
        raise GraphDefinitionError(
            f"graph {target.name!r} has a name and settings already: pass them to Graph(...) only"
        )
    graph = target if isinstance(target, Graph) else Graph(target, name=name, settings=settings)
    app = app_of(graph, route_prefix)
    with _services_lock:
        earlier = [service for service in _services if service.name == graph.name]
    try:
        listening = listen(host, port)
    except BackendError:
        if not any(service.port == port for service in earlier):
            raise
        listening = None  # by the one that is replaced
    for service in earlier:
        service.stop()
    service = _Service(graph, app, listening or listen(host, port))
    if blocking:
        service.serve()
    else:
        service.start()
    return graph.handle


def shutdown() -> None:
    """Stop every graph that `run` has started, as a server stops: requests in flight finish."""
    with _services_lock:
        services = list(_services)
    for service in reversed(services):
        service.stop()


class _Service:
    """A graph and its server, on an event loop of their own."""

    def __init__(self, graph: Graph, app: FastAPI, listening: socket.socket) -> None:
        try:
            import uvicorn
        except ImportError as error:
            listening.close()
            raise MissingExtraError(
                "run() needs uvicorn: pip install 'fastapi-graph[cli]'"
            ) from error
        self.name = graph.name
        self.host, self.port = listening.getsockname()[:2]
        self._graph = graph
        self._socket = listening
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=None)
        self._server = uvicorn.Server(config)
        self._ended = threading.Event()
        self._loop_thread: int | None = None
        self._ready: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self.serve, name=f"serve {self.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()
        try:
            self._ready.result()
        except BaseException:
            self._server.should_exit = True
            self._thread.join()
            raise

    def serve(self) -> None:
        with _services_lock:
            _services.append(self)
        try:
            loop_factory = self._server.config.get_loop_factory()
            with sigterm_ends_serving(), asyncio.Runner(loop_factory=loop_factory) as runner:
                runner.run(self._serve(self._server))
        except KeyboardInterrupt:
            if threading.current_thread() is self._thread:
                raise
        except BaseException as error:
            if self._ready.done() or threading.current_thread() is not self._thread:
                raise
            self._ready.set_exception(error)
        finally:
            self._socket.close()
            with _services_lock:
                _services.remove(self)
            self._ended.set()

    async def _serve(self, server: uvicorn.Server) -> None:
        self._loop_thread = threading.get_ident()
        # Started here, what a constructor raises reaches the caller of `run`, and not only
        # the log of the server; the app's lifespan then counts one more start.
        await self._graph.start()
        serving = asyncio.ensure_future(server.serve(sockets=[self._socket]))
        try:
            while not server.started and not serving.done():  # noqa: ASYNC110 - it has no event
                await asyncio.sleep(0.005)
        finally:
            await self._graph.stop()
        if server.started:
            logger.info("graph %s: serving at http://%s:%s", self.name, self.host, self.port)
            self._ready.set_result(None)
        await serving
        if not self._ready.done():
            raise BackendError(f"graph {self.name!r}: the server did not start, see its log")

    def stop(self) -> None:
        """Stop the server and wait until it has ended; from its own thread, only stop it."""
        self._server.should_exit = True
        if threading.get_ident() != self._loop_thread:
            self._ended.wait()


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        BackendError: It cannot.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BackendError(
            f"cannot listen on {host}:{port}: {reason}; pass another port, or stop what listens "
            "there"
        ) from error


@contextlib.contextmanager
def sigterm_ends_serving() -> Iterator[None]:
    """Let SIGTERM end the server in the body, and not the program.

    After its own shutdown uvicorn raises the signal again, for the handler that was there
    before; the default one would end the program before the rest of it could run.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@atexit.register
def _shutdown_at_exit() -> None:
    with contextlib.suppress(Exception):
        shutdown()
