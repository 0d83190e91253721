"""Measuring in rounds, where a peer that cannot run here is missing from the table only."""

from __future__ import annotations

import operator
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from tests.benchmarks.serving import BenchmarkError
from tests.benchmarks.timing import Row, Target

Figures = TypeVar("Figures")


class Results(Generic[Figures]):
    """What the rounds have given, by name; and why something is missing."""

    def __init__(self) -> None:
        self._figures: dict[str, list[Figures]] = {}
        self._reasons: dict[str, str] = {}

    def add(self, name: str, figures: Figures) -> None:
        self._figures.setdefault(name, []).append(figures)

    def miss(self, name: str, reason: str) -> None:
        self._reasons[name] = " ".join(reason.split()).replace("|", "/")

    def row(
        self,
        work: str,
        names: tuple[str, str],
        peer: str,
        figure: Callable[[Figures], float],
        show: Callable[[float], str],
        target: Target | None,
        compare: Callable[[float, float], float] = operator.truediv,
        note: str = "",
    ) -> Row:
        """Compare two names: in the rounds that both have, or show what there is of one."""
        ours, theirs = (self._figures.get(name, []) for name in names)
        rounds = min(len(ours), len(theirs)) or max(len(ours), len(theirs))
        notes = [note] if note else []
        notes += [f"{name}: {self._reasons[name]}" for name in names if name in self._reasons]
        return Row(
            work,
            peer,
            [figure(figures) for figures in ours[:rounds]],
            [figure(figures) for figures in theirs[:rounds]],
            show,
            target,
            compare,
            "; ".join(notes),
        )


def measure(one: Callable[[str], Figures], names: Sequence[str], rounds: int) -> Results[Figures]:
    """Measure each name in turn, round by round; one that fails is left out from then on."""
    results: Results[Figures] = Results()
    left = list(names)
    for number in range(rounds):
        for name in tuple(left):
            print(f"  round {number + 1}, {name}", file=sys.stderr, flush=True)
            try:
                results.add(name, one(name))
            except (BenchmarkError, OSError, subprocess.SubprocessError) as error:
                print(f"  {name}: {error}", file=sys.stderr, flush=True)
                results.miss(name, str(error))
                left.remove(name)
    return results
