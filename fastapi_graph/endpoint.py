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
import inspect
import json
import logging
import math
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar

from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError, ResponseValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from opentelemetry import trace
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, to_jsonable_python
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from fastapi_graph.application import Graph
from fastapi_graph.context import current_deadline
from fastapi_graph.errors import (
    BackPressureError,
    DeadlineExceededError,
    GraphStoppingError,
    InputError,
    SerializationError,
)

__all__ = ["GraphEndpoint", "GraphRoute", "adapter_of"]

logger = logging.getLogger("fastapi_graph")

Handler = Callable[[Request], Coroutine[Any, Any, Response]]

# A request that takes longer than once or twice this is watched for its client leaving.
_WATCH_AFTER_S = 0.05

# In a request's scope: no response class but FastAPI's default one is in force.
_DEFAULT_CLASS = "fastapi_graph.default_class"

# In a request's scope: its `_Rereadable`.
_RECEIVE = "fastapi_graph.receive"


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
    """

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
    ) -> None:
        self.__name__ = label.replace(".", "_").lower()
        self.__doc__ = doc
        self._graph = graph
        self._callee = callee
        self._check = check
        self._timeout_s = graph.settings.request_timeout_s
        self._seen = threading.local()
        self._result = _Result(result_type, label)
        self._reads_json = body is not None
        self._body = None if body in (None, Any) else TypeAdapter(body)
        parameters = [_keyword("request", Request), _keyword("response", Response)]
        if parameter is not None:
            parameters.append(_keyword("value", parameter))
        self._has_value = parameter is not None
        self.__signature__ = inspect.Signature(
            parameters, return_annotation=self._result.annotation
        )

    async def __call__(self, request: Request, response: Response, value: Any = None) -> Any:
        if self._check is not None:
            try:
                value = self._check.validate_python(value)
            except ValidationError as error:
                raise _unprocessable(error, value) from error
        result = await self._run(request, value)
        if isinstance(result, Response):
            return result
        status = response.status_code or 200
        if not request.scope.get(_DEFAULT_CLASS) or status < 200 or status in (204, 205, 304):
            return self._result.plain(result)
        answer = Response(self._result.dump(result), status, media_type="application/json")
        # FastAPI merges what dependencies have set into its own responses only.
        answer.headers.raw.extend(response.headers.raw)
        return answer

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
                return _client_left(request)
            result = await self._run(request, value)
            if isinstance(result, Response):
                return result
            return _JsonBytes(self._result.dump(result))

        return answer

    async def _run(self, request: Request, value: Any) -> Any:
        args = (value,) if self._has_value else ()
        # Without an input nobody reads the body, and JSON has been read already.
        watch = _Watch(request, self._reads_json or not self._has_value)
        try:
            if self._timeout_s is None:
                return await self._graph.request(self._callee, args)
            return await self._within(self._timeout_s, args)
        except asyncio.CancelledError:
            if not watch.client_left():
                raise
            return _client_left(request)
        except ClientDisconnect:
            return _client_left(request)
        except InputError as error:
            if error.input is not value and not isinstance(value, Request):
                raise  # of what a node has passed on, not of what the client has sent
            raise RequestValidationError(
                [
                    {
                        "type": "graph_input",
                        "loc": ("body", *error.path),
                        "msg": error.reason,
                        "input": _said_in_json(value),
                    }
                ],
                body=_said_in_json(value),
            ) from error
        except BackPressureError as error:
            retry_after = str(math.ceil(error.retry_after_s))
            raise HTTPException(
                503, "Over capacity, try again later", {"Retry-After": retry_after}
            ) from error
        except GraphStoppingError as error:
            raise HTTPException(503, "Shutting down", {"Retry-After": "1"}) from error
        except DeadlineExceededError as error:
            raise HTTPException(504, "The request took too long") from error
        finally:
            watch.stop()

    async def _within(self, timeout_s: float, args: tuple[Any, ...]) -> Any:
        token = current_deadline.set(asyncio.get_running_loop().time() + timeout_s)
        try:
            async with asyncio.timeout(timeout_s) as scope:
                return await self._graph.request(self._callee, args)
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise DeadlineExceededError(
                f"{self.__name__}: no result within request_timeout_s={timeout_s}"
            ) from error
        finally:
            current_deadline.reset(token)


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
        """Answer a request, and keep an eye on its body."""
        scope[_RECEIVE] = rereadable = _Rereadable(receive)
        try:
            await super().handle(scope, rereadable, send)
        finally:
            # The server's `receive` refers to the scope: a cycle for the garbage collector.
            del scope[_RECEIVE]


class _Rereadable:
    """A `receive` that gives its first message again after `take()`.

    `Request.body()` costs more than the rest of reading a small body, but whoever handles an
    exception of the endpoint has the same request and may want its body.

    Attributes:
        beyond: The `receive` of the server.
        ended: Whether the whole body has been received.
    """

    __slots__ = ("_taken", "beyond", "ended")

    def __init__(self, receive: Receive) -> None:
        self.beyond = receive
        self.ended = False
        self._taken: Message | None = None

    async def __call__(self) -> Message:
        if self._taken is None:
            message = await self.beyond()
            self.ended = not message.get("more_body", False)
            return message
        message, self._taken = self._taken, None
        return message

    async def take(self) -> Message:
        """Receive the first message, to be given again."""
        self._taken = message = await self.beyond()
        self.ended = not message.get("more_body", False)
        return message


async def _body(request: Request) -> bytes:
    receive = request.receive
    if type(receive) is _Rereadable:
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


class _Watch:
    """Cancels the current task when the client of a request leaves.

    Under uvicorn an endpoint goes on for a client that has gone, unless it looks. Most
    requests are over before that is worth a task: a sweep over all of them, every
    `_WATCH_AFTER_S`, begins to look at those it meets for the second time.
    """

    __slots__ = ("_body_is_ours", "_gone", "_met", "_others", "_request", "_task", "_watcher")

    _open: ClassVar[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, set[_Watch]]] = (
        weakref.WeakKeyDictionary()
    )

    def __init__(self, request: Request, body_is_ours: bool) -> None:
        self._request = request
        self._body_is_ours = body_is_ours
        self._task = asyncio.current_task()
        self._watcher: asyncio.Task[None] | None = None
        self._met = self._gone = False
        loop = asyncio.get_running_loop()
        watches = self._open.get(loop)
        if watches is None:
            watches = self._open[loop] = set()
            loop.call_later(_WATCH_AFTER_S, self._sweep, loop)
        watches.add(self)
        self._others = watches

    @classmethod
    def _sweep(cls, loop: asyncio.AbstractEventLoop) -> None:
        watches = cls._open[loop]
        if not watches:
            del cls._open[loop]  # the next request begins anew
            return
        for watch in watches:
            if watch._met and watch._watcher is None:
                watch._look(loop)
            watch._met = True
        loop.call_later(_WATCH_AFTER_S, cls._sweep, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        tracked = self._request.scope.get(_RECEIVE)
        if tracked is None:  # in a route class of the user's own
            receive = self._request.receive if self._body_is_ours else None
        elif self._body_is_ours or tracked.ended or not _has_body(self._request):
            receive = tracked.beyond
        else:  # whoever reads the body later must not miss a part of it to us
            receive = None
        if receive is not None:
            self._watcher = loop.create_task(self._listen(receive))

    async def _listen(self, receive: Receive) -> None:
        try:
            while (await receive())["type"] != "http.disconnect":
                pass
        except Exception as error:
            logger.debug("cannot watch for the client leaving: %r", error)
            return
        self._gone = True
        if self._task is not None:
            self._task.cancel()

    def client_left(self) -> bool:
        """Say whether it cancelled the task, and take that back."""
        if self._gone and self._task is not None:
            self._task.uncancel()
        return self._gone

    def stop(self) -> None:
        """Look no longer."""
        self._others.discard(self)
        if self._watcher is not None:
            self._watcher.cancel()


def _has_body(request: Request) -> bool:
    return "content-length" in request.headers or "transfer-encoding" in request.headers


def _is_json(request: Request) -> bool:
    for name, value in request.scope["headers"]:
        if name == b"content-type":
            return bool(value == b"application/json" or value.startswith(b"application/json;"))
    return False


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation)


def _client_left(request: Request) -> Response:
    # Nobody receives it; it is what middleware and access logs see.
    logger.warning("499 %s %s: the client left", request.method, request.url.path)
    return Response(status_code=499)


def _unprocessable(error: ValidationError, value: Any) -> RequestValidationError:
    errors = error.errors(include_url=False)
    return RequestValidationError(
        [
            {**item, "loc": ("body", *item["loc"]), "input": _said_in_json(item["input"])}
            for item in errors
        ],
        body=_said_in_json(value),
    )


def _said_in_json(value: Any) -> Any:
    """Return what a validation error may show of a value: None of what JSON cannot say."""
    try:
        return to_jsonable_python(value)
    except ValueError:
        return None


def adapter_of(type_: Any) -> TypeAdapter[Any] | None:
    """Return what validates a declared type, or None where pydantic cannot."""
    if type_ is Any:
        return None
    for config in (None, ConfigDict(arbitrary_types_allowed=True)):
        try:
            return TypeAdapter(type_, config=config)
        except Exception:  # pydantic raises several kinds for what it cannot describe
            continue
    return None


class _Result:
    """How a route's output is said in JSON.

    Attributes:
        annotation: The declared type as FastAPI should see it; `Any` for what has no schema.
    """

    def __init__(self, type_: Any, label: str) -> None:
        self._label = label
        self._declared: TypeAdapter[Any] | None = None
        self.annotation = type_
        if type_ is type(None):
            self.annotation = None  # to FastAPI, `-> None` declares nothing
        elif type_ is not Any and not (inspect.isclass(type_) and issubclass(type_, Response)):
            try:
                self._declared = TypeAdapter(type_)
            except Exception:  # such as an array: no schema, but it can be said in JSON
                self.annotation = Any

    def dump(self, value: Any) -> bytes:
        """Return the value as JSON, validated against the declared type.

        Raises:
            ResponseValidationError: It is not of the declared type.
            SerializationError: It cannot be said in JSON.
        """
        declared = self._declared
        if declared is not None:
            value = self._validated(declared, value)
        try:
            return (declared or _ANY).serializer.to_json(value, by_alias=True)
        except PydanticSerializationError:
            return _ANY.dump_json(_plain(value, self._label))

    def plain(self, value: Any) -> Any:
        """Return the value for FastAPI to validate and serialise: itself, if pydantic can.

        Raises:
            SerializationError: It cannot be said in JSON.
        """
        try:
            _ANY.dump_json(value)
        except PydanticSerializationError:
            return _plain(value, self._label)
        return value

    def _validated(self, declared: TypeAdapter[Any], value: Any) -> Any:
        try:
            return declared.validator.validate_python(value, from_attributes=True)
        except ValidationError as error:
            with contextlib.suppress(ValidationError, SerializationError):
                return declared.validate_python(_plain(value, self._label), from_attributes=True)
            errors = error.errors(include_url=False)
            raise ResponseValidationError(
                errors=[{**item, "loc": ("response", *item["loc"])} for item in errors],
                body=value,
            ) from error


_ANY: TypeAdapter[Any] = TypeAdapter(Any)


def _plain(value: Any, label: str) -> Any:
    """Return a value in which arrays and frames have become lists."""

    def convert(part: Any) -> Any:
        for method in ("to_list", "tolist"):  # pandas, numpy
            if callable(getattr(part, method, None)):
                return getattr(part, method)()
        if type(part).__module__.startswith("pandas"):  # a frame
            return part.to_dict(orient="records")
        raise SerializationError(
            f"the result of {label} cannot be said in JSON: it has an instance of "
            f"{type(part).__qualname__}; return JSON types, pydantic models, dataclasses, arrays "
            "or a Response"
        )

    try:
        return to_jsonable_python(value, fallback=convert)
    except ValueError as error:
        raise SerializationError(
            f"the result of {label} cannot be said in JSON: {error}"
        ) from error
