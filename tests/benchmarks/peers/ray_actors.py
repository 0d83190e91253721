"""The logic by hand: a FastAPI endpoint, and a Ray actor for each of its five parts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Annotated, Any

import ray
from fastapi import Body, FastAPI

from tests.benchmarks import seed


@ray.remote
class Preprocessor:
    async def run(self, input_data: str) -> int:
        return await seed.preprocessor(input_data)


@ray.remote
class AvgPreprocessor:
    async def run(self, input_data: list[float]) -> float:
        return await seed.avg_preprocessor(input_data)


@ray.remote
class Model(seed.Model):
    async def forward(self, req: str) -> str:
        return await super().forward(req)


@ray.remote
class Combiner:
    def __init__(self, m1: Any, m2: Any) -> None:
        self.m1 = m1
        self.m2 = m2

    async def run(self, req_part_1: int, req_part_2: float, operation: str) -> str:
        req = f"({req_part_1} + {req_part_2})"
        rst = await asyncio.gather(self.m1.forward.remote(req), self.m2.forward.remote(req))
        return f"sum({rst})" if operation == "sum" else f"max({rst})"


actors: dict[str, Any] = {}


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    ray.init(log_to_driver=False)
    actors["preprocessor"] = Preprocessor.remote()
    actors["avg_preprocessor"] = AvgPreprocessor.remote()
    m1, m2 = Model.remote(1), Model.remote(2)
    actors["combiner"] = Combiner.remote(m1, m2)
    await predict(seed.REQUEST)  # all of them have started
    yield
    actors.clear()
    ray.shutdown()


app = FastAPI(lifespan=lifespan)


@app.post("/my-dag")
async def predict(body: Annotated[Any, Body()]) -> str:
    part_1, part_2 = await asyncio.gather(
        actors["preprocessor"].run.remote(body[0]),
        actors["avg_preprocessor"].run.remote(body[1]),
    )
    answer: str = await actors["combiner"].run.remote(part_1, part_2, body[2])
    return answer
