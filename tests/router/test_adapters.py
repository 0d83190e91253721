"""Adapters of the user's own: any FastAPI dependency, and its value against the declared type."""

import functools
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any

import pytest
from fastapi import (
    BackgroundTasks,
    Body,
    Cookie,
    Depends,
    FastAPI,
    File,
    Form,
    Header,
    HTTPException,
    Path,
    Query,
    Request,
    Response,
    UploadFile,
)
from fastapi.testclient import TestClient
from pydantic import BaseModel

from fastapi_graph import DAGDriver, GraphDefinitionError, InputNode, deployment, graph_router
from fastapi_graph.http_adapters import json_request, starlette_request
from tests.router import importable
from tests.router.golden import PATH, by_hand, client_of, graph_of, router_of, served


class Payload(BaseModel):
    name: str
    size: int = 1


async def query(
    number: Annotated[int, Query(ge=0)],
    tags: Annotated[list[str], Query()] = [],  # noqa: B006
) -> Any:
    return [number, tags]


async def header_and_cookie(
    x_user: Annotated[str, Header()], session: Annotated[str, Cookie()] = "none"
) -> Any:
    return [x_user, session]


def form(a: Annotated[str, Form()], b: Annotated[int, Form()] = 0) -> Any:
    return [a, b]


async def file(upload: UploadFile, raw: Annotated[bytes, File()]) -> Any:
    return [upload.filename, len(await upload.read()), len(raw)]


async def body_parts(payload: Payload, scale: Annotated[int, Body()]) -> Any:
    return [payload.name, scale]


def user_of(x_user: Annotated[str, Header()]) -> str:
    return x_user.upper()


async def sub_dependency(
    user: Annotated[str, Depends(user_of)], body: Annotated[Any, Depends(json_request)]
) -> Any:
    return [user, body]


async def yielding(payload: Payload) -> AsyncIterator[Any]:
    yield payload.name


def sync_yielding(payload: Payload) -> Iterator[Any]:
    yield payload.name


async def raw_request(request: Request) -> Any:
    return (await request.body()).decode()


class Callable:
    def __init__(self, factor: int) -> None:
        self.factor = factor

    async def __call__(self, number: int) -> int:
        return number * self.factor


class SyncCallable(Callable):
    def __call__(self, number: int) -> int:  # type: ignore[override]
        return number * self.factor


