"""The shorter way past FastAPI's handler: taken where nobody can tell, and only there."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.routing import APIRoute
from fastapi.security import APIKeyHeader
from pydantic import BaseModel

from fastapi_graph import DAGDriver, Graph, GraphSettings, deployment, graph_router
from tests.router.golden import PATH, client_of, graph_of, router_of, served


class Item(BaseModel):
    name: str


async def nothing() -> None:
    """A dependency that changes nothing."""


def callers() -> str:
    """Return the names of the functions of FastAPI that are running."""
    frame, names = sys._getframe(1), []
    while frame is not None:
        if frame.f_globals.get("__name__") == "fastapi.routing":
            names.append(frame.f_code.co_name)
        frame = frame.f_back
    return "standard" if "run_endpoint_function" in names else "shortcut"


def observed(app: FastAPI, path: str = PATH, **request: Any) -> str:
    """Return which way a request takes, as seen from the node."""
    with client_of(app) as client:
        response = client.post(path, **(request or {"json": {"name": "a"}}))
    assert response.status_code == 200, response.text
    return response.json()


def way(_: Any) -> str:
    return callers()


@pytest.mark.parametrize("takes", [Item, dict[str, str], Any, Item | None, dict], ids=str)
@pytest.mark.parametrize("gives", [str, Any, str | None], ids=str)
def test_taken_for_every_declared_type(takes: Any, gives: Any) -> None:
    assert observed(served(takes, gives, way)) == "shortcut"


@pytest.mark.parametrize("path", [PATH, PATH + "/"])
def test_taken_with_and_without_a_trailing_slash(path: str) -> None:
    assert observed(served(Item, str, way), path) == "shortcut"


@pytest.mark.parametrize("content_type", ["application/json", "application/json; charset=utf-8"])
def test_taken_for_what_is_declared_as_json(content_type: str) -> None:
    request = {"content": b'{"name": "a"}', "headers": {"content-type": content_type}}
    assert observed(served(Item, str, way), **request) == "shortcut"


def test_taken_through_nested_routers_and_their_settings() -> None:
    inner, outer = APIRouter(tags=["inner"]), APIRouter(prefix="/outer", deprecated=True)
    inner.include_router(router_of(Item, str, way), prefix="/graph")
    outer.include_router(inner, responses={404: {"description": "no"}})
    app = FastAPI()
    app.include_router(outer, prefix="/v1", generate_unique_id_function=lambda route: route.name)
    assert observed(app, "/v1/outer/graph") == "shortcut"


def test_taken_by_every_route_of_a_driver() -> None:
    app = FastAPI()
    routes = {"/a": graph_of(Item, str, way), "/b": graph_of(Any, str, way)}
    app.include_router(graph_router(DAGDriver.bind(routes)), prefix="/d")
    assert observed(app, "/d/a") == "shortcut"
    assert observed(app, "/d/b/") == "shortcut"


def test_taken_with_limits() -> None:
    settings = GraphSettings(max_body_size=1000, request_timeout_s=5)
    assert observed(served(Item, str, way, settings=settings)) == "shortcut"


def test_taken_by_a_router_that_is_included_with_prefix_only_later() -> None:
    app = FastAPI()
    router = router_of(Item, str, way)
    app.include_router(router, prefix="/guarded", dependencies=[Depends(nothing)])
    app.include_router(router, prefix="/open")
    assert observed(app, "/open") == "shortcut"
    assert observed(app, "/guarded") == "standard"
    assert observed(app, "/open") == "shortcut"


@pytest.mark.parametrize("declared", [Depends(nothing), Security(nothing, scopes=["a"])])
@pytest.mark.parametrize("level", ["router", "include", "app"])
def test_not_taken_with_a_dependency(level: str, declared: Any) -> None:
    given = {"dependencies": [declared]}
    options = given if level == "router" else {level: given}
    assert observed(served(Item, str, way, **options)) == "standard"


@pytest.mark.parametrize("level", ["outer", "include", "middle"])
def test_not_taken_with_a_dependency_further_up(level: str) -> None:
    given: dict[str, list[Any]] = {name: [] for name in ("outer", "include", "middle")}
    given[level] = [Depends(nothing)]
    outer = APIRouter(dependencies=given["outer"])
    middle = APIRouter()
    middle.include_router(router_of(Item, str, way), prefix="/graph")
    outer.include_router(middle, dependencies=given["middle"])
    app = FastAPI()
    app.include_router(outer, prefix="/v1", dependencies=given["include"])
    assert observed(app, "/v1/graph") == "standard"


def test_not_taken_with_an_adapter() -> None:
    async def adapter(request: Request) -> Any:
        return await request.json()

    assert observed(served(Item, str, way, http_adapter=adapter)) == "standard"
    assert observed(served(Any, str, way, http_adapter=Item)) == "standard"


@pytest.mark.parametrize("level", ["router", "include", "app"])
def test_not_taken_with_another_response_class(level: str) -> None:
    class Shouting(JSONResponse):
        def render(self, content: Any) -> bytes:
            return super().render(str(content).upper())

    given = {"default_response_class": Shouting}
    options = given if level == "router" else {level: given}
    assert observed(served(Item, str, way, **options)) == "STANDARD"


def test_not_taken_with_a_route_class_of_the_users_own() -> None:
    seen = []

    class Recording(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:
            handler = super().get_route_handler()

            async def recorded(request: Request) -> Response:
                seen.append(request.url.path)
                return await handler(request)

            return recorded

    assert observed(served(Item, str, way, route_class=Recording)) == "standard"
    assert seen == [PATH]


def test_bad_input_goes_the_standard_way() -> None:
    """The app's own handler sees what FastAPI would have raised, with its own body."""
    app = served(Item, str, way)
    seen: list[RequestValidationError] = []

    @app.exception_handler(RequestValidationError)
    async def handle(request: Request, error: RequestValidationError) -> Response:
        seen.append(error)
        return PlainTextResponse("no", 400)

    with client_of(app) as client:
        assert client.post(PATH, json={"nome": "a"}).status_code == 400
        assert client.post(
            PATH, content=b"{", headers={"content-type": "application/json"}
        ).is_error
    assert [error.body for error in seen] == [{"nome": "a"}, "{"]


