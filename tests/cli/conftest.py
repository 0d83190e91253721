from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from tests.processes import start

__all__ = ["start"]

GRAPHS = """
    import os
    from pathlib import Path
    from fastapi_graph import DAGDriver, Graph, InputNode, deployment, shadow, split

    @deployment
    async def add_one(number: int) -> int:
        return number + 1

    @deployment(num_replicas=3)
    class Scale:
        def __init__(self, factor: int) -> None:
            self.factor = factor

        async def run(self, number: int) -> int:
            return number * self.factor

        def close(self) -> None:
            with Path("closed").open("a") as file:
                print(os.getpid(), file=file)

    @deployment
    def pid(anything) -> int:
        return os.getpid()

    with InputNode(int) as number:
        added = add_one.bind(number)
        dag = Scale.bind(10).run.bind(added)
        pids = pid.bind(number)

    driver = DAGDriver.options(route_prefix="/driven", num_replicas=2).bind(
        {"/": dag, "/pid": pids}
    )
    routes = {"/added": added, "/scaled": dag, "/pid": pids}
    graph = Graph(dag, name="scaling")

    canary = split({Scale.bind(1): 9, Scale.bind(2): 1}, sticky_by=abs)
    spread = shadow(canary, Scale.bind(3), share=0.25).run.bind(added)

    class Holder:
        dag = dag
"""
SERVICE = """
    from fastapi import FastAPI
    from graphs import added
    from fastapi_graph import graph_router

    app = FastAPI()
    app.include_router(graph_router(added), prefix="/added")

    @app.get("/own")
    async def own() -> str:
        return "own"
"""
WRONG = """
    from fastapi_graph import InputNode, deployment

    @deployment
    class Model:
        def forward(self, number: int) -> int:
            return number

    with InputNode() as number:
        dag = Model.bind().forward.bind(number, 2)
"""
BROKEN = """
    import time
    from fastapi_graph import deployment

    @deployment
    class Broken:
        def __init__(self): raise RuntimeError("no weights")
        def __call__(self, number): ...

    @deployment
    class Slow:
        def __init__(self): time.sleep(1.5)
        def __call__(self, number: int) -> int: return number

    dag = Broken.bind()
    slow = Slow.bind()
"""
UNSERVABLE = """
    from fastapi_graph import InputNode, deployment

    @deployment
    class Model:
        def predict(self, number: int) -> int:
            return number

    dag = Model.bind()
    plain = 5

    @deployment
    def count(number: int):
        yield from range(number)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a folder with modules to serve."""
    folder = tmp_path / "project"
    folder.mkdir()
    modules = {"graphs": GRAPHS, "service": SERVICE}
    modules |= {"wrong": WRONG, "broken": BROKEN, "unservable": UNSERVABLE}
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(source))
    return folder
