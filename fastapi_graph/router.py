"""`graph_router`: a graph as an `APIRouter`, to include in the app you already have."""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, NamedTuple, get_args

from fastapi import APIRouter, Body, Depends
from pydantic import BaseModel, ImportString, TypeAdapter, ValidationError

from fastapi_graph.application import Graph
from fastapi_graph.errors import GraphDefinitionError, UnknownMethodError
from fastapi_graph.graph import signatures
from fastapi_graph.graph.nodes import Node, Target, targets_of
from fastapi_graph.graph.plan import Plan
from fastapi_graph.http.endpoint import GraphEndpoint, GraphRoute
from fastapi_graph.http.results import adapter_of
from fastapi_graph.http.sockets import SocketEndpoint
from fastapi_graph.http.streaming import StreamEndpoint, StreamForm
from fastapi_graph.http_adapters import AnyJson, json_request, starlette_request
from fastapi_graph.settings import GraphSettings

__all__ = ["graph_router"]


def graph_router(
    dag_or_graph: Any,
    *,
    http_adapter: Any = json_request,
    settings: GraphSettings | None = None,
    lifespan: Any = None,
    stream: StreamForm | None = None,
    request_timeout_s: float | None = None,
    websocket: str | None = None,
    **router_options: Any,
) -> APIRouter:
    """Return a router that answers HTTP requests with a graph.

    ```
    app.include_router(graph_router(dag), prefix="/my-dag")
    ```

    It answers POST at the include prefix itself, with and without a trailing slash; a driver
    answers GET and POST; a dict of routes answers at each of them. The graph starts and stops
    with the app. Dependencies of the router and of `include_router` always run.

    A generator at the root answers with a stream: as Server-Sent Events or as JSON lines if the
    request's `Accept` header asks for them, else by the declared type of its items: `bytes` and
    `str` as they are, `ServerSentEvent` as events, anything else as JSON lines.

    Args:
        dag_or_graph: A bound node, a dict of routes, a `DAGDriver`, a driver of your own, or a
            `Graph`.
        http_adapter: How a request becomes the graph's input: any FastAPI dependency, a
            pydantic class for the body, or an import string of one of them. Its value is
            checked against a declared input type. An adapter bound to a `DAGDriver` is used
            unless one other than `json_request` is given here.
        settings: How to run the graph; by default read from the environment. A `Graph` has
            its own.
        lifespan: A lifespan of your own; it is entered before the graph starts.
        stream: How every stream is sent, whatever the request asks for: `"sse"`, `"jsonl"`, or
            `"chunks"` for items of `bytes` or `str`.
        request_timeout_s: Seconds that a request may take before it is answered with 504; None:
            what the settings say. A request's header `x-request-timeout-seconds` can shorten it.
        websocket: A path, below that of the route, at which a websocket is served, too, or `"/"`
            for the route's own: its messages are the stream that the graph takes, and what it
            yields is sent.
        **router_options: Every other keyword of `fastapi.APIRouter`.

    Raises:
        GraphDefinitionError: The graph is wrong, or cannot be served over HTTP.
        SettingsError: A setting cannot work.
    """
    if isinstance(dag_or_graph, Graph):
        graph = dag_or_graph
        if settings is not None:
            raise GraphDefinitionError(
                f"graph {graph.name!r} has settings already: pass them to Graph(...) only"
            )
    else:
        graph = Graph(dag_or_graph, settings=settings)
    ingress = graph.ingress
    if http_adapter is json_request and ingress.http_adapter is not None:
        http_adapter = ingress.http_adapter
    if ingress.takes_request:
        if http_adapter is not json_request:
            raise GraphDefinitionError(
                f"{ingress.root._label()} takes the request itself, so an http_adapter would never "
                f"be used (bound at {ingress.root._where})"
            )
        http_adapter = starlette_request
    router_options.setdefault("max_body_size", graph.settings.max_body_size)
    router = APIRouter(lifespan=_lifespan(graph, lifespan), **router_options)
    if stream not in (None, *get_args(StreamForm)):
        forms = ", ".join(get_args(StreamForm))
        raise GraphDefinitionError(f"stream={stream!r}: there is no such form; there is: {forms}")
    if request_timeout_s is None:
        request_timeout_s = graph.settings.request_timeout_s
    elif not request_timeout_s > 0:
        raise GraphDefinitionError(
            f"request_timeout_s={request_timeout_s!r} must be a number of seconds above 0"
        )
    roots = {path: _root(graph, node) for path, node in ingress.routes.items()}
    bound = f"{ingress.root._label()} (bound at {ingress.root._where})"
    if stream and not any(root.streams for root in roots.values()):
        raise GraphDefinitionError(
            f"stream={stream!r}: {bound} gives no stream; leave `stream` out, or bind a generator "
            "last"
        )
    adapter = _load(http_adapter)
    for path, root in roots.items():
        endpoint = _endpoint(graph, root, adapter, ingress.takes_request, stream, request_timeout_s)
        _add_route(router, path, endpoint, ["GET", "POST"] if ingress.is_driver else ["POST"])
    if websocket is not None:
        talking = {} if ingress.takes_request else {p: r for p, r in roots.items() if r.talks}
        _add_sockets(router, graph, websocket, talking, bound, request_timeout_s)
    return router


