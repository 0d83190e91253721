"""A graph that makes a stream of a stream, at a websocket."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI, HTTPException, Query, Request, WebSocket
from fastapi.testclient import TestClient
from pydantic import BaseModel
from starlette.testclient import WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect

from fastapi_graph import (
    DAGDriver,
    Graph,
    GraphDefinitionError,
    GraphSettings,
    InputNode,
    deployment,
    graph_router,
)
from tests.contract.probes import Journal


class Panic(BaseException):
    """What an extension module may raise."""


class Turn(BaseModel):
    text: str
    number: int = 0


@deployment
async def shout(messages: AsyncIterator[str]) -> AsyncIterator[str]:
    async for message in messages:
        yield message.upper()


@deployment
def sync_shout(messages: Iterator[str]) -> Iterator[str]:
    for message in messages:
        yield message.upper()


@deployment
async def twice(messages: AsyncIterator[str]) -> AsyncIterator[str]:
    async for message in messages:
        yield message
        yield message


def app_of(target: Any, **options: Any) -> FastAPI:
    app = FastAPI()
    options.setdefault("websocket", "/ws")
    app.include_router(graph_router(target, **options), prefix="/g")
    return app


def talking(generator: Any, type_: Any = AsyncIterator[str]) -> Any:
    with InputNode(type_) as x:
        return generator.bind(x)


def chain() -> Any:
    with InputNode(AsyncIterator[str]) as x:
        return shout.bind(twice.bind(x))


@pytest.mark.parametrize(
    "target, answers",
    [
        (talking(shout), 1),
        (talking(sync_shout), 1),
        (shout.bind(), 1),
        (sync_shout.bind(), 1),
        (chain(), 2),
        (DAGDriver.bind(chain()), 2),
    ],
)
@pytest.mark.parametrize("serialize", [False, True])
def test_messages_in_and_items_out(target: Any, answers: int, serialize: bool) -> None:
    app = app_of(target, settings=GraphSettings(serialize=serialize))
    with TestClient(app) as client, client.websocket_connect("/g/ws") as socket:
        for message in ("one", "two"):
            socket.send_text(message)
            for _ in range(answers):
                assert socket.receive_text() == message.upper()


def test_several_routes() -> None:
    @deployment
    async def plain(value: int) -> int:
        return value

    with InputNode(int) as x:
        number = plain.bind(x)
    app = app_of({"/a": talking(shout), "/b": number, "/c": talking(twice)})
    with TestClient(app) as client:
        for path in ("/g/a/ws", "/g/c/ws"):
            with client.websocket_connect(path) as socket:
                socket.send_text("x")
                assert socket.receive_text().lower() == "x"
        with pytest.raises(WebSocketDisconnect), client.websocket_connect("/g/b/ws"):
            pass
        assert client.post("/g/b", json=2).json() == 2


ECHOES: list[tuple[Any, Any, Any]] = [
    (AsyncIterator[Any], "text", "text"),
    (AsyncIterator[Any], b"bytes", b"bytes"),
    (AsyncIterator, "text", "text"),
    (AsyncIterator[bytes], "text", b"text"),
    (AsyncIterator[str], b"bytes", "bytes"),
    (AsyncIterator[int], "5", "5"),
    (AsyncIterator[Turn], '{"text": "a"}', '{"text":"a","number":0}'),
    (AsyncIterator[Turn], b'{"text": "a", "number": 2}', '{"text":"a","number":2}'),
    (AsyncIterator[dict[str, int]], '{"a": 1}', '{"a":1}'),
]


@pytest.mark.parametrize("type_, sent, received", ECHOES)
def test_a_message_is_of_the_declared_type(type_: Any, sent: Any, received: Any) -> None:
    @deployment
    async def echo(messages: Any) -> AsyncIterator[Any]:
        async for message in messages:
            yield message

    with (
        TestClient(app_of(talking(echo, type_))) as client,
        client.websocket_connect("/g/ws") as socket,
    ):
        (socket.send_bytes if isinstance(sent, bytes) else socket.send_text)(sent)
        receive: Callable[[], Any]
        receive = socket.receive_bytes if isinstance(received, bytes) else socket.receive_text
        assert receive() == received


def closed_with(socket: Any) -> tuple[int, str]:
    with pytest.raises(WebSocketDisconnect) as caught:
        socket.receive_text()
    return caught.value.code, caught.value.reason


@pytest.mark.parametrize("sent", ["no JSON", '{"text": 5}', b"\xff", "[" * 100_000])
def test_a_message_of_another_type_closes(sent: Any, tmp_path: Any) -> None:
    journal = Journal(tmp_path / "journal")

    @deployment
    async def wait(turns: AsyncIterator[Turn]) -> AsyncIterator[str]:
        try:
            async for turn in turns:
                yield turn.text
        finally:
            journal.add("closed")

    with (
        TestClient(app_of(talking(wait, AsyncIterator[Turn]))) as client,
        client.websocket_connect("/g/ws") as socket,
    ):
        socket.send_text('{"text": "a"}')
        assert socket.receive_text() == "a"
        (socket.send_bytes if isinstance(sent, bytes) else socket.send_text)(sent)
        assert closed_with(socket) == (1007, "a message is not of the declared type")
    assert journal.read() == ["closed"]


def test_the_end_of_the_generator_closes_regularly() -> None:
    @deployment
    async def first(messages: AsyncIterator[str]) -> AsyncIterator[str]:
        yield await anext(messages)

    with (
        TestClient(app_of(talking(first))) as client,
        client.websocket_connect("/g/ws") as socket,
    ):
        socket.send_text("a")
        assert socket.receive_text() == "a"
        assert closed_with(socket) == (1000, "")


@pytest.mark.parametrize("leaves", ["while it reads", "while it sleeps", "while it sends"])
def test_a_client_that_leaves_ends_the_messages_and_closes_the_generator(
    leaves: str, tmp_path: Any
) -> None:
    journal = Journal(tmp_path / "journal")

    @deployment
    async def note(messages: AsyncIterator[str]) -> AsyncIterator[str]:
        try:
            yield await anext(messages)
            if leaves == "while it sleeps":
                await asyncio.sleep(60)
            while leaves == "while it sends":
                yield "more"
                await asyncio.sleep(0.001)
            journal.add([message async for message in messages])
        finally:
            journal.add("closed")

    with TestClient(app_of(talking(note))) as client:
        with client.websocket_connect("/g/ws") as socket:
            socket.send_text("a")
            assert socket.receive_text() == "a"
            socket.send_text("b")
        asyncio.run(asyncio.wait_for(journal.wait_for("closed"), 1))
    assert journal.read() == (["['b']", "closed"] if "reads" in leaves else ["closed"])


def failing(error: BaseException) -> Any:
    @deployment
    async def fails(messages: AsyncIterator[str]) -> AsyncIterator[str]:
        async for message in messages:
            yield message
            raise error

    return fails


@pytest.mark.parametrize(
    "error, code, reason",
    [
        (ValueError("secret"), 1011, "Internal Server Error"),
        (asyncio.CancelledError(), 1011, "Internal Server Error"),
        (Panic("secret"), 1011, "Internal Server Error"),
        (HTTPException(403, "not you"), 1008, "not you"),
        (HTTPException(503, "later"), 1013, "later"),
        (HTTPException(400, "\u20ac" * 100), 1008, "\u20ac" * 41),
    ],
)
def test_a_failure_closes(
    error: BaseException, code: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        TestClient(app_of(talking(failing(error)))) as client,
        client.websocket_connect("/g/ws") as socket,
    ):
        socket.send_text("a")
        assert socket.receive_text() == "a"
        assert closed_with(socket) == (code, reason)
    (record,) = [found for found in caplog.records if found.levelno == logging.ERROR]
    assert record.getMessage().startswith("fails: the websocket failed after 1 items")
    assert bool(record.exc_info) is (code == 1011)


def test_an_item_that_is_not_of_the_declared_type_closes() -> None:
    @deployment
    async def wrong(messages: AsyncIterator[str]) -> AsyncIterator[int]:
        yield "no number"  # type: ignore[misc]

    with (
        TestClient(app_of(talking(wrong))) as client,
        client.websocket_connect("/g/ws") as socket,
    ):
        assert closed_with(socket) == (1011, "Internal Server Error")


def test_the_deadline_closes() -> None:
    app = app_of(talking(shout), settings=GraphSettings(request_timeout_s=0.1))
    with TestClient(app) as client, client.websocket_connect("/g/ws") as socket:
        assert closed_with(socket) == (1013, "The request took too long")


def test_the_stop_of_the_graph_closes() -> None:
    graph = Graph(talking(shout.options(graceful_shutdown_timeout_s=0.05)))
    with (
        TestClient(app_of(graph)) as client,
        client.websocket_connect("/g/ws") as socket,
    ):
        socket.send_text("a")
        assert socket.receive_text() == "A"
        assert client.portal is not None
        client.portal.call(graph.stop)
        assert closed_with(socket) == (1012, "Shutting down")


@pytest.mark.parametrize("prefix", ["", "/g"])
def test_at_the_path_of_the_route_itself(prefix: str) -> None:
    app = FastAPI()
    routes = {"/": talking(shout), "/b": talking(twice)}
    app.include_router(graph_router(routes, websocket="/"), prefix=prefix)
    with TestClient(app) as client:
        for path in (prefix or "/", f"{prefix}/b"):
            assert client.post(path, json=["a"]).text.startswith(("A", "a"))
            with client.websocket_connect(path) as socket:
                socket.send_text("a")
                assert socket.receive_text().lower() == "a"


def test_over_capacity_closes() -> None:
    busy = shout.options(max_ongoing_requests=1, max_queued_requests=0)
    with (
        TestClient(app_of(talking(busy))) as client,
        client.websocket_connect("/g/ws") as first,
    ):
        first.send_text("a")
        assert first.receive_text() == "A"
        with client.websocket_connect("/g/ws") as second:
            assert closed_with(second) == (1013, "Over capacity, try again later")


@pytest.mark.parametrize("level", ["router", "include", "app"])
def test_dependencies_run(level: str) -> None:
    async def guard(key: Annotated[str | None, Query()] = None) -> None:
        if key != "secret":
            raise HTTPException(403)

    dependencies = [Depends(guard)]
    app = FastAPI(dependencies=dependencies if level == "app" else None)
    router = graph_router(
        talking(shout), websocket="/ws", dependencies=dependencies if level == "router" else None
    )
    included = {"dependencies": dependencies} if level == "include" else {}
    app.include_router(router, prefix="/g", **included)
    with TestClient(app) as client:
        with (
            pytest.raises(WebSocketDenialResponse) as caught,
            client.websocket_connect("/g/ws"),
        ):
            pass
        assert caught.value.status_code == 403
        with client.websocket_connect("/g/ws?key=secret") as socket:
            socket.send_text("a")
            assert socket.receive_text() == "A"


def test_over_http_the_messages_are_a_list() -> None:
    @deployment
    async def total(numbers: AsyncIterator[int]) -> int:
        return sum([number async for number in numbers])

    app = app_of({"/shout": chain(), "/total": talking(total, AsyncIterator[int])})
    with TestClient(app) as client:
        assert client.post("/g/shout", json=["a", "b"]).text == "AABB"
        assert client.post("/g/shout", json=[1]).status_code == 422
        assert client.post("/g/total", json=[1, 2]).json() == 3
        assert client.post("/g/total", json=1).status_code == 422
    schema = app.openapi()["paths"]["/g/total"]["post"]["requestBody"]["content"]
    (content,) = schema.values()
    assert content["schema"]["items"] == {"type": "integer"}


def test_an_adapter_may_give_the_body_piece_by_piece() -> None:
    async def pieces(request: Request) -> AsyncIterator[bytes]:
        return request.stream()

    @deployment
    async def lengths(pieces: AsyncIterator[bytes]) -> AsyncIterator[int]:
        async for piece in pieces:
            if piece:
                yield len(piece)

    app = FastAPI()
    dag = talking(lengths, AsyncIterator[bytes])
    app.include_router(graph_router(dag, http_adapter=pieces), prefix="/g")
    with TestClient(app) as client:
        content = iter([b"a", b"bcd"])
        answer = client.post("/g", content=content)
        assert sum(map(json.loads, answer.text.split())) == 4


def test_a_graph_without_streams_has_no_websocket() -> None:
    @deployment
    async def plain(value: int) -> int:
        return value

    @deployment
    class Driver:
        async def __call__(self, request: Request) -> AsyncIterator[str]:
            yield "a"

    with InputNode(str) as x:
        plain_input = sync_shout.bind([x])
    for target in (talking(plain, int), Driver.bind(), plain_input):
        with pytest.raises(GraphDefinitionError, match=r"websocket='/ws': .*bound at") as caught:
            graph_router(target, websocket="/ws")
        assert "InputNode(AsyncIterator[str])" in str(caught.value)
    with pytest.raises(GraphDefinitionError, match="must be a path that starts"):
        graph_router(talking(shout), websocket="ws")
    with pytest.raises(GraphDefinitionError, match="websocket=True must be a path"):
        graph_router(talking(shout), websocket=True)  # type: ignore[arg-type]


def test_an_input_stream_has_one_reader() -> None:
    with InputNode(AsyncIterator[str]) as x:
        dag = shout.bind(twice.bind(x))

        @deployment
        async def both(left: AsyncIterator[str], right: AsyncIterator[str]) -> AsyncIterator[str]:
            yield ""

        twofold = both.bind(x, twice.bind(x))
    graph_router(dag)
    with pytest.raises(GraphDefinitionError, match=r"InputNode .*taken twice"):
        graph_router(twofold)
    with (
        pytest.raises(GraphDefinitionError, match="one by one"),
        InputNode(AsyncIterator[str]) as x,
    ):
        shout.bind(x[0])


def test_by_hand_beside_it() -> None:
    app = app_of(talking(shout))

    @app.websocket("/hand")
    async def by_hand(websocket: WebSocket) -> None:
        await websocket.accept()
        async for message in websocket.iter_text():
            await websocket.send_text(message.upper())

    with TestClient(app) as client:
        for path in ("/hand", "/g/ws"):
            with client.websocket_connect(path) as socket:
                socket.send_text("a")
                assert socket.receive_text() == "A"


@pytest.mark.anyio
async def test_a_connection_that_is_gone_before_the_server_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """gunicorn passes on what uvloop raises for a transport that was closed."""
    closed = asyncio.Event()

    @deployment
    async def flood(messages: AsyncIterator[str]) -> AsyncIterator[str]:
        try:
            async for message in messages:
                while True:
                    yield message
        finally:
            closed.set()

    received = iter([{"type": "websocket.connect"}, {"type": "websocket.receive", "text": "x"}])

    async def receive() -> Any:
        for message in received:
            return message
        return await asyncio.Future()

    async def send(message: Any) -> None:
        if message["type"] != "websocket.accept":
            raise RuntimeError("unable to perform operation on <TCPTransport closed=True>")

    app = app_of(talking(flood))
    scope = {"type": "websocket", "path": "/g/ws", "query_string": b"", "headers": []}
    with caplog.at_level(logging.WARNING):
        async with app.router.lifespan_context(app), asyncio.timeout(5):
            await app(scope, receive, send)
            await closed.wait()
    assert not caplog.records
