"""Drivers: what stands between HTTP and a graph, and what a target offers to be served.

`graph_router`, `Graph`, `run` and the command line take the same targets; `ingress_of` says
what each of them means. Nothing here knows of FastAPI.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Mapping
from typing import Any

from fastapi_graph.errors import GraphDefinitionError, InputError
from fastapi_graph.graph import signatures
from fastapi_graph.graph.deployment import Deployment, deployment
from fastapi_graph.graph.nodes import (
    ClassNode,
    DeploymentNode,
    MethodBinder,
    Node,
    caller_location,
)
from fastapi_graph.handle import DeploymentHandle, DeploymentResponseGenerator

__all__ = ["DAGDriver", "Ingress", "ingress_of"]


class _DAGDriver:
    """Serves one graph, or several by route. Bind it last: `DAGDriver.bind(dag)`.

    It is a deployment like any other, so it has `.options(route_prefix=..., num_replicas=...)`.
    Its `num_replicas` is the number of web processes that the command line starts. The handle
    calls `predict`; over HTTP it answers GET and POST.

    Args:
        dags: A bound node, or `{"/route": node, ...}`.
        http_adapter: How a request becomes the graph's input; see `graph_router`.
    """

    def __init__(
        self,
        dags: DeploymentHandle | dict[str, DeploymentHandle],
        http_adapter: Any = None,
    ) -> None:
        self.dags = dags if isinstance(dags, dict) else {"/": dags}
        self.http_adapter = http_adapter

    async def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph on these arguments, without HTTP.

        Raises:
            InputError: There are several routes.
        """
        if len(self.dags) != 1:
            raise InputError(
                "DAGDriver has several routes, call predict_with_route(route, ...); "
                f"its routes: {', '.join(self.dags)}"
            )
        (route,) = self.dags
        return await self.predict_with_route(route, *args, **kwargs)

    async def predict_with_route(self, route: str, *args: Any, **kwargs: Any) -> Any:
        """Run the graph of a route on the other arguments, without HTTP.

        Raises:
            InputError: There is no such route.
        """
        if route not in self.dags:
            raise InputError(
                f"DAGDriver has no route {route!r}; its routes: {', '.join(self.dags)}"
            )
        response = self.dags[route].remote(*args, **kwargs)
        if isinstance(response, DeploymentResponseGenerator):
            response.cancel()
            raise GraphDefinitionError(
                f"the graph at route {route!r} is a generator, whose items DAGDriver gives over "
                "HTTP only; without HTTP call it through the handle of Graph(dag)"
            )
        return await response

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return await self.predict(*args, **kwargs)


_DAGDriver.__name__ = _DAGDriver.__qualname__ = "DAGDriver"  # what deployments and docs show
DAGDriver = deployment(_DAGDriver)


@dataclasses.dataclass(frozen=True)
class Ingress:
    """What a target offers to be served.

    Attributes:
        root: The node that the graph's handle stands for.
        routes: What is answered over HTTP, by path.
        http_adapter: The adapter that the target brings along, if any.
        is_driver: Whether it is a driver: a `DAGDriver`, or a class that takes the request.
        takes_request: Whether the root is given the HTTP request itself.
        route_prefix: Where `run` and the command line serve it.
        num_workers: How many web processes the command line starts.
    """

    root: Node
    routes: Mapping[str, Node]
    http_adapter: Any = None
    is_driver: bool = False
    takes_request: bool = False
    route_prefix: str = "/"
    num_workers: int = 1


def ingress_of(target: Any) -> Ingress:
    """Return what a target means.

    Args:
        target: A bound node, a dict of routes, a `DAGDriver` or a driver of the user's own.

    Raises:
        GraphDefinitionError: It is none of these.
    """
    if isinstance(target, Mapping):
        target = DAGDriver.bind(dict(target))
    if isinstance(target, Deployment):
        raise GraphDefinitionError(
            f"{target.name} is a deployment, not a graph: pass {target.name}.bind(...)"
        )
    if isinstance(target, MethodBinder):
        name = f"{target._node._label()}.{target._name}"
        raise GraphDefinitionError(
            f"{name} is a method, not a graph: pass {name}.bind(...) "
            f"(bound at {target._node._where}, used at {caller_location()})"
        )
    if not isinstance(target, Node):
        raise GraphDefinitionError(
            f"{target!r} is no graph: pass a bound node, a dict of routes, a DAGDriver or a Graph"
        )
    if not isinstance(target, DeploymentNode):
        return Ingress(target, {"/": target})
    options = target._deployment.deployment_options
    ingress = Ingress(target, {"/": target}, route_prefix=options.route_prefix or "/")
    if not isinstance(target, ClassNode):
        return ingress
    if target._deployment.target is _DAGDriver:
        bound = inspect.signature(_DAGDriver).bind(*target._args, **target._kwargs).arguments
        return dataclasses.replace(
            ingress,
            routes=_routes(bound["dags"], target),
            http_adapter=bound.get("http_adapter"),
            is_driver=True,
            num_workers=options.num_replicas,
        )
    takes_request = _takes_request(target)
    return dataclasses.replace(
        ingress,
        is_driver=takes_request,
        takes_request=takes_request,
        num_workers=options.num_replicas if takes_request else 1,
    )


def _routes(dags: Any, driver: Node) -> dict[str, Node]:
    routes = dags if isinstance(dags, Mapping) else {"/": dags}
    if not routes:
        raise GraphDefinitionError(f"DAGDriver has no route (bound at {driver._where})")
    for route, node in routes.items():
        if not isinstance(route, str) or not route.startswith("/"):
            raise GraphDefinitionError(
                f"DAGDriver: route {route!r} must start with '/' (bound at {driver._where})"
            )
        if len(route) > 1 and route.endswith("/"):
            raise GraphDefinitionError(
                f"DAGDriver: route {route!r} must not end with '/'; it is answered with and "
                f"without (bound at {driver._where})"
            )
        if not isinstance(node, Node):
            raise GraphDefinitionError(
                f"DAGDriver: {node!r} at route {route!r} is no bound node "
                f"(bound at {driver._where})"
            )
    return dict(routes)


def _takes_request(node: ClassNode) -> bool:
    """Say whether the first parameter of `__call__` is the HTTP request.

    It is where it is annotated with Starlette's `Request`, or named `request` and not
    annotated at all: `request: Payload` is a value like any other.
    """
    if not node._has("__call__"):
        return False
    name, annotation = signatures.parameter_type(node._method("__call__"), 0, method=True)
    if isinstance(annotation, str):  # which could not be evaluated
        return annotation.rpartition(".")[2] == "Request"
    if annotation is Any:
        return name == "request"
    starlette = sys.modules.get("starlette.requests")
    return inspect.isclass(annotation) and issubclass(annotation, getattr(starlette, "Request", ()))
