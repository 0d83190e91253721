"""The graph, plugged into a FastAPI app."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI

from fastapi_graph import DeploymentHandle, InputNode, deployment, graph_router
from tests.benchmarks import seed


class Combiner:
    def __init__(self, m1: DeploymentHandle, m2: DeploymentHandle) -> None:
        self.m1 = m1
        self.m2 = m2

    async def run(self, req_part_1: int, req_part_2: float, operation: str) -> str:
        req = f"({req_part_1} + {req_part_2})"
        r1_ref = self.m1.forward.remote(req)
        r2_ref = self.m2.forward.remote(req)
        rst = await asyncio.gather(r1_ref, r2_ref)
        return f"sum({rst})" if operation == "sum" else f"max({rst})"


async def slow_preprocessor(input_data: str) -> int:
    await asyncio.sleep(seed.PREPROCESSOR_S)
    return await seed.preprocessor(input_data)


async def slow_avg_preprocessor(input_data: list[float]) -> float:
    await asyncio.sleep(seed.AVG_PREPROCESSOR_S)
    return await seed.avg_preprocessor(input_data)


class SlowModel(seed.Model):
    async def forward(self, req: str) -> str:
        await asyncio.sleep(seed.MODEL_S)
        return await super().forward(req)


def _bind(preprocessor: Any, avg_preprocessor: Any, model: type[seed.Model]) -> Any:
    with InputNode() as x:
        part_1 = deployment(preprocessor).bind(x[0])
        part_2 = deployment(avg_preprocessor).bind(x[1])
        m1, m2 = deployment(model).bind(1), deployment(model).bind(2)
        return deployment(Combiner).bind(m1, m2).run.bind(part_1, part_2, x[2])


dag = _bind(seed.preprocessor, seed.avg_preprocessor, seed.Model)
slow_dag = _bind(slow_preprocessor, slow_avg_preprocessor, SlowModel)

app = FastAPI()
app.include_router(graph_router(dag), prefix="/my-dag")

slow_app = FastAPI()
slow_app.include_router(graph_router(slow_dag), prefix="/my-dag")
