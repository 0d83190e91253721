"""`fastapi-graph check`, and what is wrong with a command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT, Start

Done = subprocess.CompletedProcess[str]
SCRIPT = Path(sys.executable).with_name("fastapi-graph")


def run(*command: object, folder: Path) -> Done:
    return subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=5,
        check=False,
    )


def check(target: str, *options: object, folder: Path) -> Done:
    return run(sys.executable, "-m", "fastapi_graph", "check", target, *options, folder=folder)


def test_tree(project: Path) -> None:
    done = check("graphs:dag", folder=project)
    assert done.returncode == 0, done.stdout + done.stderr
    tree = [line.strip(" │├└─") for line in done.stdout.splitlines()]
    assert tree == [
        "graph graphs.Scale, backend inprocess",
        "POST /",
        "Scale.run (graphs.py:28)",
        "add_one (graphs.py:27)",
        "InputNode (graphs.py:26)",
        "deployments",
        "Scale: num_replicas=3, but 1 in each process with this backend (graphs.py:28)",
        "add_one: 1 replica (graphs.py:27)",
    ]
    assert done.stderr == ""


def test_splits_and_shadows(project: Path) -> None:
    done = check("graphs:spread", folder=project)
    assert done.returncode == 0, done.stdout + done.stderr
    tree = [line.strip(" │├└─") for line in done.stdout.splitlines()]
    section = tree.index("splits and shadows")
    assert tree[1:3] == ["POST /", "shadow(split(Scale, Scale), Scale).run (graphs.py:38)"]
    assert [line.partition(":")[0] for line in tree[6 : section - 1]] == [
        "Scale",
        "Scale_1",
        "Scale_2",
    ]
    assert tree[section + 1 :] == [
        "split(Scale, Scale_1): 0.9 to Scale, 0.1 to Scale_1, sticky by abs (graphs.py:37)",
        "shadow(split(Scale, Scale_1), Scale_2): split(Scale, Scale_1) answers, 0.25 of the calls "
        "are copied to Scale_2 (graphs.py:38)",
    ]


@pytest.mark.parametrize(
    "target, shown",
    [
        ("graphs.dag", ["POST /\n", "Scale.run"]),
        ("graphs:Holder.dag", ["POST /\n", "Scale.run"]),
        ("graphs:graph", ["graph scaling", "Scale.run"]),
        ("graphs:routes", ["POST /added", "POST /scaled", "POST /pid"]),
        ("graphs:driver", ["POST /driven\n", "POST /driven/pid", "so 2 web processes"]),
        ("service:app", ["graph graphs.add_one", "add_one (graphs.py:27)"]),
        ("service.app", ["graph graphs.add_one", "add_one (graphs.py:27)"]),
    ],
)
def test_targets(project: Path, target: str, shown: list[str]) -> None:
    done = check(target, folder=project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(text in done.stdout for text in shown), done.stdout


def test_seed_like_graph_of_the_example_app() -> None:
    done = check("example_app.tutorial:serve_dag", folder=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "GET, POST /my-dag" in done.stdout
    assert "ModelCombiner: 1 replica, has handles to WeightModel, WeightModel_1" in done.stdout


def test_app_without_a_graph(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text("from fastapi import FastAPI\napp = FastAPI()\n")
    done = check("plain:app", folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, "plain:app is an app without a graph\n")


def test_nothing_is_started(project: Path) -> None:
    assert check("broken:dag", folder=project).returncode == 0


WRONG = "Model.forward takes 1 argument (number), bound with 2 arguments"


@pytest.mark.parametrize(
    "target, said",
    [
        ("wrong:dag", WRONG),
        ("wrong:dag", "(bound at wrong.py:10)"),
        ("unservable:dag", "Model (bound at unservable.py:9) is an instance without __call__"),
        ("unservable:plain", "5 is no graph"),
        ("unservable:count", "count is a deployment, not a graph: pass count.bind(...)"),
        ("nowhere:dag", "there is no module 'nowhere'"),
        ("graphs.nowhere:dag", "there is no module 'graphs.nowhere'"),
        ("graphs:nothing", "graphs has no 'nothing'"),
        ("graphs.nothing", "graphs has no 'nothing'"),
        ("graphs", "write module:attr or module.attr"),
        ("graphs:", "write module:attr or module.attr"),
        (":dag", "write module:attr or module.attr"),
    ],
)
def test_errors(project: Path, target: str, said: str) -> None:
    done = check(target, folder=project)
    assert done.returncode == 1
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("target, said", [("wrong:dag", WRONG), ("nowhere:dag", "no module")])
def test_errors_of_run(project: Path, target: str, said: str) -> None:
    done = run(SCRIPT, "run", target, folder=project)
    assert done.returncode == 1
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_errors_go_to_stderr(project: Path) -> None:
    done = run(SCRIPT, "check", "graphs:nothing", folder=project)
    assert "has no 'nothing'" in done.stderr
    assert done.stdout == ""


def test_error_in_the_users_module(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text("import nothing_of_this_name\n")
    done = check("failing:dag", folder=tmp_path)
    assert done.returncode == 1
    assert "ModuleNotFoundError: No module named 'nothing_of_this_name'" in done.stderr
    assert 'failing.py", line 1' in done.stderr


@pytest.mark.parametrize("command", ["check", "run"])
def test_unknown_backend(project: Path, command: str) -> None:
    done = run(SCRIPT, command, "graphs:dag", "--backend", "abacus", folder=project)
    assert done.returncode == 1
    assert "abacus" in done.stdout + done.stderr
    assert "inprocess" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize("target", ["service:app", "graphs:graph"])
def test_unknown_backend_of_a_graph_in_the_module(project: Path, command: str, target: str) -> None:
    done = run(SCRIPT, command, target, "--backend", "abacus", folder=project)
    assert done.returncode == 1
    assert "SettingsError" in done.stdout + done.stderr
    assert "abacus" in done.stdout + done.stderr


def test_app_dir(project: Path, tmp_path: Path) -> None:
    assert check("graphs:dag", folder=tmp_path).returncode == 1
    for app_dir in (project, project.relative_to(tmp_path)):
        done = check("graphs:dag", "--app-dir", app_dir, folder=tmp_path)
        assert done.returncode == 0, done.stdout
        assert "Scale.run (project/graphs.py:28)" in done.stdout


@pytest.mark.parametrize(
    "options",
    [["--workers", "0"], ["--port", "many"], ["--port", "70000"], ["--no-such-option"]],
)
def test_wrong_options(project: Path, options: list[str]) -> None:
    done = run(SCRIPT, "run", "graphs:dag", *options, folder=project)
    assert done.returncode == 2
    assert options[0] in done.stderr
    assert "Traceback" not in done.stderr


def test_route_prefix_for_an_app(project: Path) -> None:
    done = run(SCRIPT, "run", "service:app", "--route-prefix", "/else", folder=project)
    assert done.returncode == 1
    assert "no --route-prefix" in done.stdout + done.stderr


@pytest.mark.parametrize("command", [[SCRIPT], [sys.executable, "-m", "fastapi_graph"]])
def test_help(command: list[object], tmp_path: Path) -> None:
    done = run(*command, "--help", folder=tmp_path)
    assert done.returncode == 0
    assert "Usage: fastapi-graph" in done.stdout
    assert "check" in done.stdout
    done = run(*command, "run", "--help", folder=tmp_path)
    for option in ("app-dir", "host", "port", "route-prefix", "workers", "reload", "backend"):
        assert f"--{option}" in done.stdout


WITHOUT = """
import importlib.abc, runpy, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {name!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
sys.argv = ["fastapi-graph", "check", "graphs:dag"]
runpy.run_module("fastapi_graph", run_name="__main__")
"""


@pytest.mark.parametrize("name", ["typer", "rich", "uvicorn"])
def test_missing_extra(project: Path, name: str) -> None:
    done = run(sys.executable, "-W", "error", "-c", WITHOUT.format(name=name), folder=project)
    assert done.returncode == 1
    assert done.stderr == f"The command line needs {name}: pip install 'fastapi-graph[cli]'\n"


def test_no_warning(start: Start, project: Path) -> None:
    program = start("-m", "fastapi_graph", "check", "graphs:dag", folder=project)
    assert program.wait() == 0, program.output
