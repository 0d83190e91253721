"""`DAGDriver`, and drivers of the user's own, over HTTP and from Python."""

import asyncio
import http.client
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import fastapi
import pytest
import starlette.requests
import uvicorn
from fastapi import Depends, FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.testclient import TestClient
from pydantic import BaseModel

from fastapi_graph import (
    DAGDriver,
    DeploymentHandle,
    Graph,
    GraphDefinitionError,
    InputError,
    InputNode,
    deployment,
    graph_router,
)
from tests.router import postponed
from tests.router.golden import graph_of


def app_of(target: Any, prefix: str = "/my-dag", **options: Any) -> FastAPI:
    app = FastAPI()
    app.include_router(graph_router(target, **options), prefix=prefix)
    return app


@deployment
async def double(value: Any) -> Any:
    return value * 2


def doubling() -> Any:
    with InputNode() as x:
        return double.bind(x)


# DAGDriver


def test_dag_driver_answers_get_and_post() -> None:
    with TestClient(app_of(DAGDriver.bind(doubling()))) as client:
        assert client.post("/my-dag", json=3).json() == 6
        assert client.request("GET", "/my-dag/", json="ab").json() == "abab"
        assert client.get("/my-dag").status_code == 422


def test_dag_driver_is_documented_as_get_and_post() -> None:
    operations = app_of(DAGDriver.bind(doubling())).openapi()["paths"]["/my-dag"]
    assert sorted(operations) == ["get", "post"]
    assert all("requestBody" in operation for operation in operations.values())


def test_route_prefix_is_not_for_the_router() -> None:
    driver = DAGDriver.options(route_prefix="/elsewhere", num_replicas=2).bind(doubling())
    with TestClient(app_of(driver)) as client:
        assert client.post("/my-dag", json=3).json() == 6
        assert client.post("/elsewhere", json=3).status_code == 404
        assert client.post("/my-dag/elsewhere", json=3).status_code == 404


def through(graph: Graph, call: Any) -> Any:
    async def run() -> Any:
        async with graph:
            return await call(graph.handle)

    return asyncio.run(run())


def test_predict() -> None:
    graph = Graph(DAGDriver.bind(doubling()))
    assert through(graph, lambda handle: handle.remote(2)) == 4
    assert through(graph, lambda handle: handle.predict.remote(3)) == 6
    assert through(graph, lambda handle: handle.predict_with_route.remote("/", 4)) == 8


def test_predict_with_several_arguments() -> None:
    with InputNode() as x:
        dag = deployment(lambda a, b: [a, b]).bind(x[0], x["b"])
    graph = Graph(DAGDriver.bind(dag))
    assert through(graph, lambda handle: handle.predict.remote(1, b=2)) == [1, 2]
    assert through(graph, lambda h: h.predict_with_route.remote("/", 1, b=2)) == [1, 2]


def test_routes_from_python_and_over_http() -> None:
    routes = {"/double": doubling(), "/same": graph_of()}
    driver = DAGDriver.bind(routes)
    graph = Graph(driver)
    assert through(graph, lambda h: h.predict_with_route.remote("/double", 4)) == 8
    with pytest.raises(InputError, match=r"'/none'.*/double, /same"):
        through(graph, lambda h: h.predict_with_route.remote("/none", 4))
    for call in (lambda h: h.predict.remote(1), lambda h: h.remote(1)):
        with pytest.raises(InputError, match="predict_with_route"):
            through(graph, call)
    with TestClient(app_of(driver)) as client:
        assert client.post("/my-dag/double", json=2).json() == 4
        assert client.get("/my-dag/same").status_code == 422
        assert client.post("/my-dag/none", json=2).status_code == 404


def test_dict_is_a_driver() -> None:
    with TestClient(app_of({"/double": doubling()})) as client:
        assert client.post("/my-dag/double", json=2).json() == 4
        assert client.request("GET", "/my-dag/double", json=2).json() == 4


@pytest.mark.parametrize("bad", [3, None, "text", double, double(1)], ids=str)
def test_bad_graph_of_a_driver(bad: Any) -> None:
    if asyncio.iscoroutine(bad):
        bad.close()
    with pytest.raises(GraphDefinitionError, match=r"DAGDriver|double"):
        graph_router(DAGDriver.bind(bad))


