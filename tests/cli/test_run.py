"""`fastapi-graph run`."""

from __future__ import annotations

import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes import PATIENCE_S, Program, Start, answer, free_port

Serve = Callable[..., Program]


@pytest.fixture
def serve(start: Start, project: Path) -> Serve:
    """Run the command in the project's folder."""

    def serve(target: str, *options: object, folder: Path = project, **environ: str) -> Program:
        command = ("-m", "fastapi_graph", "run", target, "--port=0", *options)
        return start(*command, folder=folder, **environ)

    return serve


def pids(url: str, wanted: int) -> set[int]:
    found: set[int] = set()
    deadline = time.monotonic() + PATIENCE_S / 2
    while len(found) < wanted and time.monotonic() < deadline:
        found.add(answer("POST", url, json=0).json())
    return found


@pytest.mark.parametrize(
    "target, path, number",
    [
        ("graphs:dag", "/", 50),
        ("graphs.dag", "/", 50),
        ("graphs:Holder.dag", "/", 50),
        ("graphs:graph", "/", 50),
        ("graphs:routes", "/added", 5),
        ("service:app", "/added", 5),
    ],
)
def test_targets(serve: Serve, target: str, path: str, number: int) -> None:
    program = serve(target)
    url = program.wait_for_url()
    assert answer("POST", f"{url}{path}", json=4).json() == number
    assert program.processes() == {program.pid}
    program.press_ctrl_c()
    assert program.wait() == 0
    program.assert_gone()


def test_routes_of_an_app_and_of_a_dict(serve: Serve) -> None:
    url = serve("service:app").wait_for_url()
    assert answer("GET", f"{url}/own").json() == "own"
    url = serve("graphs:routes").wait_for_url()
    assert answer("POST", f"{url}/scaled", json=4).json() == 50
    assert answer("POST", f"{url}/", json=4).status_code == 404


def test_script_on_the_path(start: Start, project: Path) -> None:
    script = Path(sys.executable).with_name("fastapi-graph")
    program = start(script, "run", "graphs:dag", "--port", free_port(), folder=project)
    assert answer("POST", program.wait_for_url(), json=4).json() == 50


def test_port(start: Start, project: Path) -> None:
    port = free_port()
    program = start("-m", "fastapi_graph", "run", "graphs:dag", "--port", port, folder=project)
    assert answer("POST", f"http://127.0.0.1:{port}/", json=4).json() == 50
    assert program.wait_for_url() == f"http://127.0.0.1:{port}"


