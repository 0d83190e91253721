"""A generator at the root of a route: forms, statuses, headers, schema."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Body, Depends, FastAPI, Header, HTTPException, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from fastapi.testclient import TestClient
from pydantic import BaseModel

from fastapi_graph import (
    DAGDriver,
    DeploymentHandle,
    GraphDefinitionError,
    GraphSettings,
    InputNode,
    deployment,
    graph_router,
)
from tests.router.golden import client_of, headers_of


class Panic(BaseException):
    """What an extension module may raise."""


class Token(BaseModel):
    text: str
    number: int = 0


def tokens(value: int) -> list[Token]:
    return [Token(text="line\nbreak", number=number) for number in range(value)]


@deployment
async def models(value: int) -> AsyncIterator[Token]:
    for token in tokens(value):
        yield token


@deployment
def sync_models(value: int) -> Iterator[Token]:
    yield from tokens(value)


@deployment
async def undeclared(value):  # type: ignore[no-untyped-def]
    for token in tokens(value):
        yield token


@deployment
def text(value: int) -> Iterator[str]:
    for number in range(value):
        yield f"{number}\u20ac "


@deployment
async def raw(value: int) -> AsyncIterator[bytes]:
    for number in range(value):
        yield bytes([number])


@deployment
async def events(value: int) -> AsyncIterator[ServerSentEvent]:
    for number in range(value):
        yield ServerSentEvent(data=Token(text="a", number=number), event="token", id=str(number))
    yield ServerSentEvent(raw_data="[DONE]", retry=5, comment="the end")


@deployment
class Service:
    def items(self, value: int) -> Iterator[Token]:
        yield from tokens(value)

    async def __call__(self, value: int) -> AsyncIterator[Token]:
        for token in tokens(value):
            yield token


def bound(generator: Any) -> Any:
    with InputNode(int) as x:
        return generator.bind(x)


def app_of(target: Any, prefix: str = "/g", **options: Any) -> FastAPI:
    app = FastAPI()
    app.include_router(graph_router(target, **options), prefix=prefix)
    return app


def ask(
    app: FastAPI, value: Any = 2, accept: str = "*/*", path: str = "/g", **options: Any
) -> httpx.Response:
    with client_of(app) as client:
        response: Any = client.post(path, json=value, headers={"accept": accept}, **options)
        return response  # type: ignore[no-any-return]


LINES = b'{"text":"line\\nbreak","number":0}\n{"text":"line\\nbreak","number":1}\n'
EVENTS = b"".join(b"data: %b\n\n" % line for line in LINES.splitlines())
SSE = "text/event-stream; charset=utf-8"
JSONL = "application/jsonl"

FORMS = [
    (models, "*/*", None, JSONL, LINES),
    (sync_models, "*/*", None, JSONL, LINES),
    (undeclared, "*/*", None, JSONL, LINES),
    (models, "text/event-stream", None, SSE, EVENTS),
    (models, "application/jsonl", None, JSONL, LINES),
    (models, "application/x-ndjson", None, "application/x-ndjson", LINES),
    (models, "text/html, application/jsonl;q=0.5, text/event-stream;q=0.9", None, SSE, EVENTS),
    (models, "text/event-stream;q=0, */*", None, JSONL, LINES),
    (models, "text/event-stream;q=x", None, JSONL, LINES),
    (models, "application/json", None, JSONL, LINES),
    (models, "application/jsonl", "sse", SSE, EVENTS),
    (models, "text/event-stream", "jsonl", JSONL, LINES),
    (text, "*/*", None, "text/plain; charset=utf-8", "0\u20ac 1\u20ac ".encode()),
    (text, "*/*", "chunks", "text/plain; charset=utf-8", "0\u20ac 1\u20ac ".encode()),
    (text, "text/event-stream", None, SSE, 'data: "0\u20ac "\n\ndata: "1\u20ac "\n\n'.encode()),
    (text, "*/*", "jsonl", JSONL, '"0\u20ac "\n"1\u20ac "\n'.encode()),
    (raw, "*/*", None, "application/octet-stream", b"\0\1"),
    (raw, "application/jsonl", "chunks", "application/octet-stream", b"\0\1"),
    (
        events,
        "*/*",
        None,
        SSE,
        b'event: token\ndata: {"text":"a","number":0}\nid: 0\n\n'
        b'event: token\ndata: {"text":"a","number":1}\nid: 1\n\n'
        b": the end\ndata: [DONE]\nretry: 5\n\n",
    ),
    (
        events,
        "application/jsonl",
        None,
        JSONL,
        b'{"text":"a","number":0}\n{"text":"a","number":1}\n"[DONE]"\n',
    ),
]


@pytest.mark.parametrize("generator, accept, form, media_type, said", FORMS)
def test_form(generator: Any, accept: str, form: Any, media_type: str, said: bytes) -> None:
    response = ask(app_of(bound(generator), stream=form), accept=accept)
    assert response.status_code == 200
    assert response.headers["content-type"] == media_type
    assert response.headers.get("vary") == (None if form else "Accept")
    assert response.content == said


@pytest.mark.parametrize(
    "generator, media_type",
    [(models, JSONL), (text, "text/plain; charset=utf-8"), (raw, "application/octet-stream")],
)
def test_nothing_at_all(generator: Any, media_type: str) -> None:
    response = ask(app_of(bound(generator)), 0)
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-type"] == media_type


def test_every_kind_of_target() -> None:
    service = Service.bind()
    with InputNode(int) as x:
        method = service.items.bind(x)
        function = models.bind(x)
    app = FastAPI()
    for name, target in {
        "method": method,
        "class": Service.bind(),
        "function": models.bind(),
        "driver": DAGDriver.bind(function),
        "routes": {"/a": function, "/b": method},
    }.items():
        app.include_router(graph_router(target), prefix=f"/{name}")
    with client_of(app) as client:
        for path in ("/method", "/class", "/function/", "/driver", "/routes/a", "/routes/b/"):
            assert client.post(path, json=2).content == LINES
            assert client.post(path, json="x").status_code == 422
        assert client.request("GET", "/driver", json=2).content == LINES


def test_streams_beside_other_routes() -> None:
    @deployment
    async def plain(value: int) -> int:
        return value

    app = app_of({"/a": bound(models), "/b": bound(plain)}, stream="sse")
    assert ask(app, path="/g/a").content == EVENTS
    assert ask(app, path="/g/b").json() == 2


def test_a_form_for_no_stream_is_an_error() -> None:
    @deployment
    async def plain(value: int) -> int:
        return value

    with pytest.raises(GraphDefinitionError, match=r"stream='sse': plain \(bound at .*no stream"):
        graph_router(bound(plain), stream="sse")
    with pytest.raises(GraphDefinitionError, match=r"stream='xml'.*sse, jsonl, chunks"):
        graph_router(bound(models), stream="xml")  # type: ignore[arg-type]


def test_a_driver_of_ones_own_streams() -> None:
    @deployment
    class Driver:
        def __init__(self, dag: DeploymentHandle) -> None:
            self.dag = dag

        async def __call__(self, request: Request) -> AsyncIterator[str]:
            async for token in self.dag.remote(await request.json()):
                yield f"{token.number};"

    response = ask(app_of(Driver.bind(bound(models))), 3)
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    assert response.text == "0;1;2;"


# Golden: the endpoint that one would write by hand


def by_hand(form: str) -> FastAPI:
    app = FastAPI()
    options: dict[str, Any] = {"response_class": EventSourceResponse} if form == "sse" else {}

    @app.post("/g", **options)
    async def models(value: Annotated[int, Body()]) -> AsyncIterator[Token]:
        for token in tokens(value):
            yield token

    return app


@pytest.mark.parametrize("form", ["sse", "jsonl"])
def test_as_written_by_hand(form: Any) -> None:
    ours, theirs = app_of(bound(models), stream=form), by_hand(form)
    for value in (0, 1, 5):
        mine, other = ask(ours, value), ask(theirs, value)
        assert mine.content == other.content
        assert dict(headers_of(mine)) == dict(headers_of(other))
    documented = ours.openapi()["paths"]["/g"]["post"]
    expected = theirs.openapi()["paths"]["/g"]["post"]
    assert documented["responses"] == expected["responses"]
    assert (
        ours.openapi()["components"]["schemas"]["Token"]
        == (theirs.openapi()["components"]["schemas"]["Token"])
    )


def content_of(target: Any, **options: Any) -> dict[str, Any]:
    paths = app_of(target, **options).openapi()["paths"]
    content: dict[str, Any] = paths["/g"]["post"]["responses"]["200"]["content"]
    return content


def test_schema_names_every_form() -> None:
    content = content_of(bound(models))
    assert set(content) == {JSONL, "text/event-stream"}
    assert content[JSONL]["itemSchema"] == {"$ref": "#/components/schemas/Token"}
    content = content_of(bound(text))
    assert set(content) == {"text/plain", JSONL, "text/event-stream"}
    assert content["text/plain"]["schema"] == {"type": "string"}
    assert set(content_of(bound(raw), stream="chunks")) == {"application/octet-stream"}
    assert set(content_of(bound(events))) == {JSONL, "text/event-stream"}
    assert set(content_of(bound(undeclared), stream="jsonl")) == {JSONL}


# What FastAPI does before a stream


def test_dependencies_headers_and_status() -> None:
    ended: list[str] = []

    async def guard(response: Response, key: Annotated[str | None, Header()] = None) -> Any:
        if key != "secret":
            raise HTTPException(401)
        response.headers["x-kept"] = "yes"
        response.set_cookie("kept", "too")
        response.status_code = 202
        yield
        ended.append("after the stream")

    router_level = app_of(bound(models), dependencies=[Depends(guard)])
    include_level = FastAPI()
    include_level.include_router(
        graph_router(bound(models)), prefix="/g", dependencies=[Depends(guard)]
    )
    for app in (router_level, include_level):
        ended.clear()
        with client_of(app) as client:
            assert client.post("/g", json=2).status_code == 401
            response = client.post("/g", json=2, headers={"key": "secret"})
        assert response.status_code == 202
        assert response.headers["x-kept"] == "yes"
        assert response.cookies["kept"] == "too"
        assert response.content == LINES
        assert ended == ["after the stream"]


def test_an_adapter_of_ones_own() -> None:
    async def from_header(number: Annotated[int, Header()]) -> int:
        return number

    app = app_of(bound(models), http_adapter=from_header)
    with client_of(app) as client:
        assert client.post("/g", headers={"number": "2"}).content == LINES
        assert client.post("/g").status_code == 422


# Failures


def failing(error: BaseException, after: int, **options: Any) -> FastAPI:
    @deployment
    async def fails(value: int) -> AsyncIterator[int]:
        for number in range(after):
            yield number
        raise error

    return app_of(bound(fails), **options)


@pytest.mark.parametrize("form", ["sse", "jsonl", "chunks"])
def test_a_failure_before_the_first_item_has_its_status(form: Any) -> None:
    response = ask(failing(HTTPException(418, "short and stout"), 0, stream=form))
    assert (response.status_code, response.json()) == (418, {"detail": "short and stout"})
    response = ask(failing(ValueError("secret"), 0, stream=form))
    assert (response.status_code, response.text) == (500, "Internal Server Error")


def test_an_exception_handler_of_the_app_sees_a_failure_before_the_first_item() -> None:
    app = failing(KeyError("x"), 0)

    @app.exception_handler(KeyError)
    async def handle(request: Request, error: KeyError) -> Response:
        return Response("handled", 409)

    assert ask(app).status_code == 409


def test_an_input_that_lacks_something_is_a_422() -> None:
    with InputNode() as x:
        app = app_of(models.bind(x["number"]))
    assert ask(app, {"number": 2}).content == LINES
    assert ask(app, {}).status_code == 422


INTERNAL = b'{"status":500,"detail":"Internal Server Error"}'


@pytest.mark.parametrize("error", [ValueError, asyncio.CancelledError, Panic, SystemExit])
@pytest.mark.parametrize(
    "form, said",
    [
        ("sse", b"data: 0\n\ndata: 1\n\nevent: error\ndata: " + INTERNAL + b"\n\n"),
        ("jsonl", b'0\n1\n{"error":' + INTERNAL + b"}\n"),
    ],
)
def test_a_failure_in_mid_stream(
    form: Any, said: bytes, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    response = ask(failing(error("secret"), 2, stream=form))
    assert response.status_code == 200
    assert response.content == said
    (record,) = [found for found in caplog.records if found.levelno == logging.ERROR]
    assert record.getMessage().startswith("fails: the stream failed after 2 items")
    assert record.exc_info
    assert "secret" in str(record.exc_info[1])


def test_an_http_exception_in_mid_stream_says_its_detail() -> None:
    response = ask(failing(HTTPException(409, {"reason": "gone"}), 1))
    assert response.content == b'0\n{"error":{"status":409,"detail":{"reason":"gone"}}}\n'


def test_chunks_break_off(caplog: pytest.LogCaptureFixture) -> None:
    @deployment
    async def fails(value: int) -> AsyncIterator[bytes]:
        yield b"a"
        raise OSError("secret")

    with (
        TestClient(app_of(bound(fails))) as client,
        pytest.raises(Exception, match=r"^fails: broken off"),
    ):
        client.post("/g", json=1)
    assert "fails: the stream failed after 1 items: OSError('secret')" in caplog.text


def test_an_item_that_cannot_be_said() -> None:
    @deployment
    async def wrong(value: int) -> AsyncIterator[int]:
        yield value
        yield "no number"  # type: ignore[misc]

    assert ask(app_of(bound(wrong)), 1).content == b'1\n{"error":' + INTERNAL + b"}\n"
    assert ask(app_of(bound(wrong)), "x").status_code == 422
    response = ask(app_of(bound(models), stream="chunks"))
    assert response.status_code == 500


def test_a_deadline_before_the_first_item() -> None:
    @deployment
    async def slow(value: int) -> AsyncIterator[int]:
        import asyncio

        await asyncio.sleep(30)
        yield value

    app = app_of(bound(slow), settings=GraphSettings(request_timeout_s=0.05))
    response = ask(app)
    assert (response.status_code, response.json()) == (504, {"detail": "The request took too long"})


def test_an_idle_stream_of_events_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastapi_graph.http.streaming._IDLE_S", 0.02)

    @deployment
    async def pausing(value: int) -> AsyncIterator[int]:
        import asyncio

        yield 1
        await asyncio.sleep(0.1)
        yield 2

    said = ask(app_of(bound(pausing)), accept="text/event-stream").content
    assert said.startswith(b"data: 1\n\n: ping\n\n")
    assert said.endswith(b": ping\n\ndata: 2\n\n")
    assert ask(app_of(bound(pausing))).content == b"1\n2\n"


def test_gzip_and_plain_middleware_may_stand_before_a_stream() -> None:
    app = app_of(bound(models))

    @app.middleware("http")
    async def add(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        response.headers["x-seen"] = "yes"
        assert isinstance(response, StreamingResponse) or response
        return response

    response = ask(app)
    assert response.headers["x-seen"] == "yes"
    assert response.content == LINES


def test_without_a_lifespan_it_says_so() -> None:
    client = TestClient(app_of(bound(models)), raise_server_exceptions=False)
    assert client.post("/g", json=1).status_code == 500


def test_items_of_arrays() -> None:
    import numpy as np

    @deployment
    def arrays(value: int) -> Iterator[Any]:
        yield {"a": np.arange(value)}

    assert json.loads(ask(app_of(bound(arrays)), 3).content) == {"a": [0, 1, 2]}
