from collections.abc import Awaitable, Callable
from typing import Annotated, Any, assert_type

from fastapi import Depends, FastAPI

from fastapi_graph import (
    DeploymentHandle,
    DeploymentResponse,
    Graph,
    GraphSettings,
    deployment,
    graph_router,
)
from fastapi_graph.http_adapters import json_request


@deployment
def double(value: int) -> int:
    return value * 2


node = double.bind()
graph = Graph(node, settings=GraphSettings(serialize=True))
app = FastAPI(lifespan=graph.lifespan)
app.include_router(graph_router(graph, http_adapter=json_request, tags=["graph"]), prefix="/g")
app.include_router(graph_router({"/a": node}, settings=GraphSettings(), dependencies=[]))

assert_type(graph.handle, DeploymentHandle)
assert_type(graph.handle.forward, DeploymentHandle)
assert_type(graph.handle.options(method_name="forward"), DeploymentHandle)
assert_type(graph.provide(node), Callable[[], Awaitable[DeploymentHandle]])

Handle = Annotated[DeploymentHandle, Depends(graph.provide(node))]


@app.get("/injected")
async def injected(handle: Handle, value: int) -> int:
    result: int = await handle.remote(value)
    return result


app.dependency_overrides[graph.provide(node)] = lambda: None


async def use() -> None:
    async with graph as started:
        assert_type(started, Graph)
        response = started.handle.remote(1)
        value: int = await response
        async for item in started.handle.remote(1):
            print(item, value)
    await graph.start()
    await graph.stop()
    with graph.override(node, lambda value: value):
        pass
    for status in graph.status():
        assert_type(status.name, str)
        assert_type(status.ongoing, int)


def in_thread(response: DeploymentResponse) -> Any:
    assert_type(response.cancel(), bool)
    assert_type(response.done(), bool)
    return response.result(timeout_s=1.5)


async def in_loop(response: DeploymentResponse) -> Any:
    return await response