@pytest.mark.parametrize("bad", [3, None, double], ids=str)
def test_bad_target(bad: Any) -> None:
    with pytest.raises(GraphDefinitionError, match="graph"):
        graph_router(bad)


# Drivers of the user's own


@deployment(route_prefix="/my-dag")
class MyDAGDriver:
    def __init__(self, dag_handle: DeploymentHandle) -> None:
        self.dag_handle = dag_handle

    async def predict(self, inp: Any) -> Any:
        """Perform inference directly without HTTP."""
        return await self.dag_handle.remote(inp)

    async def __call__(self, request: starlette.requests.Request) -> Any:
        """HTTP endpoint of the DAG."""
        return await self.predict(await request.json())


@deployment
class Unannotated:
    def __init__(self, dag_handle):
        self.dag_handle = dag_handle

    async def __call__(self, request):
        return await self.dag_handle.remote(await request.json())


@deployment
class OfFastAPI(MyDAGDriver.target):
    async def __call__(self, http: fastapi.Request) -> Any:
        return await self.predict(await http.json())


@deployment
class Synchronous:
    def __init__(self, dag_handle: DeploymentHandle) -> None:
        self.dag_handle = dag_handle

    def __call__(self, request: starlette.requests.Request) -> Any:
        return self.dag_handle.remote(int(request.query_params["n"])).result(timeout_s=5)


DRIVERS = [MyDAGDriver, Unannotated, OfFastAPI, postponed.Qualified, postponed.Plain]


@pytest.mark.parametrize("driver", DRIVERS, ids=lambda driver: driver.name)
def test_driver_of_ones_own(driver: Any) -> None:
    with TestClient(app_of(driver.bind(doubling()))) as client:
        assert client.post("/my-dag", json=3).json() == 6
        assert client.request("GET", "/my-dag/", json=4).json() == 8
        assert client.put("/my-dag", json=4).status_code == 405


def test_synchronous_driver() -> None:
    with TestClient(app_of(Synchronous.bind(doubling()))) as client:
        assert client.get("/my-dag?n=4").json() == 8


def test_predict_of_ones_own_driver() -> None:
    graph = Graph(MyDAGDriver.bind(doubling()))
    assert through(graph, lambda handle: handle.predict.remote(3)) == 6


def test_driver_is_documented() -> None:
    operation = app_of(MyDAGDriver.bind(doubling())).openapi()["paths"]["/my-dag"]["post"]
    assert operation["description"] == "HTTP endpoint of the DAG."
    assert "requestBody" not in operation
    assert "parameters" not in operation


def test_class_that_takes_no_request_gets_the_adapters_value() -> None:
    @deployment
    class Model:
        async def __call__(self, value: int) -> list[Any]:
            return [type(value).__name__, value]

    app = app_of(Model.bind())
    with TestClient(app) as client:
        assert client.post("/my-dag", json="3").json() == ["int", 3]
        assert client.post("/my-dag", json="x").status_code == 422
        assert client.get("/my-dag").status_code == 405


def driver_answering(answer: Any) -> FastAPI:
    @deployment
    class Driver:
        async def __call__(self, request: starlette.requests.Request) -> Any:
            return await answer(request)

    return app_of(Driver.bind())


def test_driver_returns_a_response() -> None:
    async def plain(request: Any) -> Any:
        return PlainTextResponse("text", 201, {"x-a": "b"})

    async def json(request: Any) -> Any:
        return JSONResponse({"a": 1}, 203)

    with TestClient(driver_answering(plain)) as client:
        response = client.get("/my-dag")
        assert (response.status_code, response.text, response.headers["x-a"]) == (201, "text", "b")
    with TestClient(driver_answering(json)) as client:
        response = client.get("/my-dag")
        assert (response.status_code, response.json()) == (203, {"a": 1})


def test_driver_returns_a_stream() -> None:
    async def stream(request: Any) -> Any:
        async def lines() -> AsyncIterator[str]:
            for number in range(3):
                await asyncio.sleep(0)
                yield f"{number}\n"

        return StreamingResponse(lines(), media_type="text/plain")

    with TestClient(driver_answering(stream)) as client:
        assert client.post("/my-dag").text == "0\n1\n2\n"


