"""Print the benchmark tables: `python -m tests.benchmarks [row ...]`.

Only ratios count: every row measures ours and its peer in turn, round by round, and shows the
median of the ratios of the rounds, with the smallest and the largest. Nothing fails because a
machine is slow.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version

from tests.benchmarks import batches, in_process, over_http, policies
from tests.benchmarks.timing import Effort, Row

ROWS: dict[str, Callable[[Effort], Iterator[Row]]] = {
    "http": over_http.throughput,
    "handle": in_process.through_handle,
    "chain": in_process.chained,
    "fan": in_process.fanned,
    "latency": over_http.latency,
    "cache": policies.cached,
    "overload": policies.overloaded,
    "batch": batches.overhead,
    "adaptive": batches.adaptive,
    "import": in_process.imported,
    "build": in_process.built,
}
NORMAL, QUICK = Effort(rounds=11, duration=2), Effort(rounds=3, duration=1)


def main() -> None:
    effort, names = _arguments()
    print(_header(effort), Row.HEADER, sep="\n\n", flush=True)
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        for row in ROWS[name](effort):
            print(row, flush=True)


def _arguments() -> tuple[Effort, list[str]]:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        "python -m tests.benchmarks",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("row", nargs="*", help=f"what to run, of {', '.join(ROWS)}; else all")
    parser.add_argument("--rounds", type=int, default=NORMAL.rounds, help="how often")
    parser.add_argument(
        "--duration",
        type=int,
        default=NORMAL.duration,
        help="seconds of one run of wrk; a measurement in the process takes a tenth of it",
    )
    parser.add_argument("--quick", action="store_true", help="a rough look, in about a minute")
    given = parser.parse_args()
    if unknown := set(given.row) - set(ROWS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    effort = QUICK if given.quick else Effort(given.rounds, given.duration)
    return effort, [name for name in ROWS if name in given.row or not given.row]


def _header(effort: Effort) -> str:
    packages = ("fastapi", "starlette", "pydantic", "uvicorn", "uvloop", "httptools")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    command = shlex.join(["python", "-m", "tests.benchmarks", *sys.argv[1:]])
    return (
        f"{datetime.datetime.now(datetime.UTC).date()}, {os.cpu_count()} CPUs, "
        f"{platform.system()} {platform.machine()}, {platform.python_implementation()} "
        f"{platform.python_version()}, {versions}; "
        f"medians of {effort.rounds} interleaved rounds: `{command}`"
    )


if __name__ == "__main__":
    main()
