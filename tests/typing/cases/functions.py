from collections.abc import AsyncIterator, Iterator
from typing import assert_type

from fastapi_graph import DAGDriver, Deployment, Graph, InputNode, deployment


@deployment
def add(left: int, right: float = 1.0) -> float:
    return left + right


@deployment(num_replicas=2, max_ongoing_requests=7, name="other")
async def clean(text: str, *, lower: bool = True) -> str:
    return text.lower() if lower else text


@deployment
def items(number: int) -> Iterator[int]:
    yield from range(number)


@deployment()
async def async_items(number: int) -> AsyncIterator[int]:
    yield number


# A decorated function keeps its signature.
assert_type(add(1), float)
assert_type(add(1, right=2.0), float)
assert_type(items(3), Iterator[int])
assert_type(async_items(3), AsyncIterator[int])


async def use() -> None:
    assert_type(await clean("a", lower=False), str)
    assert_type(await clean.options(name="cleaner")("a"), str)


# Options copy it, with the same signature.
assert_type(add.options(num_replicas=3)(1), float)
assert_type(add.name, str)

changed = add.options(user_config={"factor": 1})
same: Deployment[..., float] = changed

# bind takes anything: a node may stand for any argument.
with InputNode() as x:
    dag = add.bind(clean.bind(x["text"], lower=x.lower), right=x[0][1].number)
    part = add.bind(add.bind(1)["key"].attribute)

Graph(dag)
Graph({"/a": dag, "/b": part})
Graph(DAGDriver.bind(dag))
