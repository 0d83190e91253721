"""The service: its own routes and lifespan, and the two lines that plug in the graphs."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from pydantic import BaseModel

from example_app import triage, tutorial
from example_app.auth import customer, read_keys
from example_app.sentiment import Sentiment
from example_app.text import Message, clean
from fastapi_graph import DeploymentHandle, graph_router


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    """Read the API keys; the graphs start after this, and stop before it ends."""
    yield {"keys": read_keys(), "started": time.monotonic()}


app = FastAPI(title="Support desk", lifespan=lifespan)

app.include_router(graph_router(tutorial.serve_dag), prefix="/my-dag", tags=["tutorial"])
app.include_router(
    graph_router(triage.graph), prefix="/triage", tags=["triage"], dependencies=[Depends(customer)]
)


class Health(BaseModel):
    pid: int
    uptime_s: float
    deployments: dict[str, str]


@app.get("/health")
async def health(request: Request) -> Health:
    """Say how this process does, and in which state the models of the triage are."""
    return Health(
        pid=os.getpid(),
        uptime_s=round(time.monotonic() - request.state.started, 3),
        deployments={row.name: row.state for row in triage.graph.status()},
    )


@app.get("/me")
async def me(name: Annotated[str, Depends(customer)]) -> dict[str, str]:
    """Say whose API key it is."""
    return {"customer": name}


@app.post("/sentiment", dependencies=[Depends(customer)])
async def sentiment(
    message: Message,
    scorer: Annotated[DeploymentHandle, Depends(triage.graph.provide(triage.scorer))],
) -> Sentiment:
    """Ask one model of the triage, and not the whole graph."""
    answer: Sentiment = await scorer.score.remote(clean(message.text))
    return answer