@pytest.mark.parametrize("workers", [1, 2])
def test_port_in_use(start: Start, project: Path, workers: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        command = ("-m", "fastapi_graph", "run", "graphs:dag", "--port", port)
        program = start(*command, "--workers", workers, folder=project)
        assert program.wait() != 0
    program.assert_gone()
    assert "address already in use" in program.output.lower()
    assert str(port) in program.output
    assert "Traceback" not in program.output


def test_app_dir(serve: Serve, project: Path, tmp_path: Path) -> None:
    url = serve("graphs:dag", "--app-dir", project, folder=tmp_path).wait_for_url()
    assert answer("POST", url, json=4).json() == 50


def test_app_dir_with_workers(serve: Serve, project: Path, tmp_path: Path) -> None:
    options = ("--app-dir", project.name, "--workers", 2)
    url = serve("graphs:dag", *options, folder=tmp_path).wait_for_url()
    assert answer("POST", url, json=4).json() == 50


@pytest.mark.parametrize("prefix", ["/else", "/else/", "/a/b"])
def test_route_prefix(serve: Serve, prefix: str) -> None:
    url = serve("graphs:dag", "--route-prefix", prefix).wait_for_url()
    assert answer("POST", f"{url}{prefix.rstrip('/')}", json=4).json() == 50
    assert answer("POST", url, json=4).status_code == 404


def test_route_prefix_without_a_slash(serve: Serve) -> None:
    program = serve("graphs:dag", "--route-prefix", "else")
    assert program.wait() in (1, 2)
    assert "else" in program.output
    assert "start with '/'" in program.output
    assert "Traceback" not in program.output


def test_driver_has_workers_and_a_prefix(serve: Serve) -> None:
    program = serve("graphs:driver")
    url = program.wait_for_url()
    assert answer("POST", f"{url}/driven", json=4).json() == 50
    found = pids(f"{url}/driven/pid", 2)
    assert len(found) == 2
    assert program.pid not in found
    assert found < program.processes()


def test_workers_override_the_driver(serve: Serve) -> None:
    program = serve("graphs:driver", "--workers", 1, "--route-prefix", "/else")
    url = program.wait_for_url()
    assert pids(f"{url}/else/pid", 1) == {program.pid}


def test_workers_of_an_app(serve: Serve) -> None:
    program = serve("service:app", "--workers", 2)
    url = program.wait_for_url()
    assert answer("POST", f"{url}/added", json=4).json() == 5
    program.wait_for(r"(?s)(Application startup complete.*){2}")
    assert len(program.processes()) >= 3


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "Ctrl-C"])
@pytest.mark.parametrize("workers", [1, 2])
def test_ends_with_a_signal(serve: Serve, project: Path, workers: int, how: str) -> None:
    program = serve("graphs:dag", "--workers", workers)
    assert answer("POST", program.wait_for_url(), json=4).json() == 50
    program.wait_for(rf"(?s)(Application startup complete.*){{{workers}}}")
    if how == "Ctrl-C":
        program.press_ctrl_c()
    else:
        program.send(signal.Signals[how])
    code = program.wait()
    program.assert_gone()
    assert len((project / "closed").read_text().splitlines()) == workers
    assert "Traceback" not in program.output
    assert code == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_lines_when_not_a_terminal(serve: Serve, workers: int) -> None:
    program = serve("graphs:graph", "--workers", workers)
    program.wait_for("scaling: Scale is running")
    program.wait_for("scaling: add_one is running")
    for name in ("Scale", "add_one"):  # progress while they load
        assert len(re.findall(rf"{name}: starting", program.output)) == workers
        assert len(re.findall(rf"{name}: running, after 0\.\d+ s", program.output)) == workers
    assert "\x1b" not in program.output
    assert not re.search("[┏┃│╭]", program.output)
    time.sleep(1.2)  # a line for a change, and not for every look
    assert program.output.count("Scale is running") == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_constructor_fails(serve: Serve, workers: int) -> None:
    program = serve("broken:dag", "--workers", workers)
    assert program.wait() != 0
    program.assert_gone()
    assert "Broken (bound at broken.py:15) did not start: RuntimeError: no weights" in (
        program.output
    )


def test_slow_constructor_is_seen_starting(serve: Serve) -> None:
    program = serve("broken:slow")
    program.wait_for("broken.Slow: Slow is starting")
    assert "is running" not in program.output
    program.wait_for("broken.Slow: Slow is running")
    assert answer("POST", program.wait_for_url(), json=4).json() == 4


@pytest.mark.parametrize("workers", [1, 2])
def test_backend(serve: Serve, project: Path, workers: int) -> None:
    options = ("--backend", "inprocess", "--workers", workers)
    program = serve("graphs:dag", *options, FASTAPI_GRAPH_BACKEND="abacus")
    assert answer("POST", program.wait_for_url(), json=4).json() == 50


def test_reload(serve: Serve, project: Path) -> None:
    program = serve("graphs:driver", "--reload")
    url = f"{program.wait_for_url()}/driven"
    assert answer("POST", url, json=4).json() == 50
    module = project / "graphs.py"
    module.write_text(module.read_text().replace("Scale.bind(10)", "Scale.bind(100)"))
    deadline = time.monotonic() + PATIENCE_S - 2
    while answer("POST", url, json=4).json() != 500 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert answer("POST", url, json=4).json() == 500
    program.press_ctrl_c()
    assert program.wait() == 0
    program.assert_gone()
    assert "Traceback" not in program.output


def test_reload_after_a_mistake(serve: Serve, project: Path) -> None:
    program = serve("graphs:dag", "--reload")
    url = program.wait_for_url()
    assert answer("POST", url, json=4).json() == 50
    module = project / "graphs.py"
    right = module.read_text()
    module.write_text(right.replace("run.bind(added)", "run.bind(added, 1)"))
    program.wait_for(r"Scale\.run takes 1 argument \(number\), bound with 2")
    module.write_text(right.replace("Scale.bind(10)", "Scale.bind(100)"))
    assert answer("POST", url, json=4).json() == 500
