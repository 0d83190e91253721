from typing import assert_type

from fastapi_graph import DeploymentHandle, Graph, InputNode, deployment, graph_router


@deployment
def add(left: int, right: int = 1) -> int:
    return left + right


class Model:
    def __init__(self, weight: int) -> None:
        self.weight = weight


M = deployment(Model)

add("1")  # error
add()  # error
add(1, wrong=2)  # error
assert_type(add(1), str)  # error
add.options(num_replicas=2)("1")  # error
number: str = add(1)  # error

M("heavy")  # error
M()  # error
M(1).missing  # error
M.options(name="other")(1, 2)  # error

deployment(num_replicas="two")(add.target)  # error
deployment(replicas=2)  # error
deployment(5)  # error


async def use(graph: Graph, handle: DeploymentHandle) -> None:
    await graph.start(1)  # error
    graph.handle_of(5)  # error
    handle.options(name="forward")  # error
    Graph()  # error
    Graph(add.bind(1), nme="other")  # error
    graph_router(graph, settings={"serialize": True})  # error
    wrong: int = graph.handle  # error
    print(wrong)


with InputNode() as x:
    add.bnd(x)  # error
