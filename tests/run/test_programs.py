"""Programs that use `run`: how they end."""

from __future__ import annotations

import signal
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.processes import Start, answer, free_port

GRAPH = """
    import sys
    import fastapi_graph as serve

    @serve.deployment
    class Model:
        def __call__(self, number: int) -> int:
            return number * 2

        async def slowly(self, number: int) -> int:
            import asyncio
            print("asked", flush=True)
            await asyncio.sleep(0.5)
            return number * 2

        def close(self) -> None:
            print("closed", flush=True)

    port = int(sys.argv[1])
    with serve.InputNode() as number:
        dag = Model.bind()
        slow = Model.bind().slowly.bind(number)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return tmp_path / "script.py"


def write(script: Path, body: str) -> None:
    script.write_text(textwrap.dedent(GRAPH) + textwrap.dedent(body))


BLOCKING = """
    handle = serve.run(dag, port=port, blocking=True)
    print("returned", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_blocking_ends_with_a_signal(start: Start, script: Path, number: signal.Signals) -> None:
    write(script, BLOCKING)
    port = free_port()
    program = start(script, port)
    assert answer("POST", f"http://127.0.0.1:{port}/", json=2).json() == 4
    program.send(number)
    code = program.wait()
    program.assert_gone()
    assert program.output.splitlines() == ["closed", "returned"]
    assert code == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_lets_requests_finish(start: Start, script: Path, number: signal.Signals) -> None:
    write(script, "serve.run(slow, port=port, blocking=True)")
    port = free_port()
    program = start(script, port)
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(answer, "POST", f"http://127.0.0.1:{port}/", json=2)
        program.wait_for("asked")
        program.send(number)
        assert asked.result().json() == 4
    program.wait()
    program.assert_gone()
    assert program.output.splitlines() == ["asked", "closed"]


def test_blocking_raises_what_a_constructor_raised(start: Start, script: Path) -> None:
    write(
        script,
        """
        @serve.deployment
        class Broken:
            def __init__(self):
                raise RuntimeError("no weights")
            def __call__(self, number): ...

        try:
            serve.run(Broken.bind(), port=port, blocking=True)
        except serve.DeploymentStartError as error:
            print("caught", error)
        """,
    )
    program = start(script, free_port())
    assert program.wait() == 0, program.output
    assert program.output.startswith("caught Broken (bound at ")


@pytest.mark.parametrize("in_flight", [False, True])
def test_script_that_does_not_shut_down(start: Start, script: Path, in_flight: bool) -> None:
    write(
        script,
        f"""
        import time
        print(serve.run(dag, port=port).remote(2).result())
        if {in_flight}:
            serve.run(slow, port=0, name="slow").remote(2)
        print("ends", flush=True)
        """,
    )
    program = start(script, free_port())
    program.wait_for("ends")
    began = time.monotonic()
    code = program.wait()
    assert time.monotonic() - began < 2
    program.assert_gone()
    lines = program.output.splitlines()
    assert lines.count("closed") == (2 if in_flight else 1), program.output
    assert code == 0
    assert "Traceback" not in program.output


def test_script_that_raises(start: Start, script: Path) -> None:
    write(script, "serve.run(dag, port=port)\nraise SystemExit('enough')")
    program = start(script, free_port())
    assert program.wait() == 1
    assert sorted(program.output.splitlines()) == ["closed", "enough"]


def test_interrupted_script(start: Start, script: Path) -> None:
    write(
        script,
        """
        import time
        serve.run(dag, port=port)
        print("waits", flush=True)
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        """,
    )
    program = start(script, free_port())
    program.wait_for("waits")
    program.send(signal.SIGINT)
    assert program.wait() == 0
    assert program.output.splitlines() == ["waits", "interrupted", "closed"]
