"""Programs that are started for a measurement, and of which nothing stays behind."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.benchmarks import seed, serving
from tests.benchmarks.serving import ROOT, BenchmarkError

CLUSTER = "tests.benchmarks.ray_suite.cluster"
STARTS_WITHIN_S = 90
STOPS_WITHIN_S = 20
_NOT_YET = (404, 500, 502, 503, 504)
_MARK = "BENCH_STAGE"
_SETTINGS = ("BENTOML_", "FASTAPI_GRAPH_", "PYTHON", "RAY_", "UVICORN_")
"""How the variables begin that would change what is measured: they are not passed on."""


class Program:
    """A running program.

    Args:
        command: The program and its arguments.
        environ: Its environment.
        log: The file that gets what it prints.
    """

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], log: Path) -> None:
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=dict(environ),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_for_line(self, begins: str) -> str:
        """Wait for a line that begins like this, and return the rest of it."""
        for _ in self._while_it_starts():
            for line in self.log.read_text("utf-8", "replace").splitlines(keepends=True):
                if line.startswith(begins) and line.endswith("\n"):
                    return line.removeprefix(begins).strip()
        raise AssertionError

    def wait_for_answer(self, port: int) -> float:
        """Wait for the first right answer to the request, and return when it came.

        A server may be reachable before the graph behind it is: until then it answers with an
        error, or not at all.

        Raises:
            BenchmarkError: The answer is wrong, or none comes.
        """
        for _ in self._while_it_starts():
            with contextlib.suppress(OSError, http.client.HTTPException):
                status, answer = serving.ask(port)
                if status == 200 and answer == seed.ANSWER:
                    return time.monotonic()
                if status not in _NOT_YET:
                    raise self._failed(f"wrong answer {status} {answer!r}")
        raise AssertionError

    def output(self, timeout_s: float) -> str:
        """Wait for its end, and return the last line that it has printed."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise self._failed(f"has not ended after {timeout_s:.0f} s") from None
        if code:
            raise self._failed(f"ended with {code}")
        return self.log.read_text("utf-8", "replace").splitlines()[-1]

    def stop(self) -> None:
        """Ask it to end: as Ctrl-C does, and by the end of its standard input."""
        assert self.process.stdin is not None
        if self.process.poll() is None:
            self.process.stdin.close()
            self.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOPS_WITHIN_S)

    def _while_it_starts(self) -> Iterator[None]:
        deadline = time.monotonic() + STARTS_WITHIN_S
        while time.monotonic() < deadline:
            ended = self.process.poll() is not None
            yield
            if ended:
                raise self._failed(f"ended with {self.process.returncode}")
            time.sleep(0.01)
        raise self._failed(f"has not started within {STARTS_WITHIN_S} s")

    def _failed(self, what: str) -> BenchmarkError:
        lines = self.log.read_text("utf-8", "replace").strip().splitlines()
        print(*lines[-30:], sep="\n", file=sys.stderr, flush=True)
        raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
        reason = (raised or lines or ["it printed nothing"])[-1]
        return BenchmarkError(f"{what}: {reason[:200]}")


class Stage:
    """Where programs run one peer's measurement; when it ends, nothing of them is left.

    ```
    with Stage() as stage:
        program = stage.start([...], {...})
    ```

    Everything started here carries a mark in its environment, whatever process it descends
    from and whatever session it makes for itself. That is how it is found again.
    """

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="bench-"))
        self._mark = f"{_MARK}={secrets.token_hex(8)}"
        self._programs: list[Program] = []
        name, _, value = self._mark.partition("=")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(_SETTINGS)}
        self._environ = kept | {
            name: value,
            "PYTHONPATH": str(ROOT),
            "BENTOML_DO_NOT_TRACK": "True",
            "BENTOML_HOME": str(self._folder / "bentoml"),
            # A folder and a token of its own: other clusters of this machine are not disturbed.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_TMPDIR": str(self._folder),
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def __enter__(self) -> Stage:
        return self

    def start(self, command: Sequence[str], environ: Mapping[str, str] | None = None) -> Program:
        """Start a program; it ends with the stage."""
        log = self._folder / f"{len(self._programs)}.log"
        program = Program(command, self._environ | (environ or {}), log)
        self._programs.append(program)
        return program

    def start_cluster(self, python: str, environ: Mapping[str, str] | None = None) -> None:
        """Start a Ray cluster that every later program of the stage joins."""
        program = self.start([python, "-m", CLUSTER], environ)
        self._environ["RAY_ADDRESS"] = program.wait_for_line("address")

    def __exit__(self, *exc_info: object) -> None:
        try:
            for program in reversed(self._programs):
                program.stop()
            self._wait_for_the_rest()
        finally:
            while left := self._left():  # what is killed may just have started another one
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.05)
            for program in self._programs:
                program.process.wait()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _wait_for_the_rest(self) -> None:
        """Give what the programs have started a moment to end after them."""
        deadline = time.monotonic() + 5
        while self._left() and time.monotonic() < deadline:
            time.sleep(0.05)

    def _left(self) -> list[int]:
        mark = self._mark.encode()
        left = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # it has ended, or is not ours
                if mark in path.read_bytes().split(b"\0"):
                    left.append(int(path.parent.name))
        return left
