"""Compare the graph on Ray with its peers: `python -m tests.benchmarks.ray_suite [name ...]`.

A name is a row, or a peer of the row `http`. Only ratios count: every round measures ours and
its peers in turn, and a row shows the median of the ratios of the rounds, with the smallest and
the largest. What cannot run here is missing from the table, and the table says why.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import os
import platform
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.benchmarks.ray_suite import environments, through_handles, through_http
from tests.benchmarks.ray_suite.peers import Peers
from tests.benchmarks.serving import BenchmarkError
from tests.benchmarks.timing import Effort, Row

Rows = Callable[[Effort, Peers], Iterator[Row]]

ROWS: dict[str, Rows] = {
    "call": through_handles.call,
    "values": through_handles.values,
    "stream": through_http.streams,
    "hedge": through_handles.hedge,
    "start": through_http.start,
    "memory": through_handles.memory,
}
HTTP = "http"
NORMAL, QUICK = Effort(rounds=5, duration=5), Effort(rounds=1, duration=3)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that all that runs is stopped
    given = _arguments()
    peers = Peers(given.envs)
    effort = QUICK if given.quick else Effort(given.rounds, given.duration)
    compared = [name for name in through_http.TARGETS if name in given.name]
    chosen = {HTTP: functools.partial(through_http.load, names=compared or through_http.TARGETS)}
    if given.name and not compared and HTTP not in given.name:
        chosen = {}
    chosen |= {name: rows for name, rows in ROWS.items() if name in given.name or not given.name}
    lines: list[str] = []
    for name, rows in chosen.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            lines += [str(row) for row in rows(effort, peers)]
        except BenchmarkError as error:
            lines.append(str(Row(name, "-", [], [], str, None, note=str(error))))
    print(_header(effort, peers), "\n".join([Row.HEADER, *lines]), sep="\n\n", flush=True)


def _arguments() -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        "python -m tests.benchmarks.ray_suite",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    names = [HTTP, *through_http.TARGETS, *ROWS]
    parser.add_argument("name", nargs="*", help=f"what to run, of {', '.join(names)}; else all")
    parser.add_argument("--rounds", type=int, default=NORMAL.rounds, help="how often")
    parser.add_argument(
        "--duration", type=int, default=NORMAL.duration, help="seconds of one measurement"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a rough look: one round, three seconds each"
    )
    parser.add_argument(
        "--envs",
        type=Path,
        default=Path(os.environ.get(environments.FOLDER_VARIABLE, environments.FOLDER)),
        help="the folder of the peers' virtual environments, made where they are missing; "
        f"also {environments.FOLDER_VARIABLE} in the environment",
    )
    given = parser.parse_args()
    if unknown := set(given.name) - set(names):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    given.envs = given.envs.absolute()
    return given


def _header(effort: Effort, peers: Peers) -> str:
    command = shlex.join(["python", "-m", "tests.benchmarks.ray_suite", *sys.argv[1:]])
    versions = "; ".join(
        f"{name}: {', '.join(f'{package} {number}' for package, number in found.items())}"
        for name, found in peers.versions().items()
    )
    return (
        f"{datetime.datetime.now(datetime.UTC).date()}, {os.cpu_count()} CPUs, "
        f"{platform.system()} {platform.machine()}, {platform.python_implementation()} "
        f"{platform.python_version()}; {versions}; "
        f"medians of {effort.rounds} interleaved rounds: `{command}`"
    )


if __name__ == "__main__":
    main()
