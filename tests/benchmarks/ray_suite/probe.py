"""Measure one peer from a script: `python -m tests.benchmarks.ray_suite.probe MODULE WORK ...`.

The module is one that has `calling`. The figures are printed as JSON, on the last line.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvloop

Call = Callable[[Any], Awaitable[Any]]

SIDE_BY_SIDE = 32
SETTLES_WITHIN_S = 2
_WARM_UP = 50


async def call(call: Call, seconds: float) -> dict[str, float]:
    """Call with a small value: one call after another, then many side by side."""
    if await call("ping") != "ping":
        raise SystemExit("wrong answer")
    for _ in range(_WARM_UP):
        await call("ping")
    durations = await _durations(call, "ping", seconds)
    start = time.perf_counter()
    callers = [_durations(call, "ping", seconds) for _ in range(SIDE_BY_SIDE)]
    calls = sum(map(len, await asyncio.gather(*callers)))
    return {"p50": statistics.median(durations), "rate": calls / (time.perf_counter() - start)}


async def values(call: Call, seconds: float, megabytes: float) -> dict[str, float]:
    """Call with an array, and get one of the same size back."""
    import numpy

    array = numpy.zeros(int(megabytes * 1e6 / 4), dtype="float32")
    for _ in range(2):  # the first one is paid by whoever allocates
        answer = await call(array)
    if answer.shape != array.shape or answer[0] != 3 or answer[-1] != 3:
        raise SystemExit("wrong answer")
    del answer
    return {"p50": statistics.median(await _durations(call, array, seconds))}


async def memory(call: Call) -> dict[str, float]:
    """Return the megabytes of the process that answers, when it has nothing to do."""
    pid, numpy_imported = await call(0)
    await asyncio.sleep(SETTLES_WITHIN_S)
    kilobytes = {"Pss": 0, "Private_Clean": 0, "Private_Dirty": 0}
    smaps = Path(f"/proc/{pid}/smaps_rollup").read_text()  # noqa: ASYNC240
    for line in smaps.splitlines():
        name, _, amount = line.partition(":")
        if name in kilobytes:
            kilobytes[name] = int(amount.split()[0])
    return {
        "pss": kilobytes["Pss"] / 1e3,
        "uss": (kilobytes["Private_Clean"] + kilobytes["Private_Dirty"]) / 1e3,
        "numpy": numpy_imported,
    }


async def _durations(call: Call, value: Any, seconds: float) -> list[float]:
    durations: list[float] = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end or len(durations) < 3:
        await call(value)
        durations.append(time.perf_counter() - start)
    return durations


WORK = {"call": (call, "echo"), "values": (values, "chain"), "memory": (memory, "process")}


async def main(module: str, work: str, *arguments: str) -> None:
    probe, subject = WORK[work]
    async with importlib.import_module(module).calling(subject) as call:
        figures = await probe(call, *map(float, arguments))
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
