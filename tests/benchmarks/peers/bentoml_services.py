"""The graph as five services of BentoML; the combiner is the one that is served."""

from __future__ import annotations

import asyncio
from typing import Any

import bentoml

from tests.benchmarks import seed

_service = bentoml.service(logging={"access": {"enabled": False}})


@_service
class Preprocessor:
    @bentoml.api
    async def run(self, input_data: str) -> int:
        return await seed.preprocessor(input_data)


@_service
class AvgPreprocessor:
    @bentoml.api
    async def run(self, input_data: list[float]) -> float:
        return await seed.avg_preprocessor(input_data)


@_service
class Model1:
    @bentoml.api
    async def forward(self, req: str) -> str:
        return await seed.m1.forward(req)


@_service
class Model2:
    @bentoml.api
    async def forward(self, req: str) -> str:
        return await seed.m2.forward(req)


@_service
class Combiner:
    part_1 = bentoml.depends(Preprocessor)
    part_2 = bentoml.depends(AvgPreprocessor)
    m1 = bentoml.depends(Model1)
    m2 = bentoml.depends(Model2)

    @bentoml.api(route="/my-dag")
    async def predict(self, data: list[Any], /) -> str:
        part_1, part_2 = await asyncio.gather(
            self.part_1.to_async.run(data[0]), self.part_2.to_async.run(data[1])
        )
        req = f"({part_1} + {part_2})"
        rst = await asyncio.gather(self.m1.to_async.forward(req), self.m2.to_async.forward(req))
        return f"sum({rst})" if data[2] == "sum" else f"max({rst})"
