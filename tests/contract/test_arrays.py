"""Arrays between nodes, with and without serialisation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastapi_graph import DeploymentHandle, GraphSettings, InputNode, deployment
from tests.contract.conftest import Serve
from tests.contract.probes import collect

pytestmark = pytest.mark.anyio


@deployment
async def scale(values: Any, factor: float) -> Any:
    return values * factor


@deployment
def fill(values: Any) -> Any:
    values[:] = 7
    return values


@deployment
class Model:
    def __init__(self, weights: Any, helper: DeploymentHandle) -> None:
        self.weights = weights
        self.helper = helper

    async def forward(self, values: Any) -> Any:
        return self.weights @ await self.helper.remote(values, factor=2)


async def test_through_nodes_handles_and_constructors(serve: Serve) -> None:
    with InputNode() as x:
        dag = Model.bind(np.eye(3, dtype="float32"), scale.bind()).forward.bind(x["values"])
    async with serve(dag) as graph:
        result = await graph.handle.remote({"values": np.arange(3, dtype="float32")})
    np.testing.assert_array_equal(result, [0, 2, 4])
    assert result.dtype == np.float32


async def test_a_node_may_write_to_what_it_gets(serve: Serve) -> None:
    with InputNode() as x:
        dag = fill.bind(scale.bind(x, 1))
    async with serve(dag) as graph:
        result = await graph.handle.remote(np.zeros(1_000))
    assert (result == 7).all()
    assert result.flags.writeable


async def test_a_write_does_not_leak_under_serialisation(
    serialized: GraphSettings, serve: Serve
) -> None:
    constant, given = np.zeros(100), np.zeros(100)
    with InputNode() as x:
        dag = collect.bind(fill.bind(x), fill.bind(constant), x, constant)
    async with serve(dag) as graph:
        for _ in range(2):
            filled, filled_constant, *others = await graph.handle.remote(given)
            assert (filled == 7).all()
            assert (filled_constant == 7).all()
            assert all((other == 0).all() for other in others)
    assert not given.any()
    assert not constant.any()


@pytest.mark.parametrize("dtype", ["int8", "float64", "bool", "U3", "datetime64[s]"])
async def test_types_and_shapes_are_kept(dtype: str, serve: Serve) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    with InputNode() as x:
        dag = collect.bind(x, {"k": [x]})
    async with serve(dag) as graph:
        first, nested = await graph.handle.remote(array.transpose(1, 0, 2))
    for result in (first, nested["k"][0]):
        assert result.dtype == array.dtype
        np.testing.assert_array_equal(result, array.transpose(1, 0, 2))
