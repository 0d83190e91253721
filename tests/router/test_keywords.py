"""Every keyword of `APIRouter` does through `graph_router` what it does for a router by hand."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any

import pytest
from fastapi import (
    APIRouter,
    Body,
    Depends,
    FastAPI,
    Form,
    Header,
    HTTPException,
    Request,
    Response,
)
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from fastapi.routing import APIRoute
from starlette.routing import Route

from fastapi_graph import GraphSettings, SettingsError
from tests.router.golden import (
    PATH,
    answering,
    by_hand,
    client_of,
    router_of,
    same,
    served,
)

JSON = {"content-type": "application/json"}
TESTED: dict[str, Callable[..., None]] = {}


def keyword(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Say which keywords a test is for."""

    def note(test: Callable[..., None]) -> Callable[..., None]:
        TESTED.update(dict.fromkeys(names, test))
        return test

    return note


def test_every_keyword_has_a_test() -> None:
    assert set(TESTED) == set(inspect.signature(APIRouter).parameters)


async def key(x_key: Annotated[str | None, Header()] = None) -> None:
    if x_key is None:
        raise HTTPException(401)


class Shouting(JSONResponse):
    media_type = "application/shouting"


def unique_id(route: APIRoute) -> str:
    return f"id-{route.name}-{route.path_format}"


callback_router = APIRouter()


@callback_router.post("{$request.body.url}/done")
def done(result: dict[str, Any]) -> None:
    """Tell that it is done."""


OPENAPI: dict[str, Any] = {
    "tags": ["a", "b"],
    "dependencies": [Depends(key)],
    "default_response_class": HTMLResponse,
    "responses": {404: {"description": "Not there", "model": dict[str, int]}},
    "callbacks": callback_router.routes,
    "deprecated": True,
    "include_in_schema": False,
    "generate_unique_id_function": unique_id,
}


@keyword("tags", "responses", "callbacks", "deprecated", "include_in_schema")
@pytest.mark.parametrize("level", ["router", "include", "app", "outer"])
@pytest.mark.parametrize("name", OPENAPI)
def test_schema_with_a_keyword(name: str, level: str) -> None:
    if (name, level) == ("tags", "app"):
        pytest.skip("an app has no tags for its routes")
    given = {name: OPENAPI[name]}
    schemas = []
    for route in (graph_routed, routed_by_hand):
        outer = APIRouter(**(given if level == "outer" else {}))
        outer.include_router(
            route(**(given if level == "router" else {})),
            prefix=PATH,
            **(given if level == "include" else {}),
        )
        app = FastAPI(**(given if level == "app" else {}))
        app.include_router(outer)
        schemas.append(app.openapi())
    assert schemas[0] == schemas[1]
    assert schemas[0] != served(dict[str, int], list[int]).openapi()


def graph_routed(**options: Any) -> APIRouter:
    return router_of(dict[str, int], list[int], **options)


def routed_by_hand(**options: Any) -> APIRouter:
    router = APIRouter(**options)
    router.post("")(answering(Annotated[dict[str, int], Body()], list[int], same))
    return router


def hidden(app: FastAPI) -> bool:
    return PATH not in app.openapi().get("paths", {})


@pytest.mark.parametrize("level", ["router", "include", "app"])
def test_hidden_but_answering(level: str) -> None:
    given = {"include_in_schema": False}
    app = served(**(given if level == "router" else {level: given}))
    assert hidden(app)
    with client_of(app) as client:
        assert client.post(PATH, json=1).json() == 1


@keyword("prefix")
def test_prefix() -> None:
    app = FastAPI()
    app.include_router(router_of(prefix="/own"), prefix="/given")
    app.include_router(router_of(prefix="/alone"))
    with client_of(app) as client:
        for path in ("/given/own", "/given/own/", "/alone", "/alone/"):
            assert client.post(path, json=1).json() == 1
        for path in ("/own", "/given", "/"):
            assert client.post(path, json=1).status_code == 404
    assert set(app.openapi()["paths"]) == {"/given/own", "/alone"}
    with pytest.raises(AssertionError, match="must start with"):
        router_of(prefix="own")


