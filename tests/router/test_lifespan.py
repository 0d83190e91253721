"""The graph starts and stops with the app."""

import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.testclient import TestClient

from fastapi_graph import (
    DeploymentHandle,
    DeploymentStartError,
    Graph,
    GraphDefinitionError,
    GraphNotStartedError,
    InputNode,
    deployment,
    graph_router,
)


class Log(list[str]):
    """What happened, in order."""

    def graph(self, name: str = "model", **options: Any) -> Any:
        """Return a graph whose one deployment notes its start and its end."""
        log = self

        @deployment(name=name, **options)
        class Model:
            def __init__(self) -> None:
                log.append(f"+{name}")

            async def predict(self, value: Any) -> Any:
                return [name, value]

            def close(self) -> None:
                log.append(f"-{name}")

        with InputNode() as x:
            return Model.bind().predict.bind(x)

    def lifespan(self, name: str, state: dict[str, Any] | None = None) -> Any:
        @contextlib.asynccontextmanager
        async def lifespan(app: Any) -> AsyncIterator[dict[str, Any] | None]:
            self.append(f"+{name}")
            yield state
            self.append(f"-{name}")

        return lifespan


@pytest.fixture
def log() -> Log:
    return Log()


def test_starts_and_stops_with_the_app(log: Log) -> None:
    app = FastAPI()
    app.include_router(graph_router(log.graph()), prefix="/g")
    assert log == []
    with TestClient(app) as client:
        assert log == ["+model"]
        assert client.post("/g", json=1).json() == ["model", 1]
        assert client.post("/g", json=2).json() == ["model", 2]
        assert log == ["+model"]
    assert log == ["+model", "-model"]


def test_starts_again(log: Log) -> None:
    app = FastAPI()
    app.include_router(graph_router(log.graph()), prefix="/g")
    for _ in range(3):
        with TestClient(app) as client:
            assert client.post("/g", json=1).json() == ["model", 1]
    assert log == ["+model", "-model"] * 3


def test_merges_with_the_lifespans_around_it(log: Log) -> None:
    app = FastAPI(lifespan=log.lifespan("app", {"of": "app", "app": 1}))
    outer = APIRouter(lifespan=log.lifespan("outer", {"of": "outer", "outer": 2}))
    users = log.lifespan("user", {"of": "user", "user": 3})
    outer.include_router(graph_router(log.graph(), lifespan=users), prefix="/g")
    app.include_router(outer)
    with TestClient(app) as client:
        assert log == ["+app", "+outer", "+user", "+model"]
        state = client.app_state
        assert (state["of"], state["app"], state["outer"], state["user"]) == ("app", 1, 2, 3)
        graphs = [value for value in state.values() if isinstance(value, Graph)]
        assert len(graphs) == 1
    assert log[4:] == ["-model", "-user", "-outer", "-app"]


def test_lifespans_of_every_kind(log: Log) -> None:
    async def asynchronous(app: Any) -> AsyncIterator[None]:
        log.append("+async")
        yield
        log.append("-async")

    def synchronous(app: Any) -> Iterator[None]:
        log.append("+sync")
        yield
        log.append("-sync")

    for users, name in ((asynchronous, "async"), (synchronous, "sync")):
        log.clear()
        app = FastAPI()
        app.include_router(graph_router(log.graph(), lifespan=users), prefix="/g")
        with TestClient(app) as client:
            assert client.post("/g", json=1).status_code == 200
        assert log == [f"+{name}", "+model", "-model", f"-{name}"]


def test_users_lifespan_gets_the_app(log: Log) -> None:
    seen = []

    @contextlib.asynccontextmanager
    async def users(app: FastAPI) -> AsyncIterator[None]:
        seen.append(app)
        yield

    app = FastAPI()
    outer = APIRouter()
    outer.include_router(graph_router(log.graph(), lifespan=users), prefix="/g")
    app.include_router(outer)
    with TestClient(app):
        assert seen == [app]


