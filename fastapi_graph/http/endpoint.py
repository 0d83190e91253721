"""The endpoint of one route: from a request to the graph's input, and back.

FastAPI's own request handler defines what the route does. `GraphRoute` may answer without it,
in less time, where nobody could tell the difference: no dependency applies to the route as it
was included, the default response class is in force, the body is valid JSON of the declared
type, and nobody traces the request. Everything else, errors included, goes through FastAPI's
handler.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import json
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from opentelemetry import trace
from pydantic import TypeAdapter, ValidationError
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from fastapi_graph.application import Graph
from fastapi_graph.errors import DeadlineExceededError, GraphError
from fastapi_graph.http.disconnects import RECEIVE, Rereadable, Watch, client_left
from fastapi_graph.http.incoming import IncomingRequest, incoming_of
from fastapi_graph.http.results import Result
from fastapi_graph.http.statuses import http_error, unprocessable
from fastapi_graph.request import within
from fastapi_graph.streams import stream_of

__all__ = ["GraphEndpoint", "GraphRoute"]

Handler = Callable[[Request], Coroutine[Any, Any, Response]]

# In a request's scope: no response class but FastAPI's default one is in force.
_DEFAULT_CLASS = "fastapi_graph.default_class"


class GraphEndpoint:
    """What FastAPI calls for a route, with the signature that documents it.

    Args:
        graph: The graph that answers.
        callee: What of the graph answers this route.
        label: What messages call the route's output.
        parameter: The annotation of the value parameter, or None if the graph has no input.
        check: Validates what an adapter of the user's own gave, if there is a declared type.
        body: The type of the JSON body where no adapter but `json_request` stands before it.
        result_type: The declared type of the output, or `Any`.
        doc: The description for the schema.
        timeout_s: Seconds that a request may take; None for no limit.
        takes_stream: Whether the graph takes the items of the value one by one.
    """

    shown_options: Mapping[str, Any] = MappingProxyType({})
    """Keywords of `add_api_route` for what documents the route."""

    def __init__(
        self,
        graph: Graph,
        callee: Any,
        *,
        label: str,
        parameter: Any = None,
        check: TypeAdapter[Any] | None = None,
        body: Any = None,
        result_type: Any = Any,
        doc: str | None = None,
        timeout_s: float | None = None,
        takes_stream: bool = False,
    ) -> None:
        self.__name__ = label.replace(".", "_").lower()
        self.__doc__ = doc
        self._label = label
        self._graph = graph
        self._callee = callee
        self._ask: Callable[[tuple[Any, ...]], Awaitable[Any]] = functools.partial(
            graph.request, callee
        )
        self._takes_stream = takes_stream
        self._reading: set[asyncio.Task[Any]] = set()
        if takes_stream:
            self._ask = self._ask_with_stream
        self._check = check
        self._timeout_s = timeout_s
        self._seen = threading.local()
        self._result = Result(result_type, label)
        self._reads_json = body is not None
        self._body = None if body in (None, Any) else TypeAdapter(body)
        parameters = [_keyword("request", Request), _keyword("response", Response)]
        if parameter is not None:
            parameters.append(_keyword("value", parameter))
        self._has_value = parameter is not None
        # Without an input nobody reads the body, and JSON has been read already.
        self._body_is_ours = self._reads_json or not self._has_value
        self.__signature__ = inspect.Signature(
            parameters, return_annotation=self._result.annotation
        )

    @property
    def shown(self) -> Callable[..., Any]:
        """What documents the route; FastAPI never calls it."""
        return self

    async def __call__(self, request: Request, response: Response, value: Any = None) -> Any:
        with self._answering(request, response):
            result = await self._run(request, self._checked(value))
        if isinstance(result, Response):
            return result
        status = response.status_code or 200
        if not request.scope.get(_DEFAULT_CLASS) or status < 200 or status in (204, 205, 304):
            return self._result.plain(result)
        answer = Response(self._result.dump(result), status, media_type="application/json")
        # FastAPI merges what dependencies have set into its own responses only.
        answer.headers.raw.extend(response.headers.raw)
        return answer

    @contextlib.contextmanager
    def _answering(self, request: Request, response: Response) -> Iterator[None]:
        """Read the request's headers, and say those of the answer, where no `GraphRoute` does."""
        if incoming_of(request.scope) is not None:
            yield
            return
        incoming = IncomingRequest(request.scope)
        yield
        response.headers.raw.extend(incoming.headers())

    def _checked(self, value: Any) -> Any:
        """Return what an adapter gave as the declared type."""
        if self._check is None:
            return value
        try:
            return self._check.validate_python(value)
        except ValidationError as error:
            raise unprocessable(error, value) from error

    def notice(self, route: APIRoute) -> str:
        """Note the route as it is included somewhere; FastAPI asks for its unique id then.

        `generate_unique_id_function` is the public hook through which FastAPI shows a route
        together with everything that the routers and the app around it add to it.
        """
        self._seen.route = route
        return f"{route.name}{route.path_format}"

    def shortcut(self, standard: Handler, asking: APIRoute | None) -> Handler:
        """Return the handler for the route that was noticed last, `standard` or a faster one.

        Args:
            standard: FastAPI's handler.
            asking: The route that asks, if FastAPI has just let it be noticed.
        """
        route = self._seen.__dict__.pop("route", None)
        if asking is None or asking is not getattr(route, "original_route", route):
            return standard
        # A response class that was chosen, at any level, is not wrapped as a default.
        if route is None or getattr(route.response_class, "value", None) is not JSONResponse:
            return standard

        async def noting(request: Request) -> Response:
            request.scope[_DEFAULT_CLASS] = True
            return await standard(request)

        if route.dependencies or not self._reads_json:
            return noting

        async def answer(request: Request) -> Response:
            # Whoever adds a dependency to a route afterwards adds it to its dependant.
            if route.dependant.dependencies or not _is_json(request):
                return await noting(request)
            if trace.get_current_span().is_recording():
                return await noting(request)  # which traces the parts of a request
            try:
                value = _from_json(await _body(request))
                if self._body is not None:
                    value = self._body.validator.validate_python(value, from_attributes=True)
            except (ValueError, RecursionError):
                return await noting(request)
            except ClientDisconnect:
                return client_left(request)
            result = await self._run(request, value)
            if isinstance(result, Response):
                return result
            return _JsonBytes(self._result.dump(result))

        return answer

    async def _run(self, request: Request, value: Any) -> Any:
        args = (value,) if self._has_value else ()
        watch = Watch(request, self._body_is_ours)
        incoming = incoming_of(request.scope)
        try:
            timeout_s = self._timeout_s
            if incoming is not None:
                timeout_s = incoming.timeout_s(timeout_s)
            if timeout_s is None:
                return await self._ask(args)
            return await self._within(timeout_s, args)
        except asyncio.CancelledError:
            if not watch.client_left():
                raise
            return client_left(request)
        except ClientDisconnect:
            return client_left(request)
        except GraphError as error:
            said = self._said(error, value)
            try:
                if said is error:
                    raise
                raise said from error
            finally:
                del said  # no cycle through its traceback
        finally:
            watch.stop()

    def _said(self, error: GraphError, value: Any) -> Exception:
        return http_error(error, value, self._graph.settings.over_capacity_status)

    async def _ask_with_stream(self, args: tuple[Any, ...]) -> Any:
        (source,) = args = self._opened(args)
        try:
            return await self._graph.request(self._callee, args)
        finally:
            source.abort()

    def _opened(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return arguments with a stream in place of what can be iterated, if it is to be one."""
        if not self._takes_stream:
            return args
        return tuple(stream_of(items, f"{self._label}: the input", self._reading) for items in args)

    async def _within(self, timeout_s: float, args: tuple[Any, ...]) -> Any:
        deadline = asyncio.get_running_loop().time() + timeout_s
        try:
            with within(deadline):
                async with asyncio.timeout_at(deadline) as scope:
                    return await self._ask(args)
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise DeadlineExceededError(
                f"{self.__name__}: no result within the {timeout_s:g} s of the request"
            ) from error
        finally:
            del scope  # it has the task, whose exception has this frame


class GraphRoute(APIRoute):
    """A route whose endpoint may know a shorter way than FastAPI's handler."""

    def get_route_handler(self) -> Handler:
        """Return the handler; FastAPI asks once for every way in which the route is included."""
        standard = super().get_route_handler()
        endpoint = self.endpoint
        if not isinstance(endpoint, GraphEndpoint):
            return standard
        # With an operation id FastAPI does not ask for the unique id, so nothing was noticed.
        asked = not self.operation_id and self.generate_unique_id_function == endpoint.notice
        return endpoint.shortcut(standard, self if asked else None)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, read its headers, and keep an eye on its body."""
        scope[RECEIVE] = rereadable = Rereadable(receive)
        try:
            await super().handle(scope, rereadable, IncomingRequest(scope).saying(send))
        finally:
            # The server's `receive` refers to the scope: a cycle for the garbage collector.
            del scope[RECEIVE]


async def _body(request: Request) -> bytes:
    receive = request.receive
    if type(receive) is Rereadable:
        message = await receive.take()
        if message["type"] == "http.request" and not message.get("more_body"):
            return message.get("body", b"")  # type: ignore[no-any-return]
    return await request.body()


_decoder = json.JSONDecoder()


def _from_json(body: bytes) -> Any:
    """Return what `json.loads` does, in less time for what is the rule."""
    try:
        text = body.decode().strip(" \t\n\r")
        value, end = _decoder.raw_decode(text)
    except ValueError:
        return json.loads(body)  # in UTF-16, with a byte order mark, or not JSON
    return value if end == len(text) else json.loads(body)


class _JsonBytes(Response):
    """A response of JSON that is ready, made with less ado."""

    def __init__(self, body: bytes) -> None:
        self.status_code = 200
        self.background = None
        self.body = body
        self.raw_headers = [
            (b"content-length", b"%d" % len(body)),
            (b"content-type", b"application/json"),
        ]


def _is_json(request: Request) -> bool:
    for name, value in request.scope["headers"]:
        if name == b"content-type":
            return bool(value == b"application/json" or value.startswith(b"application/json;"))
    return False


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation)