def test_driver_reads_a_form_and_everything_of_the_request() -> None:
    async def form(request: Any) -> Any:
        fields = await request.form()
        return [fields["a"], request.method, request.url.path, request.app.title]

    with TestClient(driver_answering(form)) as client:
        response = client.post("/my-dag", data={"a": "b"})
    assert response.json() == ["b", "POST", "/my-dag", "FastAPI"]


# Slow bodies, on a real server


class Server(uvicorn.Server):
    """Uvicorn in a thread, on a free port."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(uvicorn.Config(app, port=0, log_level="error"))
        self.thread = threading.Thread(target=self.run)

    def __enter__(self) -> int:
        self.thread.start()
        deadline = time.monotonic() + 10
        while not self.started:
            assert self.thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return self.servers[0].sockets[0].getsockname()[1]

    def __exit__(self, *exc_info: object) -> None:
        self.should_exit = True
        self.thread.join(10)
        assert not self.thread.is_alive()


def slow_chunks() -> Iterator[bytes]:
    for number in range(4):
        if number:
            time.sleep(0.25)
        yield f"chunk {number};".encode()


EXPECTED = "chunk 0;chunk 1;chunk 2;chunk 3;"


async def by_stream(request: Any) -> Any:
    return "".join([chunk.decode() async for chunk in request.stream()])


async def by_body(request: Any) -> Any:
    return (await request.body()).decode()


async def late(request: Any) -> Any:
    await asyncio.sleep(0.3)
    return (await request.body()).decode()


async def twice(request: Any) -> Any:
    first = await request.body()
    await asyncio.sleep(0.2)
    return (first if first == await request.body() else b"").decode()


@pytest.mark.parametrize("length", [None, len(EXPECTED)], ids=["chunked", "content-length"])
@pytest.mark.parametrize("read", [by_stream, by_body, late, twice])
def test_slow_body_loses_nothing(read: Any, length: int | None) -> None:
    with Server(driver_answering(read)) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        # Without a length http.client sends chunks.
        headers = {} if length is None else {"content-length": str(length)}
        connection.request("POST", "/my-dag", slow_chunks(), headers)
        response = connection.getresponse()
        assert (response.status, response.read()) == (200, f'"{EXPECTED}"'.encode())
        connection.close()


def test_slow_body_of_a_plain_graph() -> None:
    def chunks() -> Iterator[bytes]:
        for part in (b'{"a"', b": [1,", b"2]}"):
            time.sleep(0.2)
            yield part

    with Server(app_of(graph_of())) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        headers = {"content-type": "application/json"}
        connection.request("POST", "/my-dag", chunks(), headers)
        assert connection.getresponse().read() == b'{"a":[1,2]}'
        connection.close()


# Requests


class Question(BaseModel):
    text: str


def test_a_value_named_request_makes_no_driver() -> None:
    @deployment
    class Model:
        async def __call__(self, request: Question) -> str:
            return request.text.upper()

    app = FastAPI()
    app.include_router(graph_router(Model.bind()), prefix="/m")
    with TestClient(app) as client:
        assert client.post("/m", json={"text": "a"}).json() == "A"
        assert client.post("/m", json={}).status_code == 422
        assert client.get("/m").status_code == 405
    assert "Question" in app.openapi()["components"]["schemas"]


@pytest.mark.parametrize("reads", ["body", "form"])
def test_a_dependency_may_read_the_body_first(reads: str) -> None:
    async def read(request: starlette.requests.Request) -> None:
        await getattr(request, reads)()

    @deployment
    class Driver:
        async def __call__(self, request: starlette.requests.Request) -> str:
            await asyncio.sleep(0.15)  # so long that somebody looks whether the client has left
            return str(await getattr(request, reads)())

    app = FastAPI()
    app.include_router(graph_router(Driver.bind()), prefix="/d", dependencies=[Depends(read)])
    with TestClient(app) as client:
        assert "here" in client.post("/d", data={"a": "here"}).json()


def test_a_request_inside_of_a_value_may_be_read_late() -> None:
    async def wrapped(request: fastapi.Request) -> Any:
        return {"request": request}

    @deployment
    async def late(value: Any) -> str:
        await asyncio.sleep(0.15)
        return (await value["request"].body()).decode()

    with InputNode() as x:
        dag = late.bind(x)
    app = FastAPI()
    app.include_router(graph_router(dag, http_adapter=wrapped), prefix="/d")
    with TestClient(app) as client:
        assert client.post("/d", content=b"text").json() == "text"
