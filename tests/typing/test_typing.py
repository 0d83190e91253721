"""The typing contract, as users' own type checkers see it.

`cases/*.py` must be accepted without an error by mypy (strict) and by pyright. In `errors/*.py`
each of them must report exactly the lines marked `# error`; `# error: mypy` and
`# error: pyright` mark a line that only that one reports.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CHECKERS = ("mypy", "pyright")
MARK = re.compile(r"#\s*error(?::\s*(?P<only>mypy|pyright))?\b")

# (file name, line) -> messages
Report = dict[tuple[str, int], list[str]]
Check = Callable[[str, Path], Report]

# A first run without a cache reads FastAPI, pydantic and numpy.
pytestmark = pytest.mark.timeout(300)


def files(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.glob("*.py"))]


def add(report: Report, file: str, line: int, message: str) -> None:
    report.setdefault((Path(file).name, line), []).append(message)


def run_mypy(folder: Path, cache: Path) -> Report:
    # Without this project's configuration, and away from its source tree: as for a user.
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", f"--config-file={os.devnull}"),
            *(f"--cache-dir={cache}", "--output=json", "--no-error-summary", *files(folder)),
        ],
        cwd=cache,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    report: Report = {}
    for item in map(json.loads, done.stdout.splitlines()):
        if item["severity"] == "error":
            add(report, item["file"], item["line"], item["message"])
    return report


def run_pyright(folder: Path, cache: Path) -> Report:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pyright", "--outputjson"),
            *(f"--pythonpath={sys.executable}", *files(folder)),
        ],
        cwd=cache,
        env=os.environ | {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    report: Report = {}
    for item in json.loads(done.stdout)["generalDiagnostics"]:
        if item["severity"] == "error":
            add(report, item["file"], item["range"]["start"]["line"] + 1, item["message"])
    return report


@pytest.fixture
def check(pytestconfig: pytest.Config) -> Check:
    assert pytestconfig.cache is not None
    cache = pytestconfig.cache.mkdir("typing")

    def run(checker: str, folder: Path) -> Report:
        assert files(folder), f"no files in {folder}"
        return {"mypy": run_mypy, "pyright": run_pyright}[checker](folder, cache)

    return run


def marked_lines(folder: Path, checker: str) -> set[tuple[str, int]]:
    return {
        (path.name, number)
        for path in folder.glob("*.py")
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if (mark := MARK.search(line)) and mark["only"] in (None, checker)
    }


def describe(report: Report) -> str:
    return "\n".join(
        f"{file}:{line}: {message}"
        for (file, line), messages in sorted(report.items())
        for message in messages
    )


@pytest.mark.parametrize("checker", CHECKERS)
def test_cases_have_no_errors(checker: str, check: Check) -> None:
    report = check(checker, HERE / "cases")
    assert not report, describe(report)


@pytest.mark.parametrize("checker", CHECKERS)
def test_marked_errors_are_reported_and_no_others(checker: str, check: Check) -> None:
    report = check(checker, HERE / "errors")
    marked = marked_lines(HERE / "errors", checker)
    missed = sorted(marked - report.keys())
    unmarked = {place: text for place, text in report.items() if place not in marked}
    assert not missed, f"{checker} reports nothing at {missed}"
    assert not unmarked, describe(unmarked)
