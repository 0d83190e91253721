"""Dependencies around a graph: at every level, they run, and do all that they may do."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any

import pytest
from fastapi import (
    APIRouter,
    BackgroundTasks,
    Depends,
    FastAPI,
    Header,
    HTTPException,
    Request,
    Response,
    Security,
)
from fastapi.responses import PlainTextResponse
from fastapi.routing import APIRoute
from fastapi.security import APIKeyHeader, HTTPBearer, SecurityScopes
from fastapi.testclient import TestClient

from fastapi_graph import graph_router
from tests.router.golden import PATH, by_hand, client_of, graph_of, headers_of, router_of, served

ALLOWED = {"x-key": "right"}


async def auth(x_key: Annotated[str | None, Header()] = None) -> None:
    if x_key != "right":
        raise HTTPException(401, "Who are you?", {"WWW-Authenticate": "Key"})


def sync_auth(x_key: Annotated[str | None, Header()] = None) -> None:
    if x_key != "right":
        raise HTTPException(401, "Who are you?")


class Auth:
    def __call__(self, x_key: Annotated[str | None, Header()] = None) -> None:
        sync_auth(x_key)


def nested_auth(_: Annotated[None, Depends(auth)]) -> None:
    """Depends on what refuses."""


async def yielding_auth(x_key: Annotated[str | None, Header()] = None) -> AsyncIterator[None]:
    sync_auth(x_key)
    yield


def at_router(app: FastAPI, dependency: Any) -> None:
    app.include_router(router_of(dependencies=[dependency]), prefix=PATH)


def at_include(app: FastAPI, dependency: Any) -> None:
    app.include_router(router_of(), prefix=PATH, dependencies=[dependency])


def at_outer_router(app: FastAPI, dependency: Any) -> None:
    outer = APIRouter(dependencies=[dependency])
    outer.include_router(router_of(), prefix=PATH)
    app.include_router(outer)


def at_inner_include(app: FastAPI, dependency: Any) -> None:
    outer = APIRouter()
    outer.include_router(router_of(), prefix=PATH, dependencies=[dependency])
    app.include_router(outer)


def at_outer_include(app: FastAPI, dependency: Any) -> None:
    outer = APIRouter()
    outer.include_router(router_of(), prefix=PATH)
    app.include_router(outer, dependencies=[dependency])


def three_levels_up(app: FastAPI, dependency: Any) -> None:
    inner, middle, outer = APIRouter(), APIRouter(), APIRouter()
    inner.include_router(router_of(), prefix=PATH)
    middle.include_router(inner)
    outer.include_router(middle)
    app.include_router(outer, dependencies=[dependency])


LEVELS: list[Callable[[FastAPI, Any], None]] = [
    at_router, at_include, at_outer_router, at_inner_include, at_outer_include,
    three_levels_up,
]  # fmt: skip


def refused_without_key(app: FastAPI) -> None:
    with client_of(app) as client:
        for path in (PATH, PATH + "/"):
            assert client.post(path, json=1).status_code == 401
            assert client.post(path, json=1, headers=ALLOWED).json() == 1
            assert client.post(path, json=1).status_code == 401


@pytest.mark.parametrize(
    "dependency", [auth, sync_auth, Auth(), nested_auth, yielding_auth], ids=str
)
@pytest.mark.parametrize("level", LEVELS)
def test_auth_at_every_level(level: Callable[[FastAPI, Any], None], dependency: Any) -> None:
    app = FastAPI()
    level(app, Depends(dependency))
    refused_without_key(app)


def test_auth_of_the_app() -> None:
    app = FastAPI(dependencies=[Depends(auth)])
    app.include_router(router_of(), prefix=PATH)
    refused_without_key(app)


def test_auth_of_the_app_with_the_graph_at_the_root() -> None:
    app = FastAPI(dependencies=[Depends(auth)])
    app.include_router(router_of())
    with client_of(app) as client:
        assert client.post("/", json=1).status_code == 401
        assert client.post("/", json=1, headers=ALLOWED).json() == 1


@pytest.mark.parametrize("level", LEVELS)
def test_scopes_at_every_level(level: Callable[[FastAPI, Any], None]) -> None:
    seen: list[list[str]] = []

    async def scoped(
        scopes: SecurityScopes, token: Annotated[Any, Depends(HTTPBearer(auto_error=True))]
    ) -> None:
        seen.append(scopes.scopes)
        if token.credentials != "t":
            raise HTTPException(403)

    app = FastAPI()
    level(app, Security(scoped, scopes=["predict"]))
    with client_of(app) as client:
        assert client.post(PATH, json=1).status_code == 401
        bad, good = ({"authorization": f"Bearer {token}"} for token in "xt")
        assert client.post(PATH, json=1, headers=bad).status_code == 403
        assert client.post(PATH, json=1, headers=good).json() == 1
    assert seen == [["predict"], ["predict"]]
    operation = app.openapi()["paths"][PATH]["post"]
    assert operation["security"] == [{"HTTPBearer": ["predict"]}]


@pytest.mark.parametrize("order", list(itertools.permutations(["open", "guarded", "keyed"])))
def test_one_router_with_and_without_dependencies(order: tuple[str, ...]) -> None:
    router, app = router_of(), FastAPI()
    dependencies: dict[str, list[Any]] = {
        "open": [],
        "guarded": [Depends(auth)],
        "keyed": [Security(APIKeyHeader(name="x-key"))],
    }
    for name in order:
        app.include_router(router, prefix=f"/{name}", dependencies=dependencies[name])
    with client_of(app) as client:
        for name in (*order, *reversed(order)):
            status = client.post(f"/{name}", json=1).status_code
            assert (name, status) == (name, 200 if name == "open" else 401)
            assert client.post(f"/{name}/", json=1, headers=ALLOWED).status_code == 200


@pytest.mark.parametrize("first", ["open", "guarded"])
def test_included_again_while_the_app_serves(first: str) -> None:
    router, app = router_of(), FastAPI()
    guards = {"open": [], "guarded": [Depends(auth)]}
    second = "guarded" if first == "open" else "open"
    app.include_router(router, prefix=f"/{first}", dependencies=guards[first])
    expected = {"open": 200, "guarded": 401}
    with client_of(app) as client:
        assert client.post(f"/{first}", json=1).status_code == expected[first]
        app.include_router(router, prefix=f"/{second}", dependencies=guards[second])
        for name in (second, first, second):
            assert client.post(f"/{name}", json=1).status_code == expected[name]
            assert client.post(f"/{name}", json=1, headers=ALLOWED).status_code == 200


def test_guarded_in_one_app_and_open_in_another() -> None:
    router = router_of()
    guarded, open_ = FastAPI(dependencies=[Depends(auth)]), FastAPI()
    guarded.include_router(router, prefix=PATH)
    open_.include_router(router, prefix=PATH)
    for _ in range(2):
        with client_of(open_) as client:
            assert client.post(PATH, json=1).status_code == 200
        refused_without_key(guarded)


def test_auth_of_a_router_that_was_included_before_the_graph() -> None:
    """FastAPI takes a router's lifespan when it is included: the graph never starts."""
    outer, app = APIRouter(), FastAPI()
    app.include_router(outer, dependencies=[Depends(auth)])
    outer.include_router(router_of(), prefix=PATH)
    with client_of(app) as client:
        assert client.post(PATH, json=1).status_code == 401
        assert client.post(PATH, json=1, headers=ALLOWED).status_code == 500


