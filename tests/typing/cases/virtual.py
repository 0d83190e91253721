from typing import assert_type

from fastapi_graph import DeploymentHandle, Graph, InputNode, deployment, shadow, split


class Model:
    def __init__(self, weight: int) -> None:
        self.weight = weight

    async def predict(self, value: int) -> int:
        return self.weight * value


class Combiner:
    def __init__(self, model: DeploymentHandle) -> None:
        self.model = model

    async def run(self, value: int) -> int:
        return 1


@deployment
def add(left: int) -> int:
    return left + 1


M = deployment(Model)
m1, m2 = M.bind(1), M.bind(2)

canary = split({m1: 0.9, m2: 0.1}, sticky_by=lambda value, *_: value)
mirrored = shadow(canary, m2, share=0.1, max_ongoing_requests=10)
alternatives = {canary: 1, mirrored: 2}
nested = split(alternatives, sticky_by="user")
functions = split({add.bind(): 1})

with InputNode() as x:
    called = functions.bind(x)
    dag = deployment(Combiner).bind(nested).run.bind(canary.predict.bind(x), called["key"])

graph = Graph(dag)
assert_type(graph.handle_of(canary), DeploymentHandle)
assert_type(graph.traffic(canary), dict[str, int])