class _RootPath(str):
    """The path of a router's root: nothing behind a prefix, and `/` without one.

    FastAPI refuses a route with an empty path in a router that is included without a prefix,
    and a route at `/` answers `/prefix/` but not `/prefix`. Only when the prefix is put
    before the path is it known which of them is right.
    """

    __slots__ = ()

    def __radd__(self, prefix: str) -> str:
        return prefix or self


def _add_route(router: APIRouter, path: str, endpoint: GraphEndpoint, methods: list[str]) -> None:
    # The routes that answer stay out of the schema, and the one in the schema, which is never
    # reached, shows FastAPI's own documentation of the same endpoint. So the answering route
    # can note how it is included without a say in how operation ids are made.
    answers: dict[str, Any] = {"methods": methods, "include_in_schema": False}
    if router.route_class is APIRouter().route_class:
        answers["route_class_override"] = GraphRoute
        answers["generate_unique_id_function"] = endpoint.notice
    root = path == "/"
    shown = _RootPath("/") if root else path
    router.add_api_route(shown, endpoint, **answers)
    router.add_api_route("/" if root else f"{path}/", endpoint, **answers)
    for method in methods:
        # FastAPI takes one operation id per route: with two methods each needs its own.
        name = endpoint.__name__ + ("_get" if method == "GET" else "")
        router.add_api_route(
            shown, endpoint.shown, methods=[method], name=name, **endpoint.shown_options
        )


def _add_sockets(
    router: APIRouter,
    graph: Graph,
    websocket: str,
    talking: dict[str, _Root],
    bound: str,
    timeout_s: float | None,
) -> None:
    if not str(websocket).startswith("/"):
        raise GraphDefinitionError(f"websocket={websocket!r} must be a path that starts with '/'")
    if not talking:
        raise GraphDefinitionError(
            f"websocket={websocket!r}: {bound} does not take a stream and give one; declare the "
            "input, InputNode(AsyncIterator[str]) or a parameter of that type, and bind a "
            "generator last"
        )
    for path, root in talking.items():
        at = f"{path}{websocket}" if path != "/" else websocket
        if websocket == "/":
            at = _RootPath("/") if path == "/" else path
        router.add_api_websocket_route(at, _socket(graph, root, timeout_s))


def _lifespan(graph: Graph, users: Any) -> Callable[[Any], Any]:
    if users is None:
        return graph.lifespan
    entered = APIRouter(lifespan=users).lifespan_context  # of whatever kind it is

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[dict[str, Any]]:
        async with entered(app) as state, graph.lifespan(app) as own:
            yield {**own, **(state or {})}

    return lifespan


def _load(adapter: Any) -> Any:
    if not isinstance(adapter, str):
        return adapter
    try:
        return TypeAdapter(ImportString).validate_python(adapter)
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"]
        raise GraphDefinitionError(f"http_adapter {adapter!r}: {reason}") from error


class _Root(NamedTuple):
    """What answers at one route.

    Attributes:
        node: The node.
        label: What messages call it.
        takes: Whether it takes a value.
        input_type: Of which type.
        streams: Whether it gives a stream.
        result_type: The type of what it gives.
        doc: Its description.
    """

    node: Node
    label: str
    takes: bool
    input_type: Any
    streams: bool
    result_type: Any
    doc: str | None

    @property
    def talks(self) -> bool:
        """Whether it makes a stream of a stream."""
        return self.streams and signatures.item_type(self.input_type) is not None


