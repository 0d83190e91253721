"""`fastapi-graph run` on a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.processes import PATIENCE_S, answer, session_of

# Makes standard input the terminal of the session that begins with this process.
IN_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "fastapi_graph", *sys.argv[1:]])
"""
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A terminal with a command in it."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self._master, slave = os.openpty()
        size = struct.pack("HHHH", 40, 140, 0, 0)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, size)
        self._process = subprocess.Popen(
            [sys.executable, "-c", IN_TERMINAL, *arguments],
            cwd=folder,
            env={**os.environ, "TERM": "xterm-256color", "PYTHONWARNINGS": "error"},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self.pid = self._process.pid
        self.raw = ""

    @property
    def shown(self) -> str:
        """All that has been shown, without control sequences."""
        return CONTROL.sub("", self.raw)

    def read(self, seconds: float = 0.05) -> bool:
        """Read what is shown for that long; False when nobody holds the terminal any more."""
        if select.select([self._master], [], [], seconds)[0]:
            try:
                self.raw += os.read(self._master, 65536).decode("utf-8", "replace")
            except OSError:
                return False
        return True

    def wait_for(self, pattern: str) -> re.Match[str]:
        deadline = time.monotonic() + PATIENCE_S
        while (found := re.search(pattern, self.shown)) is None:
            assert self.read() or re.search(pattern, self.shown), f"it ended: {self.shown}"
            assert time.monotonic() < deadline, f"{pattern!r} is not in: {self.shown}"
        return found

    def type(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def wait(self) -> int:
        """Read until the command ends, and return its exit code."""
        deadline = time.monotonic() + PATIENCE_S
        while self._process.poll() is None:
            self.read(0.02)
            assert time.monotonic() < deadline, f"it has not ended: {self.shown}"
        return self._process.returncode

    def close(self) -> None:
        for pid in session_of(self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        self._process.wait()
        os.close(self._master)


Open = Callable[..., Terminal]


@pytest.fixture
def terminal(project: Path) -> Iterator[Open]:
    terminals: list[Terminal] = []

    def terminal(*arguments: str) -> Terminal:
        terminals.append(Terminal(list(arguments), project))
        return terminals[-1]

    yield terminal
    for opened in terminals:
        opened.close()


HEADER = r"graph\W+deployment\W+state\W+replicas\W+starting\W+ongoing\W+queued\W+restarts\W+error"


@pytest.mark.parametrize("workers", [1, 2])
def test_status_table(terminal: Open, workers: int) -> None:
    shown = terminal("run", "graphs:graph", "--port=0", f"--workers={workers}")
    url = shown.wait_for(r"listening on\s+(http://127\.0\.0\.1:\d+)").group(1)
    shown.wait_for(HEADER)
    shown.wait_for(rf"scaling\W+Scale\W+running\W+{workers}/{workers}\W+0\W+0\W+0\W+0\W")
    shown.wait_for(rf"scaling\W+add_one\W+running\W+{workers}/{workers}\W+0\W+0\W+0\W+0\W")
    assert answer("POST", url, json=4).json() == 50
    shown.type(b"\x03")  # Ctrl-C
    assert shown.wait() == 0
    assert not set(session_of(shown.pid))
    assert "Traceback" not in shown.shown


def test_table_is_refreshed_in_place(terminal: Open) -> None:
    shown = terminal("run", "graphs:graph", "--port=0")
    shown.wait_for(r"Scale\W+running")
    before = len(shown.raw)
    deadline = time.monotonic() + 2.5
    while time.monotonic() < deadline:
        shown.read()
    later = shown.raw[before:]
    assert "Scale" in later
    assert "\x1b[1A" in later  # moves up, over the table before
    assert "Scale is running" not in shown.shown  # that is for what is no terminal


def test_progress_and_requests_are_shown(terminal: Open) -> None:
    shown = terminal("run", "graphs:graph", "--port=0")
    url = shown.wait_for(r"listening on\s+(http://127\.0\.0\.1:\d+)").group(1)
    shown.wait_for(r"Scale: running, after")
    answer("POST", url, json=4)
    shown.wait_for(r"POST / HTTP/1\.1")
    assert shown.shown.count("Scale: starting") == 1


def test_check_fits_the_terminal(terminal: Open) -> None:
    shown = terminal("check", "graphs:graph")
    assert shown.wait() == 0
    while shown.read():
        pass
    assert "add_one: 1 replica (graphs.py:27)" in shown.shown
