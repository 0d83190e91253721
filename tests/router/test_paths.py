"""Where a graph answers: its prefix, with and without a trailing slash, and nowhere else."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, Request
from fastapi.testclient import TestClient
from starlette.routing import NoMatchFound

from fastapi_graph import DAGDriver, Graph, GraphDefinitionError, InputNode, deployment
from fastapi_graph.router import graph_router
from tests.router.golden import graph_of, router_of


def tagged(tag: str, name: str | None = None) -> Any:
    """Return a graph that answers with a tag."""
    dag = graph_of(answer=lambda value: [tag, value])
    if name is None:
        return dag

    @deployment(name=name)
    async def named(value: Any) -> Any:
        return [tag, value]

    with InputNode() as x:
        return named.bind(x)


def answers(app: FastAPI, *paths: str, method: str = "POST") -> dict[str, int]:
    """Return the status of each path, without following a redirect."""
    with TestClient(app, follow_redirects=False) as client:
        return {path: client.request(method, path, json=1).status_code for path in paths}


@pytest.mark.parametrize("redirect_slashes", [True, False])
def test_prefix_with_and_without_a_trailing_slash(redirect_slashes: bool) -> None:
    app = FastAPI(redirect_slashes=redirect_slashes)
    app.include_router(router_of(), prefix="/my-dag")
    assert answers(app, "/my-dag", "/my-dag/") == {"/my-dag": 200, "/my-dag/": 200}
    assert set(answers(app, "/", "/my-dag/x", "/my-dagx", "/my-dag/x/").values()) == {404}
    assert list(app.openapi()["paths"]) == ["/my-dag"]


def test_root_without_a_prefix() -> None:
    app = FastAPI()
    app.include_router(router_of())
    assert answers(app, "/", "/x") == {"/": 200, "/x": 404}
    assert list(app.openapi()["paths"]) == ["/"]


def test_router_prefix() -> None:
    app = FastAPI()
    app.include_router(router_of(prefix="/own"))
    app.include_router(router_of(prefix="/own"), prefix="/given")
    paths = ("/own", "/own/", "/given/own", "/given/own/")
    assert set(answers(app, *paths).values()) == {200}
    assert set(answers(app, "/", "/given", "/given/").values()) == {404}
    assert list(app.openapi()["paths"]) == ["/own", "/given/own"]


@pytest.mark.parametrize("prefixes", list(itertools.product(["", "/a"], ["", "/b"], ["", "/c"])))
def test_routers_in_routers(prefixes: tuple[str, str, str]) -> None:
    inner, outer, app = APIRouter(), APIRouter(prefix=prefixes[1]), FastAPI()
    inner.include_router(router_of(), prefix=prefixes[2])
    outer.include_router(inner)
    app.include_router(outer, prefix=prefixes[0])
    path = "".join(prefixes)
    assert set(answers(app, path or "/", f"{path}/").values()) == {200}
    assert answers(app, f"{path}/nothing") == {f"{path}/nothing": 404}
    assert list(app.openapi()["paths"]) == [path or "/"]


def test_dict_of_routes() -> None:
    app = FastAPI()
    routes = {"/a": tagged("a"), "/b/c": tagged("b"), "/": tagged("root")}
    app.include_router(graph_router(routes), prefix="/dags")
    expected = {
        "/dags/a": "a",
        "/dags/a/": "a",
        "/dags/b/c": "b",
        "/dags": "root",
        "/dags/": "root",
    }
    with TestClient(app, follow_redirects=False) as client:
        for path, tag in expected.items():
            assert client.post(path, json=1).json() == [tag, 1]
        assert client.post("/dags/b", json=1).status_code == 404
    assert list(app.openapi()["paths"]) == ["/dags/a", "/dags/b/c", "/dags"]


def test_dict_of_routes_has_exactly_its_routes() -> None:
    app = FastAPI()
    app.include_router(graph_router({"/a": tagged("a")}), prefix="/dags")
    statuses = answers(app, "/dags", "/dags/", "/dags/a", "/dags/a/", "/dags/a/b", "/a")
    assert statuses == {
        "/dags": 404, "/dags/": 404, "/dags/a": 200, "/dags/a/": 200, "/dags/a/b": 404, "/a": 404
    }  # fmt: skip


def test_dict_of_routes_without_a_prefix() -> None:
    app = FastAPI()
    app.include_router(graph_router({"/": tagged("root"), "/a": tagged("a")}))
    assert set(answers(app, "/", "/a", "/a/").values()) == {200}


def test_path_parameters_of_a_route() -> None:
    async def adapter(request: Request, name: str, number: int) -> Any:
        return [name, number, request.path_params]

    app = FastAPI()
    dags = {"/by/{number}": tagged("dict")}
    app.include_router(graph_router(dags, http_adapter=adapter), prefix="/{name}")
    with TestClient(app) as client:
        for path in ("/ann/by/3", "/ann/by/3/"):
            response = client.post(path)
            assert response.json() == ["dict", ["ann", 3, {"name": "ann", "number": "3"}]]
        error = client.post("/ann/by/three").json()["detail"][0]
    assert error["loc"] == ["path", "number"]


def test_path_parameters_in_the_prefix() -> None:
    app = FastAPI()
    app.include_router(router_of(), prefix="/models/{name}/versions/{number:int}")
    assert answers(
        app, "/models/m/versions/1", "/models/m/versions/1/", "/models/m/versions/x"
    ) == {
        "/models/m/versions/1": 200,
        "/models/m/versions/1/": 200,
        "/models/m/versions/x": 404,
    }


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"])
@pytest.mark.parametrize("path", ["/my-dag", "/my-dag/"])
def test_only_post(path: str, method: str) -> None:
    app = FastAPI()
    app.include_router(router_of(), prefix="/my-dag")
    with TestClient(app, follow_redirects=False) as client:
        response = client.request(method, path)
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"


def test_a_driver_answers_get_and_post() -> None:
    app = FastAPI()
    app.include_router(graph_router(DAGDriver.bind(graph_of())), prefix="/d")
    for method, status in (("GET", 200), ("POST", 200), ("PUT", 405), ("DELETE", 405)):
        assert answers(app, "/d", "/d/", method=method) == {"/d": status, "/d/": status}


def test_url_path_for() -> None:
    app = FastAPI()
    app.include_router(router_of(), prefix="/one")
    dags = {"/a": tagged("a", "first"), "/b": tagged("b", "second")}
    app.include_router(graph_router(dags), prefix="/{key}")
    assert app.url_path_for("answer") == "/one"
    assert app.url_path_for("first", key="k") == "/k/a"
    assert app.url_path_for("second", key="k") == "/k/b"
    with pytest.raises(NoMatchFound):
        app.url_path_for("third")


def test_url_of_the_request() -> None:
    urls = []

    async def adapter(request: Request) -> Any:
        urls.append(str(request.url_for("answer")))
        return 1

    app = FastAPI()
    app.include_router(router_of(http_adapter=adapter), prefix="/one")
    with TestClient(app) as client:
        client.post("/one/")
    assert urls == ["http://testserver/one"]


def test_root_path() -> None:
    app = FastAPI()
    app.include_router(router_of(), prefix="/my-dag")
    with TestClient(app, root_path="/proxy", follow_redirects=False) as client:
        for path in ("/my-dag", "/my-dag/", "/proxy/my-dag", "/proxy/my-dag/"):
            assert client.post(path, json=1).status_code == 200
        schema = client.get("/openapi.json").json()
    assert schema["servers"] == [{"url": "/proxy"}]
    assert list(schema["paths"]) == ["/my-dag"]


def test_several_graphs_in_one_app() -> None:
    app = FastAPI()
    app.include_router(graph_router(tagged("a")), prefix="/a")
    app.include_router(graph_router(tagged("b")), prefix="/b")
    app.include_router(graph_router(tagged("root")))

    @app.post("/own")
    async def own() -> str:
        return "own"

    with TestClient(app) as client:
        found = {path: client.post(path, json=1).json() for path in ("/a", "/b", "/", "/own")}
    assert found == {"/a": ["a", 1], "/b": ["b", 1], "/": ["root", 1], "/own": "own"}


def test_earlier_routes_of_the_app_win() -> None:
    app = FastAPI()

    @app.post("/my-dag")
    async def own() -> str:
        return "own"

    app.include_router(router_of(), prefix="/my-dag")
    with TestClient(app) as client:
        assert client.post("/my-dag", json=1).json() == "own"
        assert client.post("/my-dag/", json=1).json() == 1


def operation_ids(app: FastAPI) -> list[str]:
    operations = [item for path in app.openapi()["paths"].values() for item in path.values()]
    return [operation["operationId"] for operation in operations]


def test_operation_ids_are_unique() -> None:
    """FastAPI warns of a duplicate when it writes the schema; here a warning is an error."""
    app = FastAPI()
    router = router_of()
    for prefix in ("", "/a", "/b"):
        app.include_router(router, prefix=prefix)
    app.include_router(router_of(), prefix="/c")
    app.include_router(graph_router(DAGDriver.bind(graph_of())), prefix="/d")
    routes = {"/": graph_of(), "/x": graph_of(), "/y-z": graph_of()}
    app.include_router(graph_router(DAGDriver.bind(routes)), prefix="/e")
    ids = operation_ids(app)
    assert len(ids) == 4 + 2 + 6
    assert len(set(ids)) == len(ids)


def test_operation_ids_of_ones_own_function_are_unique() -> None:
    app = FastAPI(generate_unique_id_function=lambda route: route.name)
    app.include_router(graph_router(DAGDriver.bind(graph_of())), prefix="/d")
    app.include_router(graph_router(tagged("a", "first")), prefix="/a")
    assert sorted(operation_ids(app)) == ["answer", "answer_get", "first"]


def test_the_documentation_pages_are_served() -> None:
    app = FastAPI()
    app.include_router(router_of(), prefix="/my-dag")
    with TestClient(app) as client:
        assert client.get("/docs").status_code == 200
        assert client.get("/openapi.json").json() == app.openapi()


@pytest.mark.parametrize("route", ["a", "", "/a/", 1])
def test_bad_routes(route: Any) -> None:
    with pytest.raises(GraphDefinitionError, match="route") as raised:
        graph_router({route: graph_of()})
    assert "test_paths.py:" in str(raised.value)


def test_no_routes() -> None:
    with pytest.raises(GraphDefinitionError, match="no route"):
        graph_router({})


def test_settings_of_a_graph_are_given_once() -> None:
    from fastapi_graph import GraphSettings

    graph = Graph(graph_of())
    with pytest.raises(GraphDefinitionError, match="settings already"):
        graph_router(graph, settings=GraphSettings())