def _root(graph: Graph, node: Node) -> _Root:
    root = graph.built.roots[node]
    if isinstance(root, Plan):
        label, streams = root.label, root.streams
        takes, input_type, result_type = root.takes_input, root.input_type, root.output_type
        targets = targets_of(node)
    else:
        label = root.deployment
        targets = _targets_of_call(node, label)
        takes, input_type = _parameter(targets, label, node._where)
        streams = signatures.is_stream(targets[0].function)
        answers = [target.function for target in targets if target.answers]
        result_type = signatures.either([*map(signatures.return_type, answers)])
    doc = inspect.getdoc(targets[0].function) if targets else None
    return _Root(node, label, takes, input_type, streams, result_type, doc)


def _endpoint(
    graph: Graph,
    root: _Root,
    adapter: Any,
    takes_request: bool,
    form: StreamForm | None,
    timeout_s: float | None,
) -> GraphEndpoint:
    where: dict[str, Any] = {
        "label": root.label,
        "result_type": root.result_type,
        "doc": root.doc,
        "timeout_s": timeout_s,
    }
    if not takes_request:
        where |= _input(root.takes, root.input_type, adapter, root.label)
    else:
        where |= {"parameter": Annotated[Any, Depends(adapter)]}
    if root.streams:
        return StreamEndpoint(graph, graph.callee_of(root.node), form=form, **where)
    return GraphEndpoint(graph, graph.callee_of(root.node), **where)


def _socket(graph: Graph, root: _Root, timeout_s: float | None) -> SocketEndpoint:
    return SocketEndpoint(
        graph,
        graph.callee_of(root.node),
        label=root.label,
        takes=signatures.item_type(root.input_type),
        gives=signatures.item_type(root.result_type),
        timeout_s=timeout_s,
    )


def _input(takes: bool, input_type: Any, adapter: Any, label: str) -> dict[str, Any]:
    """Return how a route gets the graph's input, as arguments of `GraphEndpoint`."""
    items = signatures.input_item_type(input_type)
    if items is not None:  # which are a list in JSON, and whatever an adapter gives to iterate
        if adapter is json_request:
            where = _input(takes, types.GenericAlias(list, (items,)), adapter, label)
        else:
            where = _input(takes, Any, adapter, label)
        return {**where, "takes_stream": takes}
    if adapter is json_request:
        if not takes:
            return {}
        body = AnyJson if input_type is Any else input_type
        try:
            TypeAdapter(body)
        except Exception as error:  # pydantic raises several kinds for what it cannot describe
            raise GraphDefinitionError(
                f"{label}: the declared input type {input_type!r} cannot be read from JSON; "
                "declare a type that pydantic knows, or pass an http_adapter"
            ) from error
        return {"parameter": Annotated[body, Body()], "body": input_type}
    if inspect.isclass(adapter) and issubclass(adapter, BaseModel):
        parameter: Any = Annotated[adapter, Body()]
    elif callable(adapter):
        parameter = Annotated[Any, Depends(adapter)]
    else:
        raise GraphDefinitionError(
            f"{label}: http_adapter {adapter!r} is neither a callable, a pydantic class nor an "
            "import string"
        )
    return {"parameter": parameter, "check": adapter_of(input_type)}


def _targets_of_call(node: Node, label: str) -> tuple[Target, ...]:
    """Return what a request to something that is served as it is comes to."""
    try:
        return targets_of(node)
    except UnknownMethodError:
        raise GraphDefinitionError(
            f"{label} (bound at {node._where}) is an instance without __call__, so it does "
            f"not answer requests: bind one of its methods, {label}.method.bind(...)"
        ) from None


def _parameter(targets: tuple[Target, ...], label: str, where: str) -> tuple[bool, Any]:
    """Return whether what is served as it is takes a value, and of which type."""
    signed = [(target, signatures.signature_of(target.function)) for target in targets]
    takes = any(
        signature is None or len(signature.parameters) > target.takes_self
        for target, signature in signed
    )
    declared: list[Any] = []
    for target in targets:
        _, type_ = signatures.parameter_type(target.function, 0, method=target.takes_self)
        if target.answers:
            declared.append(type_)
        signatures.check_arguments(
            f"{label}, served with one value,",
            target.function,
            (None,) if takes else (),
            {},
            where,
            method=target.takes_self,
        )
    type_ = signatures.either(declared)
    is_known = adapter_of(type_) is not None or signatures.item_type(type_) is not None
    return takes, type_ if is_known else Any