class NoDependency:
    """A class whose constructor takes the parameters."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"NoDependency({self.number})"


def of_two(number: int, factor: int) -> int:
    return number * factor


USER = {"x-user": "ann"}
FORM = {"content-type": "application/x-www-form-urlencoded"}
ADAPTERS: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "query": (query, {"params": {"number": 3, "tags": ["a", "b"]}}, [3, ["a", "b"]]),
    "header and cookie": (
        header_and_cookie, {"headers": {**USER, "cookie": "session=s"}}, ["ann", "s"]
    ),
    "form": (form, {"data": {"a": "x", "b": "2"}}, ["x", 2]),
    "file": (file, {"files": {"upload": ("f.txt", b"abc"), "raw": b"ab"}}, ["f.txt", 3, 2]),
    "parts of the body": (
        body_parts, {"json": {"payload": {"name": "n"}, "scale": 2}}, ["n", 2]
    ),
    "sub-dependency": (sub_dependency, {"headers": USER, "json": [1]}, ["ANN", [1]]),
    "yield": (yielding, {"json": {"name": "n"}}, "n"),
    "sync yield": (sync_yielding, {"json": {"name": "n"}}, "n"),
    "request": (raw_request, {"content": b"raw", "headers": FORM}, "raw"),
    "callable object": (Callable(3), {"params": {"number": 2}}, 6),
    "sync callable object": (SyncCallable(3), {"params": {"number": 2}}, 6),
    "partial": (functools.partial(of_two, factor=5), {"params": {"number": 2}}, 10),
    "lambda": (lambda number: [number], {"params": {"number": "2"}}, ["2"]),
    "bound method": (Callable(4).__call__, {"params": {"number": 2}}, 8),
    "pydantic class": (Payload, {"json": {"name": "n"}}, {"name": "n", "size": 1}),
    "import string": ("tests.router.importable:doubled", {"params": {"number": 2}}, 4),
    "dotted string": ("tests.router.importable.doubled", {"params": {"number": 2}}, 4),
    "string of a class": (
        "tests.router.importable:Payload", {"json": {"name": "n"}}, {"name": "n"}
    ),
    "string of a built-in": (
        "fastapi_graph.http_adapters.json_request", {"json": {"a": 1}}, {"a": 1}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter(name: str) -> None:
    adapter, request, expected = ADAPTERS[name]
    with client_of(served(http_adapter=adapter)) as client:
        response = client.post(PATH, **request)
        assert (response.status_code, response.json()) == (200, expected)
        response = client.post(f"{PATH}/", **request)
        assert (response.status_code, response.json()) == (200, expected)


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name != "request"])
def test_bad_input_of_an_adapter_is_fastapis_422(name: str) -> None:
    adapter, _, _ = ADAPTERS[name]
    with client_of(served(http_adapter=adapter)) as client:
        response = client.post(PATH)
    assert response.status_code == 422
    assert {error["type"] for error in response.json()["detail"]} == {"missing"}


@pytest.mark.parametrize("name", ["query", "header and cookie", "form", "file", "sub-dependency"])
def test_schema_of_an_adapter(name: str) -> None:
    """The parameters of the adapter are those of an endpoint that depends on it."""
    adapter, _, _ = ADAPTERS[name]
    plain = FastAPI()

    @plain.post(PATH)
    async def answer(value: Annotated[Any, Depends(adapter)]) -> Any:
        return value

    assert served(http_adapter=adapter).openapi() == plain.openapi()


def test_pydantic_class_is_the_body() -> None:
    assert served(http_adapter=Payload).openapi() == by_hand(Payload).openapi()


def test_path_parameters() -> None:
    async def adapter(name: str, number: Annotated[int, Path(gt=0)]) -> Any:
        return [name, number]

    app = FastAPI()
    app.include_router(router_of(http_adapter=adapter), prefix="/m/{name}/{number}")
    with TestClient(app) as client:
        assert client.post("/m/a/1").json() == ["a", 1]
        assert client.post("/m/a/0").json()["detail"][0]["loc"] == ["path", "number"]


def test_yield_adapter_encloses_the_graph() -> None:
    events: list[str] = []

    async def adapter() -> AsyncIterator[int]:
        events.append("enter")
        try:
            yield 1
        finally:
            events.append("exit")

    def answer(value: int) -> int:
        events.append(f"node {value}")
        return value

    with client_of(served(answer=answer, http_adapter=adapter)) as client:
        assert client.post(PATH).json() == 1
    assert events == ["enter", "node 1", "exit"]


def test_adapter_that_sets_the_response_and_tasks() -> None:
    done: list[str] = []

    async def adapter(response: Response, tasks: BackgroundTasks) -> int:
        response.headers["x-a"] = "b"
        response.status_code = 202
        tasks.add_task(done.append, "task")
        return 1

    with client_of(served(http_adapter=adapter)) as client:
        response = client.post(PATH)
    assert (response.status_code, response.headers["x-a"], done) == (202, "b", ["task"])


@pytest.mark.parametrize("status", [400, 418])
def test_adapter_raises_http_exception(status: int) -> None:
    calls: list[Any] = []

    async def adapter() -> None:
        raise HTTPException(status, {"why": "no"}, {"x-a": "b"})

    with client_of(served(answer=calls.append, http_adapter=adapter)) as client:
        response = client.post(PATH)
    assert (response.status_code, response.json()) == (status, {"detail": {"why": "no"}})
    assert response.headers["x-a"] == "b"
    assert calls == []


def test_adapter_that_fails_is_a_500() -> None:
    async def adapter() -> None:
        raise OSError("disk /secret")

    app = served(http_adapter=adapter)
    with client_of(app) as client:
        response = client.post(PATH)
    assert (response.status_code, response.text) == (500, "Internal Server Error")
    with TestClient(app) as client, pytest.raises(OSError, match="secret"):
        client.post(PATH)


def test_adapter_can_be_overridden() -> None:
    app = served(http_adapter=query)
    app.dependency_overrides[query] = lambda: "instead"
    with client_of(app) as client:
        assert client.post(PATH).json() == "instead"


def test_value_is_checked_against_the_declared_type() -> None:
    async def adapter(request: Request) -> Any:
        return await request.json()

    app = served(Payload, str, repr, http_adapter=adapter)
    with client_of(app) as client:
        good = client.post(PATH, json={"name": "n", "size": "3"})
        bad = client.post(PATH, json={"size": "x"})
    assert good.json() == "Payload(name='n', size=3)"
    assert bad.status_code == 422
    assert [(e["loc"], e["type"]) for e in bad.json()["detail"]] == [
        (["body", "name"], "missing"),
        (["body", "size"], "int_parsing"),
    ]


def test_value_of_a_declared_class_that_pydantic_does_not_know() -> None:
    class Frame:
        pass

    async def right() -> Any:
        return Frame()

    async def wrong() -> Any:
        return "a string"

    def name(value: Any) -> str:
        return type(value).__name__

    with client_of(served(Frame, str, name, http_adapter=right)) as client:
        assert client.post(PATH).json() == "Frame"
    with client_of(served(Frame, str, name, http_adapter=wrong)) as client:
        response = client.post(PATH)
    assert response.status_code == 422
    assert "Frame" in response.json()["detail"][0]["msg"]


def test_declared_class_that_json_cannot_be() -> None:
    class Frame:
        pass

    with pytest.raises(GraphDefinitionError, match="http_adapter"):
        graph_router(graph_of(Frame))


def test_graph_of_an_adapters_value_by_attribute() -> None:
    @deployment
    async def greet(name: str) -> str:
        return f"Hello {name}"

    with InputNode(Payload) as x:
        dag = greet.bind(x.name)
    app = FastAPI()
    app.include_router(graph_router(dag, http_adapter=Payload), prefix=PATH)
    with TestClient(app) as client:
        assert client.post(PATH, json={"name": "Ann"}).json() == "Hello Ann"


BAD = {
    "no module": "no_such_module:adapter",
    "no attribute": "tests.router.importable:missing",
    "no dotted attribute": "tests.router.importable.missing",
    "no such thing": "nothing",
    "not a callable": "tests.router.importable:not_callable",
    "empty": "",
}


@pytest.mark.parametrize("string", BAD.values(), ids=BAD)
def test_bad_import_string(string: str) -> None:
    with pytest.raises(GraphDefinitionError, match="http_adapter"):
        router_of(http_adapter=string)


@pytest.mark.parametrize("adapter", [3, None, ["a"], importable.Payload(name="n")], ids=str)
def test_neither_callable_nor_class(adapter: Any) -> None:
    with pytest.raises(GraphDefinitionError, match="http_adapter") as raised:
        router_of(http_adapter=adapter)
    assert "answer" in str(raised.value)


def test_adapter_of_a_driver() -> None:
    app = FastAPI()
    driver = DAGDriver.bind(graph_of(), http_adapter=query)
    app.include_router(graph_router(driver), prefix="/own")
    app.include_router(graph_router(driver, http_adapter=Payload), prefix="/other")
    strung = DAGDriver.bind(graph_of(), http_adapter="tests.router.importable.doubled")
    app.include_router(graph_router(strung), prefix="/string")
    with TestClient(app) as client:
        assert client.post("/own?number=1").json() == [1, []]
        assert client.get("/own?number=1").json() == [1, []]
        assert client.post("/other", json={"name": "n"}).json() == {"name": "n", "size": 1}
        assert client.post("/string?number=4").json() == 8


def test_adapter_of_a_driver_is_checked() -> None:
    with pytest.raises(GraphDefinitionError, match="http_adapter"):
        graph_router(DAGDriver.bind(graph_of(), http_adapter="no.such:thing"))


def test_starlette_request_reaches_the_graph() -> None:
    async def read(request: Request) -> Any:
        return [request.method, (await request.body()).decode(), request.headers["x-user"]]

    with InputNode() as x:
        dag = deployment(read).bind(x)
    app = FastAPI()
    app.include_router(graph_router(dag, http_adapter=starlette_request), prefix=PATH)
    with TestClient(app) as client:
        response = client.post(PATH, content=b"raw", headers=USER)
    assert response.json() == ["POST", "raw", "ann"]


def test_a_value_that_is_not_json_in_a_validation_error() -> None:
    """The refused value is part of the 422 only where JSON can say it."""

    async def adapter() -> Any:
        return object()

    with client_of(served(int, http_adapter=adapter)) as client:
        response = client.post(PATH)
    assert response.status_code == 422
    assert response.json()["detail"][0]["loc"] == ["body"]
