"""What a replica that is not placed is said to wait for."""

from __future__ import annotations

from typing import Any

import pytest

from fastapi_graph.backends.ray.placement import needs_of, waits_for


@pytest.mark.parametrize(
    "options, needs",
    [
        ({}, {"CPU": 1}),
        ({"num_cpus": 0}, {}),
        ({"num_cpus": 2, "num_gpus": 0.5, "memory": 100}, {"CPU": 2, "GPU": 0.5, "memory": 100}),
        ({"num_cpus": 0, "resources": {"disk": 1}}, {"disk": 1}),
        ({"num_cpus": 0, "resources": None}, {}),
        ({"num_cpus": 0, "accelerator_type": "T4"}, {"accelerator_type:T4": 0.001}),
    ],
)
def test_needs(options: dict[str, Any], needs: dict[str, float]) -> None:
    assert needs_of(options) == needs


def node(alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"Alive": alive, "Resources": resources}


NODES = [node(CPU=4), node(CPU=1, GPU=1), node(alive=False, CPU=64)]


@pytest.mark.parametrize(
    "needs, available, words",
    [
        ({}, {}, ""),
        ({"CPU": 1}, {"CPU": 2}, ""),
        ({"CPU": 1}, {}, "needs {'CPU': 1}, which are in use"),
        ({"CPU": 8, "GPU": 1}, {"CPU": 5, "GPU": 1}, "needs {'CPU': 8}, no node has them"),
        ({"CPU": 4, "GPU": 1}, {"CPU": 5}, "needs {'CPU': 4, 'GPU': 1}, no node has all of them"),
    ],
)
def test_reasons(needs: dict[str, float], available: dict[str, float], words: str) -> None:
    reason = waits_for(needs, NODES, available)
    assert reason == (f"waiting for resources: {words}" if words else "")
