"""Bind models into a graph and plug it into the FastAPI app you already have.

```
app.include_router(graph_router(dag), prefix="/my-dag")
```
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastapi_graph.errors import (
    BackendError,
    BackPressureError,
    DeadlineExceededError,
    DeadlockError,
    DeploymentStartError,
    ExecutionError,
    GraphDefinitionError,
    GraphError,
    GraphNameTakenError,
    GraphNotStartedError,
    GraphStoppingError,
    InputError,
    LocalProtocolError,
    MissingExtraError,
    NodeError,
    NoReplicaError,
    OptionError,
    OutputError,
    RemoteProtocolError,
    ReplicaLostError,
    ResponseTimeoutError,
    SerializationError,
    SettingsError,
    UnknownMethodError,
    VersionSupersededError,
    WireError,
)

if TYPE_CHECKING:
    from fastapi_graph.application import Graph
    from fastapi_graph.batching import batch
    from fastapi_graph.driver import DAGDriver
    from fastapi_graph.graph.deployment import Deployment, deployment
    from fastapi_graph.graph.nodes import InputNode
    from fastapi_graph.graph.options import Cache
    from fastapi_graph.graph.virtual import shadow, split
    from fastapi_graph.handle import (
        DeploymentHandle,
        DeploymentResponse,
        DeploymentResponseGenerator,
    )
    from fastapi_graph.logs import RequestLogFilter
    from fastapi_graph.models import get_multiplexed_model_id
    from fastapi_graph.multiplexing import multiplexed
    from fastapi_graph.request import RequestContext, get_request_context
    from fastapi_graph.router import graph_router
    from fastapi_graph.settings import GraphSettings
    from fastapi_graph.standalone import run, shutdown

__version__ = "0.1.0"

__all__ = [
    "BackPressureError",
    "BackendError",
    "Cache",
    "DAGDriver",
    "DeadlineExceededError",
    "DeadlockError",
    "Deployment",
    "DeploymentHandle",
    "DeploymentResponse",
    "DeploymentResponseGenerator",
    "DeploymentStartError",
    "ExecutionError",
    "Graph",
    "GraphDefinitionError",
    "GraphError",
    "GraphNameTakenError",
    "GraphNotStartedError",
    "GraphSettings",
    "GraphStoppingError",
    "InputError",
    "InputNode",
    "LocalProtocolError",
    "MissingExtraError",
    "NoReplicaError",
    "NodeError",
    "OptionError",
    "OutputError",
    "RemoteProtocolError",
    "ReplicaLostError",
    "RequestContext",
    "RequestLogFilter",
    "ResponseTimeoutError",
    "SerializationError",
    "SettingsError",
    "UnknownMethodError",
    "VersionSupersededError",
    "WireError",
    "batch",
    "deployment",
    "get_multiplexed_model_id",
    "get_request_context",
    "graph_router",
    "multiplexed",
    "run",
    "shadow",
    "shutdown",
    "split",
]

# Names are imported when they are first used: a replica that hosts one model needs no FastAPI.
_HOMES = {
    "application": ("Graph",),
    "batching": ("batch",),
    "driver": ("DAGDriver",),
    "graph.deployment": (
        "Deployment",
        "deployment",
    ),
    "graph.nodes": ("InputNode",),
    "graph.options": ("Cache",),
    "graph.virtual": (
        "shadow",
        "split",
    ),
    "handle": (
        "DeploymentHandle",
        "DeploymentResponse",
        "DeploymentResponseGenerator",
    ),
    "logs": ("RequestLogFilter",),
    "models": ("get_multiplexed_model_id",),
    "multiplexing": ("multiplexed",),
    "request": (
        "RequestContext",
        "get_request_context",
    ),
    "router": ("graph_router",),
    "standalone": (
        "run",
        "shutdown",
    ),
    "settings": ("GraphSettings",),
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    try:
        module = importlib.import_module(f"fastapi_graph.{_MODULES[name]}")
    except KeyError:
        raise AttributeError(f"module 'fastapi_graph' has no attribute {name!r}") from None
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | _MODULES.keys())
