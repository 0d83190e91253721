"""Websockets, over every backend: what becomes of the messages and of the generator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import BaseModel

from fastapi_graph import GraphSettings, InputNode, deployment, graph_router
from tests.contract.probes import Journal


class Turn(BaseModel):
    text: str


@deployment
async def answer(turns: AsyncIterator[Turn], journal: Journal) -> AsyncIterator[Turn]:
    try:
        async for turn in turns:
            yield Turn(text=turn.text.upper())
    finally:
        journal.add("closed")


@deployment
async def texts(turns: AsyncIterator[Turn]) -> AsyncIterator[str]:
    async for turn in turns:
        yield turn.text


def test_a_websocket(backend: GraphSettings, journal: Journal) -> None:
    with InputNode(AsyncIterator[Turn]) as x:
        dag = texts.bind(answer.bind(x, journal))
    app = FastAPI()
    app.include_router(graph_router(dag, settings=backend, websocket="/ws"), prefix="/g")
    with TestClient(app) as client:
        assert client.post("/g", json=[{"text": "a"}, {"text": "b"}]).text == "AB"
        assert journal.count("closed") == 1
        with client.websocket_connect("/g/ws") as socket:
            for text in ("one", "two", "three"):
                socket.send_json({"text": text})
                assert socket.receive_text() == text.upper()
        asyncio.run(asyncio.wait_for(journal.wait_for("closed", 2), 1))
