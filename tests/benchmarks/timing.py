"""How everything here is timed, and how a result is judged and shown."""

from __future__ import annotations

import dataclasses
import gc
import operator
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: How often everything is measured.
        duration: Seconds of one run of wrk; a measurement in the process takes a tenth of it.
    """

    rounds: int
    duration: int


def pairwise(measures: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measure each in turn, round by round: what disturbs the machine disturbs all alike.

    One round before the others warms up and does not count.
    """
    results: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(rounds + 1):
        for name, measure in measures.items():
            gc.collect()  # nobody pays for what another one has left
            result = measure()
            if number:
                results[name].append(result)
    return results


def timed(call: Callable[[], Any]) -> float:
    """Return how many seconds a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


async def per_call(call: Callable[[Any], Awaitable[Any]], value: Any, seconds: float) -> float:
    """Call again and again for some seconds; return how many of them one call took."""
    calls = 0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        await call(value)
        calls += 1
    return elapsed / calls


@dataclasses.dataclass(frozen=True)
class Target:
    """What the ratio of ours to the peer's has to reach, and what it should.

    Attributes:
        limit: The smallest or the largest ratio that is good enough.
        aim: One that would be better still.
        at_least: Whether larger is better.
        note: The limit in other words.
    """

    limit: float
    aim: float | None = None
    at_least: bool = False
    note: str = ""

    def judge(self, ratio: float) -> str:
        if not self._reached(ratio, self.limit):
            return "no"
        if self.aim is not None and self._reached(ratio, self.aim):
            return "yes, the aim too"
        return "yes"

    def _reached(self, ratio: float, limit: float) -> bool:
        return ratio >= limit if self.at_least else ratio <= limit

    def __str__(self) -> str:
        sign = "≥" if self.at_least else "≤"
        aim = "" if self.aim is None else f", aim {self.aim:g}"
        note = f" ({self.note})" if self.note else ""
        return f"{sign} {self.limit:.4g}{aim}{note}"


def at_least(limit: float, *, aim: float | None = None) -> Target:
    return Target(limit, aim, at_least=True)


def at_most(limit: float, note: str = "") -> Target:
    return Target(limit, note=note)


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        work: What is done.
        peer: What it is compared with.
        ours: Our figures, one per round.
        theirs: The peer's, of the same rounds.
        show: Writes a figure.
        target: What the ratio has to reach; None where nothing was promised.
        compare: Puts our figure and the peer's of one round together; the ratio, by default.
        note: What else to know, or why there are no figures.
    """

    work: str
    peer: str
    ours: list[float]
    theirs: list[float]
    show: Callable[[float], str]
    target: Target | None
    compare: Callable[[float, float], float] = operator.truediv
    note: str = ""

    HEADER = (
        "| work | against | ours | theirs | ours / theirs | target | reached |\n"
        "| --- | --- | --- | --- | --- | --- | --- |"
    )

    def __str__(self) -> str:
        ratios = []
        if self.ours and self.theirs:
            pairs = zip(self.ours, self.theirs, strict=True)
            ratios = [self.compare(ours, theirs) for ours, theirs in pairs]
        verdict = [self.note] if self.note else []
        if ratios and self.target:
            verdict.insert(0, self.target.judge(statistics.median(ratios)))
        cells = (
            self.work,
            self.peer,
            self._median(self.ours),
            self._median(self.theirs),
            _with_spread(ratios) if ratios else "-",
            str(self.target or "-"),
            "; ".join(verdict) or "-",
        )
        return f"| {' | '.join(cells)} |"

    def _median(self, figures: list[float]) -> str:
        return self.show(statistics.median(figures)) if figures else "-"


def _with_spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})"


def rate(value: float) -> str:
    return f"{value:.0f} requests/s"


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size * 0.1:
            return f"{seconds / size:.3f} {unit}"
    return f"{seconds * 1e6:.1f} µs"