@keyword("dependencies")
def test_dependencies() -> None:
    with client_of(served(dependencies=[Depends(key)])) as client:
        assert client.post(PATH, json=1).status_code == 401
        assert client.post(PATH, json=1, headers={"x-key": "k"}).status_code == 200


@keyword("default_response_class")
@pytest.mark.parametrize("level", ["router", "include", "app"])
@pytest.mark.parametrize("result", [{"a": 1.5}, ["\u00e9"], "text", None])
def test_default_response_class(level: str, result: Any) -> None:
    given = {"default_response_class": Shouting}
    options = given if level == "router" else {level: given}
    answers = []
    for build in (served, by_hand):
        with client_of(build(answer=lambda _: result, **options)) as client:
            response = client.post(PATH, json=1)
        assert response.headers["content-type"] == "application/shouting"
        answers.append(response.content)
    assert answers[0] == answers[1]


def test_the_nearest_response_class_wins() -> None:
    class Nearer(Shouting):
        media_type = "application/nearer"

    app = served(
        app={"default_response_class": PlainTextResponse},
        include={"default_response_class": Shouting},
        default_response_class=Nearer,
    )
    with client_of(app) as client:
        assert client.post(PATH, json=1).headers["content-type"] == "application/nearer"


@keyword("routes")
def test_routes_of_ones_own() -> None:
    async def home(request: Request) -> Response:
        return PlainTextResponse("home")

    app = served(routes=[Route("/home", home)])
    with client_of(app) as client:
        assert client.get(f"{PATH}/home").text == "home"
        assert client.post(PATH, json=1).json() == 1


