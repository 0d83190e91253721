"""The names of a graph's actors.

A graph's name may hold anything. In the names of actors the parts are quoted, so that those
of one graph are never taken for those of another.
"""

from __future__ import annotations

import dataclasses
import urllib.parse

__all__ = ["Identity", "controller_name", "is_replica_of", "replica_name"]


@dataclasses.dataclass(frozen=True)
class Identity:
    """Who a controller is.

    Attributes:
        graph: The graph's name.
        namespace: Ray namespace of its actors.
        controller: Name of the controller's own actor.
    """

    graph: str
    namespace: str
    controller: str


def controller_name(graph: str) -> str:
    """Return the name of a graph's controller."""
    return f"fastapi_graph:{_quoted(graph)}"


def replica_name(graph: str, version: str, deployment: str, token: str) -> str:
    """Return a replica's id, which is also the name of its actor."""
    return ":".join((_quoted(graph), _quoted(version[:8]), _quoted(deployment), token))


def is_replica_of(graph: str, name: str) -> bool:
    """Return whether an actor's name is that of a replica of this graph."""
    return name.startswith(f"{_quoted(graph)}:") and name.count(":") == 3


def _quoted(name: str) -> str:
    return urllib.parse.quote(name, safe=" ")
