"""The command line: `fastapi-graph run module:attr`, `check module:attr` and `delete NAME`."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI

from fastapi_graph.application import Graph, graphs
from fastapi_graph.backends import load_backend
from fastapi_graph.errors import GraphError
from fastapi_graph.settings import GraphSettings
from fastapi_graph.standalone import app_of, listen, sigterm_ends_serving

try:
    import typer
    import uvicorn
    from uvicorn.config import STARTUP_FAILURE
    from uvicorn.supervisors import Multiprocess

    from fastapi_graph.terminal import (
        console,
        error_console,
        graph_tree,
        log_handler,
        own_rows,
        publish_rows,
        published_rows,
        status_shown,
    )
except ImportError as error:
    raise SystemExit(
        f"The command line needs {error.name}: pip install 'fastapi-graph[cli]'"
    ) from error

__all__ = ["create_app", "main"]

cli = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

# How the command tells the worker processes, which uvicorn starts, what to serve.
_TARGET = "FASTAPI_GRAPH_RUN_TARGET"
_PREFIX = "FASTAPI_GRAPH_RUN_ROUTE_PREFIX"
_STATUS = "FASTAPI_GRAPH_RUN_STATUS_DIR"

Target = Annotated[
    str, typer.Argument(help="What to serve: module:attr or module.attr.", metavar="MODULE:ATTR")
]
AppDir = Annotated[Path, typer.Option(help="Where modules are looked for first.")]
Backend = Annotated[
    str | None, typer.Option(help="Where deployments run; else FASTAPI_GRAPH_BACKEND.")
]


def main() -> None:
    """Run the command line."""
    cli(prog_name="fastapi-graph")


@cli.callback()
def _commands() -> None:
    """Serve graphs of models, or check them without serving."""


@cli.command()
def run(
    target: Target,
    app_dir: AppDir = Path(),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for one that is free.")
    ] = 8000,
    route_prefix: Annotated[
        str | None, typer.Option(help="Path to serve at; else the driver's own, else /.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Web processes; else the driver's num_replicas.")
    ] = None,
    reload: Annotated[bool, typer.Option(help="Start again when a file changes.")] = False,
    backend: Backend = None,
) -> None:
    """Serve a node, a Graph or a FastAPI app, until Ctrl-C."""
    _prepare(app_dir, backend)
    os.environ[_TARGET] = target
    if route_prefix is not None:
        os.environ[_PREFIX] = route_prefix
    elif _PREFIX in os.environ:
        del os.environ[_PREFIX]
    with _shown_errors():
        app, default_workers = _app(target, route_prefix)
    workers = workers or (1 if reload else default_workers)
    with contextlib.suppress(KeyboardInterrupt), _shown_errors():
        if not reload and workers == 1:
            _serve(app, host, port)
            return
        with _shared_by_processes():
            if reload:
                _serve_reloading(host, port, app_dir.resolve())
            else:
                _serve_workers(host, port, workers)


@cli.command()
def delete(
    name: Annotated[str, typer.Argument(help="The graph's name.", metavar="NAME")],
    backend: Backend = None,
) -> None:
    """Stop a detached graph, which no web process uses any more."""
    _prepare(Path(), backend)
    with _shown_errors():
        settings = GraphSettings()
        load_backend(settings.backend).delete(name, settings)
    console.print(f"graph {name} is gone", markup=False, highlight=False)


@cli.command()
def check(target: Target, app_dir: AppDir = Path(), backend: Backend = None) -> None:
    """Build and validate without starting anything, and show the graph."""
    _prepare(app_dir, backend)
    with _shown_errors():
        found = _load(target)
        if isinstance(found, FastAPI):
            shown, prefix = graphs(), "<prefix of include_router>"
            if not shown:
                console.print(f"{target} is an app without a graph")
        else:
            shown, prefix = [found if isinstance(found, Graph) else Graph(found)], None
            if not isinstance(found, Graph):
                app_of(shown[0])  # what cannot be served over HTTP is an error too
        for graph in shown:
            console.print(graph_tree(graph, prefix), markup=False)


def create_app() -> FastAPI:
    """Return the app of a worker process, which the environment names."""
    _log_to_stderr()
    publish_rows(Path(os.environ[_STATUS]))
    app, _ = _app(os.environ[_TARGET], os.environ.get(_PREFIX))
    return app


def _prepare(app_dir: Path, backend: str | None) -> None:
    sys.path.insert(0, str(app_dir.resolve()))
    if backend is not None:
        os.environ["FASTAPI_GRAPH_BACKEND"] = backend


@contextlib.contextmanager
def _shown_errors() -> Iterator[None]:
    """End the command with exit code 1 on an error: ours in a line, others with a traceback."""
    try:
        yield
    except GraphError as error:
        error_console.print(f"[red]{type(error).__name__}[/red]:", end=" ")
        error_console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    except typer.Exit:
        raise
    except Exception:
        traceback.print_exc()
        raise typer.Exit(1) from None


def _load(target: str) -> Any:
    module_name, colon, path = target.partition(":")
    if not colon:
        module_name, _, path = target.rpartition(".")
    if not module_name or not path:
        raise GraphError(f"{target!r} names nothing: write module:attr or module.attr")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, but what it imports is not
        raise GraphError(
            f"there is no module {error.name!r} in {sys.path[0]} or on the Python path; "
            "see --app-dir"
        ) from None
    found: Any = module
    for name in path.split("."):
        if not hasattr(found, name):
            raise GraphError(f"{module_name} has no {path!r}")
        found = getattr(found, name)
    return found


def _app(target: str, route_prefix: str | None) -> tuple[FastAPI, int]:
    """Return the app to serve, and how many web processes it wants."""
    found = _load(target)
    if isinstance(found, FastAPI):
        if route_prefix is not None:
            raise GraphError(f"{target} is an app and has paths of its own: no --route-prefix")
        return found, 1
    graph = found if isinstance(found, Graph) else Graph(found)
    return app_of(graph, route_prefix), graph.ingress.num_workers


def _log_to_stderr() -> None:
    logger = logging.getLogger("fastapi_graph")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        handler: logging.Handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s:     %(message)s"))
        logger.addHandler(handler)


def _serve(app: FastAPI, host: str, port: int) -> None:
    """Serve in this process."""
    log_config: Any = uvicorn.config.LOGGING_CONFIG
    if console.is_terminal:
        log_config = None  # through the console, so that lines do not tear the table
        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[log_handler()])
    else:
        _log_to_stderr()
    listening = listen(host, port)
    server = uvicorn.Server(uvicorn.Config(app, log_config=log_config))
    _say_address(listening)
    with status_shown(own_rows, live=True), sigterm_ends_serving():
        server.run(sockets=[listening])


def _serve_workers(host: str, port: int, workers: int) -> None:
    """Serve in processes that import the app themselves; this one watches them."""
    listening = listen(host, port)
    listening.set_inheritable(True)
    _say_address(listening)
    config = uvicorn.Config("fastapi_graph.cli:create_app", factory=True, workers=workers)
    with _published_status_shown():
        supervisor = Multiprocess(config, sockets=[listening])
        supervisor.run()
    if any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes):
        raise typer.Exit(STARTUP_FAILURE)


def _serve_reloading(host: str, port: int, app_dir: Path) -> None:
    """Serve in a process that is replaced when a file changes."""
    with _published_status_shown():
        uvicorn.run(
            "fastapi_graph.cli:create_app",
            factory=True,
            host=host,
            port=port,
            reload=True,
            reload_dirs=[str(app_dir)],
            app_dir=str(app_dir),
        )


@contextlib.contextmanager
def _shared_by_processes() -> Iterator[None]:
    """Provide what the backends of the graphs have to share between processes."""
    with contextlib.ExitStack() as stack:
        for name, settings in {g.settings.backend: g.settings for g in graphs()}.items():
            stack.enter_context(load_backend(name).for_processes(settings))
        yield


def _say_address(listening: socket.socket) -> None:
    host, port = listening.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    console.out(f"listening on http://{host}:{port} (Ctrl-C to stop)")


@contextlib.contextmanager
def _published_status_shown() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        os.environ[_STATUS] = folder
        with status_shown(lambda: published_rows(Path(folder)), live=False):
            yield
