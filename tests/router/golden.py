"""The same service twice: served from a graph, and written by hand with FastAPI."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Body, FastAPI
from fastapi.testclient import TestClient
from httpx2 import Response

from fastapi_graph import InputNode, deployment, graph_router
from fastapi_graph.graph.nodes import Node

PATH = "/answer"


def answering(takes: Any, gives: Any, answer: Callable[[Any], Any]) -> Callable[..., Any]:
    """Return an async function `answer(value: takes) -> gives`."""

    async def answer_(value: Any) -> Any:
        return answer(value)

    answer_.__name__ = answer_.__qualname__ = "answer"
    answer_.__annotations__ = {"value": takes, "return": gives}
    return answer_


def same(value: Any) -> Any:
    return value


def graph_of(takes: Any = Any, gives: Any = Any, answer: Callable[[Any], Any] = same) -> Node:
    """Return a graph of one node that gives `answer(value)`."""
    with InputNode(takes) as x:
        return deployment(answering(takes, gives, answer)).bind(x)


def router_of(
    takes: Any = Any, gives: Any = Any, answer: Callable[[Any], Any] = same, **options: Any
) -> APIRouter:
    return graph_router(graph_of(takes, gives, answer), **options)


def served(
    takes: Any = Any,
    gives: Any = Any,
    answer: Callable[[Any], Any] = same,
    *,
    app: dict[str, Any] | None = None,
    include: dict[str, Any] | None = None,
    **options: Any,
) -> FastAPI:
    """Return an app that serves the graph at `/answer`."""
    application = FastAPI(**(app or {}))
    router = router_of(takes, gives, answer, **options)
    application.include_router(router, prefix=PATH, **(include or {}))
    return application


def by_hand(
    takes: Any = Any,
    gives: Any = Any,
    answer: Callable[[Any], Any] = same,
    *,
    app: dict[str, Any] | None = None,
    include: dict[str, Any] | None = None,
    **options: Any,
) -> FastAPI:
    """Return an app with the endpoint that one would write instead."""
    application = FastAPI(**(app or {}))
    router = APIRouter(**options)
    router.post("")(answering(Annotated[takes, Body()], gives, answer))
    application.include_router(router, prefix=PATH, **(include or {}))
    return application


def headers_of(response: Response) -> list[tuple[str, str]]:
    """Return the headers of a response, without that of the graph's own: the request id."""
    return [header for header in response.headers.multi_items() if header[0] != "x-request-id"]


def client_of(app: FastAPI) -> TestClient:
    """Return a client that shows a 500 as a 500."""
    return TestClient(app, raise_server_exceptions=False)
