"""The contract of a backend, and backends by name.

A backend places the deployments of one graph and says what calls them.
"""

from __future__ import annotations

import contextlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

from fastapi_graph.directory import Directory
from fastapi_graph.errors import BackendError, MissingExtraError, SettingsError
from fastapi_graph.executor import Caller
from fastapi_graph.graph.plan import BuiltGraph
from fastapi_graph.settings import GraphSettings

__all__ = ["Backend", "DeploymentState", "DeploymentStatus", "load_backend"]

DeploymentState = Literal["stopped", "starting", "running", "unhealthy", "stopping", "failed"]


class DeploymentStatus(NamedTuple):
    """The state of one deployment at one moment.

    Attributes:
        name: The deployment.
        state: Of the deployment as a whole.
        wanted: How many replicas there should be.
        replicas: How many are ready.
        starting: How many are being started.
        ongoing: Calls that run; of all processes together, about a second old where replicas
            are in other processes.
        queued: Calls that wait for a slot, likewise.
        restarts: How many replicas had to be replaced so far.
        error: The last thing that went wrong, or an empty string.
        shared: Whether all processes share these replicas, so that each reports the same ones.
        counts: What happened to calls, where it did: `abandoned`, the threads that go on for calls
            which were cancelled; and, since this process began, `cache_hits`, `cache_misses`,
            `retries`, `hedges` and `fallbacks`.
    """

    name: str
    state: DeploymentState
    wanted: int
    replicas: int
    starting: int
    ongoing: int
    queued: int
    restarts: int
    error: str
    shared: bool
    counts: Mapping[str, int]


class Backend(ABC):
    """Places the deployments of one graph and calls them.

    Args:
        built: The graph.
        settings: How to run it.
        directory: Where what runs in this process finds its handles.
        local: Names of deployments that run in this process under every backend: drivers,
            which are given the HTTP request itself.
    """

    @abstractmethod
    def __init__(
        self,
        built: BuiltGraph,
        settings: GraphSettings,
        directory: Directory,
        local: frozenset[str],
    ) -> None: ...

    @classmethod
    def for_processes(cls, settings: GraphSettings) -> AbstractContextManager[None]:
        """Provide what web processes that are started in the context have to share."""
        return contextlib.nullcontext()

    @classmethod
    def delete(cls, name: str, settings: GraphSettings) -> None:
        """Stop a graph that has outlived its web processes, and return when it is gone.

        Args:
            name: The graph's name.
            settings: Where to look for it.

        Raises:
            BackendError: There is none, or a process uses it.
        """
        raise BackendError(f"graph {name!r}: with this backend no graph outlives its process")

    @abstractmethod
    async def start(self, name: str) -> None:
        """Start every deployment, each after those its constructor has handles to.

        Progress is logged, with level INFO.

        Args:
            name: The graph's name.

        Raises:
            DeploymentStartError: One failed; those that were started have been stopped.
        """

    @abstractmethod
    async def stop(self) -> None:
        """Stop every deployment, each before those its constructor has handles to."""

    @abstractmethod
    def caller(self, deployment: str) -> Caller:
        """Return what calls a deployment, also before the start."""

    @abstractmethod
    def override(self, deployment: str, fake: Any) -> AbstractContextManager[None]:
        """Replace a deployment's object while the context lasts.

        Raises:
            BackendError: This backend cannot.
        """

    @abstractmethod
    def status(self) -> list[DeploymentStatus]:
        """Return the state of every deployment."""


_BACKENDS = {
    "inprocess": "fastapi_graph.backends.inprocess:InProcessBackend",
    "ray": "fastapi_graph.backends.ray.backend:RayBackend",
}


def load_backend(name: str) -> type[Backend]:
    """Return the backend class of this name, importing it on demand.

    Raises:
        SettingsError: There is no such backend.
        MissingExtraError: What it needs is not installed.
    """
    try:
        module, _, attribute = _BACKENDS[name].partition(":")
    except KeyError:
        raise SettingsError(
            f"unknown backend {name!r} (keyword backend, or FASTAPI_GRAPH_BACKEND); "
            f"there is: {', '.join(_BACKENDS)}"
        ) from None
    try:
        backend: type[Backend] = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise MissingExtraError(
            f"the {name} backend needs a package that is not installed: "
            f"pip install 'fastapi-graph[{name}]'",
            name=name,
        ) from error
    return backend
