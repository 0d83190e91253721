from typing import Any, assert_type

from pydantic import BaseModel

from fastapi_graph import Deployment, DeploymentHandle, Graph, InputNode, deployment


class Payload(BaseModel):
    text: str


class Model:
    def __init__(self, weight: int, *, bias: float = 0) -> None:
        self.weight = weight

    async def forward(self, value: int) -> int:
        return self.weight * value

    def __call__(self, value: int) -> str:
        return str(value)


class Combiner:
    def __init__(self, m1: DeploymentHandle, m2: DeploymentHandle) -> None:
        self.m1 = m1
        self.m2 = m2

    async def run(self, value: int) -> Any:
        return await self.m1.forward.remote(value) + await self.m2.remote(value)


# A class that is not decorated but passed types fully, under every checker.
M = deployment(Model)
N = deployment(num_replicas=2)(Model)
C = deployment(Combiner)

assert_type(M(1), Model)
assert_type(M(1, bias=0.5).weight, int)
assert_type(N(1), Model)
assert_type(M.options(name="other")(2), Model)
assert_type(M(1)(2), str)

kept: Deployment[..., Model] = M


# A constructor that receives handles is bound to nodes.
with InputNode(Payload) as x:
    m1 = M.bind(1)
    m2 = M.bind(weight=2, bias=0.5)
    combined = C.bind(m1, m2=m2)
    dag = combined.run.bind(m1.forward.bind(x.text))
    called = m1.__call__.bind(x)

graph = Graph(dag, name="typed")
assert_type(graph.handle, DeploymentHandle)
assert_type(graph.handle_of(m1), DeploymentHandle)
assert_type(graph.handle_of("Model"), DeploymentHandle)