def test_users_lifespan_that_fails_starts_nothing(log: Log) -> None:
    @contextlib.asynccontextmanager
    async def users(app: FastAPI) -> AsyncIterator[None]:
        raise OSError("no database")
        yield

    app = FastAPI()
    app.include_router(graph_router(log.graph(), lifespan=users), prefix="/g")
    with pytest.raises(OSError, match="no database"), TestClient(app):
        pass
    assert log == []


def test_one_router_twice_starts_once(log: Log) -> None:
    app = FastAPI()
    router = graph_router(log.graph())
    app.include_router(router, prefix="/a")
    app.include_router(router, prefix="/b")
    for _ in range(2):
        with TestClient(app) as client:
            assert client.post("/a", json=1).status_code == 200
            assert client.post("/b", json=1).status_code == 200
    assert log == ["+model", "-model"] * 2


def test_one_graph_in_two_routers_and_the_app(log: Log) -> None:
    graph = Graph(log.graph())
    app = FastAPI(lifespan=graph.lifespan)
    app.include_router(graph_router(graph), prefix="/a")
    app.include_router(graph_router(graph, prefix="/b"))

    @app.get("/own")
    async def own(handle: Annotated[DeploymentHandle, Depends(graph.provide())]) -> Any:
        return await handle.remote(3)

    with TestClient(app) as client:
        assert client.post("/a", json=1).json() == ["model", 1]
        assert client.post("/b", json=2).json() == ["model", 2]
        assert client.get("/own").json() == ["model", 3]
    assert log == ["+model", "-model"]


def test_several_graphs(log: Log) -> None:
    app = FastAPI()
    for name in ("a", "b", "c"):
        app.include_router(graph_router(log.graph(name)), prefix=f"/{name}")
    with TestClient(app) as client:
        assert log == ["+a", "+b", "+c"]
        for name in ("a", "b", "c"):
            assert client.post(f"/{name}", json=1).json() == [name, 1]
        graphs = {key for key, value in client.app_state.items() if isinstance(value, Graph)}
        assert len(graphs) == 3
    assert log[3:] == ["-c", "-b", "-a"]


def test_graphs_of_one_name_keep_apart_in_the_state() -> None:
    @deployment
    async def model(value: Any) -> Any:
        return value

    app = FastAPI()
    with InputNode() as x:
        for prefix in ("/a", "/b"):
            app.include_router(graph_router(model.bind(x)), prefix=prefix)
    with TestClient(app) as client:
        assert len([v for v in client.app_state.values() if isinstance(v, Graph)]) == 2
        assert client.post("/a", json=1).json() == client.post("/b", json=1).json() == 1


def test_state_reaches_the_request(log: Log) -> None:
    graph = Graph(log.graph(), name="g")
    app = FastAPI()
    app.include_router(graph_router(graph), prefix="/g")

    @app.get("/state")
    async def state(request: Request) -> bool:
        return request.state["fastapi_graph.g"] is graph

    with TestClient(app) as client:
        assert client.get("/state").json() is True


def test_lifespan_alone(log: Log) -> None:
    dag = log.graph()
    graph = Graph(dag)
    app = FastAPI(lifespan=graph.lifespan)

    @app.get("/own")
    async def own(handle: Annotated[DeploymentHandle, Depends(graph.provide("model"))]) -> Any:
        return await handle.predict.remote("own")

    with TestClient(app) as client:
        assert client.get("/own").json() == ["model", "own"]
    assert log == ["+model", "-model"]


def without_lifespan(app: FastAPI, path: str) -> Exception:
    client = TestClient(app)
    with pytest.raises(GraphNotStartedError) as raised:
        client.request("POST", path, json=1)
    return raised.value


def test_test_client_without_with(log: Log) -> None:
    graph = Graph(log.graph())
    app = FastAPI()
    app.include_router(graph_router(graph), prefix="/g")

    @app.post("/own")
    async def own(handle: Annotated[DeploymentHandle, Depends(graph.provide())]) -> Any:
        return await handle.remote(1)

    for path in ("/g", "/own"):
        message = str(without_lifespan(app, path))
        for remedy in ("with TestClient(app) as client", "include", "async with graph", "run("):
            assert remedy in message
    assert log == []


