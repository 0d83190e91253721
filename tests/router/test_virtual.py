"""split and shadow behind HTTP: the schema, and what a client is told."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import BaseModel

from fastapi_graph import (
    Graph,
    GraphDefinitionError,
    GraphSettings,
    InputNode,
    deployment,
    graph_router,
    shadow,
    split,
)
from tests.router.golden import PATH


class User(BaseModel):
    id: int
    name: str | None = None


class Answer(BaseModel):
    version: int


class Other(BaseModel):
    text: str


@deployment
async def first(user: User) -> Answer:
    """Say the version."""
    return Answer(version=1)


@deployment
async def second(user: User) -> Answer:
    return Answer(version=2)


@deployment
async def other(user: dict[str, Any]) -> Other:
    return Other(text="other")


@deployment
def stream(user: User) -> Iterator[int]:
    yield 1


@deployment
class Predicting:
    async def predict(self, user: User) -> Answer:
        return Answer(version=3)


def served(target: Any) -> FastAPI:
    app = FastAPI()
    app.include_router(graph_router(target), prefix=PATH)
    return app


def operation(target: Any) -> dict[str, Any]:
    with TestClient(served(target)) as client:
        found: dict[str, Any] = client.get("/openapi.json").json()["paths"][PATH]["post"]
        return found


def body_of(schema: dict[str, Any]) -> Any:
    return schema["requestBody"]["content"]["application/json"]["schema"]


def result_of(schema: dict[str, Any]) -> Any:
    return schema["responses"]["200"]["content"]["application/json"]["schema"]


def ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def test_the_schema_of_one_type() -> None:
    schema = operation(split({first.bind(): 1, second.bind(): 1}))
    assert body_of(schema) == ref("User")
    assert result_of(schema) == ref("Answer")
    assert schema["description"] == "Say the version."


def test_the_schema_of_several_types() -> None:
    with InputNode(User) as user:
        dag = split({first.bind(): 1, other.bind(): 1}).bind(user)
    schema = operation(dag)
    assert body_of(schema) == ref("User")
    assert result_of(schema)["anyOf"] == [ref("Answer"), ref("Other")]


def test_a_shadow_has_the_types_of_what_answers() -> None:
    schema = operation(shadow(first.bind(), other.bind()))
    assert body_of(schema) == ref("User")
    assert result_of(schema) == ref("Answer")


def test_it_answers() -> None:
    with TestClient(served(split({first.bind(): 1, second.bind(): 1}, sticky_by="id"))) as client:
        answers = [client.post(PATH, json={"id": number}).json() for number in (*range(20),) * 2]
    assert answers[:20] == answers[20:]
    assert {answer["version"] for answer in answers} == {1, 2}


def test_a_client_that_sends_no_key_is_told() -> None:
    with InputNode() as user:
        dag = split({other.bind(): 1}, sticky_by="id").bind(user)
    with TestClient(served(dag)) as client:
        answer = client.post(PATH, json={"name": "a"})
    assert answer.status_code == 422
    (problem,) = answer.json()["detail"]
    assert problem["loc"] == ["body", "id"]
    assert problem["msg"] == "there is no 'id' in the dict"


@pytest.mark.parametrize("key", [1.5, [1], {}])
def test_a_client_that_sends_another_kind_of_key_is_told(key: Any) -> None:
    with InputNode() as user:
        dag = split({other.bind(): 1}, sticky_by="id").bind(user)
    with TestClient(served(dag)) as client:
        answer = client.post(PATH, json={"id": key})
    assert answer.status_code == 422
    (problem,) = answer.json()["detail"]
    assert problem["loc"] == ["body", "id"]
    assert "a key is a str, bytes, an int or a UUID" in problem["msg"]


@pytest.mark.parametrize("make", [lambda a, b: split({a: 1, b: 1}), shadow])
def test_it_answers_with_a_stream(make: Any) -> None:
    with TestClient(served(make(stream.bind(), stream.bind()))) as client:
        answer = client.post(PATH, json={"id": 1})
    assert answer.headers["content-type"].startswith("application/jsonl")
    assert answer.text.splitlines() == ["1"]


def test_what_cannot_answer() -> None:
    with pytest.raises(GraphDefinitionError, match="without __call__"):
        served(split({Predicting.bind(): 1}))


def test_a_copy_outlives_the_deadline_of_its_request() -> None:
    done = asyncio.Event()

    @deployment
    async def late(user: User) -> Answer:
        await asyncio.sleep(3600)
        raise AssertionError

    @deployment
    async def copied(user: User) -> None:
        await asyncio.sleep(0.1)
        done.set()

    graph = Graph(
        shadow(late.bind(), copied.bind()), settings=GraphSettings(request_timeout_s=0.01)
    )
    with TestClient(served(graph)) as client:
        assert client.post(PATH, json={"id": 1}).status_code == 504
    assert done.is_set()  # the graph has waited for it
