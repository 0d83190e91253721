"""A batched output: its route takes and gives one input and one result."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.testclient import TestClient

from fastapi_graph import InputNode, batch, deployment, graph_router


@deployment
class Length:
    @batch
    async def of(self, texts: list[str]) -> list[int | ValueError]:
        return [len(text) for text in texts]


def test_the_schema_is_that_of_one_call() -> None:
    with InputNode(str) as text:
        dag = Length.bind().of.bind(text)
    app = FastAPI()
    app.include_router(graph_router(dag), prefix="/length")
    (operation,) = app.openapi()["paths"]["/length"].values()
    body = operation["requestBody"]["content"]["application/json"]["schema"]
    result = operation["responses"]["200"]["content"]["application/json"]["schema"]
    assert (body["type"], result["type"]) == ("string", "integer")
    with TestClient(app) as client:
        assert client.post("/length", json="four").json() == 4
        assert client.post("/length", json=4).status_code == 422
