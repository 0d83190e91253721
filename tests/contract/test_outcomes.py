"""A short run of random calls; `tests/fuzz` has the long one."""

from __future__ import annotations

import pytest

from fastapi_graph import GraphSettings
from tests.contract.conftest import Serve
from tests.contract.outcomes import Caller, graph_of

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_random_calls(seed: int, backend: GraphSettings, serve: Serve) -> None:
    outer, inner = graph_of()
    async with serve(outer) as graph:
        caller = Caller(graph, inner, seed)
        await caller.run(500)
        await caller.settled()
        expected = {"answer", "CancelledError", "DeadlineExceededError"}
        assert expected <= caller.outcomes.keys(), caller.outcomes
