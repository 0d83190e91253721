"""Programs that tests start: what they print, how they end, and that nothing of them stays."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

__all__ = ["Program", "Start", "answer", "free_port", "session_of", "start"]

PATIENCE_S = 9.0
ROOT = Path(__file__).parents[1]


class Program:
    """A running program in a session of its own, so that all that it starts can be found.

    Args:
        command: The program and its arguments.
        folder: Where it runs.
        log: The file that gets what it prints.
        environ: Additional environment variables.
    """

    def __init__(
        self, command: Sequence[str], folder: Path, log: Path, environ: Mapping[str, str]
    ) -> None:
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, "PYTHONWARNINGS": "error", **environ},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._process.pid

    @property
    def output(self) -> str:
        """What it has printed until now."""
        return self._log.read_text("utf-8", "replace")

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait until it has printed what matches `pattern`."""
        deadline = time.monotonic() + PATIENCE_S
        while (found := re.search(pattern, self.output)) is None:
            running = self._process.poll() is None
            assert running or re.search(pattern, self.output), f"it ended: {self.output}"
            assert time.monotonic() < deadline, f"{pattern!r} is not in: {self.output}"
            time.sleep(0.01)
        return found

    def wait_for_url(self) -> str:
        """Wait until it says where it listens."""
        return self.wait_for(
            r"(?:listening on|running on|Listening at:) (http://127\.0\.0\.1:\d+)"
        ).group(1)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the program alone."""
        os.kill(self.pid, number)

    def press_ctrl_c(self) -> None:
        """Send SIGINT to every process of the session, as a terminal does."""
        os.killpg(self.pid, signal.SIGINT)

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Wait for its end and return the exit code."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it has not ended after {timeout_s} s: {self.output}")

    def processes(self) -> set[int]:
        """Return the processes of its session."""
        return set(session_of(self.pid))

    def assert_gone(self, timeout_s: float = 2.0) -> None:
        """Check that no process of its session is left."""
        deadline = time.monotonic() + timeout_s
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not left, f"left behind: {left}; it printed: {self.output}"

    def kill(self) -> None:
        """End it and all that it has started."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()


def session_of(session: int) -> Iterator[int]:
    """Yield the processes of a session, apart from those that have ended."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        state, number = fields[0], int(fields[3])
        if number == session and state != "Z":
            yield int(path.parent.name)


Start = Callable[..., Program]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start programs that have ended when the test has: `start("run", "graphs:dag")`.

    The arguments are those of the Python interpreter. Keywords: `folder`, and `environ`.
    """
    programs: list[Program] = []

    def start(*arguments: object, folder: Path = tmp_path, **environ: str) -> Program:
        log = tmp_path / f"output-{len(programs)}.txt"
        command = [sys.executable, *map(str, arguments)]
        programs.append(Program(command, folder, log, environ))
        return programs[-1]

    yield start
    for program in programs:
        program.kill()


def free_port() -> int:
    """Return a port on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answer(method: str, url: str, **options: Any) -> httpx.Response:
    """Return the answer to a request, as soon as there is somebody who answers."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return httpx.request(method, url, timeout=PATIENCE_S, trust_env=False, **options)
        except httpx.TransportError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