def test_dependency_overrides() -> None:
    app = FastAPI()
    at_include(app, Depends(auth))
    with client_of(app) as client:
        assert client.post(PATH, json=1).status_code == 401
        app.dependency_overrides[auth] = lambda: None
        assert client.post(PATH, json=1).status_code == 200
        app.dependency_overrides.clear()
        assert client.post(PATH, json=1).status_code == 401


def test_a_stricter_override() -> None:
    app = FastAPI()

    async def anybody() -> None:
        """Let everybody in."""

    at_outer_include(app, Depends(anybody))
    with client_of(app) as client:
        assert client.post(PATH, json=1).status_code == 200
        app.dependency_overrides[anybody] = auth
        assert client.post(PATH, json=1).status_code == 401


def both(**options: Any) -> list[FastAPI]:
    return [served(**options), by_hand(**options)]


def test_parameters_of_a_dependency_are_documented_and_checked() -> None:
    async def page(number: int, x_user: Annotated[str, Header()]) -> None:
        """Take two parameters."""

    mine, theirs = both(dependencies=[Depends(page)])
    assert mine.openapi() == theirs.openapi()
    answers = []
    for app in (mine, theirs):
        with client_of(app) as client:
            answers.append(client.post(f"{PATH}?number=x", json=[]).json())
    assert answers[0] == answers[1]


