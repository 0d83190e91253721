"""The logic by hand, as a FastAPI endpoint: of the app itself, or of a router it includes."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, FastAPI

from tests.benchmarks import seed


async def predict(body: Annotated[Any, Body()]) -> str:
    return await seed.predict(body)


app = FastAPI()
app.post("/my-dag")(predict)

router = APIRouter()
router.post("")(predict)
included_app = FastAPI()
included_app.include_router(router, prefix="/my-dag")
