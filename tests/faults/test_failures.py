"""Nodes that fail, bad input and bad output: what the caller sees, and what the log says."""

import json
import logging
from typing import Any

import pytest
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.testclient import TestClient
from pydantic import BaseModel

from fastapi_graph import (
    DAGDriver,
    DeploymentHandle,
    GraphSettings,
    InputNode,
    OutputError,
    deployment,
    graph_router,
)

JSON = {"content-type": "application/json"}
SERIALIZED = [GraphSettings(), GraphSettings(serialize=True)]
IDS = ["plain", "serialized"]


class ModelError(Exception):
    """An exception of the user's own, which does not rebuild from its arguments alone."""

    def __init__(self, reason: str, *, code: int) -> None:
        super().__init__(f"{reason} ({code})")
        self.code = code

    def __reduce__(self) -> Any:
        return _rebuild, (self.args[0], self.code)


def _rebuild(message: str, code: int) -> ModelError:
    error = ModelError(message, code=code)
    error.args = (message,)
    return error


@deployment
async def fails(value: Any) -> Any:
    raise ModelError("secret weights", code=7)


@deployment
def fails_in_a_thread(value: Any) -> Any:
    raise ModelError("secret weights", code=7)


@deployment
async def refuses(value: Any) -> Any:
    raise HTTPException(409, {"node": "refuses"}, {"x-why": "because"})


@deployment
async def same(value: Any) -> Any:
    return value


@deployment
class Calling:
    """Calls another deployment through a handle."""

    def __init__(self, inner: DeploymentHandle) -> None:
        self.inner = inner

    async def run(self, value: Any) -> Any:
        return await self.inner.remote(value)


def alone(target: Any) -> Any:
    with InputNode() as x:
        return target.bind(x)


def in_a_branch(target: Any) -> Any:
    with InputNode() as x:
        return same.bind([target.bind(x), same.bind(x), target.bind(same.bind(x))])


def nested(target: Any) -> Any:
    with InputNode() as x:
        return Calling.bind(target.bind()).run.bind(x)


def in_a_driver(target: Any) -> Any:
    return DAGDriver.bind({"/": nested(target)})


SHAPES = [alone, in_a_branch, nested, in_a_driver]


def app_of(dag: Any, settings: GraphSettings | None = None, **options: Any) -> FastAPI:
    app = FastAPI()
    app.include_router(graph_router(dag, settings=settings, **options), prefix="/g")
    return app


def quiet(app: FastAPI) -> TestClient:
    return TestClient(app, raise_server_exceptions=False)