def test_background_tasks_run_after_the_answer() -> None:
    for build in (served, by_hand):
        done: list[str] = []

        async def later(tasks: BackgroundTasks) -> None:
            tasks.add_task(done.append, "task")  # noqa: B023

        def answer(value: Any) -> Any:
            done.append("node")  # noqa: B023
            return value

        app = build(answer=answer, dependencies=[Depends(later)])
        with client_of(app) as client:
            assert client.post(PATH, json=1).json() == 1
        assert done == ["node", "task"]


def test_background_tasks_run_after_a_response_of_the_node() -> None:
    for build in (served, by_hand):
        done: list[str] = []

        async def later(tasks: BackgroundTasks) -> None:
            tasks.add_task(done.append, "task")  # noqa: B023

        app = build(answer=lambda _: PlainTextResponse("text"), dependencies=[Depends(later)])
        with client_of(app) as client:
            assert client.post(PATH, json=1).text == "text"
        assert done == ["task"]


def test_yield_dependencies_enclose_the_graph() -> None:
    for build in (served, by_hand):
        events: list[str] = []

        async def outer() -> AsyncIterator[None]:
            events.append("+outer")  # noqa: B023
            yield
            events.append("-outer")  # noqa: B023

        def inner(_: None = Depends(outer)) -> Iterator[None]:
            events.append("+inner")  # noqa: B023
            yield
            events.append("-inner")  # noqa: B023

        def answer(value: Any) -> Any:
            events.append("node")  # noqa: B023
            return value

        app = build(answer=answer, dependencies=[Depends(inner)])
        with client_of(app) as client:
            assert client.post(PATH, json=1).status_code == 200
        assert events == ["+outer", "+inner", "node", "-inner", "-outer"]


def test_yield_dependencies_see_the_exception_of_a_node() -> None:
    for build in (served, by_hand):
        seen: list[BaseException] = []

        async def watch() -> AsyncIterator[None]:
            try:
                yield
            except KeyError as error:
                seen.append(error)  # noqa: B023
                raise HTTPException(418, "I saw it") from error  # noqa: B023

        def fail(_: Any) -> None:
            raise KeyError("gone")

        app = build(answer=fail, dependencies=[Depends(watch)])
        with client_of(app) as client:
            response = client.post(PATH, json=1)
        assert (response.status_code, response.json()) == (418, {"detail": "I saw it"})
        assert [str(error) for error in seen] == ["'gone'"]


@pytest.mark.parametrize(
    "error, status", [(HTTPException(402, {"pay": 1}, {"x-a": "b"}), 402), (OSError("x"), 500)]
)
def test_a_dependency_that_raises_spares_the_graph(error: Exception, status: int) -> None:
    calls: list[Any] = []

    async def refuse() -> None:
        raise error

    answers = []
    for app in both(answer=calls.append, dependencies=[Depends(refuse)]):
        with client_of(app) as client:
            response = client.post(PATH, json=1)
        assert response.status_code == status
        answers.append((response.content, headers_of(response)))
    assert answers[0] == answers[1]
    assert calls == []


def test_a_dependency_may_read_the_body_and_the_state() -> None:
    async def read(request: Request, response: Response) -> None:
        response.headers["x-length"] = str(len(await request.body()))
        request.state.seen = True

    answers = []
    for app in both(dependencies=[Depends(read)]):
        with client_of(app) as client:
            response = client.post(PATH, json={"a": [1, 2]})
        answers.append((response.json(), response.headers["x-length"]))
    assert answers[0] == answers[1]
    assert answers[0][0] == {"a": [1, 2]}


@pytest.mark.parametrize("by", ["operation id", "dependant"])
def test_a_dependency_counts_however_the_routes_were_changed(by: str) -> None:
    """Tools set operation ids, or add to what FastAPI reads at every request."""

    async def refuse() -> None:
        raise HTTPException(401)

    router = graph_router(graph_of(lambda value: value))
    if by == "operation id":
        for route in router.routes:
            assert isinstance(route, APIRoute)
            make = route.generate_unique_id_function
            route.operation_id = getattr(make, "value", make)(route)
    app = FastAPI()
    if by == "operation id":
        app.include_router(router, prefix="/g", dependencies=[Depends(refuse)])
    else:
        guarded = APIRouter(dependencies=[Depends(refuse)])
        guarded.add_api_route("/x", refuse)
        (model,) = guarded.routes
        for route in router.routes:
            route.dependant.dependencies.extend(model.dependant.dependencies)
        app.router.routes.extend(router.routes)
        app.router.lifespan_context = router.lifespan_context
    with TestClient(app) as client:
        for path in ("/g", "/g/") if by == "operation id" else ("/",):
            assert client.post(path, json=1).status_code == 401