@keyword("redirect_slashes", "default")
def test_a_router_that_is_served_itself() -> None:
    """Both keywords matter only to a router that no app includes."""

    async def otherwise(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("otherwise", 418)(scope, receive, send)

    router = router_of(default=otherwise, redirect_slashes=False)
    assert router.redirect_slashes is False
    app = FastAPI()
    app.include_router(router_of(redirect_slashes=False), prefix=PATH)
    app.mount("/mounted", router)
    with client_of(app) as client:
        assert client.post(PATH, json=1).status_code == 200
        assert client.post(f"{PATH}/", json=1).status_code == 200
        assert client.get("/mounted/nowhere").text == "otherwise"


@keyword("dependency_overrides_provider")
def test_dependency_overrides_provider() -> None:
    provider = FastAPI()
    router = router_of(dependency_overrides_provider=provider, dependencies=[Depends(key)])
    assert router.dependency_overrides_provider is provider
    app = FastAPI()
    app.include_router(router, prefix=PATH)
    app.dependency_overrides[key] = lambda: None
    with client_of(app) as client:
        assert client.post(PATH, json=1).status_code == 200


@keyword("route_class")
def test_route_class() -> None:
    seen: list[str] = []

    class Timed(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:
            handler = super().get_route_handler()

            async def timed(request: Request) -> Response:
                response = await handler(request)
                response.headers["x-route"] = "timed"
                seen.append(request.method)
                return response

            return timed

    with client_of(served(route_class=Timed)) as client:
        for path in (PATH, f"{PATH}/"):
            response = client.post(path, json=1)
            assert (response.json(), response.headers["x-route"]) == (1, "timed")
    assert seen == ["POST", "POST"]


@keyword("on_startup", "on_shutdown", "lifespan")
def test_start_and_stop_with_the_graph() -> None:
    events: list[str] = []
    app = served(
        on_startup=[lambda: events.append("start")], on_shutdown=[lambda: events.append("stop")]
    )
    with client_of(app) as client:
        assert client.post(PATH, json=1).status_code == 200
        assert events == ["start"]
    assert events == ["start", "stop"]

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        events.append("enter")
        yield {"mine": 1}
        events.append("exit")

    events.clear()
    with client_of(served(lifespan=lifespan)) as client:
        assert client.post(PATH, json=1).status_code == 200
        assert client.app_state["mine"] == 1
    assert events == ["enter", "exit"]


@keyword("generate_unique_id_function")
@pytest.mark.parametrize("level", ["router", "include", "app"])
def test_generate_unique_id_function(level: str) -> None:
    calls: list[str] = []

    def counted(route: APIRoute) -> str:
        calls.append(route.path_format)
        return unique_id(route)

    given = {"generate_unique_id_function": counted}
    app = served(**(given if level == "router" else {level: given}))
    operation = app.openapi()["paths"][PATH]["post"]
    assert operation["operationId"] == f"id-answer-{PATH}"
    assert PATH in calls
    with client_of(app) as client:
        assert client.post(PATH, json=1).status_code == 200


@keyword("strict_content_type")
@pytest.mark.parametrize("takes", [dict[str, int], Any])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("level", ["router", "app"])
def test_strict_content_type(level: str, strict: bool, takes: Any) -> None:
    given = {"strict_content_type": strict}
    answers = []
    for build in (served, by_hand):
        app = build(takes, **(given if level == "router" else {level: given}))
        with client_of(app) as client:
            requests = [(b'{"a": 1}', {}), (b'{"a": 1}', {"content-type": "text/plain"})]
            requests += [(b"[1", {}), (b'{"a": 1}', JSON)]
            responses = [client.post(PATH, content=body, headers=h) for body, h in requests]
        answers.append([(response.status_code, response.json()) for response in responses])
    mine, theirs = answers
    assert mine[0] == ((200, {"a": 1}) if not strict else mine[0])
    assert mine[0][0] == (422 if strict else 200)
    if takes is not Any:  # where FastAPI passes bytes on, a graph refuses them
        assert mine == theirs
    assert mine[3] == (200, {"a": 1})


@keyword("max_body_size")
@pytest.mark.parametrize("level", ["router", "include", "app"])
@pytest.mark.parametrize("guard", [[], [Depends(lambda: None)]], ids=["plain", "depending"])
def test_max_body_size(level: str, guard: list[Any]) -> None:
    given = {"max_body_size": 10}
    options = given if level == "router" else {level: given}
    answers = []
    for build in (served, by_hand):
        with client_of(build(dependencies=guard, **options)) as client:
            assert client.post(PATH, content=b'"45678901', headers=JSON).status_code == 422
            assert client.post(PATH, content=b'"345678"', headers=JSON).json() == "345678"
            declared = client.post(PATH, content=b'"345678901"', headers=JSON)
            chunked = client.post(PATH, content=iter([b'"34567', b'8901"']), headers=JSON)
        assert declared.status_code == chunked.status_code == 413
        answers.append([declared.text, chunked.text])
    assert answers[0] == answers[1]


def test_max_body_size_of_the_settings() -> None:
    settings = GraphSettings(max_body_size=5)
    with client_of(served(settings=settings)) as client:
        assert client.post(PATH, json="123").status_code == 200
        assert client.post(PATH, json="1234").status_code == 413
    with client_of(served(settings=settings, max_body_size=6)) as client:
        assert client.post(PATH, json="1234").status_code == 200
    with pytest.raises(SettingsError, match="max_body_size"):
        GraphSettings(max_body_size=-1)


def test_max_body_size_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTAPI_GRAPH_MAX_BODY_SIZE", "5")
    with client_of(served()) as client:
        assert client.post(PATH, json="1234").status_code == 413


@keyword("form_limits")
@pytest.mark.parametrize("level", ["router", "include", "app"])
def test_form_limits(level: str) -> None:
    async def fields(a: Annotated[str, Form()] = "", b: Annotated[str, Form()] = "") -> list[str]:
        return [a, b]

    given = {"form_limits": {"max_fields": 1}}
    options = given if level == "router" else {level: given}
    with client_of(served(http_adapter=fields, **options)) as client:
        files = [("a", (None, "1"))]
        assert client.post(PATH, files=files).json() == ["1", ""]
        refused = client.post(PATH, files=[*files, ("b", (None, "2"))])
    assert refused.status_code == 400
    assert "Too many fields" in refused.text


def test_an_unknown_keyword() -> None:
    with pytest.raises(TypeError, match="no_such_keyword"):
        router_of(no_such_keyword=1)
