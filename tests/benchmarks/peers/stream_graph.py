"""A deployment that streams, plugged into an app."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastapi import FastAPI

from fastapi_graph import InputNode, deployment, graph_router
from tests.benchmarks import seed


@deployment
async def items(count: int) -> AsyncIterator[str]:
    for number in range(count):
        yield f"{number}\n"


with InputNode(int) as count:
    dag = items.bind(count)

app = FastAPI()
app.include_router(graph_router(dag, stream="chunks"), prefix="/stream")


@app.post("/my-dag")
async def ready() -> str:
    return seed.ANSWER
