"""The tutorial's graph: two preprocessors, and a combiner that calls two models."""

from __future__ import annotations

import asyncio

from fastapi_graph import DAGDriver, DeploymentHandle, InputNode, deployment
from fastapi_graph.http_adapters import json_request


@deployment
async def preprocessor(input_data: str) -> int:
    """Convert to int."""
    await asyncio.sleep(0.1)  # stands for work
    return int(input_data)


@deployment
async def avg_preprocessor(input_data: list[float]) -> float:
    """Return the average."""
    await asyncio.sleep(0.15)
    return sum(input_data) / len(input_data)


class WeightModel:
    def __init__(self, weight: int) -> None:
        self.weight = weight

    async def forward(self, req: str) -> str:
        await asyncio.sleep(0.3)
        return f"({self.weight} * {req})"


class ModelCombiner:
    def __init__(self, m1: DeploymentHandle, m2: DeploymentHandle) -> None:
        self.m1 = m1
        self.m2 = m2

    async def run(self, req_part_1: int, req_part_2: float, operation: str) -> str:
        """Ask both models, and decide by the request what becomes of their answers."""
        req = f"({req_part_1} + {req_part_2})"
        r1 = self.m1.forward.remote(req)
        r2 = self.m2.forward.remote(req)
        rst = await asyncio.gather(r1, r2)
        return f"sum({rst})" if operation == "sum" else f"max({rst})"


# mypy knows nothing of what a class decorator returns; called like this, it does.
Model = deployment(WeightModel)
Combiner = deployment(ModelCombiner)

with InputNode() as user_input:
    m1 = Model.bind(1)
    m2 = Model.bind(2)
    combiner = Combiner.bind(m1, m2)
    dag = combiner.run.bind(
        preprocessor.bind(user_input[0]), avg_preprocessor.bind(user_input[1]), user_input[2]
    )

serve_dag = DAGDriver.options(route_prefix="/my-dag", num_replicas=2).bind(
    dag, http_adapter=json_request
)
