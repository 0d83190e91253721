"""The example app under real servers."""

from __future__ import annotations

import signal
import time

import pytest

from tests.processes import PATIENCE_S, ROOT, Start, answer

TUTORIAL = (["5", [1, 2], "sum"], "sum(['(1 * (5 + 1.5))', '(2 * (5 + 1.5))'])")
KEY = {"x-api-key": "dev-key"}


def check(url: str) -> None:
    asked, answered = TUTORIAL
    assert answer("POST", f"{url}/my-dag", json=asked).json() == answered
    found = answer("POST", f"{url}/triage", json={"text": "Where is my parcel?"}, headers=KEY)
    assert found.json()["team"] == "delivery"
    assert answer("POST", f"{url}/triage", json={"text": "Hello"}).status_code == 401
    found = answer("POST", f"{url}/sentiment", json={"text": "great"}, headers=KEY)
    assert found.json()["score"] > 0.5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_uvicorn(start: Start, number: signal.Signals) -> None:
    server = start("-m", "uvicorn", "example_app:app", "--port=0", folder=ROOT)
    url = server.wait_for_url()
    check(url)
    assert answer("GET", f"{url}/health").json()["pid"] == server.pid
    server.send(number)
    server.wait()
    server.assert_gone()
    assert "Application shutdown complete" in server.output
    assert "Traceback" not in server.output.replace("KeyboardInterrupt", "")


def test_gunicorn_with_two_workers(start: Start) -> None:
    server = start(
        *("-m", "gunicorn", "example_app:app", "-k", "asgi", "-w", "2"),
        *("--no-control-socket", "--bind", "127.0.0.1:0"),
        folder=ROOT,
    )
    url = server.wait_for_url()
    check(url)
    workers: set[int] = set()
    deadline = time.monotonic() + PATIENCE_S
    while len(workers) < 2 and time.monotonic() < deadline:
        workers.add(answer("GET", f"{url}/health").json()["pid"])
    assert len(workers) == 2
    assert server.processes() == {server.pid, *workers}
    server.send(signal.SIGTERM)
    assert server.wait() == 0
    server.assert_gone()
    assert "Traceback" not in server.output
