"""The logic by hand, as a bare Starlette endpoint."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from tests.benchmarks import seed


async def predict(request: Request) -> JSONResponse:
    return JSONResponse(await seed.predict(await request.json()))


app = Starlette(routes=[Route("/my-dag", predict, methods=["POST"])])