@pytest.mark.parametrize("settings", SERIALIZED, ids=IDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("node", [fails, fails_in_a_thread], ids=lambda node: node.name)
def test_a_node_that_raises(
    node: Any, shape: Any, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    app = app_of(shape(node), settings)
    with quiet(app) as client:
        response = client.post("/g", json=1)
    assert (response.status_code, response.text) == (500, "Internal Server Error")
    with TestClient(app) as client, pytest.raises(ModelError) as raised:
        client.post("/g", json=1)
    assert raised.value.code == 7
    notes = "\n".join(raised.value.__notes__)
    assert node.name in notes
    assert "test_failures.py:" in notes


@pytest.mark.parametrize("settings", SERIALIZED, ids=IDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_handler_of_the_app_sees_the_users_exception(shape: Any, settings: Any) -> None:
    app = app_of(shape(fails), settings)

    @app.exception_handler(ModelError)
    async def handle(request: Request, error: ModelError) -> Any:
        return JSONResponse({"code": error.code, "at": request.url.path}, 502)

    with TestClient(app) as client:
        response = client.post("/g", json=1)
    assert (response.status_code, response.json()) == (502, {"code": 7, "at": "/g"})


@pytest.mark.parametrize("settings", SERIALIZED, ids=IDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_http_exception_of_a_node(shape: Any, settings: Any) -> None:
    with TestClient(app_of(shape(refuses), settings)) as client:
        response = client.post("/g", json=1)
    assert (response.status_code, response.json()) == (409, {"detail": {"node": "refuses"}})
    assert response.headers["x-why"] == "because"


def test_handler_for_http_exceptions() -> None:
    app = app_of(alone(refuses))

    @app.exception_handler(HTTPException)
    async def handle(request: Request, error: HTTPException) -> Any:
        return PlainTextResponse(f"my {error.status_code}", error.status_code)

    with TestClient(app) as client:
        assert client.post("/g", json=1).text == "my 409"


def test_one_failure_does_not_disturb_the_next_request() -> None:
    @deployment
    async def sometimes(value: int) -> float:
        return 1 / value

    with quiet(app_of(alone(sometimes))) as client:
        for _ in range(3):
            assert client.post("/g", json=0).status_code == 500
            assert client.post("/g", json=2).json() == 0.5


# Input


class Payload(BaseModel):
    text: str
    parts: list[int] = []


def reads(access: Any, type_: Any = Any) -> FastAPI:
    with InputNode(type_) as x:
        return app_of(same.bind(access(x)))


@pytest.mark.parametrize(
    "access, sent, loc, words",
    [
        (lambda x: x[2], [1, 2], [2], ["index 2", "list"]),
        (lambda x: x["key"], {"k": 1}, ["key"], ["key 'key'", "dict"]),
        (lambda x: x.name, {"name": 1}, ["name"], ["attribute 'name'", "dict"]),
        (lambda x: x["a"][0]["b"], {"a": [{}]}, ["a", 0, "b"], ["key 'b'", "dict"]),
        (lambda x: x["a"][1], {"a": []}, ["a", 1], ["index 1", "list"]),
        (lambda x: x[0], 3, [0], ["index 0", "int"]),
        (lambda x: x["a"], [1], ["a"], ["key 'a'", "list"]),
        (lambda x: x["a"], None, ["a"], ["key 'a'", "NoneType"]),
        (lambda x: x[0], {"a": 1}, [0], ["index 0", "dict"]),
    ],
)
def test_input_that_lacks_something(access: Any, sent: Any, loc: list[Any], words: Any) -> None:
    with TestClient(reads(access)) as client:
        response = client.post("/g", content=json.dumps(sent), headers=JSON)
    assert response.status_code == 422
    (error,) = response.json()["detail"]
    assert error["loc"] == ["body", *loc]
    assert error["input"] == sent
    for word in words:
        assert word in error["msg"]
    assert "test_failures" not in response.text
    assert ".py" not in response.text


def test_declared_input_that_lacks_an_index() -> None:
    with TestClient(reads(lambda x: x.parts[1], Payload)) as client:
        response = client.post("/g", json={"text": "a", "parts": [1]})
        assert response.status_code == 422
        assert response.json()["detail"][0]["loc"] == ["body", "parts", 1]
        assert client.post("/g", json={"text": "a", "parts": [1, 2]}).json() == 2


def test_handler_for_bad_input_of_the_graph() -> None:
    from fastapi.exceptions import RequestValidationError

    app = reads(lambda x: x["key"])

    @app.exception_handler(RequestValidationError)
    async def handle(request: Request, error: RequestValidationError) -> Any:
        return JSONResponse([error.body, error.errors()[0]["loc"][1]], 400)

    with TestClient(app) as client:
        response = client.post("/g", json={"a": 1})
    assert (response.status_code, response.json()) == (400, [{"a": 1}, "key"])


@pytest.mark.parametrize(
    "content, kind",
    [(b"{", "json_invalid"), (b'{"text": 1}', "string_type"), (b"{}", "missing"),
     (b"[]", "model_attributes_type"), (b"", "missing")],
)  # fmt: skip
def test_bad_bodies(content: bytes, kind: str) -> None:
    with InputNode(Payload) as x, TestClient(app_of(same.bind(x))) as client:
        response = client.post("/g", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 422
    assert [error["type"] for error in response.json()["detail"]] == [kind]


# Output


@pytest.mark.parametrize("access", [lambda x: x["key"], lambda x: x[3], lambda x: x.name])
def test_output_that_lacks_something(access: Any, caplog: pytest.LogCaptureFixture) -> None:
    """What a node's output lacks is our fault, and the caller learns nothing of it."""
    with InputNode() as x:
        inner = same.options(name="giving").bind(x)
        app = app_of(same.bind(access(inner)))
    with quiet(app) as client:
        response = client.post("/g", json={"secret": 1})
    assert (response.status_code, response.text) == (500, "Internal Server Error")
    with TestClient(app) as client, pytest.raises(OutputError, match="giving") as raised:
        client.post("/g", json={"secret": 1})
    assert "test_failures.py:" in str(raised.value)


def test_lookup_error_inside_a_node_is_no_bad_input() -> None:
    @deployment
    async def looks_up(value: Any) -> Any:
        return value["key"]

    with quiet(app_of(alone(looks_up))) as client:
        assert client.post("/g", json={}).status_code == 500


def test_arguments_that_do_not_pickle() -> None:
    @deployment
    async def gives(value: Any) -> Any:
        return lambda: (yield)

    @deployment
    async def gives_a_lock(value: Any) -> Any:
        import threading

        return threading.Lock()

    with InputNode() as x:
        dag = same.bind(gives_a_lock.bind(x))
    with quiet(app_of(dag, GraphSettings(serialize=True))) as client:
        assert client.post("/g", json=1).status_code == 500


def test_nothing_internal_in_any_body(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), quiet(app_of(in_a_branch(fails))) as client:
        response = client.post("/g", json=1)
    for word in ("secret", "weights", "fails", "Traceback", ".py"):
        assert word not in response.text
        assert word not in str(response.headers)
