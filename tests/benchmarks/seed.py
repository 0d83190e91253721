"""The work that every peer does: the tutorial's graph, without its delays.

The parts are plain functions and classes; `predict` is how one would put them together by
hand. The graph of the same parts is in `tests.benchmarks.peers.graph`.
"""

from __future__ import annotations

import asyncio
from typing import Any

REQUEST: list[Any] = ["5", [1, 2], "sum"]
ANSWER = "sum(['(1 * (5 + 1.5))', '(2 * (5 + 1.5))'])"

# The tutorial's delays, and how long the longest way through its graph takes with them.
PREPROCESSOR_S, AVG_PREPROCESSOR_S, MODEL_S = 0.1, 0.15, 0.3
CRITICAL_PATH_S = 0.45


async def preprocessor(input_data: str) -> int:
    return int(input_data)


async def avg_preprocessor(input_data: list[float]) -> float:
    return sum(input_data) / len(input_data)


class Model:
    def __init__(self, weight: int) -> None:
        self.weight = weight

    async def forward(self, req: str) -> str:
        return f"({self.weight} * {req})"


m1, m2 = Model(1), Model(2)


async def predict(data: list[Any]) -> str:
    part_1, part_2 = await asyncio.gather(preprocessor(data[0]), avg_preprocessor(data[1]))
    req = f"({part_1} + {part_2})"
    rst = await asyncio.gather(m1.forward(req), m2.forward(req))
    return f"sum({rst})" if data[2] == "sum" else f"max({rst})"