def test_a_key_is_asked_for_however_the_app_is_built() -> None:
    """The node must not run for who has no key, at whatever level the key is asked for."""
    calls = []

    def spy(value: Any) -> str:
        calls.append(value)
        return callers()

    key = [Security(APIKeyHeader(name="x-key"))]
    keyed: dict[str, Any] = {"dependencies": key}
    for options in (keyed, {"include": keyed}, {"app": keyed}):
        with client_of(served(Any, str, spy, **options)) as client:
            for path in (PATH, PATH + "/"):
                assert client.post(path, json=1).status_code in (401, 403)
                assert calls == []
                allowed = client.post(path, json=1, headers={"x-key": "k"})
                assert (allowed.status_code, allowed.json()) == (200, "standard")
                calls.clear()


def test_the_whole_app_can_be_described_between_requests() -> None:
    """Documenting a route must not change how it is answered."""
    app = served(Item, str, way)
    assert observed(app) == "shortcut"
    app.openapi_schema = None
    app.openapi()
    assert observed(app) == "shortcut"
    app.include_router(router_of(Item, str, way), prefix="/b", dependencies=[Depends(nothing)])
    app.openapi_schema = None
    app.openapi()
    assert observed(app) == "shortcut"
    assert observed(app, "/b") == "standard"


def test_one_graph_object_behind_two_routers() -> None:
    graph = Graph(graph_of(Item, str, way))
    app = FastAPI()
    app.include_router(graph_router(graph, dependencies=[Depends(nothing)]), prefix="/guarded")
    app.include_router(graph_router(graph), prefix="/open")
    assert observed(app, "/guarded") == "standard"
    assert observed(app, "/open") == "shortcut"


def test_a_deployment_served_as_it_is() -> None:
    @deployment
    class Model:
        async def __call__(self, value: int) -> str:
            return f"{callers()} {value}"

    app = FastAPI()
    app.include_router(graph_router(Model.bind()), prefix=PATH)
    assert observed(app, json=3) == "shortcut 3"


@pytest.mark.parametrize("depth", [10, 100_000])
def test_deep_json_is_the_callers_fault(depth: int) -> None:
    body = b"[" * depth + b"]" * depth
    answers = []
    for dependencies in ([], [Depends(lambda: None)]):
        app = served(Any, int, lambda _: 1, dependencies=dependencies)
        with client_of(app) as client:
            answers.append(
                client.post(
                    PATH, content=body, headers={"content-type": "application/json"}
                ).status_code
            )
    assert answers[0] == answers[1]
    assert answers[0] == (200 if depth == 10 else 400)