def test_after_the_app_has_stopped(log: Log) -> None:
    app = FastAPI()
    app.include_router(graph_router(log.graph()), prefix="/g")
    with TestClient(app):
        pass
    without_lifespan(app, "/g")


def test_included_while_the_app_serves(log: Log) -> None:
    app = FastAPI()
    with TestClient(app) as client:
        app.include_router(graph_router(log.graph()), prefix="/g")
        with pytest.raises(GraphNotStartedError, match="before the app starts"):
            client.post("/g", json=1)


def test_included_in_a_router_that_had_been_included(log: Log) -> None:
    outer, app = APIRouter(), FastAPI()
    app.include_router(outer)
    outer.include_router(graph_router(log.graph()), prefix="/g")
    with TestClient(app) as client, pytest.raises(GraphNotStartedError) as raised:
        client.post("/g", json=1)
    assert "included before" in str(raised.value)


def test_a_constructor_that_fails(log: Log) -> None:
    @deployment
    class Broken:
        def __init__(self, model: Any) -> None:
            raise OSError("no weights")

        async def predict(self, value: Any) -> Any:
            return value

    with InputNode() as x:
        inner = log.graph()
        dag = Broken.bind(inner).predict.bind(x)
    app = FastAPI(lifespan=log.lifespan("app"))
    app.include_router(graph_router(log.graph("other")), prefix="/o")
    app.include_router(graph_router(dag), prefix="/g")
    with pytest.raises(DeploymentStartError) as raised, TestClient(app):
        pass
    assert "Broken" in str(raised.value)
    assert "test_lifespan.py:" in str(raised.value)
    assert "no weights" in str(raised.value)
    assert isinstance(raised.value.__cause__, OSError)
    assert log == ["+app", "+other", "+model", "-model", "-other"]


def test_provide_and_dependency_overrides(log: Log) -> None:
    dag = log.graph()
    graph = Graph(dag)
    assert graph.provide("model") is graph.provide("model")
    assert graph.provide() is graph.provide()
    assert graph.provide() is not graph.provide("model")
    app = FastAPI(lifespan=graph.lifespan)

    @app.get("/own")
    async def own(handle: Annotated[Any, Depends(graph.provide("model"))]) -> Any:
        return await handle.predict.remote(1)

    class Fake:
        class predict:
            @staticmethod
            async def remote(value: Any) -> str:
                return f"fake {value}"

    with TestClient(app) as client:
        assert client.get("/own").json() == ["model", 1]
        app.dependency_overrides[graph.provide("model")] = Fake
        assert client.get("/own").json() == "fake 1"
        app.dependency_overrides.clear()
        assert client.get("/own").json() == ["model", 1]
    with pytest.raises(GraphDefinitionError, match="nobody"):
        graph.provide("nobody")


def test_override_in_endpoints(log: Log) -> None:
    graph = Graph(log.graph())
    app = FastAPI()
    app.include_router(graph_router(graph), prefix="/g")

    @app.get("/own")
    async def own(handle: Annotated[Any, Depends(graph.provide("model"))]) -> Any:
        return await handle.predict.remote(1)

    with graph.override("model", lambda value: f"fake {value}"):
        with TestClient(app) as client:
            assert client.post("/g", json=1).json() == "fake 1"
            assert client.get("/own").json() == "fake 1"
        assert log == []
    with TestClient(app) as client:
        assert client.post("/g", json=1).json() == ["model", 1]
        with graph.override("model", lambda value: "fake"):
            assert client.post("/g", json=1).json() == "fake"
        assert client.post("/g", json=1).json() == ["model", 1]
    assert log == ["+model", "-model"]


def test_two_running_graphs_of_one_explicit_name(log: Log) -> None:
    app = FastAPI()
    for prefix in ("/a", "/b"):
        app.include_router(graph_router(Graph(log.graph(), name="same")), prefix=prefix)
    with pytest.raises(Exception, match="same"), TestClient(app):
        pass
    assert log == ["+model", "-model"]
